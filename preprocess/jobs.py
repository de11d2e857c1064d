"""What preprocessing can be asked to do, as plain JSON. Launchers carry the job; one process does
it.

{"do": "preprocess", "store": {...}, "verify": false}   a whole store, or what is missing of it
{"do": "survey", "store": {...}, "share": [i, n]}       a member's share of the first look at the raw files
{"do": "write", "store": {...}, "share": [i, n]}        a member's share of the shards
"store" holds the arguments of `build`; "overrides" those of `Overrides`.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from segfleet.core.errors import DataError, Problem
from segfleet.preprocess.building.build import Progress, build
from segfleet.preprocess.building.shard_job import STATE
from segfleet.preprocess.building.share import survey_share, write_share
from segfleet.preprocess.planning.patients import Grouping
from segfleet.preprocess.planning.plan import Overrides
from segfleet.preprocess.stores.verify import verify

JOBS = ("preprocess", "survey", "write")


def run_job(job: dict[str, Any], progress: Progress) -> None:
    """Do a job and say on stdout what came out. Raises InputError or a fault."""
    store = {**job["store"], "overrides": overrides_of(job["store"])}
    if job["do"] == "survey":
        known = {key: store[key] for key in ("reader_name", "raw", "out", "workers", "options")}
        count = survey_share(**known, share=tuple(job["share"]), progress=progress)
        say(f"{count} case(s) looked at")
    elif job["do"] == "write":
        count = write_share(**store, share=tuple(job["share"]), progress=progress)
        say(
            f"{count} shard(s) finished"
            if count
            else "nothing to write here: the last job does what is missing and reports"
        )
    else:
        manifest = build(**store, progress=progress, say=_tell)
        if job.get("verify") and (problems := verify(store["out"], chunks=True)):
            raise DataError(str(store["out"]), problems)
        say(
            f"{store['out']}: {len(manifest.cases)} cases, id "
            f"{manifest.id}{', verified' if job.get('verify') else ''}"
        )


def _tell(grouping: Grouping, warnings: Sequence[Problem]) -> None:
    say(f"patients: {grouping.rule} ({grouping.evidence})")
    for warning in [w for w in warnings if w.case == "all"]:
        say(f"warning: {warning.field}: {warning.found}. {warning.mend}")
    if several := sum(warning.case != "all" for warning in warnings):
        say(f"{several} warning(s) of single cases: `segfleet datasets NAME check RAW` lists them")


def overrides_of(store: dict[str, Any]) -> Overrides:
    return Overrides(
        **{
            name: tuple(value) if isinstance(value, list | tuple) and value else value or None
            for name, value in (store.get("overrides") or {}).items()
        }
    )


def progress_of(job: dict[str, Any]) -> int:
    """A number that grows as long as a job gets anywhere."""
    out = Path(job["store"]["out"])
    state = out.with_name(out.name + ".partial") / STATE
    facts = sum(path.stat().st_size for path in state.glob("survey-*.jsonl"))
    return facts + len(list((state / "done").glob("*.json")))


def say(text: str) -> None:
    sys.stdout.write(text + "\n")
    sys.stdout.flush()
