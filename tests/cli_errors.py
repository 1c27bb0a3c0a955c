"""What an error of the command line looks like."""

from __future__ import annotations


def assert_error(result: tuple[int, str, str], *parts: str) -> None:
    """Exit status 2, nothing on stdout, and one line with a hint on stderr that holds ``parts``."""
    status, out, err = result
    assert (status, out) == (2, "")
    assert err.count("\n") == 1
    assert err.startswith("error: ")
    assert err.rstrip().endswith(")")
    for part in parts:
        assert part in err
