"""Facts of sound cases that a failed check leaves for the next one, so that after mending 1 of 400
files the other 399 are not opened again.

They lie in the user's cache folder ($XDG_CACHE_HOME or ~/.cache), readable by the user alone: a
failed check leaves nothing beside the data. A check that passes removes them.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Sequence
from pathlib import Path

from segfleet.core.files import write_atomically
from segfleet.preprocess.building.journal import cases_in
from segfleet.preprocess.building.shard_job import REVISION
from segfleet.preprocess.checking.check import Survey
from segfleet.preprocess.planning.fingerprint import CaseFacts
from segfleet.preprocess.readers.base import RawReader


def cached_cases(reader: RawReader) -> list[CaseFacts]:
    """Facts that the last failed check of this raw folder kept."""
    path = _place(reader)
    try:
        return list(cases_in(path)) if path else []
    except OSError:
        return []


def settle(reader: RawReader, surveyed: Survey) -> None:
    """Keep the facts of sound cases if any other has a problem; forget them if none has. A cache
    that cannot be written is none."""
    path = _place(reader)
    if path is None:
        return
    try:
        if surveyed.problems and (sound := [case for case in surveyed.facts if not case.problems]):
            path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            write_atomically(path, _lines(sound))
            path.chmod(0o600)
        else:
            path.unlink(missing_ok=True)
    except OSError:
        return


def _lines(cases: Sequence[CaseFacts]) -> str:
    return "".join(case.model_dump_json() + "\n" for case in cases)


def _place(reader: RawReader) -> Path | None:
    """One file per raw folder, layout, options and description of the data set."""
    home = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    if not os.path.isabs(home):
        return None
    layout = [type(reader).__module__, reader.chosen, reader.dataset().model_dump(mode="json")]
    described = json.dumps([REVISION, str(reader.root.resolve()), layout, len(reader.refs())])
    return (
        Path(home)
        / "segfleet/facts"
        / f"{hashlib.sha256(described.encode()).hexdigest()[:24]}.jsonl"
    )
