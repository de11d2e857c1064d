"""Jobs for SLURM, handed over by submitit. The only file that knows submitit.

submitit writes the sbatch script, submits it, and starts `run_rank` in every task. What it would do
later is not used, for it acts on rank 0 alone and remembers in pickles: the ranks agree on a stop
themselves, the script requeues, and what came out stands in files.
"""

from __future__ import annotations

import json
import os
import shlex
import shutil
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from segfleet.core.errors import ExitCode, InputError
from segfleet.core.files import absolute, write_json
from segfleet.core.job import Job
from segfleet.pipeline.launch.job import Train
from segfleet.pipeline.launch.local import AGAIN
from segfleet.pipeline.run import RECIPE
from segfleet.preprocess.building.request import Survey, Write
from segfleet.slurm import cluster, health, snapshot, submission
from segfleet.slurm.job import SlurmJob
from segfleet.slurm.jobspec import JobSpec
from segfleet.slurm.rank import run_rank

_environment = threading.Lock()
# $job is 12_3 for a member of an array: one of them has the number of the whole array as its own.
# --local: in a federation the cluster that submitted the job says nothing of a job that runs here.
SHOW = 'scontrol --local show job -o "$job"'
UNTIL = rf"""$({SHOW} | sed -n 's/.* EndTime=\([^ ]*\).*/\1/p')"""
END = f"""$(date -d "{UNTIL}" +%s 2>/dev/null || echo 0)"""
STATE = rf"""$({SHOW} | sed -n 's/.*JobState=\([A-Z_]*\).*/\1/p')"""

# SLURM's words for: not now. Whoever asks again later is served.
FULL = (
    "QOSMaxSubmit",
    "AssocMaxSubmit",
    "AssocGrpSubmit",
    "QOSGrpSubmit",
    "job submit limit",
    "MaxJobCount",
    "temporarily unavailable",
    "Resource temporarily",
    "Unable to contact",
    "Socket timed out",
)


class QueueFull(InputError):
    """SLURM takes no more jobs of this user for the moment."""


@dataclass(frozen=True, kw_only=True)
class SlurmLauncher:
    """`live`: run the code as it is when the job starts, not as it is now. `ask`: validate with the
    controller first."""

    live: bool = False
    ask: bool = True

    def submit(self, run: Path, recipe: dict[str, Any], root: Path, spec: JobSpec) -> SlurmJob:
        return self.submit_array([(run, recipe)], root, spec)[0]

    def submit_array(
        self, members: Sequence[tuple[Path, dict[str, Any]]], root: Path, spec: JobSpec
    ) -> list[SlurmJob]:
        """One training, or an array of several with the same resources. Raises InputError with
        SLURM's own words."""
        if self.ask:
            cluster.check(without_bad_nodes(spec, root))
        # it waits for a stage that another member of its array trains
        jobs = [
            (run, Train(run=run, recipe=recipe, root=root, waits=True)) for run, recipe in members
        ]
        return self.submit_jobs(
            jobs, root, spec, job_name([run for run, _ in members]), root / ".arrays"
        )

    def submit_jobs(
        self,
        jobs: Sequence[tuple[Path, Job]],
        root: Path,
        spec: JobSpec,
        name: str,
        logs: Path,
        **settings: Any,
    ) -> list[SlurmJob]:
        """One job, or an array of jobs with the same resources, each kept in its home; an array's
        logs go into a new folder in `logs`. `settings`: further fields of `submission.JobSettings`.

        The cluster is not asked before. Raises InputError with SLURM's own words.
        """
        code = None if self.live else snapshot.freeze_code(root)
        commit = snapshot.commit()
        folders = [submission.write_job(home, job, spec, **settings) for home, job in jobs]
        logs = (
            folders[0]
            if len(folders) == 1
            else logs / f"{time.strftime('%Y%m%d-%H%M%S')}-{os.getpid()}"
        )
        logs.mkdir(parents=True, exist_ok=True)
        try:
            accepted = self._hand_over(
                [str(folder) for folder in folders],
                Script(
                    logs=logs,
                    name=name,
                    spec=without_bad_nodes(spec, root),
                    code=code,
                    killed_returns=are_shares([job for _, job in jobs]),
                ),
            )
        except BaseException:
            submission.take_back([*folders, logs] if len(folders) > 1 else folders, root)
            raise
        submitted = []
        for folder, (home, requested), job in zip(folders, jobs, accepted, strict=True):
            if isinstance(requested, Train):  # `status` sees a new run from now on
                write_json(home / RECIPE, requested.recipe)
            if commit["diff"]:
                (folder / "code.diff").write_text(commit["diff"], encoding="utf-8")
            # The spec as it was asked for: a node that is bad today must not be left out of a later
            # `resume`.
            fields = {
                "id": job.job_id,
                "name": name,
                "launcher": "slurm",
                "spec": spec,
                "logs": logs,
                "code": code,
            }
            submitted.append(
                SlurmJob(home, submission.record(folder, commit=commit["commit"], **fields))
            )
        return submitted

    def _hand_over(self, folders: list[str], script: Script) -> list[Any]:
        """submitit's jobs, in as many arrays as the cluster's MaxArraySize asks for: all or
        none."""
        if shutil.which("sbatch") is None:
            raise InputError(
                "sbatch: not found; this machine has no SLURM. `segfleet train` runs here without "
                "one"
            )
        spec = script.spec
        most = cluster.most_of_an_array(spec.clusters) if len(folders) > 1 else 1
        parts = [folders[first : first + most] for first in range(0, len(folders), most)]
        if spec.throttle:
            throttle = max(1, spec.throttle // len(parts))
            script = replace(script, spec=spec.model_copy(update={"throttle": throttle}))
        accepted: list[Any] = []
        try:
            for part in parts:
                accepted += self._array(part, script)
        except BaseException:
            if accepted:
                with suppress(InputError):
                    ids = sorted({job.job_id.split("_")[0] for job in accepted})
                    cluster.call("scancel", *ids, of=spec.clusters)
            raise
        return accepted

    def _array(self, folders: list[str], script: Script) -> list[Any]:
        import submitit

        with cleaned_environment():
            chosen = executor(script)
            try:
                return (
                    [chosen.submit(run_rank, folders[0])]
                    if len(folders) == 1
                    else chosen.map_array(run_rank, folders)
                )
            except submitit.core.utils.FailedJobError as error:
                busy = any(sign in str(error) for sign in FULL)
                words = [line for line in str(error).splitlines() if "sbatch: error" in line] or [
                    str(error)
                ]
                raise (QueueFull if busy else InputError)(
                    "SLURM refused the job: "
                    + " ".join(line.partition("error: ")[2] or line for line in words)
                ) from None

    def script(
        self,
        run: Path,
        root: Path,
        spec: JobSpec,
        members: int = 1,
        name: str | None = None,
        killed_returns: bool = False,
    ) -> str:
        """The sbatch script that would be submitted."""
        spec = without_bad_nodes(spec, root)
        logs = run / "slurm" / "0001" if members == 1 else root / ".arrays" / "dry-run"
        code = None if self.live else root / ".code" / "frozen"
        with cleaned_environment():
            chosen = executor(
                Script(
                    logs=logs,
                    name=name or job_name([run] * members),
                    spec=spec,
                    code=code,
                    killed_returns=killed_returns,
                )
            )
            if members > 1:
                with suppress(InputError):  # where there is no SLURM
                    members = min(members, cluster.most_of_an_array(spec.clusters))
                chosen.parameters["map_count"] = members  # what map_array does
            return chosen._make_submission_file_text(chosen._submitit_command_str, "dry-run")


@dataclass(frozen=True, kw_only=True)
class Script:
    """What an sbatch script is written from. `killed_returns`: a job whose process was killed comes
    back by itself, as long as it gets anywhere."""

    logs: Path
    name: str
    spec: JobSpec
    code: Path | None
    killed_returns: bool = False


def are_shares(jobs: Sequence[Job]) -> bool:
    """Whether others wait for what each of these does of one whole: if one is killed, it comes back
    alone, lest all is left to the last job."""
    return all(isinstance(job, Survey | Write) for job in jobs)


def executor(script: Script) -> Any:
    """submitit's executor with everything a job needs."""
    from submitit.slurm.slurm import SlurmExecutor

    logs, name, spec, code = script.logs, script.name, script.spec, script.code

    class Executor(SlurmExecutor):
        @classmethod
        def affinity(cls) -> int:
            return 2  # a script can be written where there is no SLURM

    for path in (str(logs), str(absolute("."))):
        if not path.isprintable():
            raise InputError(
                f"submit: {path!a} has a line break or another sign that a script cannot hold in a "
                "path. Choose another folder."
            )
    submitter = Executor(folder=logs, python=python(spec))
    # sbatch would name the working folder without the links that lead to it
    further = {"requeue": True, "kill-on-invalid-dep": "yes", "chdir": str(absolute("."))}
    further |= {key: value for key in ("clusters", "reservation") if (value := getattr(spec, key))}
    if spec.memory:
        further["mem"] = spec.memory
    for option in spec.sbatch:
        key, equals, value = option[2:].partition("=")
        further[key] = value if equals else True
    ranks = ["--kill-on-bad-exit=1", "--wait=0", *spec.srun]
    if spec.cpus:
        # since 22.05 srun no longer takes it over from sbatch
        ranks.append(f"--cpus-per-task={spec.cpus}")
    options = {
        "job_name": name,
        "nodes": spec.nodes,
        "ntasks_per_node": spec.ranks_on_a_node,
        "cpus_per_task": spec.cpus,
        "gpus_per_node": (f"{spec.gpu_type}:" if spec.gpu_type else "") + str(spec.gpus_per_node)
        if spec.gpus_per_node
        else None,
        "time": spec.minutes,
        "signal_delay_s": spec.lead,
        "mail_user": spec.mail,
        "mail_type": spec.mail_on if spec.mail else None,
        "array_parallelism": spec.throttle or 256,
        "stderr_to_stdout": True,
        "wckey": None,
        "additional_parameters": further,
        "srun_args": ranks,
        "setup": before(logs, spec, code),
        "teardown": after(script.killed_returns),
    }
    options |= {
        key: getattr(spec, key)
        for key in (
            "partition",
            "account",
            "qos",
            "constraint",
            "exclude",
            "nodelist",
            "dependency",
        )
    }
    submitter.update_parameters(**options)
    return submitter


def python(spec: JobSpec) -> str:
    """How the nodes start Python. Early signals are ignored, not deadly: until Python listens, a
    warning is lost and the deadline kept. -P: a file of the working folder never stands in for a
    module."""
    program = shlex.quote(spec.python or ("python3" if spec.container else sys.executable))
    container = spec.container + " " if spec.container else ""
    return f"""bash -c 'trap "" USR1 USR2; exec "$@"' rank {container}{program} -P"""


def before(logs: Path, spec: JobSpec, code: Path | None) -> list[str]:
    """Shell lines ahead of the ranks: a fresh rendezvous folder for every start, the deadline, the
    frozen code, the user's own lines."""
    lines = [
        "trap : TERM  # the ranks save first; this script goes when they are gone",
        "job=${SLURM_ARRAY_JOB_ID:+${SLURM_ARRAY_JOB_ID}_${SLURM_ARRAY_TASK_ID}} "
        "job=${job:-$SLURM_JOB_ID}",
        f"export {submission.LIFE}={shlex.quote(str(logs))}/life-$job.${{SLURM_RESTART_COUNT:-0}}",
        f'rm -rf "${submission.LIFE}" && mkdir -p "${submission.LIFE}" || exit 1',
        f"export SEGFLEET_END=${{SLURM_JOB_END_TIME:-{END}}}",
        "export OMP_NUM_THREADS=${OMP_NUM_THREADS:-${SLURM_CPUS_PER_TASK:-1}}",
    ]
    if code is not None:
        lines.append(f"export PYTHONPATH={shlex.quote(str(code))}${{PYTHONPATH:+:$PYTHONPATH}}")
        lines.append(f"export SEGFLEET_CODE={code.name}")
    for line in spec.setup:
        lines += [line, f"[ $? = 0 ] || {refusal(line)}"]
    return lines


def refusal(line: str) -> str:
    """Shell: end the job because `line` of its setup failed, where `segfleet status` finds it."""
    message = (
        f"the setup line failed: {line}. Correct it, or end it with `|| true` if that is meant; "
        "then: segfleet resume"
    )
    failed = {"rank": 0, "time": 0, "exit_code": 2, "message": message, "peer_failure": False}
    report = shlex.quote(json.dumps(failed))
    return (
        f"{{ echo segfleet: {shlex.quote(message)} >&2; echo {report} "
        f'> "${submission.LIFE}/failed-0.json"; exit 2; }}'
    )


def after(killed_returns: bool = False) -> list[str]:
    """Shell lines behind the ranks: an interrupted job comes back, unless a person ended it; the
    exit code stays the ranks' own.

    A job whose time is up is being ended by SLURM, no longer running; it comes back if its ranks
    stopped or were killed, not if one failed. `killed_returns`: see `Script`; `rank.begin` ends
    what never gets further.
    """
    life = f"${submission.LIFE}"
    killed = (
        f'[ -e "{life}/life.json" ] && [ $code -gt 128 ] && [ "{STATE}" = RUNNING ] && again=yes'
    )
    return [
        "code=$? again=no",
        *([killed] if killed_returns else []),
        f'[ $code = {ExitCode.INTERRUPTED} ] && [ "{STATE}" = RUNNING ] && again=yes',
        f'[ -e "{life}/life.json" ] && {{ [ $code = {ExitCode.INTERRUPTED} ] || [ $code -gt 128 '
        f"]; }} && \\",
        '  [ "${SEGFLEET_END:-0}" -gt 0 ] && [ "$(date +%s)" -ge "$SEGFLEET_END" ] && again=yes',
        # a rank hung: it had to be killed, as the exit code shows
        f'[ -e "{life}/{AGAIN}" ] && [ "{STATE}" = RUNNING ] && again=yes',
        f'later="${{{submission.LIFE}%.*}}.$((${{SLURM_RESTART_COUNT:-0}} + 1))"',
        # a start that SLURM gave up for lost must not requeue the one that took its place
        f'[ $again = yes ] && [ ! -e "$later" ] && [ ! -e "{life}/stay" ] && scontrol requeue '
        '"$job" && sleep 60  # '
        "SLURM ends this script",
        "exit $code",
    ]


def without_bad_nodes(spec: JobSpec, root: Path) -> JobSpec:
    """The nodes that failed the health check of a run under `root` are left out."""
    bad = [node for node in health.bad_nodes(root) if node not in (spec.exclude or "").split(",")]
    if bad:
        with suppress(InputError):  # of another cluster, or taken away: SLURM would refuse the name
            existing = cluster.known_nodes(spec.clusters)
            bad = [node for node in bad if node in existing]
    return (
        spec.model_copy(
            update={"exclude": ",".join([*([spec.exclude] if spec.exclude else []), *bad])}
        )
        if bad
        else spec
    )


def job_name(runs: Sequence[Path]) -> str:
    return f"segfleet-{runs[0].name}" + (f"-and-{len(runs) - 1}" if len(runs) > 1 else "")


@contextmanager
def cleaned_environment() -> Iterator[None]:
    """submitit submits with this process's environment, which a job inherits."""
    with _environment:
        before = dict(os.environ)
        os.environ.clear()
        os.environ.update(cluster.clean_environment(before))
        try:
            yield
        finally:
            os.environ.clear()
            os.environ.update(before)
