"""Two users on one machine: what `nobody` gets of a training, a staged copy and a sweep's Ray.

    sudo python benchmarks/two_users.py [training] [ray]

As root a training with two ranks, two loader processes each and a staged copy is started, in a
place that everybody may enter, as on a cluster. While it runs, a process of the user nobody tries
whatever the system lets it try: files, processes, sockets, ports, shared memory, places that are
about to be used. Every attempt must come away with nothing. Then the training is stopped, and every
loss that it has noted must be that of an undisturbed one. Then the same with a Ray of `segfleet
sweep`.
"""

from __future__ import annotations

import json
import os
import select
import shutil
import signal
import socket
import stat
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import forked
import yaml

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent / "tests"))
from conftest import write_tiny_store  # noqa: E402

NOBODY = 65534
LOADERS = ("loader", "pt_data_worker")  # torch names its own
LOOPBACK = ("127.0.0.1", "::1", "::ffff:127.0.0.1")
PATIENCE = 20.0  # s
MORE = 50  # steps after the last attempt, that show whether it changed anything
Got = str  # what an attempt came away with; "" for nothing


def as_nobody(attempt: Callable[..., Got], *words: Any) -> Got:
    """What an attempt returns, made by a process of the user nobody; one that hangs got nothing."""
    ours, theirs = os.pipe()
    child = os.fork()
    if child == 0:
        os.setgroups([])
        os.setgid(NOBODY)
        os.setuid(NOBODY)
        try:
            got = attempt(*words)
        except OSError:
            got = ""
        except BaseException as error:
            got = f"a fault of this benchmark: {error!r}"
        os.write(theirs, got.encode()[:4000])
        os._exit(0)
    os.close(theirs)
    if not select.select([ours], [], [], PATIENCE)[0]:
        os.kill(child, signal.SIGKILL)
    with os.fdopen(ours, "rb") as file:
        got = file.read().decode()
    os.waitpid(child, 0)
    return got


def at_each(attempt: Callable[..., Got], ports: list[int], *words: Any) -> Got:
    """Each port by a process of its own: torch's client waits for ever for one that says
    nothing."""
    return " ".join(filter(None, (as_nobody(attempt, [port], *words) for port in ports)))


# --- attempts -------------------------------------------------------------------------------------


def opened(paths: list[str], flags: int) -> Got:
    found = []
    for path in paths:
        with suppress(OSError):
            os.close(os.open(path, flags | os.O_NONBLOCK))
            found.append(path)
    return " ".join(found)


def read_processes(numbers: list[int]) -> Got:
    names = ("environ", "mem", "maps", "fd", "fdinfo", "cwd", "root", "exe", "io", "syscall")
    found = []
    for number in numbers:
        for name in names:
            path = Path(f"/proc/{number}/{name}")
            with suppress(OSError):
                os.listdir(path) if path.is_dir() else path.open("rb").read(1)
                found.append(str(path))
    return " ".join(found)


def killed(numbers: list[int]) -> Got:
    found = []
    for number in numbers:
        with suppress(PermissionError):
            os.kill(number, signal.SIGTERM)
            found.append(str(number))
    return " ".join(found)


def replaced(folder: str) -> Got:
    """A folder moved away, so that another one can take its place."""
    os.rename(folder, folder + ".nobody")
    return folder


def connected_to_sockets(names: list[str]) -> Got:
    """Local sockets, by path or by name without a path, which asks nobody for permission."""
    found = []
    for name in names:
        with suppress(OSError), socket.socket(socket.AF_UNIX) as one:
            one.settimeout(2)
            one.connect("\0" + name[1:] if name.startswith("@") else name)
            found.append(name)
    return " ".join(found)


def read_store(ports: list[int], secrets: list[bytes]) -> Got:
    """Everything that a client of torch's store gets, where it speaks; then junk into it."""
    import datetime

    import torch.distributed as dist

    found, spoke = [], 0
    for port in ports:
        with suppress(Exception):
            patience = datetime.timedelta(seconds=3)
            store = dist.TCPStore("127.0.0.1", port, None, False, patience, False)
            names = store.list_keys()
            spoke += 1
            said = b"".join(name.encode() for name in names)
            for name in names:
                with suppress(Exception):
                    said += store.get(name)
            found += [repr(secret) for secret in secrets if secret in said]
            store.set("nonce", b"0" * 64)
            store.set("gloo/0", b"\0" * 4096)
    return " ".join(found)


def talked_to(ports: list[int]) -> Got:
    """What a port says to a stranger who sends junk."""
    found = []
    for port in ports:
        with suppress(OSError), socket.create_connection(("127.0.0.1", port), timeout=2) as one:
            one.sendall(b"\xff" * 4096)
            one.settimeout(1)
            if said := one.recv(4096):
                found.append(f"{port}: {said[:60]!r}")
    return " ".join(found)


def asked_ray(address: str) -> Got:
    """Keys of the cluster's own store, by a process of the user nobody. All that is imported was
    imported before: nobody need not read where Python lies."""
    from ray._raylet import GcsClient

    os.setgroups([])
    os.setgid(NOBODY)
    os.setuid(NOBODY)
    try:
        found = GcsClient(address=address).internal_kv_keys(b"", None, timeout=20)
    except Exception as error:
        print(f"refused: {str(error)[:200]}", file=sys.stderr)
        return ""
    return f"{len(found)} keys"


def with_token(address: str, token: str) -> Got:
    """The same in a clean interpreter: this one knows the token."""
    environment = {**os.environ, "RAY_AUTH_MODE": "token" if token else "disabled"}
    environment |= {"HOME": "/nonexistent", "RAY_AUTH_TOKEN": token}
    if not token:
        del environment["RAY_AUTH_TOKEN"]
    words = [sys.executable, __file__, "--ask", address]
    return subprocess.run(words, env=environment, stdout=subprocess.PIPE, text=True).stdout.strip()


# --- what there is --------------------------------------------------------------------------------


def listening(numbers: list[int], place: str = "tcp") -> dict[int, str]:
    """Ports that processes listen on, and their addresses."""
    import psutil

    found = {}
    for number in numbers:
        with suppress(psutil.Error):
            for one in psutil.Process(number).net_connections(place):
                if one.status == psutil.CONN_LISTEN:
                    found[one.laddr.port] = one.laddr.ip
    return found


def local_sockets(numbers: list[int]) -> list[str]:
    own = set()
    for number in numbers:
        with suppress(OSError):
            for handle in Path(f"/proc/{number}/fd").iterdir():
                own.add(os.readlink(handle).removeprefix("socket:[").rstrip("]"))
    rows = [line.split() for line in Path("/proc/net/unix").read_text().splitlines()[1:]]
    return sorted({row[7] for row in rows if len(row) > 7 and row[6] in own})


def below(*folders: Path) -> list[str]:
    return [str(path) for folder in folders for path in (folder, *folder.rglob("*"))]


# --- the two scenes -------------------------------------------------------------------------------


def world(work: Path) -> None:
    write_tiny_store(work / "store", 2, "zarr", 6, 1, 24, 1)
    recipe = {
        "name": "two",
        "data": {"store": str(work / "store"), "batch": 4, "patch": [16, 16], "workers": 2},
        "model": {"name": "unet_lite_standard", "options": {"width": 2}},
        "stages": [{"name": "base", "epochs": 100_000, "steps": 100, "lr": 1e-3}],
        "evaluation": {"every": 0},
    }
    (work / "two.yaml").write_text(yaml.safe_dump(recipe))
    (work / "tmp").mkdir()
    os.chmod(work / "tmp", 0o1777)  # as /tmp
    os.chmod(work, 0o755)


def command(runs: str) -> list[str]:
    return ["train", "two.yaml", "--ranks", "2", "--runs", runs, "--stage-to", "$TMPDIR"]


def losses(work: Path, runs: str) -> dict[int, float]:
    """Step -> loss, as far as a training has noted them."""
    found = {}
    for path in (work / runs).rglob("events.jsonl"):
        for line in path.read_text().splitlines():
            with suppress(ValueError, KeyError):  # half a line
                event = json.loads(line)
                found[event["step"]] = event["loss"]
    return found


def stopped_after(work: Path, runs: str, step: int, child: int, ended: dict[int, int]) -> None:
    """Wait until a training has done so many steps, and have it stop in order."""
    while max(losses(work, runs), default=0) < step:
        if child in forked.reap(ended):
            return
        time.sleep(0.2)
    os.kill(child, signal.SIGTERM)
    while child not in forked.reap(ended):
        time.sleep(0.05)


def training(work: Path) -> dict[str, Got]:
    tmp, err = work / "tmp", work / "stderr"
    memory = set(os.listdir("/dev/shm"))
    child, ended = forked.start(work, command("runs"), err=err, TMPDIR=str(tmp)), {}
    got = {}
    try:
        while len([n for n in forked.tree().values() if n in LOADERS]) < 6 or not losses(
            work, "runs"
        ):  # two servers, four loaders
            if child in forked.reap(ended):
                raise SystemExit(f"it ended before it was looked at\n{err.read_text()}")
            time.sleep(0.1)
        got = attempts(work, memory)
        stopped_after(work, "runs", max(losses(work, "runs")) + MORE, child, ended)
    finally:
        forked.end(forked.tree())
    found = losses(work, "runs")
    calm = forked.start(work, command("calm"), err=err, TMPDIR=str(tmp))
    stopped_after(work, "calm", max(found), calm, ended)
    wanted = losses(work, "calm")
    both = found.keys() & wanted.keys()  # at its end a training notes what is left of a window
    same = all(wanted[step] == found[step] for step in both)
    got["ends the training"] = "" if ended[child] == 75 else f"exit code {ended[child]}"
    got["changes the training"] = "" if len(both) >= MORE // 10 and same else "yes"
    return got | ambushes(work)


def attempts(work: Path, memory: set[str]) -> dict[str, Got]:
    """On a training that runs."""
    tmp, numbers = work / "tmp", list(forked.tree())
    (rendezvous,) = (path.parent for path in tmp.glob("segfleet-*/address"))
    token = json.loads((rendezvous / "address").read_text())["token"]
    ports, copies = listening(numbers), tmp / f"segfleet-{os.getuid()}"
    noted = [path.parent for path in tmp.glob("segfleet-*/made-by.json")]
    private = below(rendezvous, copies, *noted)
    shared = [f"/dev/shm/{name}" for name in set(os.listdir("/dev/shm")) - memory]
    runs = below(work / "runs")
    secrets = [token.encode(), bytes.fromhex(token), b"127.0.0.1"]
    return {
        "reads private files": as_nobody(opened, private, os.O_RDONLY),
        "writes private files": as_nobody(opened, private, os.O_WRONLY),
        "replaces the staged copies": as_nobody(replaced, str(copies)),
        "replaces the rendezvous": as_nobody(replaced, str(rendezvous)),
        "writes into the run": as_nobody(opened, runs, os.O_WRONLY),
        "replaces a run": as_nobody(replaced, str(next((work / "runs").glob("*")))),
        "reads processes": as_nobody(read_processes, numbers),
        "ends processes": as_nobody(killed, numbers),
        "enters local sockets": as_nobody(connected_to_sockets, local_sockets(numbers)),
        "opens shared memory": as_nobody(opened, shared, os.O_RDONLY),
        "reads the ranks' store": at_each(read_store, list(ports), secrets),
        "is answered by a port": as_nobody(talked_to, list(ports)),
        "ports on other addresses": " ".join(
            f"{ip}:{port}" for port, ip in ports.items() if ip not in LOOPBACK
        ),
    }


def ambushes(work: Path) -> dict[str, Got]:
    """Places that nobody took before the first start: the command must refuse them."""
    got = {}
    for how in ("a folder", "a link", "an open folder"):
        tmp, err = work / f"ambush {how}", work / "stderr"
        shutil.rmtree(tmp, ignore_errors=True)
        tmp.mkdir()
        os.chmod(tmp, 0o1777)
        taken, out = tmp / f"segfleet-{os.getuid()}", work / "out"
        if how == "a link":
            os.symlink(work / "tmp", taken)
        else:
            taken.mkdir()
            os.chmod(taken, 0o777)
        os.chown(
            taken, *((NOBODY, NOBODY) if how != "an open folder" else (0, 0)), follow_symlinks=False
        )
        code = forked.run(work, command("ambushed"), seconds=600, err=err, TMPDIR=str(tmp), out=out)
        got[f"takes the staged copies' place by {how}"] = "" if code == 2 else f"exit code {code}"
    return got


def ray(work: Path) -> dict[str, Got]:
    from segfleet.sweeps.ray.controller import ray_session
    from segfleet.sweeps.run import Resources

    folder = work / "sweep"
    folder.mkdir()
    with ray_session(Resources(slots=1), folder):
        import ray as library

        address = library.get_runtime_context().gcs_address
        session = Path(json.loads((folder / "ray.json").read_text())["temporary"])
        numbers = list(forked.tree())
        ports = listening(numbers)
        token = os.environ["RAY_AUTH_TOKEN"]
        asked = [with_token(address, words) for words in ("", "0" * len(token), token)]
        if not asked[-1]:
            raise SystemExit("with the token nobody is not let in either: this shows nothing")
        found = {
            "asks Ray without a token": asked[0],
            "asks Ray with another token": asked[1],
            "reads Ray's files": as_nobody(opened, below(session), os.O_RDONLY),
            "writes Ray's files": as_nobody(opened, below(session), os.O_WRONLY),
            "reads Ray's processes": as_nobody(read_processes, numbers),
            "enters Ray's local sockets": as_nobody(connected_to_sockets, local_sockets(numbers)),
            "Ray's ports on other addresses": " ".join(
                f"{ip}:{port}" for port, ip in ports.items() if ip not in LOOPBACK
            ),
        }
        assert stat.S_ISDIR(os.stat(session).st_mode)
    return found


SCENES = {"training": training, "ray": ray}


def main(wanted: list[str]) -> int:
    if os.getuid() != 0:
        raise SystemExit("only root can be two users")
    forked.warm()
    path = HERE / "results" / "two_users.json"
    every = json.loads(path.read_text()) if path.exists() else {}
    for scene in wanted:
        with tempfile.TemporaryDirectory(prefix="two-users-") as name:
            world(Path(name))
            got = SCENES[scene](Path(name))
        every[scene] = {
            "attempts": len(got),
            "came away with something": {key: value for key, value in got.items() if value},
            "attempted": sorted(got),
        }
        path.write_text(json.dumps(every, indent=1) + "\n")
        print(json.dumps({scene: every[scene]}, indent=1), flush=True)
    return 1 if any(every[scene]["came away with something"] for scene in wanted) else 0


if __name__ == "__main__":
    if sys.argv[1:2] == ["--ask"]:
        print(asked_ray(*sys.argv[2:]))
        sys.stdout.flush()
        os._exit(0)
    code = main(sys.argv[1:] or list(SCENES))
    sys.stdout.flush()
    os._exit(code)  # compilers complain of their own leaks at the end of a process
