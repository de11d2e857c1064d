"""The process that talks to Ray: `run.py` starts it, watches it, and starts another one if Ray or
this process dies.

It reads an order from stdin, {"space", "base", "runs", "resources", "seconds"}, and writes a line
of JSON for everything that happens:
{"joined": true} when Ray is there, {"epochs": [done, total]}, {"closing": true} before Ray is shut
down in order, {"error": message, "code": exit code}. All state is on disk.
"""

from __future__ import annotations

import json
import os
import secrets
import shutil
import signal
import socket
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from segfleet.core.errors import InputError, explain
from segfleet.core.files import read_json, write_atomically
from segfleet.core.litter import remove_marked
from segfleet.pipeline.launch.local import die_with_parent
from segfleet.slurm.ray_nodes import INSIDE, short_folder
from segfleet.sweeps.ray import keeper
from segfleet.sweeps.ray.keeper import OWNER
from segfleet.sweeps.ray.slots import NAMES, share
from segfleet.sweeps.search.tree_search import TreeSearch, start
from segfleet.sweeps.space.load import search_of
from segfleet.sweeps.space.plan import make_plan
from segfleet.sweeps.space.space import SearchSpace

SETTINGS = {  # of Ray and Tune: no telemetry, no files, no flood; the tree on disk is the state
    "RAY_USAGE_STATS_ENABLED": "0",
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",
    "TUNE_DISABLE_STRICT_METRIC_CHECKING": "1",
    "TUNE_DISABLE_SIGINT_HANDLER": "1",
    "TUNE_GLOBAL_CHECKPOINT_S": "1000000",
    "TUNE_WARN_EXCESSIVE_EXPERIMENT_CHECKPOINT_SYNC_THRESHOLD_S": "0",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    "RAY_AIR_NEW_OUTPUT": "0",
    "RAY_worker_niceness": "0",  # Ray's default of 15 would be the ranks' as well
    "RAY_gcs_rpc_server_reconnect_timeout_s": "300",  # a machine under load is slow, not dead
    "RAY_health_check_timeout_ms": "60000",
    "RAY_raylet_start_wait_time_s": "120",
}
CLUSTER = "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"  # of Ray, also elsewhere; "0": on 127.0.0.1 alone
JOIN = 5.0  # seconds in which a cluster takes a connection
SILENT = 3  # times in a row that it may take none
PAUSE = 10.0  # seconds between


def main() -> int:
    die_with_parent(int(os.environ["SEGFLEET_PARENT"]))
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent asks for a stop by a file
    send = line_writer()
    try:
        drive(json.loads(sys.stdin.read()), send)
        return 0
    except BaseException as error:
        traceback.print_exc()
        message, code = explain(error) or (f"{type(error).__name__}: {error}", 1)
        send(error=message, code=code)
        return code


def line_writer() -> Callable[..., None]:
    """A function that writes one line to what was stdout; whatever else is printed goes to stderr,
    the log."""
    number = os.dup(1)  # not a file object: Tune pickles whatever its searcher holds
    os.dup2(2, 1)

    def send(**fields: Any) -> None:
        os.write(number, (json.dumps(fields) + "\n").encode())

    return send


def drive(order: dict[str, Any], send: Callable[..., None]) -> None:
    """Train and score what is missing, until nothing is left or the file `stop` appears."""
    from segfleet.sweeps.run import Resources

    plan = make_plan(
        search_of(SearchSpace.model_validate(order["space"]), order["base"]),
        Path(order["runs"]),
        build=False,
    )
    resources = Resources(**order["resources"])

    def progress(done: int, total: int) -> None:
        send(epochs=[done, total])

    with ray_session(resources, plan.folder) as storage:
        send(joined=True)
        if resources.address:
            watch(resources.address, send)
        try:
            resources = fit(resources)
            search = start(plan, resources, progress, order["seconds"])
            tune_tree(search, resources, storage)
        finally:
            send(closing=True)


def tune_tree(search: TreeSearch, resources: Any, storage: Path) -> None:
    """Every node of the tree is a trial of Tune."""
    from ray import tune

    from segfleet.sweeps.ray.searcher import TreeScheduler, TreeSearcher
    from segfleet.sweeps.ray.trial import trial

    tuner = tune.Tuner(
        tune.with_resources(trial, share(resources)),
        tune_config=tune.TuneConfig(
            search_alg=TreeSearcher(search),
            scheduler=TreeScheduler(search),
            num_samples=-1,
            reuse_actors=True,
            **NAMES,
        ),
        run_config=tune.RunConfig(
            name="tune",
            storage_path=str(storage),
            verbose=0,
            failure_config=tune.FailureConfig(max_failures=2),
        ),
    )
    tuner.fit()


@contextmanager
def ray_session(resources: Any, folder: Path) -> Iterator[Path]:
    """Ray for this sweep alone, in a short temporary folder that goes with it; a folder for Tune's
    own files. Ray opens its own folder to everybody, so it lies in one that is ours alone, and a
    Ray of this machine alone listens on no other address than 127.0.0.1."""
    os.environ.update({key: os.environ.get(key, value) for key, value in SETTINGS.items()})
    sweep_away(folder)
    temporary = Path(tempfile.mkdtemp(prefix="sf-", dir=short_folder()))
    (temporary / OWNER).write_text(str(folder.resolve()), encoding="utf-8")
    write_atomically(
        folder / "ray.json", json.dumps({"temporary": str(temporary), "process": os.getpid()})
    )
    stack = ExitStack()
    if not resources.address:  # a token that stays ours: Ray's own would be left in the user's home
        os.environ |= {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32)}
        os.environ[CLUSTER] = "0"
        stack.enter_context(keeper.guarding(temporary, str(folder.resolve())))
    import ray  # it reads the mode now

    from segfleet.sweeps.run import gpus

    try:
        if resources.address:
            join(resources.address)
        else:
            ray.init(
                address="local", num_cpus=resources.at_once, num_gpus=gpus(),
                include_dashboard=False, object_store_memory=80 * 2**20,
                _temp_dir=str(temporary / INSIDE), log_to_driver=False, logging_level="ERROR",
            )  # fmt: skip
        # the trials of a cluster are on other nodes, which see the folder of all runs
        yield folder / "tune" if resources.address else temporary / "tune"
    finally:
        ray.shutdown()
        stack.close()
        remove_marked(temporary, OWNER)
        shutil.rmtree(folder / "tune", ignore_errors=True)
        (folder / "ray.json").unlink(missing_ok=True)


def join(address: str, command: str = "sweep") -> None:
    """Attach to a running cluster. Raises InputError in one sentence for what will not pass."""
    import ray

    host, port = place_of(address, command)
    if host and not answers(host, port):
        raise InputError(
            f"{command}: --address: nothing answers at {host}:{port}; `ray status` on the "
            "cluster's head prints its address"
        )
    try:
        ray.init(address=address, log_to_driver=False, logging_level="ERROR")
    except (ConnectionError, RuntimeError, ValueError) as error:
        words = " ".join(str(error).split())
        raise InputError(f"{command}: --address: Ray at {address} refused: {words[:300]}") from None


def place_of(address: str, command: str = "sweep") -> tuple[str | None, int]:
    """Host and port; no host for what Ray itself finds, such as auto. Raises InputError."""
    if address in ("auto", "local") or address.startswith("ray://"):
        return None, 0
    host, colon, port = address.rpartition(":")
    if not (colon and host and port.isdecimal() and int(port) < 2**16):
        raise InputError(f"{command}: --address: found '{address}', expected host:port or auto")
    return host.strip("[]"), int(port)


def answers(host: str, port: int) -> bool:
    """Whether anything takes a connection there within JOIN seconds."""
    try:
        socket.create_connection((host, port), timeout=JOIN).close()
        return True
    except OSError:
        return False


def watch(address: str, send: Callable[..., None], end: Callable[[int], Any] = os._exit) -> None:
    """End this process when a cluster is gone, whose client would wait for it for minutes."""
    host, port = place_of(address)
    if not host:
        return

    def look() -> None:
        silent = 0
        while silent < SILENT:
            time.sleep(PAUSE)
            silent = 0 if answers(host, port) else silent + 1
        send(error=f"the Ray cluster at {host}:{port} answers no more", code=1)
        end(1)

    threading.Thread(target=look, daemon=True).start()


def fit(resources: Any) -> Any:
    """The same with slots as the cluster's nodes allow, unless it is given. Raises InputError
    for ranks that no node can take."""
    import ray

    if not resources.address or resources.on != "local":
        return resources
    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    kind = "GPU" if any(node.get("GPU") for node in nodes) else "CPU"
    rooms = [int(node.get(kind, 0)) // resources.ranks for node in nodes]
    if not any(rooms):
        largest = max((int(node.get(kind, 0)) for node in nodes), default=0)
        raise InputError(
            f"sweep: --ranks: found {resources.ranks}, but no node of the cluster has more than "
            f"{largest} {kind}s; the ranks of a stage share a node"
        )
    return replace(resources, slots=resources.slots or sum(rooms))


def sweep_away(folder: Path) -> None:
    """The temporary folder of a session that was killed. The sweep's lock is ours, so no process
    uses it."""
    temporary = str((read_json(folder / "ray.json") or {}).get("temporary", ""))
    keeper.sweep(Path(temporary), str(folder.resolve()))


if __name__ == "__main__":
    code = main()
    sys.stderr.flush()
    os._exit(code)  # all is on disk; Ray's threads must not hold this process back
