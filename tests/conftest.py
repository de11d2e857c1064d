"""What all tests share."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="session")
def shared_data():
    """`shared_data("Task04_Hippocampus")` is the folder of a real data set, or the test is skipped and says so."""

    def find(name: str) -> Path:
        folder = Path(os.environ.get("SEGFLEET_TEST_DATA", ROOT.parent / "shared" / "data")) / name
        if not folder.is_dir():
            pytest.skip(f"real data set {name} is not beside the repository")
        return folder

    return find
