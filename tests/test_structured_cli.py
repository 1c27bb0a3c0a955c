"""``quantspec generate`` with a structure, and what of it is refused before weights are read."""

from __future__ import annotations

import json

import pytest
from cli_errors import assert_error
from doc_blocks import stand_in_tokenizer
from tiny_models import tiny_model


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A saved random llama whose tokenizer has one token per byte."""
    path = tmp_path_factory.mktemp("model")
    tokenizer = stand_in_tokenizer()
    ids = {name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    tiny_model("llama", vocab_size=len(tokenizer), **ids).save_pretrained(path)
    tokenizer.save_pretrained(path)
    return path


@pytest.mark.parametrize("name", ["json-schema", "regex", "grammar"])
def test_text_follows_what_is_given(run, folder, tmp_path, name):
    source = {
        "json-schema": json.dumps({"enum": ["ja", "nein"]}),
        "regex": "ja|nein",
        "grammar": 'start: "ja" | "nein"',
    }
    given = source[name]
    if name != "regex":
        given = tmp_path / "structure.txt"
        given.write_text(source[name])
    status, out, err = run("generate", folder, "Well?", f"--{name}", given, "--max-new-tokens", 12, "--no-self-check")
    assert (status, err) == (0, "")
    assert out.strip().strip('"') in ("ja", "nein")


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        (["--json-schema", "nowhere.json"], ["cannot read the JSON schema from 'nowhere.json': No such file"]),
        (["--json-schema", "bad.txt"], ["json_schema is no JSON"]),
        (["--grammar", "bad.txt"], ["grammar cannot be used"]),
        (["--regex", "(a"], ["regex cannot be used", "unclosed group"]),
        (["--regex", "a", "--grammar", "bad.txt"], ["regex and grammar are different structures"]),
    ],
    ids=str,
)
def test_bad_structures_are_refused_before_loading(run, folder, tmp_path, monkeypatch, arguments, parts):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "bad.txt").write_text("nothing")
    monkeypatch.setattr("quantspec.cli.loading.load_model", lambda *_: pytest.fail("weights were loaded"))
    assert_error(run("generate", folder, "Hi", *arguments), *parts)
