"""A sweep from start to end. Run it, kill it, run it again: only what is missing on disk is trained."""

from __future__ import annotations

import json
import math
import os
import shutil
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stdout, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from segfleet.pipeline.run import Lock
from segfleet.pipeline.stop import Interrupted
from segfleet.slurm.local import available_cores
from segfleet.sweeps.ledger import STOP, Ledger
from segfleet.sweeps.plan import Plan, claim
from segfleet.sweeps.trial import backend

JOBS = 16  # in SLURM's queue at a time, if nobody says how many
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


@dataclass(frozen=True, kw_only=True)
class Resources:
    """`slots` nodes of the tree at a time, each with `ranks` processes. `address`: a Ray cluster to attach to; none: one of our own."""

    slots: int | None = None
    ranks: int = 1
    on: str = "local"
    address: str | None = None
    options: dict[str, Any] | None = None  # of the back end

    @property
    def at_once(self) -> int:
        return self.slots or (JOBS if self.on == "slurm" else max(1, available_cores() // self.ranks))


def run_sweep(plan: Plan, resources: Resources, tick: Callable[[int, int], None] = lambda done, total: None) -> Ledger:
    """Train and score what is missing. Raises InputError for the user's mistakes, Interrupted after an agreed stop."""
    backend(resources.on)
    if resources.on == "slurm":
        from segfleet.sweeps.slurm_backend import check

        check(resources.options or {})
    claim(plan)
    lock = Lock(plan.folder)
    try:
        (plan.folder / STOP).unlink(missing_ok=True)
        if plan.search.space.scheduler == "pbt" and not plan.trials:
            from segfleet.sweeps.ray_population import run_population

            with ray_session(resources, plan.folder) as storage:
                return run_population(plan, resources, tick, storage)
        ledger, grow = Ledger(plan.tree, plan.runs, plan.folder), None
        ledger.forget_failures()
        if plan.search.space.search == "optuna":
            from segfleet.sweeps.ray_optuna import Suggestions

            grow = Suggestions(plan, ledger)
        if grow is not None or ledger.open():
            with ray_session(resources, plan.folder) as storage:
                _tune(plan, ledger, resources, storage, grow, tick)
        if (plan.folder / STOP).exists() and not all(state in ("done", "pruned", "lost", "failed") for state in ledger.states().values()):
            raise Interrupted("the sweep stopped in order; all saved. Run the same command again to go on.")
        return ledger
    finally:
        lock.release()


def _tune(plan: Plan, ledger: Ledger, resources: Resources, storage: Path, grow: Any, tick: Callable[[int, int], None]) -> None:
    from ray import tune

    from segfleet.sweeps.ray_searcher import PathAsha, TreeSearcher
    from segfleet.sweeps.ray_trial import trial

    hours = plan.search.space.budget.hours
    deadline = time.monotonic() + 3600 * hours if hours else None

    def order(node) -> dict[str, Any]:
        made = plan.order(node, ranks=resources.ranks, threads=threads_of(resources), on=resources.on, options=resources.options or {})
        if deadline:
            made["job"]["max_seconds"] = max(1.0, deadline - time.monotonic())
        return made

    def told() -> None:
        tick(ledger.epochs_done(), plan.tree.shared_epochs)

    searcher = TreeSearcher(ledger, order, slots=resources.at_once, grow=grow, tick=told, deadline=deadline)
    scheduler, measure = None, {}
    if plan.search.space.scheduler == "asha":
        options, longest = plan.search.space.asha, max((node.end for node in plan.tree.nodes.values()), default=100)
        measure = {"metric": "dice", "mode": "max"}
        scheduler = PathAsha(
            time_attr="epochs", max_t=longest + 1, grace_period=options.grace, reduction_factor=options.factor, stop_last_trials=False
        )
        scheduler.remember(ledger, order)
    told()
    tuner = tune.Tuner(
        tune.with_resources(trial, share(resources)),
        tune_config=tune.TuneConfig(search_alg=searcher, scheduler=scheduler, num_samples=-1, reuse_actors=True, **measure, **NAMES),
        run_config=tune.RunConfig(name="tune", storage_path=str(storage), verbose=0, failure_config=tune.FailureConfig(max_failures=2)),
    )
    with listening(plan.folder), redirect_stdout(sys.stderr):  # stdout is for what was asked for
        tuner.fit()


NAMES = {"trial_name_creator": lambda trial: trial.trial_id, "trial_dirname_creator": lambda trial: trial.trial_id}


def threads_of(resources: Resources) -> int:
    return int(os.environ.get("OMP_NUM_THREADS", 0)) or max(1, available_cores() // (resources.at_once * resources.ranks))


def share(resources: Resources) -> dict[str, float]:
    """What a trial takes of the Ray cluster: a slot, and its share of the GPUs if there are any."""
    import ray

    cluster = ray.cluster_resources()
    gpus = cluster.get("GPU", 0) if resources.on == "local" else 0
    each = min(resources.ranks, gpus / resources.at_once)
    return {"cpu": resources.ranks if resources.address else 1, "gpu": math.floor(each) if each >= 1 else each}


@contextmanager
def ray_session(resources: Resources, folder: Path) -> Iterator[Path]:
    """Ray for this sweep alone, in a short temporary folder that goes with it; a folder for Tune's own files."""
    os.environ.update({key: os.environ.get(key, value) for key, value in SETTINGS.items()})
    sweep_away(folder)
    temporary = Path(tempfile.mkdtemp(prefix="sf-", dir="/tmp" if Path("/tmp").is_dir() else None))
    (folder / "ray.json").write_text(json.dumps({"temporary": str(temporary), "process": os.getpid()}))
    import ray

    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        if resources.address:
            ray.init(address=resources.address, log_to_driver=False, logging_level="ERROR")
        else:
            ray.init(
                address="local", num_cpus=resources.at_once, include_dashboard=False, object_store_memory=80 * 2**20,
                _temp_dir=str(temporary), log_to_driver=False, logging_level="ERROR",
            )  # fmt: skip
        yield temporary / "tune"
    finally:
        ray.shutdown()
        if threading.current_thread() is threading.main_thread():
            for number, handler in before.items():
                signal.signal(number, handler)
        shutil.rmtree(temporary, ignore_errors=True)
        (folder / "ray.json").unlink(missing_ok=True)


def sweep_away(folder: Path) -> None:
    """The temporary folder of a controller that was killed. The sweep's lock is ours, so nobody uses it."""
    with suppress(FileNotFoundError, json.JSONDecodeError):
        left = Path(json.loads((folder / "ray.json").read_text())["temporary"])
        if left.name.startswith("sf-"):
            shutil.rmtree(left, ignore_errors=True)


@contextmanager
def listening(folder: Path) -> Iterator[None]:
    """Ctrl-C and SIGTERM ask every rank to save and stop: the file `stop` in the sweep's folder. Anybody may write it."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def ask(*_) -> None:
        (folder / STOP).touch()
        sys.stderr.write("segfleet: stopping; the ranks save first\n")

    before = {number: signal.signal(number, ask) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
