"""Tests that share something costly run in one process."""

from __future__ import annotations

import os

import pytest


@pytest.mark.xdist_group("together")
def test_groups_reach_the_scheduler(request):
    """pytest-xdist tells its scheduler of groups by the names of tests."""
    assert "PYTEST_XDIST_WORKER" not in os.environ or request.node.nodeid.endswith("@together")


def test_those_of_a_file_are_a_group(request):
    """Unless they are of another: they share what fixtures of their file make."""
    assert "PYTEST_XDIST_WORKER" not in os.environ or request.node.nodeid.endswith("@test_processes")
