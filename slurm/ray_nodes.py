"""A Ray cluster inside a SLURM job: one task of each node starts Ray there, the first one's command
uses it, and all of it goes with the job. The cluster's token is drawn anew and known to this user
alone."""

from __future__ import annotations

import os
import secrets
import shutil
import socket
import stat
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from segfleet.core.errors import InputError
from segfleet.core.machine import cpus
from segfleet.pipeline.launch import rendezvous
from segfleet.pipeline.stop import StopRequest

OVER = "over"  # a file in the life's folder: the first node's command has ended
UP = 180.0  # seconds that Ray may take to start on a node
INSIDE = "r"  # Ray's own folder, which it opens to everybody, in the one that is ours alone
LONGEST = 28  # characters of the folder below which Ray's sockets lie; their paths have 107
SETTINGS = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_worker_niceness": "0",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    "RAY_AUTH_MODE": "token",
}
Outcome = tuple[int, BaseException | None]


def run(
    life: Path,
    rank: int,
    gpus: int,
    stop: StopRequest,
    command: Callable[[list[str], dict[str, str]], Outcome],
) -> Outcome:
    """The part of one node. `command` gets the words that name the cluster and its environment; it
    is called on the first node alone, when all nodes are there."""
    address = life / "ray"
    if rank:
        head = rendezvous.published(address, rank)
        place = f"{head['host']}:{head['port']}"
        with (
            private_folder(Path(head["folder"])),
            started(["--address", place], head["token"], gpus) as ray,
        ):
            while not (life / OVER).exists() and ray.poll() is None:
                time.sleep(0.5)
        return 0, None
    host = socket.getaddrinfo(os.environ["SEGFLEET_MASTER_HOST"], None, socket.AF_INET)[0][4][0]
    with socket.create_server((host, 0)) as probe:
        port = probe.getsockname()[1]
    token, folder = secrets.token_hex(32), Path(tempfile.mkdtemp(prefix="sf-", dir=short_folder()))
    inside = str(folder / INSIDE)
    words = ["--head", "--port", str(port), "--temp-dir", inside, "--include-dashboard=false"]
    try:
        with started([*words, "--node-ip-address", host], token, gpus) as ray:
            _await(ray, host, port)
            head = {"host": host, "port": port, "token": token, "folder": str(folder)}
            rendezvous.publish(address, head)
            share = str(max(1, cpus() // (gpus or cpus())))
            environment = {**SETTINGS, "RAY_AUTH_TOKEN": token, "OMP_NUM_THREADS": share}
            _await_nodes(f"{host}:{port}", environment, int(os.environ["WORLD_SIZE"]), stop)
            return command(["--on", "local", "--address", f"{host}:{port}"], environment)
    finally:
        (life / OVER).touch()
        shutil.rmtree(folder, ignore_errors=True)


@contextmanager
def private_folder(folder: Path) -> Iterator[None]:
    """The first node's folder of Ray on this node, for this user alone. Raises InputError."""
    try:
        folder.mkdir(mode=0o700)
    except FileExistsError:  # of a node that is the same machine
        status = os.lstat(folder)
        if (
            not stat.S_ISDIR(status.st_mode)
            or status.st_uid != os.getuid()
            or status.st_mode & 0o077
        ):
            raise InputError(f"sweep: {folder} is open to others, and Ray needs it") from None
        yield
        return
    except OSError as error:
        raise InputError(f"sweep: Ray needs a folder {folder}, as on its head: {error}") from None
    try:
        yield
    finally:
        shutil.rmtree(folder, ignore_errors=True)


@contextmanager
def started(words: list[str], token: str, gpus: int) -> Iterator[subprocess.Popen]:
    """Ray on this node, and every process of it gone at the end."""
    import psutil

    shares = [
        "--num-cpus",
        str(cpus()),
        "--num-gpus",
        str(gpus),
        "--block",
        "--disable-usage-stats",
    ]
    # any free ports: several people's clusters share a node
    shares += ["--min-worker-port=0", "--max-worker-port=0", "--dashboard-agent-listen-port=0"]
    if "--node-ip-address" not in words:
        name = os.environ["SEGFLEET_MASTER_HOST"]
        own = socket.getaddrinfo(name, None, socket.AF_INET)[0][4][0]
        shares += ["--node-ip-address", own]
    process = subprocess.Popen(
        [sys.executable, "-P", "-m", "ray.scripts.scripts", "start", *words, *shares],
        env={**os.environ, **SETTINGS, "RAY_AUTH_TOKEN": token},
        stdin=subprocess.DEVNULL, stdout=sys.stderr, start_new_session=True,
    )  # fmt: skip
    try:
        yield process
    finally:
        family = []
        with suppress(psutil.Error):
            family = psutil.Process(process.pid).children(recursive=True)
        process.terminate()
        with suppress(subprocess.TimeoutExpired):
            process.wait(15)
        process.kill()
        for child in family:
            with suppress(psutil.Error):
                child.kill()
        process.wait()


def _await(ray: subprocess.Popen, host: str, port: int) -> None:
    """Until Ray takes connections. Raises InputError."""
    end = time.monotonic() + UP
    while True:
        try:
            socket.create_connection((host, port), timeout=2).close()
            return
        except OSError:
            if ray.poll() is not None or time.monotonic() > end:
                raise InputError(
                    f"sweep: Ray did not start on {host} within {UP:.0f} s; its words are above"
                ) from None
        time.sleep(0.3)


def _await_nodes(address: str, environment: dict[str, str], count: int, stop: StopRequest) -> None:
    """Until all nodes are there; in a process of its own, which alone is Ray's client."""
    program = (
        "import sys, time, ray\n"
        "ray.init(address=sys.argv[1], log_to_driver=False, logging_level='ERROR')\n"
        "end = time.time() + float(sys.argv[3])\n"
        "while sum(node['Alive'] for node in ray.nodes()) < int(sys.argv[2]):\n"
        "    time.sleep(0.5)\n"
        "    if time.time() > end: sys.exit(3)\n"
    )
    done = subprocess.run(
        [sys.executable, "-P", "-c", program, address, str(count), str(UP)],
        env={**os.environ, **environment}, stdin=subprocess.DEVNULL, stdout=sys.stderr,
    )  # fmt: skip
    if done.returncode and not stop.asked():
        raise InputError(
            f"sweep: not all {count} nodes joined Ray at {address} within {UP:.0f} s; their words "
            "are in the job's logs"
        )


def short_folder() -> str:
    """Where Ray's sockets go: RAY_TMPDIR or TMPDIR as the user has set them, else /tmp. The name of
    a socket has 107 characters at most. Raises InputError if none of the folders will do."""
    chosen: list[Any] = [os.environ.get(name) for name in ("RAY_TMPDIR", "TMPDIR")]
    places = [place for place in (*chosen, "/tmp", "/var/tmp", "/dev/shm") if place]
    for place in places:
        if len(place) <= LONGEST and os.access(place, os.W_OK | os.X_OK):
            return place
    raise InputError(
        f"Ray needs a folder for its sockets, of at most {LONGEST} characters, that can be "
        f"written; found none of {', '.join(dict.fromkeys(places))}; set RAY_TMPDIR to one"
    )
