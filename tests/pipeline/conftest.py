"""What the tests of this room share."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def run_gang():
    """`run_gang("file.py:function", ranks, **arguments)`: see gang_runner.py."""
    spec = importlib.util.spec_from_file_location("gang_runner", Path(__file__).with_name("gang_runner.py"))
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.run_gang
