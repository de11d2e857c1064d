"""Who hangs, and who is slow, while the ranks train.

A thread of every rank looks twice a second at what its training thread does, and reports to the
other ranks through the rendezvous store every two seconds. In a synchronous step every rank waits
for the slowest, so the one at fault is the one that does not wait. Fault-tolerance add-ons such as
NVIDIA's resiliency extension do this with a process beside every rank; here a thread does, and the
store that the ranks have anyhow.
"""

from __future__ import annotations

import datetime
import faulthandler
import json
import math
import os
import socket
import sys
import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from segfleet.core.process import thread_of
from segfleet.pipeline.ranks import Ranks

LOOK = 0.5  # seconds between two looks at the training thread
INTERVAL = 2.0  # seconds between two notes to the others
PATIENCE = 5 * INTERVAL  # seconds a rank may be silent on a busy node
LEAST, TIMES = 30.0, 5  # a step is late after so many seconds, or times the longest of late
END = 10  # times that, the job ends: gloo and NCCL wait for half an hour
# as END, while a rank waits for data: a shared file system may be away for minutes, and a rank that
# starts again waits for it, too. With LEAST this is a bit less than gloo's and the loader's time
DATA_END = 50
UNKNOWN = 900.0  # seconds a step may take before any was measured: it compiles, it fills caches
MINUTE = 60.0  # over which a rank is slow
SLOW, OTHERS = 0.1, 0.5  # it waits less than this share of the time, the others more than that
# where a training thread stands while it waits for other ranks; the last two for its GPU, too
COLLECTIVE = (
    "torch/distributed/",
    "torch/autograd/graph.py",
    "pipeline/ranks.py",
    "training/agreement.py",
    "training/window.py",
)
# what is on the stack of a training thread that waits for its batch
DATA = ("pipeline/data/", "preprocess/stores/", "torch/utils/data/")


@dataclass(frozen=True, kw_only=True)
class Beat:
    """What a rank says of itself."""

    number: int  # of this note: one that does not grow says that the rank is gone
    step: int
    waits: bool  # for other ranks, as far as its Python stack says
    data: bool  # whether it waits for its batch
    where: str  # innermost frame of the training thread
    place: str  # node and device
    looks: int  # so far in this stage
    waited: int  # looks that found it waiting


def hung(before: dict[int, Beat | None], now: dict[int, Beat | None]) -> dict[int, str]:
    """Rank -> why it is the one that hangs, from two readings some time apart."""
    if gone := silent(before, now):
        return gone
    latest = max(beat.step for beat in now.values() if beat)
    behind = {
        rank: f"is still at step {beat.step}, the others at {latest}, in {beat.where}"
        for rank, beat in now.items()
        if beat and beat.step < latest and not beat.waits
    }
    apart = {
        rank: f"does not wait for the others, who wait for it: it is in {beat.where}"
        for rank, beat in now.items()
        if beat and not beat.waits
    }
    return behind or (apart if len(apart) < len(now) or len(now) == 1 else {})


def silent(before: dict[int, Beat | None], now: dict[int, Beat | None]) -> dict[int, str]:
    """Those that have written nothing in between."""
    return {
        rank: "gives no sign of life: stopped, swapped out, or its node is gone"
        for rank, beat in now.items()
        if beat is None or (earlier := before.get(rank)) and earlier.number == beat.number
    }


def slow(before: dict[int, Beat], now: dict[int, Beat]) -> list[int]:
    """Ranks that hardly waited between two readings while the others waited for more than half of
    the time: they are at most half as fast."""
    shares = {
        rank: (now[rank].waited - before[rank].waited) / (now[rank].looks - before[rank].looks)
        for rank in now
        if rank in before and now[rank].looks > before[rank].looks
    }
    if len(shares) < max(2, len(now)):
        return []
    slowest = [rank for rank, share in shares.items() if share < SLOW]
    rest = [share for rank, share in shares.items() if rank not in slowest]
    return slowest if rest and len(slowest) <= len(rest) and min(rest) > OTHERS else []


def _waits_for_data(frame: Any) -> bool:
    while frame:
        name = frame.f_code.co_filename.replace(os.sep, "/")
        if any(part in name for part in DATA):
            return True
        frame = frame.f_back
    return False


class HangDump:
    """Writes every thread's stack to stderr when the loop has not come round for a time."""

    def __init__(self) -> None:
        self.seconds = float(os.environ.get("SEGFLEET_WATCHDOG", "900"))
        self.armed = -math.inf

    def rearm(self) -> None:
        """From now on, or from up to a hundredth of the time ago: to arm starts a thread, which
        costs a millisecond and more, and a step may take no longer."""
        now = time.monotonic()
        if now - self.armed >= self.seconds / 100:
            faulthandler.dump_traceback_later(self.seconds, repeat=True)
            self.armed = now

    def close(self) -> None:
        faulthandler.cancel_dump_traceback_later()


class Pulse:
    """Watches the thread that makes it, from `beat` to `rest`, until `close`."""

    def __init__(self, ranks: Ranks, warn: Callable[[str], None], file: Any = None):
        self.ranks, self.warn, self.file = ranks, warn, file or sys.stderr
        self.longest: deque[float] = deque(maxlen=100)
        self.step, self.since, self.limit = 0, None, UNKNOWN
        self.number = self.looks = self.waited = 0
        self.thread, self.task = threading.get_ident(), threading.get_native_id()
        self.place = f"{socket.gethostname()}, {ranks.device}"
        self._dump = HangDump()
        self._end = threading.Event()
        self._reported: int | None = None
        self._slow: set[int] = set()
        self._news: dict[int, tuple[int, float]] = {}  # rank -> its last note, when it was new
        self._watch = threading.Thread(target=self._run, name="pulse", daemon=True)
        self._watch.start()

    def beat(self, step: int) -> None:
        """A step begins."""
        self._dump.rearm()
        now, before = time.monotonic(), self.since
        if before is not None:
            self.longest.append(now - before)
            if len(self.longest) >= 3:
                self.limit = max(LEAST, TIMES * max(self.longest))
        if asked := os.environ.get("SEGFLEET_WATCHDOG"):
            self.limit = float(asked)
        self.step, self.since = step, now

    def rest(self) -> None:
        """What comes now is no step: a save, a validation."""
        self.since = None

    def close(self) -> None:
        self._dump.close()
        self.rest()
        self._end.set()
        self._watch.join(timeout=2 * INTERVAL)

    def _run(self) -> None:
        try:
            store = self._store()
            last_report, minute, beats = 0.0, time.monotonic(), {}
            looked = minute
            while not self._end.wait(min(LOOK, self.limit / 4)):
                now, away = time.monotonic(), time.monotonic() - looked
                looked = now
                if self.since is not None and away > self.limit:
                    self.since += away  # this process was stopped itself: SLURM suspends jobs
                    minute, beats = now, {}
                since = self.since
                self._look()
                if store and now - last_report > INTERVAL:
                    last_report = now
                    store.set(f"pulse/{self.ranks.rank}", json.dumps(asdict(self._beat())))
                if since is None:
                    minute, beats = now, {}
                    continue
                if now - since > self.limit and self._reported != self.step:
                    self._reported = self.step
                    self._late(store, now - since)
                if now - since > END * self.limit and now - since > self._most(
                    self._all(store) if store else {}
                ):
                    self._give_up(now - since)
                if store and self.ranks.rank == 0 and now - minute > MINUTE:
                    minute, beats = now, self._report_slow(beats, self._all(store))
        except Exception as error:  # the watch is no reason to stop what goes well
            if not self._end.is_set() and self.since is not None:
                self._alone(error)

    def _store(self) -> Any:
        """A connection of this thread's own."""
        if self.ranks.size == 1:
            return None
        store = self.ranks.store.clone()
        store.set_timeout(datetime.timedelta(seconds=10))
        return store

    def _frame(self) -> Any:
        return sys._current_frames().get(self.thread)

    def _waits(self, frame: Any) -> bool:
        """Whether the training thread waits for others, as far as can be seen: it stands where one
        waits and, on a CPU, sleeps; a GPU's driver waits without sleeping."""
        name = frame.f_code.co_filename.replace(os.sep, "/") if frame else ""
        if not any(part in name for part in COLLECTIVE):
            return False
        if self.ranks.device.type != "cpu":
            return True
        thread = thread_of(self.task)
        return thread is None or thread.state != "R"  # None: not Linux

    def _look(self) -> None:
        if self.since is not None:
            self.looks += 1
            self.waited += self._waits(self._frame())

    def _beat(self) -> Beat:
        frame, self.number = self._frame(), self.number + 1
        where = "nowhere"
        if frame:
            code = frame.f_code
            where = f"{code.co_name} ({Path(code.co_filename).name}, line {frame.f_lineno})"
        return Beat(
            number=self.number,
            step=self.step,
            waits=self._waits(frame),
            data=_waits_for_data(frame),
            where=where,
            place=self.place,
            looks=self.looks,
            waited=self.waited,
        )

    def _all(self, store: Any) -> dict[int, Beat | None]:
        """Every rank's last note; None of one that gave none. Who gives no further note waits for
        nothing, whatever the last one says."""
        now, beats = time.monotonic(), {}
        for rank in range(self.ranks.size):
            name = f"pulse/{rank}"
            beat = Beat(**json.loads(store.get(name))) if store.check([name]) else None
            if beat:
                if self._news.get(rank, (0, now))[0] != beat.number:
                    self._news[rank] = beat.number, now
                if now - self._news[rank][1] >= PATIENCE - LOOK:
                    beat = replace(beat, data=False)
            beats[rank] = beat
        return beats

    def _late(self, store: Any, seconds: float) -> None:
        """The stacks of this rank; one rank says who it is that hangs."""
        self._stacks(seconds)
        if store is None:
            self._name({0: f"is in {self._beat().where}"}, {0: self._beat()}, seconds)
            return
        if store.add(f"late/{self.step}", 1) > 1:
            return
        before, now = self._all(store), {}
        before[self.ranks.rank] = None  # this one speaks, so it lives
        end = time.monotonic() + PATIENCE
        while time.monotonic() < end and not self._end.wait(LOOK):
            now = self._all(store) | {self.ranks.rank: self._beat()}
            if not silent(before, now):
                break
        if self.since is not None and time.monotonic() - self.since > self.limit:
            self._name(hung(before, now), now, seconds)

    def _most(self, beats: dict[int, Beat | None]) -> float:
        """Seconds a step may take before the job ends."""
        data = any(beat and beat.data for beat in (self._beat(), *beats.values()))
        return (DATA_END if data else END) * self.limit

    def _name(
        self, silent_ranks: dict[int, str], beats: dict[int, Beat | None], seconds: float
    ) -> None:
        ends = (
            f"; the job ends after {self._most(beats):.0f} s and goes on from its last checkpoint"
        )
        for rank, why in silent_ranks.items():
            if beats[rank] and beats[rank].data:
                why = f"it waits for data; {why}"
            place = beats[rank].place if beats[rank] else "nobody knows where"
            self.warn(f"rank {rank} ({place}) hangs: {why}. Its step takes {seconds:.0f} s{ends}")
        if not silent_ranks:
            self.warn(
                f"step {self.step} takes {seconds:.0f} s and all ranks wait for each other; their "
                f"stacks are above{ends}"
            )

    def _report_slow(self, before: dict, now: dict) -> dict:
        for rank in slow(before, {k: v for k, v in now.items() if v}):
            if rank not in self._slow:
                self._slow.add(rank)
                self.warn(
                    f"rank {rank} ({now[rank].place}) is at most half as fast as the others, who "
                    f"waited for it more than half of the last minute; it was in {now[rank].where}"
                )
        return {rank: beat for rank, beat in now.items() if beat}

    def _alone(self, error: Exception) -> None:
        """The store does not answer: rank 0, whose it is, is stopped or gone. Wait out the
        limit."""
        while not self._end.wait(LOOK):
            since, now = self.since, time.monotonic()
            if since is None:
                continue
            if now - since > self.limit and self._reported != self.step:
                self._reported = self.step
                self._stacks(now - since)
                self.warn(
                    f"rank 0 hangs: its store gives no sign of life ({type(error).__name__}). Its "
                    f"step takes {now - since:.0f} s"
                )
            if now - since > END * self.limit:
                self._give_up(now - since)

    def _stacks(self, seconds: float) -> None:
        self.file.write(
            f"segfleet: rank {self.ranks.rank} ({self.place}), step {self.step}: "
            f"{seconds:.0f} s, expected less than {self.limit:.0f} s; its threads are in\n"
        )
        self.file.flush()
        faulthandler.dump_traceback(file=self.file, all_threads=True)

    def _give_up(self, seconds: float) -> None:
        self.ranks.give_up(
            f"step {self.step} did not end within {seconds:.0f} s: a rank hangs, its name and all "
            "stacks are above. Run the same command again: it goes on from the last checkpoint."
        )
