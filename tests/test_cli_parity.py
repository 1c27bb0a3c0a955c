"""``quantspec parity`` hands its arguments on and ends with the report's status."""

import pytest

from quantspec.cli import main
from quantspec.evals import parity


@pytest.mark.parametrize("status", [0, 1, 2])
def test_arguments_and_status_are_handed_on(monkeypatch, status):
    seen = []
    monkeypatch.setattr(parity, "main", lambda arguments: seen.append(arguments) or status)
    assert main(["parity", "MODEL", "--tasks", "reference_choice", "--limit", "3"]) == status
    assert seen == [["MODEL", "--tasks", "reference_choice", "--limit", "3"]]


def test_wrong_option_is_status_2(capsys):
    assert main(["parity", "MODEL", "--no-such-option"]) == 2
    assert "--no-such-option" in capsys.readouterr().err
