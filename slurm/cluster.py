"""What a cluster has and knows: partitions, limits and jobs, asked of SLURM's own programs in a
cleaned environment."""

from __future__ import annotations

import getpass
import os
import re
import shutil
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from segfleet.core.errors import InputError
from segfleet.pipeline.sections import MOST_WORKERS
from segfleet.slurm import poll
from segfleet.slurm.jobspec import JobSpec, minutes, typed

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
    inherited = os.environ if environment is None else environment
    return {
        name: value
        for name, value in inherited.items()
        if name in KEPT or not (name.startswith(INHERITED) or name in RANKS)
    }


def call(*command: str, of: str | None = None, timeout: float = 60) -> str:
    """Output of one of SLURM's programs, about the cluster `of`; none: that of SLURM_CONF. Raises
    InputError with its own words."""
    if of:
        command = (command[0], "-M", of, *command[1:])
    try:
        done = subprocess.run(
            command,
            env=clean_environment(),
            stdin=subprocess.DEVNULL,  # no one sees a question, nor answers it
            capture_output=True,
            encoding="utf-8",
            errors="replace",  # of another user's comment or job name in another encoding
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
    return re.sub(r"^CLUSTER: .*\n", "", done.stdout, flags=re.MULTILINE) if of else done.stdout


def there_is_one() -> bool:
    """Whether there is a controller that answers."""
    if shutil.which("sinfo") is None:
        return False
    try:
        return "UP" in call("scontrol", "ping", timeout=20)
    except InputError:
        return False


@dataclass(frozen=True, kw_only=True)
class Node:
    """What one node has."""

    name: str
    cpus: int
    megabytes: int
    gpus: int
    gpu_types: dict[str, int]  # type -> GPUs; a GPU without a type is in none
    features: frozenset[str]


@dataclass(frozen=True, kw_only=True)
class Partition:
    """A partition's limits, and its nodes."""

    name: str
    default: bool
    minutes: int | None  # None: no limit
    nodes: tuple[Node, ...]

    @property
    def features(self) -> frozenset[str]:
        return frozenset().union(*(node.features for node in self.nodes))


def partitions(of: str | None = None) -> dict[str, Partition]:
    """Partitions of a cluster by name, as sinfo lists them: one row for every node in every
    partition. Raises InputError."""
    limits: dict[str, tuple[bool, int | None]] = {}
    nodes: dict[str, list[Node]] = {}
    for line in call("sinfo", "-a", "-h", "-N", "-o", "%P|%l|%N|%c|%m|%G|%f", of=of).splitlines():
        name, limit, node, cpus, memory, gres, features = line.split("|")
        default, name = name.endswith("*"), name.rstrip("*")
        limits[name] = default, None if limit in ("infinite", "n/a") else minutes(limit)
        nodes.setdefault(name, []).append(
            Node(
                name=node,
                cpus=int(re.match(r"\d+", cpus)[0]),
                megabytes=int(re.match(r"\d+", memory)[0]),
                gpus=sum(int(count) for count in re.findall(r"gpu(?::[^:,(]+)?:(\d+)", gres)),
                gpu_types={
                    kind: int(count) for kind, count in re.findall(r"gpu:([^:,(]+):(\d+)", gres)
                },
                features=frozenset(features.split(",")) - {"(null)"},
            )
        )
    return {
        name: Partition(name=name, default=default, minutes=limit, nodes=tuple(nodes[name]))
        # the default first, the others by name: sinfo's rows of nodes come in no fixed order
        for name, (default, limit) in sorted(
            limits.items(), key=lambda item: (not item[1][0], item[0])
        )
    }


def chosen(spec: JobSpec, by_name: Mapping[str, Partition]) -> list[Partition]:
    """The partitions a job may run in. Raises InputError."""
    names = (
        spec.partition.split(",")
        if spec.partition
        else [part.name for part in by_name.values() if part.default]
    )
    if not names or (unknown := [name for name in names if name not in by_name]):
        fault = f"found '{unknown[0]}'" if names else "missing, and the cluster has no default"
        raise InputError(f"partition: {fault}; expected one of: {', '.join(by_name)}")
    return [by_name[name] for name in names]


def settled(spec: JobSpec) -> JobSpec:
    """The same with GPUs of the whole job (`gpus`) shared out to as few nodes as the partition
    allows. Raises InputError."""
    if spec.gpus is None:
        return spec
    (kind, count), by_name = typed(spec.gpus), partitions(spec.clusters)
    for nodes in (number for number in range(1, count + 1) if count % number == 0):
        per_node = {"gpus": None, "nodes": nodes, "gpus_per_node": count // nodes, "gpu_type": kind}
        shared = spec.model_copy(update=per_node)
        if any(not _misfits(shared, part) for part in chosen(spec, by_name)):
            return shared
    return spec.model_copy(update={"gpus": None, "gpus_per_node": count, "gpu_type": kind})


def fed(spec: JobSpec, workers: Sequence[int | str]) -> JobSpec:
    """The same with cores for the loader of every GPU, unless it is given: as many as the
    recipes' `data.workers` and two more, at most a GPU's share of the cores of any node that may be
    used. Unchanged where the cluster does not answer: `check` says why."""
    if spec.cpus or spec.whole_nodes or not spec.gpus_per_node or not workers:
        return spec
    most = MOST_WORKERS["cuda"]
    cores = max(most if isinstance(count, str) else count for count in workers) + 2
    try:
        parts = chosen(spec, partitions(spec.clusters))
    except InputError:
        return spec
    named, excluded = names_of(spec.nodelist or ""), names_of(spec.exclude or "")
    shares = [
        node.cpus // node.gpus
        for part in parts
        for node in part.nodes
        if node.gpus
        and (not spec.gpu_type or spec.gpu_type in node.gpu_types)
        and (not named or node.name in named)
        and node.name not in excluded
    ]
    return spec.model_copy(update={"cpus": max(1, min(cores, *shares))}) if shares else spec


def check(spec: JobSpec) -> None:
    """Refuse what the cluster can never run, with the legal values. Of several partitions one must
    do. Raises InputError."""
    by_name = partitions(spec.clusters)
    faults = min((_misfits(spec, part) for part in chosen(spec, by_name)), key=len)
    if spec.reservation and spec.reservation not in (legal := reservations(spec.clusters)):
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


NAMED = 5  # nodes that a message names


def _misfits(spec: JobSpec, part: Partition) -> list[str]:
    """What keeps a job out of a partition: its limits, and what the nodes lack that may be used."""
    faults, members = [], {node.name for node in part.nodes}
    required, excluded = names_of(spec.nodelist or ""), set(names_of(spec.exclude or ""))
    if strange := [name for name in required if name not in members]:
        faults.append(f"nodelist: found '{strange[0]}', which partition {part.name} has not")
    if refused := sorted(excluded & set(required)):
        faults.append(f"nodelist: '{refused[0]}' is left out by exclude, or by RUNS/.bad-nodes")
    if spec.nodes > len(part.nodes):
        faults.append(f"nodes: found {spec.nodes}, partition {part.name} has {len(part.nodes)}")
    usable = [node for node in part.nodes if node.name not in excluded] or list(part.nodes)
    lacks = {node.name: _lacks(spec, node, part.name) for node in usable}
    without = [name for name in lacks if lacks[name]]
    if len(usable) - len(without) < min(spec.nodes, len(part.nodes)):
        # of those that lack something, the words about the best
        faults += min(filter(None, lacks.values()), key=len, default=[]) or []
        if len(without) < len(usable):
            faults.append(_named("nodes", without, spec, len(usable) - len(without)))
    elif bad := [name for name in required if name in lacks and lacks[name]]:
        faults += [f"nodelist: {name}: {lacks[name][0]}" for name in bad[:NAMED]]
    if len(usable) < spec.nodes <= len(part.nodes):
        faults.append(f"nodes: found {spec.nodes}, {len(usable)} are left after exclude")
    if part.minutes is not None and spec.minutes > part.minutes:
        faults.append(
            f"time: found {spec.time}, partition {part.name} allows {part.minutes} minutes"
        )
    words = set(re.split(r"[&|,\[\]()*]+", spec.constraint or "")) - {""}
    if unknown := sorted(word for word in words - part.features if not word.isdecimal()):
        legal = ", ".join(sorted(part.features)) or "none"
        faults.append(
            f"constraint: found '{unknown[0]}', features in partition {part.name}: {legal}"
        )
    return faults


def _named(field: str, without: list[str], spec: JobSpec, enough: int) -> str:
    names = ", ".join(without[:NAMED]) + (" ..." if len(without) > NAMED else "")
    return f"{field}: found {spec.nodes}, {enough} have all that was asked for; not {names}"


def _lacks(spec: JobSpec, node: Node, partition: str) -> list[str]:
    """What a node has too little of."""
    faults, words = [], f"a node of partition {partition} has"
    if spec.gpu_type and spec.gpus_per_node > (count := node.gpu_types.get(spec.gpu_type, 0)):
        types = ", ".join(f"{kind}:{number}" for kind, number in node.gpu_types.items())
        faults.append(
            f"gpus_per_node: found {spec.gpu_type}:{spec.gpus_per_node}, {words} {count} of that "
            f"type; its types: {types or 'none'}"
        )
    elif spec.gpus_per_node > node.gpus:
        faults.append(f"gpus_per_node: found {spec.gpus_per_node}, {words} {node.gpus}")
    if (cores := (spec.cpus or 1) * spec.ranks_on_a_node) > node.cpus:
        faults.append(
            f"cpus: {spec.ranks_on_a_node} rank(s) x {spec.cpus or 1} are {cores}, {words} "
            f"{node.cpus}"
        )
    if (spec.megabytes or 0) > node.megabytes:
        faults.append(f"memory: found {spec.memory}, {words} {node.megabytes}M")
    return faults


def most_of_an_array(of: str | None = None) -> int:
    """Members that an array may have here (MaxArraySize counts one more). Raises InputError."""
    limit = re.search(r"MaxArraySize\s*=\s*(\d+)", call("scontrol", "show", "config", of=of))
    return max(1, int(limit[1]) - 1) if limit else 1000


def reservations(of: str | None = None) -> list[str]:
    answer = call("scontrol", "show", "reservation", "-o", of=of)
    return re.findall(r"ReservationName=(\S+)", answer)


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


def known_nodes(of: str | None = None) -> frozenset[str]:
    """Names of all nodes of a cluster. Raises InputError."""
    return frozenset(call("sinfo", "-a", "-h", "-N", "-o", "%N", of=of).split())


def queue(
    people: frozenset[str] = frozenset(),
    age: float = 0.0,
    since: float = 0.0,
    of: str | None = None,
) -> dict[str, dict[str, Any]]:
    """My jobs and those of `people` in a cluster by id, array members as 12_3, with name, state,
    reason and nodes: what SLURM's controller remembers. `age`, `since`: an answer this old will do
    (`poll.Answers`)."""
    # One question for all jobs: an id it has forgotten would be an error. -a: hidden partitions too
    whose = ",".join(sorted({getpass.getuser(), *people}))
    question = ("squeue", "-a", "--states=all", "-r", "-h", "-u", whose, "-o", "%i|%T|%r|%N||%j")
    return _ask(question, age, since, of)


def account(
    ids: list[str], age: float = 0.0, since: float = 0.0, of: str | None = None
) -> dict[str, dict[str, Any]]:
    """The same of these jobs, and of all members of their arrays, from the accounting database;
    empty where there is none."""
    if not ids or shutil.which("sacct") is None:
        return {}
    # a member that never started has no row of its own
    whole = ",".join(sorted({job.partition("_")[0] for job in ids}))
    columns = "JobID,State,Reason,NodeList,ExitCode,JobName"
    # of a federation's other clusters too, where SLURM_CONF's is in one
    where = () if of else ("--federation",)
    try:
        return _ask(("sacct", *where, "-n", "-P", "-X", "-j", whole, "-o", columns), age, since, of)
    except InputError:
        return {}


def _ask(
    question: tuple[str, ...], age: float, since: float, of: str | None
) -> dict[str, dict[str, Any]]:
    answers = poll.Answers(" ".join((*question, of or "")))
    return _jobs(answers.get(lambda: call(*question, of=of), age, since))


def _jobs(text: str) -> dict[str, dict[str, Any]]:
    jobs = {}
    for line in text.splitlines():
        # the name comes last: it is free text
        job, state, reason, nodes, code, name = line.split("|", 5)
        if state == "REVOKED":  # here; another cluster of the federation started it
            continue
        nodes = None if nodes in ("", "None assigned") else nodes
        reason = (_ending(code) if code else None) if reason == "None" else reason
        jobs |= dict.fromkeys(
            _members(job),
            {"name": name, "state": state.split()[0], "reason": reason, "node": nodes},
        )
    return jobs


def names_of(nodes: str) -> list[str]:
    """SLURM's short form of node names, `a[01-03,7],b`, written out; nothing of a file's name."""
    expanded: list[str] = []
    if "/" in nodes:
        return expanded
    for group in re.findall(r"(?:[^,\[]|\[[^\]]*\])+", nodes):
        names = [""]
        for plain, numbers in re.findall(r"([^\[]+)|\[([^\]]*)\]", group):
            ends = [plain] if plain else list(_numbers(numbers))
            names = [name + end for name in names for end in ends]
        expanded += names
    return expanded


def _numbers(text: str) -> Iterator[str]:
    """`01-03,7`: 01, 02, 03, 7."""
    for piece in text.split(","):
        first, _, last = piece.partition("-")
        if not (first + last).isdecimal():  # SLURM will say so
            return
        for number in range(int(first), int(last or first) + 1):
            yield f"{number:0{len(first)}d}"


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
    lines = "".join(line for line in script.splitlines(keepends=True) if "afterany:<" not in line)
    with tempfile.NamedTemporaryFile("w", suffix=".sh", encoding="utf-8") as file:
        file.write(lines)
        file.flush()
        try:
            dry_run = 'sbatch --test-only "$1" 2>&1'
            return call("bash", "-c", dry_run, "bash", file.name).splitlines()
        except InputError as error:
            raise InputError(
                "SLURM would refuse the job: " + str(error).partition("says: ")[2]
            ) from None
