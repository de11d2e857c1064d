"""What is kept of a submitted run, in its own folder, so that any later shell can attach. A store
or a folder of predictions is no run: what is kept of its jobs lies beside it, in OUT.jobs/slurm/,
and may be removed when they are over.

RUN/slurm/0001/            one submission; a later one of the same run is 0002
  job.json                 what every rank does
  submission.json          job id, resources, code version, where the logs are
  code.diff                what the code had that its commit had not
  <job>_<rank>_log.out     what the ranks print (members of an array: in RUNS/.arrays/<time>/)
  life-<job>.<restarts>/   one start of the job: where the ranks met, life.json,
                           failed-<rank>.json, ended.json
"""

from __future__ import annotations

import json
import os
import shutil
import sys
import time
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict

from segfleet.core.errors import InputError
from segfleet.core.files import absolute, read_json, write_atomically, write_json
from segfleet.core.job import Job
from segfleet.pipeline.launch.job import OF_A_STORE, Command, Predict, Train, parse_job
from segfleet.pipeline.run import StageFolder, find_run, open_run
from segfleet.slurm.jobspec import JobSpec

LIFE = "SEGFLEET_LIFE"


class RankResources(BaseModel):
    """What every rank must know of the job's resources."""

    model_config = ConfigDict(frozen=True)

    gpus_per_node: int
    lead: int  # seconds
    fruitless: int


class JobSettings(BaseModel):
    """What job.json holds beside the job."""

    model_config = ConfigDict(frozen=True)

    spec: RankResources
    before: tuple[str, ...] = ()  # folders of submissions that come first, made with this one
    sweep: Path | None = None  # whose node it trains


@dataclass(frozen=True, kw_only=True)
class Submission:
    """submission.json."""

    folder: str  # RUN/slurm/0001
    logs: str  # folder of logs and lives
    id: str  # SLURM's, 12_3 for a member of an array
    name: str
    launcher: str
    spec: dict[str, Any]
    time: float
    code: str | None  # folder of the frozen code; None: live
    commit: str | None

    def save(self) -> None:
        write_json(Path(self.folder) / "submission.json", asdict(self))

    def job(self) -> Job:
        """What every rank does: one of the kinds of launch/job.py. Raises InputError."""
        return read_job(Path(self.folder))[0]

    def settings(self) -> JobSettings:
        return read_job(Path(self.folder))[1]

    @property
    def lives(self) -> list[Path]:
        """Starts of the job, first to last."""
        return sorted(
            Path(self.logs).glob(f"life-{self.id}.*"),
            key=lambda path: int(path.name.rpartition(".")[2]),
        )

    def log(self, rank: int) -> Path:
        return Path(self.logs) / f"{self.id}_{rank}_log.out"

    def outcome(self) -> tuple[str | None, str | None]:
        """("done" | "failed" | "stopped" | None: not ended as far as its own files know, why) of
        the latest start."""
        if not self.lives:
            return None, None
        life = self.lives[-1]
        if (life / "ended.json").exists():
            return "done", None
        report = failure(life)
        return (
            (None, None)
            if report is None
            else ("stopped" if report["exit_code"] == 75 else "failed", report["message"])
        )


def submissions(run: Path) -> list[Submission]:
    """All submissions of a run, first to last. A copy of a run has none: the jobs are the
    original's."""
    loaded = (_load(path) for path in sorted((run / "slurm").glob("*/submission.json")))
    return [submission for submission in loaded if submission is not None]


def _load(path: Path) -> Submission | None:
    """A submission where it lies now: folders of runs are moved, and seen under other names. None:
    a copy, or damaged."""
    document = read_json(path)
    try:
        submission = Submission(**document) if document else None
    except TypeError:
        sys.stderr.write(f"segfleet: {path} is damaged and is left out\n")
        submission = None
    if submission is None:
        return None
    folder, then = path.parent.resolve(), Path(submission.folder)
    with suppress(OSError):
        if (then / path.name).exists():
            return submission if then.samefile(folder) else None

    def now(old: str) -> str:
        """The same way from the run's folder, which was one folder and is another one."""
        return os.path.normpath(folder.parents[1] / os.path.relpath(old, then.parents[1]))

    return replace(submission, folder=str(folder), logs=now(submission.logs))


def home_of(out: Path) -> Path:
    """Where the jobs are kept that make `out`, which is no run."""
    out = absolute(out)
    return out.with_name(out.name + ".jobs")


def find_home(text: str, root: Path) -> Path:
    """Where jobs are kept: a run folder, as `find_run` finds it below `root`, or what lies beside a
    store or a folder of predictions."""
    beside = home_of(Path(text))
    return beside if (beside / "slurm").is_dir() else find_run(text, root)


def together(run: Path) -> list[Submission]:
    """The latest submission and those it waits for, which were submitted with it. Raises InputError
    if there is none."""
    last = latest(run)
    before = last.settings().before
    return [
        submission for submission in submissions(run) if Path(submission.folder).name in before
    ] + [last]


def latest(run: Path) -> Submission:
    """Raises InputError if the run was never submitted."""
    if made := submissions(run):
        return made[-1]
    raise InputError(f"run: {run.name} was never submitted; `segfleet submit` does")


def new_folder(run: Path) -> Path:
    """The folder of the next submission, made. Two shells never get the same one."""
    for number in range(1, 10_000):
        folder = run / "slurm" / f"{number:04d}"
        try:
            folder.mkdir(parents=True)
            return folder
        except FileExistsError:
            continue
    raise InputError(
        f"run: {run} was submitted 9999 times; remove old folders under {run / 'slurm'}"
    )


def read_job(folder: Path) -> tuple[Job, JobSettings]:
    """What `write_job` left in a submission folder. Raises InputError."""
    if (document := read_json(folder / "job.json")) is None:
        raise InputError(f"submission: {folder / 'job.json'} is missing or damaged; submit again")
    # what is null is as if it were not there: earlier versions wrote stage_to for every kind of job
    present = {key: value for key, value in document.items() if value is not None}
    settings = {key: present.pop(key) for key in JobSettings.model_fields if key in present}
    return parse_job(present), JobSettings.model_validate(settings)


def write_job(home: Path, job: Job, spec: JobSpec, **settings: Any) -> Path:
    """A new submission folder that holds the frozen job; `settings`: further fields of
    JobSettings."""
    folder = new_folder(home)
    if isinstance(job, Train):  # its events are not watched: they are printed into its log
        job = job.model_copy(update={"stage_to": spec.stage_to, "lines": True})
    resources = RankResources(
        gpus_per_node=spec.gpus_per_node, lead=spec.lead, fruitless=spec.fruitless
    )
    document = {**job.document(), **JobSettings(spec=resources, **settings).model_dump(mode="json")}
    write_atomically(folder / "job.json", json.dumps(document, indent=1))
    return folder


def take_back(folders: list[Path], root: Path) -> None:
    """Remove new submission folders and the folders of runs that were made for them: nothing was
    submitted, so nothing must look like it."""
    for folder in folders:
        shutil.rmtree(folder, ignore_errors=True)
        slurm, home, *above = folder.parents
        with suppress(OSError):  # until one is not empty
            for path in (slurm, home, *(path for path in above if root in path.parents)):
                path.rmdir()


def record(
    folder: Path,
    *,
    id: str,
    name: str,
    launcher: str,
    spec: JobSpec,
    logs: Path,
    code: Path | None,
    commit: str | None,
) -> Submission:
    """Write down a submission that was accepted."""
    settings = spec.model_dump(mode="json")
    submission = Submission(
        folder=str(folder), logs=str(logs), id=id, name=name, launcher=launcher, spec=settings,
        time=time.time(),
        code=str(code) if code else None, commit=commit,
    )  # fmt: skip
    submission.save()
    return submission


def failure(life: Path) -> dict[str, Any] | None:
    """What went wrong first in a start: the report of the rank that failed by itself, else of one
    that lost its peer."""
    # by the clock of the disk they share: those of the nodes differ
    paths = sorted(life.glob("failed-*.json"), key=lambda path: path.stat().st_mtime_ns)
    reports = [report for report in map(read_json, paths) if report and "message" in report]
    own = [report for report in reports if not report["peer_failure"]]
    if own:
        return min(own, key=lambda report: report.get("joining", False))
    if not reports:
        return None
    first = reports[0]
    silent = (
        f"rank {first['rank']} lost its partner, which ended without a message (killed? out of "
        "memory? its node?)"
    )
    return {**first, "message": f"{silent}\n{first['message']}"}


def progress_of(job: Job) -> int:
    """A number that grows as long as a job gets anywhere: a training's steps, the images predicted,
    the cases preprocessed."""
    if isinstance(job, OF_A_STORE):
        from segfleet.preprocess import jobs

        return jobs.progress_of(job)
    if isinstance(job, Command):
        return 0
    if isinstance(job, Predict):
        return sum(1 for path in job.out.glob("[!.]*"))
    return steps_done(job.run)


def steps_done(run: Path) -> int:
    """Optimizer steps of all stages that are safe on disk."""
    _, folders = open_run(run)
    return sum(map(_steps_of, folders))


def _steps_of(stage: StageFolder) -> int:
    if done := stage.done():
        return int(done["checkpoint"].rpartition("-")[2])
    names = os.listdir(stage.checkpoints) if stage.checkpoints.is_dir() else []
    return max(
        (int(name.rpartition("-")[2]) for name in names if name.startswith("step-")), default=0
    )
