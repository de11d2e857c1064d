"""Is a published store still what was published?"""

from __future__ import annotations

from collections import defaultdict
from pathlib import Path

from segfleet.core.errors import InputError, Problem
from segfleet.core.files import file_facts
from segfleet.preprocess.stores.base import open_store
from segfleet.preprocess.stores.case_entry import RESTORE
from segfleet.preprocess.stores.content import content_sha256
from segfleet.preprocess.stores.manifest import NAME, CaseEntry


def verify(root: str | Path, *, chunks: bool = False, quick: bool = False) -> list[Problem]:
    """Compare size and sha256 of every file with the manifest; with `chunks` also decode every
    chunk and compare each case's content. `quick`: hash only files that changed after the manifest
    was written.

    One problem per damaged file or case, in the order of the manifest; none: the store is whole.
    Raises InputError without a manifest.
    """
    store = open_store(root)
    manifest = store.manifest
    written = (store.root / NAME).stat().st_mtime_ns
    ids = defaultdict(list)
    for case in manifest.cases:
        ids[store.path(case).relative_to(store.root)].append(case.id)
    problems = [
        problem
        for path, expected in manifest.files.items()
        if not (quick and _untouched(store.root, path, expected, written))
        and (problem := _file(store.root, path, expected, ids))
    ]
    if chunks:
        problems += [problem for case in manifest.cases if (problem := _content(store, case))]
    store.close()
    return problems


def _untouched(root: Path, path: str, expected: dict, written: int) -> bool:
    try:
        status = (root / path).stat()
    except OSError:
        return False
    return status.st_size == expected["bytes"] and status.st_mtime_ns <= written


def _file(root: Path, path: str, expected: dict, ids: dict[Path, list[str]]) -> Problem | None:
    try:
        now = file_facts(root / path)
    except OSError as error:
        now = {"bytes": error.strerror, "sha256": ""}
    if now == expected:
        return None
    what = "bytes" if now["bytes"] != expected["bytes"] else "sha256"
    return Problem(
        case=_cases(ids, Path(path)),
        field=path,
        found=f"{now[what]}",
        expected=f"{what} {expected[what]}",
        mend=RESTORE,
    )


def _cases(ids: dict[Path, list[str]], path: Path) -> str:
    """The cases that lie in a file, the first three by name."""
    names = next((ids[place] for place in (path, *path.parents) if place in ids), ["store"])
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def _content(store, case: CaseEntry) -> Problem | None:
    try:
        sha256 = content_sha256(*store.stored(case))
        if case.has_truth:
            store.truth(case)
    except InputError as error:
        return Problem(
            case=case.id,
            field=case.shard,
            found=str(error),
            expected="checksums that match",
            mend=RESTORE,
        )
    if case.sha256 in ("", sha256):
        return None
    return Problem(
        case=case.id,
        field=case.shard,
        found=f"content {sha256}",
        expected=f"content {case.sha256}",
        mend=RESTORE,
    )
