"""Options that the environment or quantspec.toml sets, under their own names."""

from __future__ import annotations

import pytest
from cli_errors import assert_error

from quantspec.cli import bench


@pytest.fixture
def seen(run, tmp_path, monkeypatch):
    """``seen(*arguments)``: the contexts and the rest that `bench` is called with, or the result of its error."""
    monkeypatch.chdir(tmp_path)
    found = []
    monkeypatch.setattr(bench, "_lengths", lambda contexts, model: found.append((contexts, model)) or ())
    monkeypatch.setattr(bench, "_check_decode", lambda *_: None)
    monkeypatch.setattr(bench, "_bench_generate", lambda lengths, full, _: found.append(full) or ({}, ""))
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)

    def call(*arguments: str):
        found.clear()
        result = run("bench", *arguments)
        return tuple(found) if result[0] == 0 else result

    return call


def write(text: str) -> None:
    with open("quantspec.toml", "w") as file:
        file.write(text)


def test_without_either_nothing_is_set(seen):
    assert seen() == ((None, "smollm2"), False)


def test_environment(seen, monkeypatch):
    monkeypatch.setenv("QUANTSPEC_CONTEXTS", "4k")
    monkeypatch.setenv("QUANTSPEC_FULL", "1")
    assert seen() == (("4k", "smollm2"), True)
    assert seen("--contexts", "2k") == (("2k", "smollm2"), True)
    monkeypatch.setenv("QUANTSPEC_FULL", "perhaps")
    assert_error(seen(), "--full", "it comes from the environment")


def test_file(seen, monkeypatch, tmp_path):
    write('contexts = "2k"\nmax-new-tokens = "1k"\ndtype = "float32"\n[bench]\nfull = true\n')
    assert seen() == (("2k", "smollm2"), True)
    monkeypatch.setenv("QUANTSPEC_CONTEXTS", "4k")
    assert seen()[0] == ("4k", "smollm2")
    monkeypatch.delenv("QUANTSPEC_CONTEXTS")
    (tmp_path / "other.toml").write_text("contexts = 8192\n")
    monkeypatch.setenv("QUANTSPEC_CONFIG", "other.toml")
    assert seen() == (("8192", "smollm2"), False)


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("contexts = ", ["cannot read 'quantspec.toml'", "TOML"]),
        ("context = 3", []),
        ("conexts = 3", ["'quantspec.toml': no command has an option 'conexts'"]),
        ("[bench]\ngamma = 3", ["`bench` has no option 'gamma'"]),
        ("[bank]\ngamma = 3", ["there is no command 'bank'", "bench"]),
        ("trust-remote-code = true", ["cannot be set in a file", "--trust-remote-code"]),
        ('[bench]\nmodel = "gpt"', ["--model", "it comes from quantspec.toml"]),
    ],
    ids=str,
)
def test_what_a_file_may_say(seen, text, parts):
    write(text)
    if parts:
        assert_error(seen(), *parts)
    else:
        assert seen() == ((None, "smollm2"), False)


def test_a_file_that_is_not_there(seen, monkeypatch):
    monkeypatch.setenv("QUANTSPEC_CONFIG", "none.toml")
    assert_error(seen(), "QUANTSPEC_CONFIG names 'none.toml', which is not there")


def test_help_is_given_whatever_the_file_says(run, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write("contexts = ")
    assert run("bench", "--help")[0] == 0


@pytest.mark.parametrize(
    ("name", "value", "option", "count"),
    [("gamma", "6", "num_speculative_tokens", 6), ("max-new-tokens", "1k", "max_new_tokens", 1024)],
)
def test_numbers_are_read_as_on_the_command_line(run, tmp_path, monkeypatch, name, value, option, count):
    """Every other option too: by the same parsers, wherever it comes from."""
    monkeypatch.chdir(tmp_path)
    given = {}

    def find(model, run_options, **others):
        given.update({**vars(model), **others["generation"]})
        raise ValueError("far enough")

    monkeypatch.setattr("quantspec.cli.generate.find_pair", find)
    write(f'[generate]\n{name} = "{value}"\n')
    run("generate", "MODEL", "Hi")
    assert given[option] == count
    write("")
    monkeypatch.setenv(f"QUANTSPEC_{name.replace('-', '_').upper()}", value)
    given.clear()
    run("generate", "MODEL", "Hi")
    assert given[option] == count


def test_a_stop_string_is_taken_as_it_stands(run, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    given = []

    def find(model, run_options, **others):
        given.append(others["generation"].get("stop_strings"))
        raise ValueError("far enough")

    monkeypatch.setattr("quantspec.cli.generate.find_pair", find)
    write('[generate]\nstop = "a b"\n')
    run("generate", "MODEL", "Hi")
    write('[generate]\nstop = ["a", "b c"]\n')
    run("generate", "MODEL", "Hi")
    for text in ("zz A", "\n"):
        monkeypatch.setenv("QUANTSPEC_STOP", text)
        run("generate", "MODEL", "Hi")
    assert given == [["a b"], ["a", "b c"], ["zz A"], ["\n"]]
