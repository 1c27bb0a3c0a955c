"""Handing a pair over: with its tokenizer and a card, through the Hub, and with commands that work where it is used."""

from __future__ import annotations

import fnmatch
import json
import shutil
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import pytest
from huggingface_hub.errors import LocalTokenNotFoundError
from tiny_models import tiny_model
from transformers import AutoTokenizer

import quantspec
from quantspec.checkpoint import hub
from quantspec.errors import SavedModelError
from quantspec.versions import install_command

REVISION = "1" * 40


@pytest.fixture(scope="module")
def pair():
    """A converted tiny llama of the Hub, which has generated."""
    model = tiny_model("llama")
    model.config._name_or_path = "owner/original"
    qs = quantspec.convert(model, kv_group_size=16, weight_group_size=64, self_check=False)
    qs.generate(model.dummy_inputs["input_ids"], max_new_tokens=12, do_sample=False, eos_token_id=None)
    return qs


def test_tokenizer_and_card_are_saved_with_the_pair(pair, tokenizer, tmp_path):
    folder = tmp_path / "mine"
    pair.save_pretrained(folder, tokenizer=tokenizer, parity="# Parity\n\nall passed")
    assert AutoTokenizer.from_pretrained(folder)("Hello").input_ids == tokenizer("Hello").input_ids
    card = (folder / "README.md").read_text()
    stats = pair.last_stats
    for part in (
        "base_model: owner/original",
        "# mine\n",
        "LlamaForCausalLM in float32",
        "| `kv_group_size` | 16 |",
        "INT4 in groups of 64",
        "1 in full precision (language-model head",
        f"of {stats.drafted} drafts {stats.draft_acceptance_rate:.1%} were accepted",
        "### Parity\n\nall passed",
        f"quantspec {quantspec.__version__}, torch",
        "AutoTokenizer.from_pretrained(FOLDER)",
    ):
        assert part in card
    # It loads, and the card and the tokenizer may be edited.
    (folder / "README.md").write_text("mine")
    quantspec.from_pretrained(folder, self_check=False)
    pair.save_pretrained(folder)
    assert (folder / "README.md").read_text() == "mine"
    assert (folder / "tokenizer.json").is_file()


def test_a_card_says_what_was_not_measured_and_is_made_anew(tmp_path):
    qs = quantspec.convert(tiny_model("llama"), kv_group_size=16, self_check=False)
    qs.save_pretrained(tmp_path)
    card = (tmp_path / "README.md").read_text()
    assert "Acceptance was not measured: nothing was drafted" in card
    assert "Parity was not measured: `quantspec parity FOLDER`" in card
    assert "base_model" not in card
    assert "AutoTokenizer" not in card
    qs.save_pretrained(tmp_path, parity="## all passed")
    assert "#### all passed" in (tmp_path / "README.md").read_text()


class LocalHub:
    """The Hub's calls, on local folders."""

    root: Path

    def __init__(self, token: object = None) -> None:
        self.token = token

    def whoami(self) -> dict[str, str]:
        return {"name": "owner"}

    def create_repo(self, repo_id: str, *, private: bool | None, exist_ok: bool) -> SimpleNamespace:
        (self.root / repo_id).mkdir(parents=True, exist_ok=exist_ok)
        return SimpleNamespace(repo_id=repo_id)

    def upload_folder(self, *, repo_id, folder_path, revision, commit_message, delete_patterns) -> None:
        assert revision is None
        assert commit_message
        repository = self.root / repo_id
        for path in list(repository.iterdir()):
            if any(fnmatch.fnmatch(path.name, pattern) for pattern in delete_patterns):
                path.unlink()
        shutil.copytree(folder_path, repository, dirs_exist_ok=True)


@pytest.fixture
def local_hub(tmp_path, monkeypatch):
    LocalHub.root = tmp_path / "hub"
    monkeypatch.setattr(hub, "HfApi", LocalHub)
    monkeypatch.setattr(hub, "snapshot_download", lambda name, **_: str(LocalHub.root / name))
    return LocalHub.root


def test_pushed_and_loaded_by_its_id(pair, tokenizer, local_hub):
    pair.push_to_hub("owner/pair", tokenizer=tokenizer, max_shard_size="50KB")
    repository = local_hub / "owner" / "pair"
    assert "# pair\n" in (repository / "README.md").read_text()
    assert (repository / "tokenizer.json").is_file()
    shards = set(repository.glob("model-*.safetensors"))
    assert len(shards) > 1
    loaded = quantspec.from_pretrained("owner/pair", self_check=False)
    ids = pair.model.dummy_inputs["input_ids"]
    options = {"max_new_tokens": 8, "do_sample": False}
    assert loaded.generate(ids, **options).equal(pair.generate(ids, **options))
    # What the earlier pair had in other files would be taken for damage.
    pair.push_to_hub("owner/pair")
    assert not shards & set(repository.iterdir())
    quantspec.from_pretrained("owner/pair", self_check=False)


def test_a_hub_that_cannot_be_reached_is_told_before_anything_is_saved(pair, monkeypatch):
    class TransportError(Exception):
        """As of the library that the Hub's client asks with."""

    class ConnectError(TransportError):
        pass

    monkeypatch.setattr(type(pair), "save_pretrained", lambda *_, **__: pytest.fail("saved first"))
    whoami = mock.Mock(side_effect=ConnectError("Name or service not known"))
    monkeypatch.setattr(hub.HfApi, "whoami", whoami)
    with pytest.raises(ConnectionError, match=r"'owner/pair' cannot be uploaded, .* not known. Check the network"):
        pair.push_to_hub("owner/pair")
    whoami.side_effect = LocalTokenNotFoundError("log in")
    with pytest.raises(LocalTokenNotFoundError, match="log in"):
        pair.push_to_hub("owner/pair")


@pytest.fixture
def cached(pair, tokenizer, tmp_path, monkeypatch):
    """A pair in the Hub's own download cache, and no network."""
    repository = tmp_path / "cache" / "models--owner--pair"
    pair.save_pretrained(repository / "snapshots" / REVISION, tokenizer=tokenizer)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(REVISION)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)


def test_a_pair_of_the_hub_in_python_and_on_the_command_line(run, cached):
    assert quantspec.from_pretrained("owner/pair", revision="main", self_check=False).config.kv_group_size == 16
    status, out, err = run("generate", "owner/pair", "Hello", "--max-new-tokens", 4, "--no-self-check", "--json")
    assert (status, err) == (0, "")
    assert json.loads(out)["generated_tokens"] == 4
    assert "quantspec" in run("inspect", "owner/pair")[1]


def test_what_is_on_no_hub(cached, tmp_path):
    with pytest.raises(SavedModelError, match="'owner/other' is no folder here, and cannot be fetched from the Hub: "):
        quantspec.from_pretrained("owner/other")
    for name in ("nowhere", tmp_path / "nowhere", "./owner/pair", "a/b/c"):
        with pytest.raises(SavedModelError, match=r"is no folder; pass a local one .* or a Hub id as OWNER/NAME"):
            quantspec.from_pretrained(name)
    with pytest.raises(ValueError, match="revision is of a pair on the Hub"):
        quantspec.from_pretrained(tmp_path, revision="main")


@pytest.mark.parametrize(
    ("origin", "command"),
    [
        (None, "pip install 'quantspec[eval]'"),
        ({"url": "file:///home/me/my%20code", "dir_info": {}}, "pip install '/home/me/my code[eval]'"),
        ({"url": "file:///code", "dir_info": {"editable": True}}, "pip install -e '/code[eval]'"),
        (
            {"url": "file:///q.whl", "archive_info": {}},
            "pip install 'quantspec[eval] @ file:///q.whl'",
        ),
    ],
)
def test_extras_are_installed_from_where_quantspec_came_from(monkeypatch, origin, command):
    """A checkout's are on no index."""
    text = None if origin is None else json.dumps(origin)
    monkeypatch.setattr("importlib.metadata.distribution", lambda name: SimpleNamespace(read_text=lambda name: text))
    assert install_command("eval") == command
