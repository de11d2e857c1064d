"""How long a training step takes on 1 to 512 GPUs, where efficiency falls below 90 %, and why.

    python benchmarks/scaling.py check       predictions against real ranks on cables of known speed
    python benchmarks/scaling.py predict     step times of networks on a cluster with GPUs
    python benchmarks/scaling.py predict --gpus-per-node 4 --between 12.5e9 --step-ms 250

A prediction has three parts, none of them fitted to what it predicts. What the training computes
and which collectives it starts, when, with how many bytes: recorded of the real training loop and
engine, which run as rank 0 of so many pretended ranks (`recorder.py`). What a collective takes: its
algorithm's number of messages, with the delay and the speed of the links. How both overlap: a
replay, in which a collective begins when it is started and the one before it has ended, and the
step goes on where it waited once that has ended.

`check` trains over gloo on real processes in network namespaces (`cables.py`), root alone can. The
batch grows with the ranks, so every rank computes the same. Ranks and cables have the priority of
any process; compared is the fastest step of all repeats, which other work on the machine disturbed
least, and the load is noted. Results: results/scaling.json
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

os.environ |= {"OMP_NUM_THREADS": "1", "TORCH_CPP_LOG_LEVEL": "ERROR"}
import torch
from cables import Cables, in_a_process
from network import STEP, Cluster, Event, Link, gloo, replay
from recorder import Tape, pretend

from segfleet.pipeline import run
from segfleet.pipeline.engines.deepspeed import quiet_deepspeed
from segfleet.pipeline.ranks import ProcessRanks, Ranks, join_ranks
from segfleet.pipeline.recipe import Recipe, parse
from segfleet.pipeline.training import train as training
from segfleet.pipeline.training.context import Context
from segfleet.preprocess.stores.base import open_store

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))
from conftest import write_tiny_store

RESULT = Path(__file__).parent / "results" / "scaling.json"
ENGINES = {"ddp": {"name": "ddp"}} | {
    f"zero{stage}": {"name": "deepspeed", "options": {"zero": stage}} for stage in (1, 2, 3)
}
WARM = 3  # steps that are not counted: caches fill, the optimizer makes its moments


@dataclass(frozen=True, kw_only=True)
class Case:
    """A training whose batch grows with the ranks."""

    model: dict[str, Any]
    engine: str
    patch: tuple[int, ...]
    share: int = 1  # samples of one rank
    steps: int = 12

    def recipe(self, store: Path, ranks: int) -> Recipe:
        document = {
            "name": "scaling",
            "data": {
                "store": str(store),
                "batch": self.share * ranks,
                "patch": list(self.patch),
                "workers": 0,
            },
            "model": self.model,
            "stages": [{"epochs": 1, "steps": self.steps, "lr": 1e-4}],
            "engine": ENGINES[self.engine],
            "evaluation": {"every": 0},
            "save_every": 10**6,
        }
        return parse(document)


# What is computed and what is asked of the network


class PretendedRanks(ProcessRanks):
    """Rank 0 of so many, over a process group that is there."""

    def __init__(self, size: int):
        self.rank, self.size, self.local_rank = 0, size, 0
        self.device, self.store = torch.device("cpu"), _Store()
        self.control = torch.distributed.group.WORLD
        self._flag = torch.zeros(1, dtype=torch.int32)


class _Store(torch.distributed.HashStore):
    def clone(self) -> _Store:
        return self


def train(case: Case, store: Path, folder: Path, ranks: Ranks, begins: Callable[[], None]) -> None:
    """The training loop as it is; `begins` is called where an optimizer step begins."""
    original, opened = training.build, open_store(store)
    recipe = case.recipe(store, ranks.size)

    def build(context, index):
        engine, before = original(context, index)
        step = engine.step

        def marked(*words):
            begins()
            return step(*words)

        engine.step = marked
        return engine, before

    training.build = build
    training.train(
        Context(
            recipe=recipe,
            stores=lambda settings: opened,
            folders=run.stage_folders(folder, recipe, opened.manifest),
            ranks=ranks,
            asked_to_stop=lambda: False,
            warn=lambda words: None,
            validate=lambda engine, settings: {},
        )
    )


def record(case: Case, store: Path, size: int) -> list[Event]:
    """The events of rank 0 of `size`, of a training in a process of its own."""

    def work(folder: Path) -> list[dict]:
        tape = pretend(size) if size > 1 else Tape()
        ranks = PretendedRanks(size) if size > 1 else Ranks(torch.device("cpu"))
        backward = torch.Tensor.backward

        def whole(*words, **options):
            backward(*words, **options)
            tape.backward_ended()

        torch.Tensor.backward = whole
        train(case, store, folder, ranks, lambda: tape.note(STEP))
        return [vars(event) for event in tape.events]

    return [Event(**facts) for facts in in_a_process(work)]


def measure(case: Case, store: Path, size: int, link: Link) -> list[float]:
    """Seconds of the steps of real ranks on cables."""

    def work(folder: Path, rank: int) -> list[float]:
        if size > 1:
            places = {"RANK": rank, "WORLD_SIZE": size, "LOCAL_RANK": rank}
            os.environ.update({name: str(value) for name, value in places.items()})
            os.environ["SEGFLEET_MASTER_HOST"] = "10.77.0.1"
        marks: list[float] = []
        ranks = join_ranks(folder / "address")
        train(case, store, folder, ranks, lambda: marks.append(time.perf_counter()))
        return [after - before for before, after in zip(marks, marks[1:], strict=False)]

    if size == 1:
        return in_a_process(lambda folder: work(folder, 0))[WARM:]
    with Cables(size, link.rate, link.delay) as cables:
        return cables.each(work)[0][WARM:]


# Predictions


def counted(events: list[Event], *rest: Any) -> list[float]:
    return replay(events, *rest)[WARM:]


def check(options: argparse.Namespace) -> list[dict]:
    """Predicted beside measured: the fastest step of each."""
    lite = {"name": "unet_lite_standard", "options": {"width": 12}}
    plain = {"name": "plain_unet_2d", "options": {"features": [16, 32, 64, 128]}}
    links = [Link(rate=20e6, delay=1e-3), Link(rate=5e6, delay=4e-3)]
    cases = [Case(model=plain, engine="ddp", patch=(32, 32))]
    cases += [Case(model=lite, engine="ddp", patch=(32, 32))]
    cases += [Case(model=plain, engine=name, patch=(32, 32)) for name in ENGINES if name != "ddp"]
    quiet_deepspeed(torch.device("cpu"))  # seconds, which the ranks need not spend again
    rows = []
    with tempfile.TemporaryDirectory() as scratch:
        store = write_tiny_store(Path(scratch) / "store", 2, "zarr", 6, 2, 40, 1)
        for case in cases:
            if options.only not in f"{case.model['name']} {case.engine}":
                continue
            for size in (1, 2, 4):
                repeats = range(options.repeats)
                recorded = [record(case, store, size) for _ in repeats]
                for link in links if size > 1 else links[:1]:
                    stretch = max(1.0, size / (os.cpu_count() or 1))

                    def fastest(seconds: Callable, stretch=stretch, recorded=recorded) -> float:
                        return min(min(counted(events, seconds, stretch)) for events in recorded)

                    loads = [os.getloadavg()[0]]
                    taken = min(min(measure(case, store, size, link)) for _ in repeats)
                    loads.append(os.getloadavg()[0])
                    expected = fastest(lambda event, n=size, k=link: gloo(event, n, k))
                    rows.append(
                        {
                            "model": case.model["name"],
                            "engine": case.engine,
                            "ranks": size,
                            "link": vars(link) if size > 1 else None,
                            "computes_s": round(fastest(lambda event: 0.0), 4),
                            "predicted_s": round(expected, 4),
                            "measured_s": round(taken, 4),
                            "off": round(expected / taken - 1, 3),
                            "load": round(max(loads), 1),
                        }
                    )
                    print(rows[-1], flush=True)
    return rows


def checked(known: dict, rows: list[dict], repeats: int) -> dict:
    """Rows that were not run again stay as they were."""

    def key(row: dict) -> tuple:
        return row["model"], row["engine"], row["ranks"], str(row["link"])

    new = set(map(key, rows))
    rows = [row for row in known.get("rows", []) if key(row) not in new] + rows
    worst = {
        engine: max(abs(row["off"]) for row in rows if row["engine"] == engine and row["ranks"] > 1)
        for engine in {row["engine"]: None for row in rows}
    }
    return {"repeats": repeats, "worst_off": worst, "rows": rows}


NETWORKS = {
    "unet_lite_standard": (64, 64),  # 31 million weights, batch normalisation after every layer
    "plain_unet_2d": (64, 64),  # planned from the patch, instance normalisation
}
SMALL = 65_536  # bytes; a collective of less is a matter of delays


def predict(options: argparse.Namespace) -> list[dict]:
    """Steps on a cluster, whose batch grows with it. How a GPU's step is divided between
    collectives is taken from the recording, how long it is from `--step-ms`."""
    cluster = Cluster(
        gpus_per_node=options.gpus_per_node,
        inside=options.inside,
        between=options.between,
        hop_inside=options.hop_inside,
        hop_between=options.hop_between,
    )
    one, rows = options.step_ms / 1e3, []
    loader = options.loader_ms / 1e3 / options.workers
    quiet_deepspeed(torch.device("cpu"))
    with tempfile.TemporaryDirectory() as scratch:
        store = write_tiny_store(Path(scratch) / "store", 2, "zarr", 6, 2, 72, 1)
        for network, patch in NETWORKS.items():
            for engine in ENGINES:
                case = Case(model={"name": network}, engine=engine, patch=patch, steps=WARM + 3)
                if options.only not in f"{network} {engine}":
                    continue
                for size in options.gpus:
                    events = record(case, store, size)
                    stretch = one / statistics.mean(counted(events, lambda event: 0.0))

                    def step(
                        seconds: Callable[[Event], float], events=events, stretch=stretch
                    ) -> float:
                        found = statistics.mean(counted(events, seconds, stretch))
                        return max(loader, found)

                    cost = lambda event, size=size: cluster.nccl(event, size)  # noqa: E731
                    whole = step(cost)
                    few = step(lambda event, cost=cost: cost(event) * (event.size >= SMALL))
                    many = step(lambda event, cost=cost: cost(event) * (event.size < SMALL))
                    rows.append(
                        {
                            "network": network,
                            "engine": engine,
                            "gpus": size,
                            "step_ms": round(1e3 * whole, 2),
                            "efficiency": round(one / whole, 3),
                            "small_messages_ms": round(1e3 * (whole - few), 2),
                            "gradients_and_weights_ms": round(1e3 * (whole - many), 2),
                        }
                    )
                    print(rows[-1], flush=True)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("what", choices=("check", "predict"))
    parser.add_argument("--only", default="", help="cases whose name holds this")
    parser.add_argument("--repeats", type=int, default=3, help="trainings of every row of `check`")
    parser.add_argument("--gpus", type=int, nargs="+", default=[2, 8, 16, 64, 256, 512])
    parser.add_argument(
        "--step-ms", type=float, default=200.0, help="of one GPU, as it is measured"
    )
    parser.add_argument("--loader-ms", type=float, default=0.0, help="CPU ms of a GPU's samples")
    parser.add_argument("--workers", type=int, default=8, help="loader processes of a GPU")
    for name, value in vars(Cluster()).items():
        flag = f"--{name.replace('_', '-')}"
        parser.add_argument(flag, type=type(value), default=value)
    options = parser.parse_args()
    torch.set_num_threads(1)
    known = json.loads(RESULT.read_text()) if RESULT.exists() else {}
    if options.what == "check":
        known["check"] = checked(known.get("check", {}), check(options), options.repeats)
    else:
        given = {name: getattr(options, name) for name in (*vars(Cluster()), "step_ms")}
        known["predict"] = {"assumed": given, "rows": predict(options)}
    RESULT.write_text(json.dumps(known, indent=1) + "\n")


if __name__ == "__main__":
    main()
