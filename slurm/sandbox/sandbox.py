"""A real SLURM of four nodes with four pretended GPUs each, on this machine alone, for tests and
for trying things out.

Debian's packages slurmctld, slurmd, slurm-client and munge are enough; nothing of the machine's own
configuration is touched: all state lies in one folder, and only processes named by its pid files
are ever stopped. An accounting database only if asked for. Needs root. Nodes are loopback
addresses, so that ranks find each other without an entry in /etc/hosts; partitions: `main`, and
`low` and `low0`, which `main` preempts after a grace time of 8 s and at once.
"""

from __future__ import annotations

import os
import random
import shutil
import signal
import socket
import subprocess
import time
from contextlib import suppress
from pathlib import Path

from segfleet.core.errors import InputError
from segfleet.core.process import alive
from segfleet.slurm.sandbox import database as sandbox_database
from segfleet.slurm.sandbox.database import Database

PROGRAMS = (
    "munged",
    "slurmctld",
    "slurmd",
    "sbatch",
    "srun",
    "squeue",
    "scontrol",
    "scancel",
    "sinfo",
)
PACKAGES = "slurmctld slurmd slurm-client munge"
NODES = tuple(f"127.0.0.{number}" for number in range(11, 15))
SEARCH = os.pathsep.join([os.environ.get("PATH", os.defpath), "/usr/sbin", "/sbin"])

CONFIGURATION = """\
ClusterName={name}
FirstJobId={first_job}
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={port}
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
CredType=cred/munge
AuthInfo=socket={keys}/munge/sock
SlurmctldPidFile={folder}/ctld.pid
SlurmdPidFile={folder}/spool/slurmd-%n.pid
SlurmdSpoolDir={folder}/spool/%n
StateSaveLocation={folder}/ctld
SlurmctldLogFile={folder}/log/slurmctld.log
SlurmdLogFile={folder}/log/slurmd-%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/linux
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU_Memory
DefMemPerCPU=250
SlurmdParameters=config_overrides
SchedulerParameters=sched_interval=2,bf_interval=2,sched_min_interval=0,batch_sched_delay=0
SchedulerType=sched/backfill
SwitchType=switch/none
MpiDefault=none
ReturnToService=2
JobRequeue=1
KillWait=5
SlurmdTimeout=10
SlurmctldTimeout=10
MinJobAge={remembers}
PropagateResourceLimits=NONE
MailProg=/bin/true
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
SlurmctldParameters=preempt_send_user_signal
PriorityType=priority/basic
GresTypes=gpu
JobCompType=jobcomp/filetxt
JobCompLoc={folder}/log/jobcomp.txt
{accounting}
NodeName=127.0.0.[11-14] NodeHostname={host} Port=[{first_port}-{last_port}] CPUs=8 RealMemory=8000 Gres={gres} Feature=fake State=UNKNOWN
PartitionName=main Nodes=ALL Default=YES MaxTime=INFINITE PriorityTier=10 PreemptMode=OFF State=UP
PartitionName=low Nodes=ALL MaxTime=INFINITE PriorityTier=1 PreemptMode=REQUEUE GraceTime=8 State=UP
PartitionName=low0 Nodes=ALL MaxTime=INFINITE PriorityTier=1 PreemptMode=REQUEUE GraceTime=0 State=UP
{further}
"""


def missing(accounting: bool = False) -> str | None:
    """Why there can be no sandbox here, or none with accounting, or None."""
    programs, packages = PROGRAMS, PACKAGES
    if accounting:
        programs, packages = (
            programs + sandbox_database.PROGRAMS,
            f"{packages} {sandbox_database.PACKAGES}",
        )
    absent = [name for name in programs if shutil.which(name, path=SEARCH) is None]
    if absent:
        return (
            f"{', '.join(absent)} not found; as root: apt-get install --no-install-recommends "
            f"{packages}"
        )
    if os.geteuid() != 0:
        return "the sandbox's daemons run as root; start it as root or in a container"
    return None


class Sandbox:
    """The daemons of one folder. `environment` is what programs need to talk to them.

    `accounting`: with slurmdbd and a database of its own. `remembers`: seconds for which the
    controller knows a job that has ended. `gpus`: how many of which type every node pretends, four
    at most. `further`: lines of slurm.conf. `beside`: a running sandbox with accounting; this is
    another cluster, called `name`, of its database.
    """

    def __init__(
        self,
        folder: Path,
        first_job: int | None = None,
        accounting: bool = False,
        remembers: int = 300,
        gpus: dict[str, int] | None = None,
        further: str = "",
        name: str = "sandbox",
        beside: Sandbox | None = None,
    ):
        self.folder = Path(folder).resolve()
        self.accounting, self.remembers = accounting, remembers
        self.gpus, self.further = gpus or {"": 4}, further
        self.name, self.beside = name, beside
        self.database: Database | None = beside.database if beside else None
        # ids of an earlier sandbox do not come again
        self.first_job = first_job or random.SystemRandom().randrange(1000, 900_000)
        self.configuration = self.folder / "etc" / "slurm.conf"

    @property
    def environment(self) -> dict[str, str]:
        return {
            **os.environ,
            "PATH": SEARCH,
            "SLURM_CONF": str(self.configuration),
            "SEGFLEET_QUEUE_SECONDS": "0",  # of its own: ask as often as you like
        }

    def call(self, *command: str, timeout: float = 30) -> str:
        """Output of a SLURM program. Raises CalledProcessError with its own words."""
        return subprocess.run(
            command,
            env=self.environment,
            check=True,
            capture_output=True,
            text=True,
            timeout=timeout,
        ).stdout

    def start(self) -> None:
        """Write the configuration and start all daemons; back when the nodes are idle. Raises
        InputError."""
        if why := missing(self.accounting):
            raise InputError(f"slurm-sandbox: {why}")
        if self.pids():
            raise InputError(f"slurm-sandbox: one runs in {self.folder} already; stop it first")
        if self.folder.exists() and any(self.folder.iterdir()) and not self.configuration.is_file():
            raise InputError(
                f"slurm-sandbox: {self.folder} is not empty and holds no sandbox; give a new folder"
            )
        if len(str(self.folder)) > 80:
            raise InputError(
                f"slurm-sandbox: {self.folder} is too long a path for a socket; give a shorter one"
            )
        self._write()
        if closed := next(
            (path for path in self.folder.parents if not path.stat().st_mode & 0o001), None
        ):
            raise InputError(
                f"slurm-sandbox: not everybody may enter {closed}, and munge insists on that; "
                "give another folder"
            )
        if self.beside is None:
            munge = self.folder / "munge"
            files = (f"--{name}={munge}/{file}" for name, file in FILES.items())
            self._daemon("munged", *files)
            if self.database:
                self.database.start(SEARCH)
                self._daemon("slurmdbd")
        if self.database:
            self._register()
        self._daemon("slurmctld")
        for node in NODES:
            self._daemon("slurmd", "-N", node)
        self._await_idle()

    def start_node(self, node: str) -> None:
        """Bring a killed node's daemon back."""
        self._daemon("slurmd", "-N", node)

    def start_controller(self) -> None:
        """Bring a killed controller back."""
        self._daemon("slurmctld")

    def stop(self, patience: float = 15) -> None:
        """Cancel all jobs, end the daemons by their process ids, and wait until they are gone. The
        folder stays."""
        with suppress(subprocess.SubprocessError, OSError):
            self.call("scancel", "--user=root", timeout=10)
            deadline = time.monotonic() + 8
            while self.call("squeue", "-h", timeout=10).strip() and time.monotonic() < deadline:
                time.sleep(0.1)
        pids = self.pids()
        # Each tells the next what it still has to say, and munged signs it.
        for names in (
            [f"slurmd {node}" for node in NODES],
            ["slurmctld"],
            ["slurmdbd"],
            ["mariadbd"],
            ["munged"],
        ):
            _end([pids[name] for name in names if name in pids], patience)

    def pids(self) -> dict[str, int]:
        """Running daemons of this folder by name. A pid file that another process inherited is
        passed over."""
        files = {"munged": self.folder / "munge" / "pid", "slurmctld": self.folder / "ctld.pid"}
        files |= {"slurmdbd": self.folder / "dbd.pid", "mariadbd": self.folder / "db" / "pid"}
        files |= {f"slurmd {node}": self.folder / "spool" / f"slurmd-{node}.pid" for node in NODES}
        pids = {}
        for name, file in files.items():
            with suppress(OSError, ValueError):
                pid = int(file.read_text())
                command = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")[0].decode()
                if Path(command).name == name.split()[0] and alive(pid):
                    pids[name] = pid
        return pids

    def _write(self) -> None:
        """All files but the database's."""
        for name in ("munge", "ctld", "log", "dev", "etc", *(f"spool/{node}" for node in NODES)):
            (self.folder / name).mkdir(parents=True, exist_ok=True)
        for path in (self.folder, self.folder / "munge"):
            path.chmod(0o755)
        key = self.folder / "munge" / "key"
        if not key.exists():
            key.write_bytes(os.urandom(1024))
            key.chmod(0o400)
        for index in range(4):
            device = self.folder / "dev" / f"nvidia{index}"
            if not device.exists():
                # a second /dev/null: only its being a device matters
                os.mknod(device, 0o666 | 0o020000, os.makedev(1, 3))
        port = free_ports(15)
        if self.accounting and not self.beside:
            self.database = Database(self.folder, port + 2, port + 1)
        text = CONFIGURATION.format(
            name=self.name,
            folder=self.folder,
            keys=self.beside.folder if self.beside else self.folder,
            host=socket.gethostname().split(".")[0],
            port=port,
            first_port=port + 11,
            last_port=port + 14,
            first_job=self.first_job,
            remembers=self.remembers,
            further=self.further,
            gres=",".join(
                f"gpu:{kind}:{count}" if kind else f"gpu:{count}"
                for kind, count in self.gpus.items()
            ),
            accounting=self.database.controller
            if self.database
            else "AccountingStorageType=accounting_storage/none",
        )
        self.configuration.write_text(text)
        names = ",".join(NODES)
        lines, first = [], 0
        for kind, count in self.gpus.items():
            devices = f"{self.folder}/dev/nvidia[{first}-{first + count - 1}]"
            typed = f" Type={kind}" if kind else ""
            lines.append(f"NodeName={names} Name=gpu{typed} Count={count} File={devices}\n")
            first += count
        (self.folder / "etc" / "gres.conf").write_text("".join(lines))
        # else slurmd wants a mounted cgroup
        (self.folder / "etc" / "cgroup.conf").write_text("CgroupPlugin=cgroup/v1\n")

    def _daemon(self, *command: str) -> None:
        # Not from inside a job: a daemon that inherits a job's variables hands them on.
        clean = {
            name: value
            for name, value in self.environment.items()
            if not name.startswith("SLURM_") or name == "SLURM_CONF"
        }
        silent = {"stdin": subprocess.DEVNULL, "stdout": subprocess.DEVNULL}
        done = subprocess.run(
            command, env=clean, stderr=subprocess.PIPE, text=True, start_new_session=True, **silent
        )
        if done.returncode:
            raise RuntimeError(
                f"slurm-sandbox: {' '.join(command)} failed: {done.stderr.strip()}; logs in "
                f"{self.folder}/log"
            )

    def _register(self, patience: float = 30) -> None:
        """Tell slurmdbd of this cluster as soon as it answers."""
        deadline = time.monotonic() + patience
        while True:
            try:
                if (
                    self.name
                    not in self.call(
                        "sacctmgr", "-n", "-P", "list", "cluster", "format=cluster"
                    ).split()
                ):
                    self.call("sacctmgr", "-i", "add", "cluster", self.name)
                return
            except subprocess.SubprocessError:
                if time.monotonic() > deadline:
                    raise RuntimeError(
                        "slurm-sandbox: slurmdbd does not answer; log in "
                        f"{self.folder}/log/slurmdbd.log"
                    ) from None
            time.sleep(0.1)

    def _await_idle(self, patience: float = 30) -> None:
        deadline = time.monotonic() + patience
        while time.monotonic() < deadline:
            with suppress(subprocess.SubprocessError):
                if self.call("sinfo", "-h", "-p", "main", "-o", "%T %D").split() == [
                    "idle",
                    str(len(NODES)),
                ]:
                    return
            time.sleep(0.1)
        raise RuntimeError(
            f"slurm-sandbox: the nodes are not idle after {patience:.0f} s; logs in "
            f"{self.folder}/log"
        )


FILES = {
    "key-file": "key",
    "socket": "sock",
    "pid-file": "pid",
    "log-file": "log",
    "seed-file": "seed",
}


def free_ports(count: int) -> int:
    """The first of `count` ports in a row that are free, below the range the kernel hands
    out."""
    chance = random.SystemRandom()
    for _ in range(200):
        first = chance.randrange(12_000, 32_000)
        with suppress(OSError):
            for port in range(first, first + count):
                with socket.socket() as probe:
                    probe.bind(("0.0.0.0", port))
            return first
    raise RuntimeError("slurm-sandbox: no free ports")


def _end(pids: list[int], patience: float) -> None:
    for number in (signal.SIGTERM, signal.SIGKILL):
        for pid in pids:
            if alive(pid):
                with suppress(ProcessLookupError):
                    os.kill(pid, number)
        deadline = time.monotonic() + patience
        while any(map(alive, pids)) and time.monotonic() < deadline:
            time.sleep(0.05)
