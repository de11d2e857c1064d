"""The facts of raw cases as they are found, on disk, so that no file is read twice. Every process
writes its own journal and reads all."""

from __future__ import annotations

import hashlib
import json
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from segfleet.preprocess.building.shard_job import REVISION, STATE
from segfleet.preprocess.planning.fingerprint import CaseFacts
from segfleet.preprocess.readers.base import RawReader


class Journals:
    """The journals of one raw data set in OUT.partial. Another description of the data set has
    other journals."""

    def __init__(self, reader: RawReader, partial: Path):
        described = json.dumps(
            [REVISION, reader.dataset().model_dump(mode="json"), len(reader.refs())]
        )
        self.folder, self.name = (
            partial / STATE,
            f"survey-{hashlib.sha256(described.encode()).hexdigest()[:12]}",
        )

    def read(self) -> list[CaseFacts]:
        """All facts that were written so far."""
        return [case for path in self._paths() for case in cases_in(path)]

    @contextmanager
    def append(self) -> Iterator[Callable[[CaseFacts], None]]:
        """`keep(facts)` writes into a new journal; one without facts does not stay."""
        path = self.folder / f"{self.name}-{uuid.uuid4().hex[:12]}.jsonl"
        with open(path, "a", encoding="utf-8") as file:

            def keep(case: CaseFacts) -> None:
                file.write(case.model_dump_json() + "\n")
                file.flush()

            try:
                yield keep
            finally:
                if not file.tell():
                    path.unlink()

    def remove(self) -> None:
        for path in self._paths():
            path.unlink()

    def _paths(self) -> list[Path]:
        return sorted(self.folder.glob(f"{self.name}-*.jsonl"))


def cases_in(path: Path) -> Iterator[CaseFacts]:
    """The facts in a journal, a line each. Raises OSError."""
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            yield CaseFacts.model_validate_json(line)
        except ValueError:
            continue  # the line a killed process was writing
