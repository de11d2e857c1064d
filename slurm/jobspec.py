"""What a job asks of a cluster. Profiles of clusters, in ./clusters.yaml or
~/.config/segfleet/clusters.yaml, hold what is always the same:

default: alpha
clusters:
  alpha: {partition: gpu, account: hearts, gpus_per_node: 4, time: "12:00:00", setup: ["module load
  CUDA/12"]}
"""

from __future__ import annotations

import math
import os
import re
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from segfleet.core import settings
from segfleet.core.errors import InputError

TIME = re.compile(r"(?:(?P<days>\d+)-)?(?P<fields>\d+(?::\d+){0,2})")
LETTERS = re.compile(r"(?:(\d+)d)?(?:(\d+)h)?(?:(\d+)m)?")
MEMORY = re.compile(r"(\d+)([KMGT]?)B?", re.IGNORECASE)
MAIL = (
    "NONE",
    "BEGIN",
    "END",
    "FAIL",
    "REQUEUE",
    "ALL",
    "TIME_LIMIT",
    "TIME_LIMIT_90",
    "TIME_LIMIT_80",
    "TIME_LIMIT_50",
    "ARRAY_TASKS",
)
OURS = (
    "output",
    "error",
    "job-name",
    "signal",
    "open-mode",
    "requeue",
    "no-requeue",
    "array",
    "export",
    "wrap",
    "parsable",
)
INSTEAD = {  # of sbatch's option: a field of ours, which writes more than that one line
    **dict.fromkeys(("mem", "mem-per-cpu", "mem-per-gpu"), "memory"),
    **dict.fromkeys(
        ("ntasks", "ntasks-per-node", "tasks-per-node", "ntasks-per-core", "ntasks-per-socket"),
        "ranks_per_node",
    ),
    **dict.fromkeys(("gpus-per-task", "gpus-per-socket", "ntasks-per-gpu"), "gpus_per_node"),
    **dict.fromkeys(("cpus-per-task", "cpus-per-gpu"), "cpus"),
    "mail-user": "mail",
    "mail-type": "mail_on",
}
PLACES = (Path("clusters.yaml"), Path("~/.config/segfleet/clusters.yaml"))
Count = Annotated[int, Field(gt=0)]
Word = Annotated[str, Field(pattern=r"^[^\s\n]+$")]


class JobSpec(BaseModel):
    """Resources and manners of one job. Every field may stand in a profile; the command line
    overrides it."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    nodes: Count = Field(1, description="nodes")
    gpus_per_node: Annotated[int, Field(ge=0)] = Field(
        0,
        description="GPUs of every node; one rank for each. 0: a job on CPUs. With a type, which "
        "may be a MIG profile: a100:2",
    )
    gpu_type: Annotated[str, Field(pattern=r"^[A-Za-z0-9_.-]+$")] | None = Field(
        None, description="type of the GPUs, as in gpus_per_node: a100:2"
    )
    gpus: Word | None = Field(
        None,
        description="GPUs of the whole job, 8 or a100:8, in place of gpus_per_node; without "
        "nodes, on as few as the partition allows",
    )
    ranks_per_node: Count = Field(1, description="ranks of every node when there are no GPUs")
    whole_nodes: bool = Field(
        False, description="one process of every node, which has all its GPUs: Ray's"
    )
    cpus: Count | None = Field(
        None,
        description="CPU cores per rank; none: for a GPU the recipe's data.workers and two, at "
        "most its share of a node, else the cluster's default",
    )
    memory: str | None = Field(
        None, description="memory per node, for example 64G; none: the cluster's default"
    )
    time: str | int = Field(
        60,
        description="time limit: minutes, 12h, 1d6h, hours:minutes:seconds or "
        "days-hours:minutes:seconds",
    )
    clusters: Annotated[str, Field(pattern=r"^[^\s,]+$")] | None = Field(
        None,
        description="another cluster behind the same login node, as sbatch -M names it; one. None: "
        "that of SLURM_CONF",
    )
    partition: Word | None = Field(None, description="partition")
    account: Word | None = Field(None, description="account")
    qos: Word | None = Field(None, description="quality of service")
    constraint: Word | None = Field(None, description="features a node must have")
    exclude: Word | None = Field(None, description="nodes that must not be used")
    nodelist: Word | None = Field(None, description="nodes that must be used")
    reservation: Word | None = Field(None, description="reservation")
    mail: Word | None = Field(None, description="mail address")
    mail_on: str = Field(
        "END,FAIL", description="when to write: END,FAIL and others of SLURM's words"
    )
    throttle: Count | None = Field(None, description="members of an array that may run at once")
    dependency: Word | None = Field(None, description="SLURM's own words: afterok:123, singleton")
    sbatch: tuple[str, ...] = Field(
        (), description="further options of sbatch, for example --licenses=matlab"
    )
    srun: tuple[str, ...] = Field((), description="options of srun, for example --mpi=none")
    setup: tuple[str, ...] = Field(
        (), description="shell lines run on the first node before the ranks start"
    )
    container: str | None = Field(
        None,
        description="command that runs what follows it in a container: apptainer exec --nv "
        "image.sif",
    )
    python: str | None = Field(
        None, description="Python on the nodes; none: this one, in a container python3"
    )
    stage_to: Annotated[str, Field(pattern=r"^[/$~]")] | None = Field(
        None,
        description="copy the store to this folder of every node first, for example $TMPDIR; its "
        "variables are the node's",
    )
    warning: Count = Field(
        120,
        description="seconds before the time limit at which the ranks save; at most a third of it",
    )
    fruitless: Count = Field(
        3, description="restarts without a step of progress after which the job gives up"
    )

    @model_validator(mode="before")
    @classmethod
    def _whole_job(cls, options: Any) -> Any:
        """GPUs of the whole job, shared out to its nodes. Without nodes they wait for
        `cluster.settled`, which knows how many a node has."""
        if not isinstance(options, dict) or options.get("gpus") in (None, ""):
            return options
        text = str(options["gpus"])
        kind, count = typed(text)
        if count < 1:
            raise ValueError(f"gpus: found '{text}', expected a number or type:number, a100:8")
        if options.get("gpus_per_node"):
            raise ValueError("gpus and gpus_per_node say the same twice; give one")
        if not options.get("nodes"):
            return {**options, "gpus": text}
        per_node, rest = divmod(count, int(options["nodes"]))
        if rest:
            raise ValueError(f"gpus: {count} on {options['nodes']} nodes are not as many on each")
        return {**options, "gpus": None, "gpus_per_node": per_node, "gpu_type": kind}

    @model_validator(mode="before")
    @classmethod
    def _typed_gpus(cls, options: Any) -> Any:
        """`a100:2` is two GPUs of a type; a type alone is one, as for SLURM."""
        gpus = options.get("gpus_per_node") if isinstance(options, dict) else None
        if not isinstance(gpus, str) or gpus.isdecimal():
            return options
        kind, count = typed(gpus)
        if count < 1:
            raise ValueError(f"gpus_per_node: found '{gpus}', expected a number or a100:2")
        return {**options, "gpu_type": kind, "gpus_per_node": count}

    @field_validator("time")
    @classmethod
    def _legal_time(cls, value: str | int) -> str | int:
        minutes(value)
        return value

    @field_validator("memory")
    @classmethod
    def _legal_memory(cls, value: str | None) -> str | None:
        if value is not None and not MEMORY.fullmatch(value):
            raise ValueError("expected a number with K, M, G or T, for example 64G")
        return value

    @field_validator("mail_on")
    @classmethod
    def _legal_mail(cls, value: str) -> str:
        if wrong := [word for word in value.split(",") if word not in MAIL]:
            raise ValueError(f"'{wrong[0]}' is none of: {', '.join(MAIL)}")
        return value

    @field_validator("sbatch")
    @classmethod
    def _legal_options(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        for option in value:
            if not re.fullmatch(r"--[a-z][a-z-]*(=[^\n]+)?", option):
                raise ValueError(f"'{option}': expected --option or --option=value")
            name = option[2:].partition("=")[0]
            if (field := INSTEAD.get(name, name.replace("-", "_"))) in JobSpec.model_fields:
                raise ValueError(
                    f"'{option}': give --{field.replace('_', '-')} instead ({field} in "
                    "clusters.yaml)"
                )
            if name in OURS:
                raise ValueError(f"'{option}': --{name} is set by segfleet itself")
        return value

    @field_validator("srun")
    @classmethod
    def _legal_srun(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        for option in value:
            if not re.fullmatch(r"--[a-z][a-z-]*(=[^\n]+)?", option):
                raise ValueError(f"'{option}': expected --option or --option=value")
            if option[2:].partition("=")[0] in ("output", "error", "kill-on-bad-exit", "wait"):
                raise ValueError(f"'{option}': is set by segfleet itself")
        return value

    @field_validator("setup")
    @classmethod
    def _legal_setup(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        if any("\n" in line for line in value):
            raise ValueError("expected one shell line per item")
        return value

    @property
    def ranks_on_a_node(self) -> int:
        return 1 if self.whole_nodes else self.gpus_per_node or self.ranks_per_node

    @property
    def ranks(self) -> int:
        return self.nodes * self.ranks_on_a_node

    @property
    def minutes(self) -> int:
        return minutes(self.time)

    @property
    def lead(self) -> int:
        """Seconds before the end at which SLURM is to send the warning."""
        return max(1, min(self.warning, self.minutes * 60 // 3))

    @property
    def megabytes(self) -> int | None:
        if self.memory is None:
            return None
        match = MEMORY.fullmatch(self.memory)
        assert match is not None, "the field was checked"
        number, unit = match.groups()
        return math.ceil(
            int(number) * {"K": 1 / 1024, "": 1, "M": 1, "G": 1024, "T": 1024**2}[unit.upper()]
        )


def typed(text: str) -> tuple[str | None, int]:
    """`a100:2` is two GPUs of a type, a type alone is one, as for SLURM; a number has no type."""
    kind, colon, count = str(text).rpartition(":")
    if not colon:
        return (None, int(text)) if str(text).isdecimal() else (str(text), 1)
    return kind or None, int(count) if count.isdecimal() else 0


def minutes(text: str | int) -> int:
    """A time limit in minutes, rounded up as SLURM does. Raises ValueError."""
    text = str(text).strip()
    seconds = 0
    if text and (match := LETTERS.fullmatch(text)) and any(match.groups()):
        days, hours, rest = (int(group or 0) for group in match.groups())
        seconds = ((days * 24 + hours) * 60 + rest) * 60
    elif match := TIME.fullmatch(text):
        fields = [int(field) for field in match["fields"].split(":")]
        if match["days"] is not None:  # days-hours[:minutes[:seconds]]
            hours, rest, last = (*fields, 0, 0)[:3]
            seconds = ((int(match["days"]) * 24 + hours) * 60 + rest) * 60 + last
        elif len(fields) == 3:
            seconds = (fields[0] * 60 + fields[1]) * 60 + fields[2]
        else:  # minutes[:seconds]
            seconds = fields[0] * 60 + (fields[1] if len(fields) > 1 else 0)
    if not seconds:
        raise ValueError(
            "expected minutes, 12h, 1d6h, hours:minutes:seconds or days-hours:minutes:seconds, "
            "and more than nothing"
        )
    return math.ceil(seconds / 60)


def make_spec(
    options: dict[str, Any], cluster: str | None = None, places: tuple[Path, ...] = PLACES
) -> JobSpec:
    """The profile of `cluster` (none: the file's default, if any) with `options` over it. What the
    user has set for sbatch (SBATCH_PARTITION and its like) stands between the two, as it does for
    sbatch. Raises InputError that names every fault."""
    from_environment = of_environment() if places else {}
    profile = read_profile(cluster, places)
    for given, other in (("gpus", "gpus_per_node"), ("gpus_per_node", "gpus")):
        if given in options:  # what the profile says of the same
            profile.pop(other, None)
    return settings.validate(JobSpec, {**profile, **from_environment, **options}, "job")


OBEYED = ("partition", "account", "qos", "reservation", "constraint", "clusters")


def of_environment() -> dict[str, str]:
    """What the user has set for sbatch, as options of ours."""
    options = {"clusters": os.environ.get("SLURM_CLUSTERS")}
    options |= {key: value for key in OBEYED if (value := os.environ.get(f"SBATCH_{key.upper()}"))}
    return {key: value for key, value in options.items() if value}


def not_obeyed() -> list[str]:
    """Variables that the user has set for sbatch and that no job of ours gets."""
    obeyed = {f"SBATCH_{key.upper()}" for key in OBEYED}
    return sorted(name for name in os.environ if name.startswith("SBATCH_") and name not in obeyed)


def read_profile(cluster: str | None, places: tuple[Path, ...] = PLACES) -> dict[str, Any]:
    """The options of a cluster's profile; of the first file that exists. Raises InputError."""
    path = next((place.expanduser() for place in places if place.expanduser().is_file()), None)
    if path is None:
        if cluster:
            raise InputError(
                f"--cluster: found '{cluster}', but there is no file "
                f"{' or '.join(map(str, places))}"
            )
        return {}
    document = settings.read(path, "--cluster", settings.text_keys(JobSpec)) or {}
    profiles = document.get("clusters") if isinstance(document, dict) else None
    if not isinstance(profiles, dict) or (
        unknown := sorted(set(document) - {"default", "clusters"})
    ):
        fault = (
            f"found the key '{unknown[0]}'"
            if isinstance(profiles, dict)
            else "found no mapping `clusters`"
        )
        raise InputError(f"{path}: {fault}; expected the keys: default, clusters")
    for name, options in profiles.items():
        if not isinstance(options, dict):
            raise InputError(
                f"{path}: clusters.{name}: found {options!r}, expected a mapping of options to "
                "values"
            )
        settings.validate(JobSpec, options, f"{path}: clusters.{name}")
    name = cluster or document.get("default")
    if name is not None and name not in profiles:
        raise InputError(
            f"{path}: found no cluster '{name}'; expected one of: "
            f"{', '.join(map(str, profiles)) or 'none'}"
        )
    return dict(profiles[name]) if name is not None else {}
