"""Nodes on this machine: network namespaces, each on a cable of a known speed and delay.

`tc netem` does this inside the kernel, where the kernel has it. This does it in a process: every
namespace has a TUN device, whose packets wait until a cable of `rate` bytes/s would have sent them
and for `delay` seconds more. A cable is one of the sender's; what arrives is not held up. Needs
root.
"""

from __future__ import annotations

import ctypes
import fcntl
import heapq
import json
import os
import select
import signal
import struct
import subprocess
import tempfile
import time
import traceback
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

TUNSETIFF, IFF_TUN, IFF_NO_PI = 0x400454CA, 0x0001, 0x1000
CLONE_NEWNET = 0x40000000
MTU = 9000  # large packets: few to carry
NET, HOST = "10.77.0", slice(19, 20)  # of an IPv4 header: the last byte of the target's address
LIBC = ctypes.CDLL(None, use_errno=True)


def _checked(code: int) -> None:
    if code:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))


class Cables:
    """`count` namespaces with the addresses 10.77.0.1 and so on, as a context."""

    def __init__(self, count: int, rate: float, delay: float):
        self.count, self.rate, self.delay = count, rate, delay
        self.spaces: list[int] = []

    def __enter__(self) -> Cables:
        home, devices = os.open("/proc/self/ns/net", os.O_RDONLY), []
        try:
            for number in range(1, self.count + 1):
                _checked(LIBC.unshare(CLONE_NEWNET))
                self.spaces.append(os.open("/proc/self/ns/net", os.O_RDONLY))
                devices.append(_device(f"{NET}.{number}/24"))
        finally:
            _checked(LIBC.setns(home, CLONE_NEWNET))
            os.close(home)
        self.process = os.fork()
        if self.process == 0:
            with suppress(BaseException):
                _carry(devices, self.rate, self.delay)
            os._exit(1)
        for device in devices:
            os.close(device)
        return self

    def __exit__(self, *_: object) -> None:
        os.kill(self.process, signal.SIGKILL)
        os.waitpid(self.process, 0)
        for space in self.spaces:
            os.close(space)

    def each(self, work: Callable[[Path, int], Any]) -> list[Any]:
        """What work(folder, number), from 0, returns, as JSON: in a process of every namespace, all
        at once, and in a folder of all. Raises RuntimeError if one of them fails."""

        def inside(number: int, space: int) -> Callable[[Path], Any]:
            def there(folder: Path) -> Any:
                _checked(LIBC.setns(space, CLONE_NEWNET))
                return work(folder, number)

            return there

        return in_processes([inside(*place) for place in enumerate(self.spaces)])


def in_processes(works: list[Callable[[Path], Any]]) -> list[Any]:
    """What each of them returns, as JSON, every one in a process forked from this one, which has
    imported what they need."""
    with tempfile.TemporaryDirectory() as name:
        folder, children = Path(name), []
        for number, work in enumerate(works):
            child = os.fork()
            if child == 0:
                code = 1
                try:
                    (folder / f"answer-{number}").write_text(json.dumps(work(folder)))
                    code = 0
                except BaseException:
                    traceback.print_exc()
                finally:
                    os._exit(code)
            children.append(child)
        codes = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]
        if any(codes):
            raise RuntimeError(f"processes ended with {codes}")
        return [json.loads((folder / f"answer-{n}").read_text()) for n in range(len(works))]


def in_a_process(work: Callable[[Path], Any]) -> Any:
    return in_processes([work])[0]


def _device(address: str) -> int:
    """A TUN device of the namespace this thread is in."""
    device = os.open("/dev/net/tun", os.O_RDWR)
    fcntl.ioctl(device, TUNSETIFF, struct.pack("16sH22x", b"cable", IFF_TUN | IFF_NO_PI))
    for words in (
        ["addr", "add", address, "dev", "cable"],
        ["link", "set", "cable", "mtu", str(MTU), "txqueuelen", "10000", "up"],
        ["link", "set", "lo", "up"],
    ):
        subprocess.run(["ip", *words], check=True)
    for name, value in (("tcp_congestion_control", "reno"), ("tcp_slow_start_after_idle", "0")):
        Path(f"/proc/sys/net/ipv4/{name}").write_text(value)  # nothing but the cable sets the pace
    return device


def _carry(devices: list[int], rate: float, delay: float) -> None:
    """Packets from device to device, for ever."""
    free = dict.fromkeys(devices, 0.0)  # when the cable of a device has sent what it was given
    waiting: list[tuple[float, int, int, bytes]] = []
    number = 0
    for device in devices:
        os.set_blocking(device, False)
    while True:
        pause = max(0.0, waiting[0][0] - time.monotonic()) if waiting else None
        for device in select.select(devices, (), (), pause)[0]:
            with suppress(BlockingIOError):
                while True:
                    packet = os.read(device, 2 * MTU)
                    host = packet[HOST][0] if packet[0] >> 4 == 4 else 0
                    if not 1 <= host <= len(devices):
                        continue
                    free[device] = max(time.monotonic(), free[device]) + len(packet) / rate
                    number += 1  # packets of one moment stay in order
                    entry = (free[device] + delay, number, devices[host - 1], packet)
                    heapq.heappush(waiting, entry)
        now = time.monotonic()
        while waiting and waiting[0][0] <= now:
            _, _, device, packet = heapq.heappop(waiting)
            with suppress(BlockingIOError):
                os.write(device, packet)
