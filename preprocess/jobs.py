"""The jobs of preprocessing, done: each by one process without torch."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from segfleet.core.errors import DataError, Problem
from segfleet.preprocess.building.build import Progress, build
from segfleet.preprocess.building.request import Preprocess, Survey, Write
from segfleet.preprocess.building.shard_job import STATE
from segfleet.preprocess.building.share import survey_share, write_share
from segfleet.preprocess.planning.patients import Grouping
from segfleet.preprocess.stores.verify import verify


def run_job(job: Preprocess | Survey | Write, progress: Progress) -> None:
    """Do a job and say on stdout what came out. Raises InputError or a fault."""
    if isinstance(job, Survey):
        count = survey_share(job.store, job.share, progress)
        print_line(f"{count} case(s) looked at")
    elif isinstance(job, Write):
        count = write_share(job.store, job.share, progress)
        print_line(
            f"{count} shard(s) finished"
            if count
            else "nothing to write here: the last job does what is missing and reports"
        )
    else:
        manifest, out = (
            build(job.store, progress=progress, report=_print_warnings),
            job.store.out,
        )
        if job.verify and (problems := verify(out, chunks=True)):
            raise DataError(str(out), problems)
        verified = ", verified" if job.verify else ""
        print_line(f"{out}: {len(manifest.cases)} cases, id {manifest.id}{verified}")


def _print_warnings(grouping: Grouping, warnings: Sequence[Problem]) -> None:
    print_line(f"patients: {grouping.rule} ({grouping.evidence})")
    for warning in [w for w in warnings if w.case == "all"]:
        print_line(f"warning: {warning.field}: {warning.found}. {warning.mend}")
    if several := sum(warning.case != "all" for warning in warnings):
        print_line(
            f"{several} warning(s) of single cases: `segfleet datasets NAME check RAW` lists them"
        )


def progress_of(job: Preprocess | Survey | Write) -> int:
    """A number that grows as long as a job gets anywhere."""
    state = job.store.partial / STATE
    journaled = sum(path.stat().st_size for path in state.glob("survey-*.jsonl"))
    return journaled + len(list((state / "done").glob("*.json")))


def print_line(text: str) -> None:
    sys.stdout.write(text + "\n")
    sys.stdout.flush()
