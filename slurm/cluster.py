"""What a cluster has and knows: partitions, limits and jobs, asked of SLURM's own programs in a
cleaned environment."""

from __future__ import annotations

import getpass
import os
import re
import shutil
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from segfleet.core.errors import InputError
from segfleet.slurm import poll
from segfleet.slurm.jobspec import JobSpec, minutes

INHERITED = (
    "SLURM_",
    "SLURMD_",
    "SBATCH_",
    "SRUN_",
    "SALLOC_",
    "PMI",
    "PMIX_",
    "OMPI_",
    "SEGFLEET_LIFE",
    "SUBMITIT_",
    # what a user has set for SLURM's own programs would change what is seen here
    "SQUEUE_",
    "SINFO_",
    "SCANCEL_",
    "SACCT_",
    "SACCTMGR_",
    "SCONTROL_",
)
RANKS = (
    "RANK",
    "WORLD_SIZE",
    "LOCAL_RANK",
    "LOCAL_WORLD_SIZE",
    "NODE_RANK",
    "GROUP_RANK",
    "MASTER_ADDR",
    "MASTER_PORT",
    "SEGFLEET_PARENT",
)
RANKS += (
    "SEGFLEET_MASTER_HOST",
    "CUDA_VISIBLE_DEVICES",
    "GPU_DEVICE_ORDINAL",
    "ROCR_VISIBLE_DEVICES",
    "ENVIRONMENT",
)
KEPT = ("SLURM_CONF", "SLURM_CONF_SERVER")


def clean_environment(environment: Mapping[str, str] | None = None) -> dict[str, str]:
    """The environment without what a surrounding job or ranks left in it: it would pin cores, ranks
    and GPUs of the new job."""
    found = os.environ if environment is None else environment
    return {
        name: value
        for name, value in found.items()
        if name in KEPT or not (name.startswith(INHERITED) or name in RANKS)
    }


def call(*command: str, timeout: float = 60) -> str:
    """Output of one of SLURM's programs. Raises InputError with its own words."""
    try:
        done = subprocess.run(
            command,
            env=clean_environment(),
            stdin=subprocess.DEVNULL,  # nobody answers a question that nobody sees
            capture_output=True,
            text=True,
            timeout=timeout,
        )
    except FileNotFoundError:
        raise InputError(
            f"{command[0]}: not found; this machine has no SLURM. `segfleet train` runs here "
            "without one"
        ) from None
    except subprocess.TimeoutExpired:
        raise InputError(
            f"{command[0]}: SLURM did not answer within {timeout:.0f} s; see `scontrol ping`"
        ) from None
    if done.returncode:
        raise InputError(f"{command[0]} says: {(done.stderr or done.stdout).strip()}")
    return done.stdout


def there_is_one() -> bool:
    """Whether there is a controller that answers."""
    if shutil.which("sinfo") is None:
        return False
    try:
        return "UP" in call("scontrol", "ping", timeout=20)
    except InputError:
        return False


@dataclass(frozen=True, kw_only=True)
class Partition:
    """A partition's limits: the best of any node in it."""

    name: str
    default: bool
    minutes: int | None  # None: no limit
    nodes: int
    cpus: int
    megabytes: int
    gpus: int
    gpu_types: dict[str, int]  # type -> GPUs of a node; a GPU without a type is in none
    features: frozenset[str]


def partitions() -> dict[str, Partition]:
    """Partitions by name, as sinfo tells them. Raises InputError."""
    found: dict[str, Partition] = {}
    for line in call("sinfo", "-a", "-h", "-o", "%P|%l|%D|%c|%m|%G|%f").splitlines():
        name, limit, nodes, cpus, memory, gres, features = line.split("|")
        default, name = name.endswith("*"), name.rstrip("*")
        here = Partition(
            name=name,
            default=default,
            minutes=None if limit in ("infinite", "n/a") else minutes(limit),
            nodes=int(nodes),
            cpus=int(re.match(r"\d+", cpus)[0]),
            megabytes=int(re.match(r"\d+", memory)[0]),
            gpus=sum(int(count) for count in re.findall(r"gpu(?::[^:,(]+)?:(\d+)", gres)),
            gpu_types={
                kind: int(count) for kind, count in re.findall(r"gpu:([^:,(]+):(\d+)", gres)
            },
            features=frozenset(features.split(",")) - {"(null)"},
        )
        found[name] = _joined(found[name], here) if name in found else here
    return found


def _joined(a: Partition, b: Partition) -> Partition:
    """Nodes of different kinds in one partition are told on several lines."""
    best = {key: max(getattr(a, key), getattr(b, key)) for key in ("cpus", "megabytes", "gpus")}
    return Partition(
        name=a.name,
        default=a.default,
        minutes=a.minutes,
        nodes=a.nodes + b.nodes,
        features=a.features | b.features,
        gpu_types={
            kind: max(a.gpu_types.get(kind, 0), b.gpu_types.get(kind, 0))
            for kind in sorted(a.gpu_types | b.gpu_types)
        },
        **best,
    )


def check(spec: JobSpec) -> None:
    """Refuse what the cluster can never run, with the legal values. Of several partitions one must
    do. Raises InputError."""
    known = partitions()
    names = (
        spec.partition.split(",")
        if spec.partition
        else [part.name for part in known.values() if part.default]
    )
    if not names or (unknown := [name for name in names if name not in known]):
        found = f"found '{unknown[0]}'" if names else "missing, and the cluster has no default"
        raise InputError(f"partition: {found}; expected one of: {', '.join(known)}")
    faults = min((_misfits(spec, known[name]) for name in names), key=len)
    if spec.reservation and spec.reservation not in (legal := reservations()):
        faults.append(
            f"reservation: found '{spec.reservation}', expected one of: "
            f"{', '.join(legal) or 'none exists'}"
        )
    for option in ("qos", "account"):
        if (
            (value := getattr(spec, option))
            and (legal := accounting(option))
            and value.lower() not in legal
        ):
            faults.append(f"{option}: found '{value}', expected one of: {', '.join(legal)}")
    if faults:
        raise InputError(
            "the cluster cannot run this job:\n" + "\n".join(f"  {fault}" for fault in faults)
        )


def _misfits(spec: JobSpec, part: Partition) -> list[str]:
    faults, node = [], f"a node of partition {part.name} has"
    if spec.nodes > part.nodes:
        faults.append(f"nodes: found {spec.nodes}, partition {part.name} has {part.nodes}")
    if spec.gpu_type and spec.gpus_per_node > (count := part.gpu_types.get(spec.gpu_type, 0)):
        types = ", ".join(f"{kind}:{number}" for kind, number in part.gpu_types.items())
        faults.append(
            f"gpus_per_node: found {spec.gpu_type}:{spec.gpus_per_node}, {node} {count} of that "
            f"type; its types: {types or 'none'}"
        )
    elif spec.gpus_per_node > part.gpus:
        faults.append(f"gpus_per_node: found {spec.gpus_per_node}, {node} {part.gpus}")
    if (cores := (spec.cpus or 1) * spec.ranks_on_a_node) > part.cpus:
        faults.append(
            f"cpus: {spec.ranks_on_a_node} rank(s) x {spec.cpus or 1} are {cores}, {node} "
            f"{part.cpus}"
        )
    if (spec.megabytes or 0) > part.megabytes:
        faults.append(f"memory: found {spec.memory}, {node} {part.megabytes}M")
    if part.minutes is not None and spec.minutes > part.minutes:
        faults.append(
            f"time: found {spec.time}, partition {part.name} allows {part.minutes} minutes"
        )
    wanted = set(re.split(r"[&|,\[\]()*]+", spec.constraint or "")) - {""}
    if unknown := sorted(word for word in wanted - part.features if not word.isdigit()):
        legal = ", ".join(sorted(part.features)) or "none"
        faults.append(
            f"constraint: found '{unknown[0]}', features in partition {part.name}: {legal}"
        )
    return faults


def reservations() -> list[str]:
    return re.findall(r"ReservationName=(\S+)", call("scontrol", "show", "reservation", "-o"))


def accounting(what: str) -> list[str]:
    """Names of all `qos` or `account`, which SLURM keeps in lower case; none where there is no
    accounting."""
    # an unknown field is no error but an empty column
    field = {"qos": "name", "account": "account"}[what]
    try:
        return sorted(
            set(call("sacctmgr", "-n", "-P", "show", what, f"format={field}", timeout=20).split())
        )
    except InputError:
        return []


def known_nodes() -> frozenset[str]:
    """Names of all nodes of this cluster. Raises InputError."""
    return frozenset(call("sinfo", "-a", "-h", "-N", "-o", "%N").split())


def queue(
    people: frozenset[str] = frozenset(), age: float = 0.0, since: float = 0.0
) -> dict[str, dict[str, Any]]:
    """My jobs and those of `people` by id, array members as 12_3, with name, state, reason and
    nodes: what SLURM's controller remembers. `age`, `since`: an answer this old will do
    (`poll.Answers`)."""
    # One question for all jobs: an id it has forgotten would be an error. -a: hidden partitions too
    whose = ",".join(sorted({getpass.getuser(), *people}))
    question = ("squeue", "-a", "--states=all", "-r", "-h", "-u", whose, "-o", "%i|%T|%r|%N||%j")
    return _jobs(poll.Answers(" ".join(question)).get(lambda: call(*question), age, since))


def account(ids: list[str]) -> dict[str, dict[str, Any]]:
    """The same of these jobs, and of all members of their arrays, from the accounting database;
    empty where there is none."""
    if not ids or shutil.which("sacct") is None:
        return {}
    # a member that never started has no row of its own
    whole = sorted({job.partition("_")[0] for job in ids})
    try:
        return _jobs(
            call(
                "sacct",
                "-n",
                "-P",
                "-X",
                "-j",
                ",".join(whole),
                "-o",
                "JobID,State,Reason,NodeList,ExitCode,JobName",
            )
        )
    except InputError:
        return {}


def _jobs(text: str) -> dict[str, dict[str, Any]]:
    found = {}
    for line in text.splitlines():
        # the name comes last: it is free text
        job, state, reason, nodes, code, name = line.split("|", 5)
        nodes = None if nodes in ("", "None assigned") else nodes
        reason = (_ending(code) if code else None) if reason == "None" else reason
        found |= dict.fromkeys(
            _members(job),
            {"name": name, "state": state.split()[0], "reason": reason, "node": nodes},
        )
    return found


def _ending(code: str) -> str | None:
    """What sacct's exit code says: "3:0" is one, "0:9" a signal."""
    number, _, signal = code.partition(":")
    return (
        f"signal {signal}"
        if signal not in ("", "0")
        else f"exit code {number}"
        if number != "0"
        else None
    )


def _members(job: str) -> list[str]:
    """The ids behind sacct's "12_[0-2,5%1]": members of an array that have not started."""
    whole, bracket, rest = job.partition("_[")
    if not bracket:
        return [job]
    pieces = re.findall(r"(\d+)(?:-(\d+))?", rest.partition("%")[0])
    return [
        f"{whole}_{number}"
        for first, last in pieces
        for number in range(int(first), int(last or first) + 1)
    ]


def ask(script: str) -> list[str]:
    """What SLURM says to a script, without submitting it. Raises InputError where it would
    refuse."""
    import tempfile

    if not there_is_one():
        return ["no SLURM controller answers here: not asked"]
    # a job that is not yet there
    known = "".join(line for line in script.splitlines(keepends=True) if "afterany:<" not in line)
    with tempfile.NamedTemporaryFile("w", suffix=".sh") as file:
        file.write(known)
        file.flush()
        try:
            asked = 'sbatch --test-only "$1" 2>&1'
            return call("bash", "-c", asked, "bash", file.name).splitlines()
        except InputError as error:
            raise InputError(
                "SLURM would refuse the job: " + str(error).partition("says: ")[2]
            ) from None
