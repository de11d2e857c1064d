"""A member's share of a store in the making, when several processes on several nodes work at one.

All members first look at their cases; when all facts are there, each makes its shards. What a
member leaves undone, `build` does, which alone publishes and alone reports problems: its result is
the same whoever did what.
"""

from __future__ import annotations

from segfleet.core.parallel import run
from segfleet.preprocess.building.build import (
    Progress,
    attempt,
    failure,
    no_progress,
    open_raw,
    weight_of,
)
from segfleet.preprocess.building.journal import Journals
from segfleet.preprocess.building.lock import locked
from segfleet.preprocess.building.request import BuildRequest
from segfleet.preprocess.building.shard_job import finished, shard_jobs
from segfleet.preprocess.checking.check import look_at, recall, survey
from segfleet.preprocess.planning.fingerprint import fingerprint
from segfleet.preprocess.planning.plan import make_plan
from segfleet.preprocess.stores.manifest import is_published


def survey_share(
    request: BuildRequest, share: tuple[int, int], progress: Progress = no_progress
) -> int:
    """Check and measure every n-th case from the i-th on, `share` = (i, n); how many are known
    afterwards. Raises InputError."""
    reader, partial = open_raw(request), request.partial
    if is_published(request.out):
        return 0
    with locked(partial, request.out, shared=True):
        journals, cases = Journals(reader, partial), range(share[0], len(reader.refs()), share[1])
        with journals.append() as keep:
            earlier = journals.read()
            surveyed = look_at(
                reader,
                cases,
                workers=request.workers,
                progress=lambda *at: progress("check", *at),
                known=earlier,
                keep=keep,
            )
    return len(surveyed)


def write_share(
    request: BuildRequest, share: tuple[int, int], progress: Progress = no_progress
) -> int:
    """Make every n-th shard from the i-th on; how many of them are finished afterwards.

    0 where cases were not surveyed or have problems: looking at them is not repeated here, and
    `build` reports. A shard that fails does not keep the others from being made; all such errors
    are raised at the end, a full disk at once. Raises InputError.
    """
    reader, partial = open_raw(request), request.partial
    if is_published(request.out):
        return 0
    with locked(partial, request.out, shared=True):
        earlier = Journals(reader, partial).read()
        if recall(reader, range(len(reader.refs())), earlier)[1]:
            return 0
        surveyed = survey(reader, known=earlier)
        if surveyed.problems:
            return 0
        measured = fingerprint(surveyed.dataset, surveyed.facts, request.split_seed)
        plan = make_plan(surveyed.dataset, measured, overrides=request.overrides)
        share_jobs = shard_jobs(reader, surveyed, plan, request)[share[0] :: share[1]]
        todo = [job for job in share_jobs if finished(job) is None]
        done, failed = len(share_jobs) - len(todo), []
        progress("write", done, len(share_jobs))
        names = [f"{job.refs[0].id} ..." for job in todo]
        for at, outcome in run(
            attempt,
            todo,
            weights=[weight_of(job) for job in todo],
            names=names,
            workers=request.workers,
        ):
            failed += [(todo[at], outcome)] if isinstance(outcome, Exception) else []
            done += not isinstance(outcome, Exception)
            progress("write", done, len(share_jobs))
    if failed:
        raise failure(failed)
    return done
