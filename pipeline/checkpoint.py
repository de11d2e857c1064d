"""Checkpoints: one folder of named tensors and plain JSON for every engine, complete or not there
at all.

    step-00000120/
      weights.safetensors      parameters and buffers by name, full tensors, whatever the engine
      optimizer.safetensors    <parameter>.<moment>
      ema.safetensors          only with engine.ema, as average.safetensors: its updates so far
      state.json               step, metrics so far, recipe, versions
      manifest.json            size and sha256 of the files above; written last

A folder is written under a temporary name, synced and renamed. No pickle is read or written.
"""

from __future__ import annotations

import functools
import hashlib
import json
import os
import shutil
import threading
from collections.abc import Callable, Collection, Container, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from segfleet.core.errors import InputError
from segfleet.core.files import (
    make_folder,
    parse_json,
    read_file,
    share_as_others,
    sync_folder,
    write_atomically,
)
from segfleet.core.partial import temporary_name

MANIFEST = "manifest.json"
PREFIX = "step-"
Tensors = dict[str, dict[str, Tensor]]  # group (weights, optimizer, ema, average) -> name -> tensor


class HostCopies(dict[str, Tensor]):
    """Tensors in host memory that do not change any more: they are saved without another copy."""


class CheckpointError(InputError):
    """A checkpoint is damaged or does not fit. Names the file and the reason."""


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """A complete checkpoint on disk, verified."""

    path: Path
    state: dict[str, Any]

    @property
    def step(self) -> int:
        return self.state["step"]

    def tensors(self, group: str, without: Container[str] = ()) -> dict[str, Tensor]:
        """Name -> CPU tensor of `group`, less those `without`, which are not read; empty if the
        checkpoint has none."""
        from safetensors import safe_open

        path = self.path / f"{group}.safetensors"
        if not path.exists():
            return {}
        with safe_open(path, framework="pt") as file:
            names = list(file.keys())
            return {name: file.get_tensor(name) for name in names if name not in without}


def folder_name(step: int) -> str:
    return f"{PREFIX}{step:08d}"


def write(root: Path, step: int, tensors: Tensors, state: dict[str, Any]) -> Path:
    """Write everything under a temporary name, synced, ready to be published."""
    from safetensors.torch import save_file

    make_folder(root)
    partial = temporary_name(root / folder_name(step))
    partial.mkdir()
    try:
        for group, named in tensors.items():
            try:
                path = partial / f"{group}.safetensors"
                save_file({name: value.contiguous() for name, value in named.items()}, path)
                share_as_others(path)
            except OSError:
                raise
            except Exception as error:  # safetensors wraps the system's error in its own
                _raise_as_oserror(error, partial)
                raise
        (partial / "state.json").write_text(
            json.dumps({**state, "step": step}, indent=1), encoding="utf-8"
        )
        records = {}
        for path in sorted(partial.iterdir()):
            with open(path, "rb") as file:
                records[path.name] = {
                    "bytes": path.stat().st_size,
                    "sha256": hashlib.file_digest(file, "sha256").hexdigest(),
                }
                os.fsync(file.fileno())
        write_atomically(partial / MANIFEST, json.dumps({"files": records}, indent=1))
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    return partial


def _raise_as_oserror(error: Exception, where: Path) -> None:
    """safetensors reports a full disk as its own error type; the number of the system's error is in
    the text."""
    import errno

    for code in (errno.ENOSPC, errno.EDQUOT):
        if f"os error {code}" in str(error) or f"code: {code}" in str(error):
            raise OSError(code, os.strerror(code), str(where)) from None


def publish(partial: Path, root: Path, step: int) -> Path:
    """Give a written checkpoint its name. From here on it exists."""
    target = root / folder_name(step)
    if target.exists():
        if damage(target) is None:
            shutil.rmtree(partial)
            return target
        shutil.rmtree(target)
    os.replace(partial, target)
    sync_folder(root)
    return target


def save(root: Path, step: int, tensors: Tensors, state: dict[str, Any]) -> Path:
    """Write and publish at once."""
    return publish(write(root, step, tensors, state), root, step)


def damage(path: Path) -> str | None:
    """What is wrong with a checkpoint folder, or None. Reads every byte."""
    try:
        files = parse_json(read_file(path / MANIFEST))["files"]
        for name, expected in files.items():
            file = path / name
            if Path(name).name != name or not file.is_file():
                return f"{name} is missing"
            if file.stat().st_size != expected["bytes"]:
                return f"{name} has {file.stat().st_size} bytes, expected {expected['bytes']}"
            with open(file, "rb") as handle:
                if hashlib.file_digest(handle, "sha256").hexdigest() != expected["sha256"]:
                    return f"{name} does not match its sha256"
        parse_json(read_file(path / "state.json"))["step"]
    except FileNotFoundError as error:
        return f"{Path(error.filename).name} is missing"
    except (ValueError, KeyError, TypeError, AttributeError, UnicodeDecodeError):
        return f"{MANIFEST} or state.json is not readable"
    return None


def steps(root: Path) -> list[Path]:
    """Published checkpoint folders, oldest first; complete or damaged."""
    return sorted(
        path
        for path in root.glob(f"{PREFIX}*")
        if path.is_dir() and path.name[len(PREFIX) :].isdecimal()
    )


def load(path: Path) -> Checkpoint:
    """A verified checkpoint. Raises CheckpointError that names the damage."""
    if fault := damage(path):
        raise CheckpointError(f"checkpoint: {path} is damaged: {fault}")
    return read(path)


def read(path: Path) -> Checkpoint:
    """A checkpoint that was verified before, perhaps on another rank. Raises CheckpointError."""
    try:
        state = parse_json(read_file(path / "state.json"))
        if isinstance(state, dict) and isinstance(state.get("step"), int):
            return Checkpoint(path=path, state=state)
        fault = "is no checkpoint's"
    except (OSError, ValueError) as error:
        fault = f"cannot be read ({error})"
    raise CheckpointError(f"checkpoint: {path} is damaged: state.json {fault}")


def latest(root: Path, warn: Callable[[str], None]) -> Checkpoint | None:
    """The newest complete checkpoint. A damaged one is named through `warn` and the one before it
    is taken."""
    paths = steps(root)
    for path in reversed(paths):
        try:
            return load(path)
        except CheckpointError as error:
            warn(
                f"{error}; "
                + (
                    "none is left, starting from the beginning"
                    if path == paths[0]
                    else "using the one before it"
                )
            )
    return None


def prune(root: Path, keep: int, protect: Collection[str] = ()) -> None:
    """Remove all but the newest `keep` checkpoints and the protected ones (folder names), and
    leftovers of killed saves."""
    for path in steps(root)[:-keep]:
        if path.name not in protect:
            gone = path.with_name(f".{path.name}.{os.getpid()}.old")
            os.replace(path, gone)  # never a half-deleted folder under a published name
            shutil.rmtree(gone, ignore_errors=True)


def clean(root: Path) -> None:
    """Remove leftovers of killed processes. Only the holder of the run's lock may call it."""
    for path in root.glob(".step-*"):
        shutil.rmtree(path, ignore_errors=True)


class Saver:
    """Saves while training continues: tensors are copied as they are now, written in a thread,
    published at a step boundary.

    `save` waits for the save before it. `poll` publishes a finished one; `wait` finishes and
    publishes. Both raise what the thread raised.
    """

    def __init__(self, root: Path):
        self.root, self.staging = root, Staging()
        self._thread: threading.Thread | None = None
        self._outcome: tuple[int, Path | BaseException] | None = None

    def save(self, step: int, tensors: Tensors, state: dict[str, Any]) -> None:
        """`tensors` may be training's own."""
        self.wait()  # the save before it has the staging buffers until then
        copied, arrived = self.staging.copies(tensors)

        def work() -> None:
            try:
                arrived()
                self._outcome = (step, write(self.root, step, copied, state))
            except BaseException as error:
                self._outcome = (step, error)

        self._thread = threading.Thread(target=work, name=f"save-{step}")
        self._thread.start()

    def poll(self) -> Path | None:
        """The folder published by this call, if any."""
        return None if self._thread is None or self._thread.is_alive() else self.wait()

    def wait(self) -> Path | None:
        if self._thread is None:
            return None
        self._thread.join()
        self._thread = None
        assert self._outcome is not None, "its thread has ended"
        step, outcome = self._outcome
        if isinstance(outcome, BaseException):
            raise outcome
        return publish(outcome, self.root, step)


class Staging:
    """Host copies of tensors on a GPU, for which the host does not wait.

    They are fetched on a stream of their own into one pinned buffer per type, kept for the next
    save: pinning costs as much as writing. Training's stream waits for them on the device, a copy's
    time once in `save_minutes`, so that nothing changes under them.
    """

    def __init__(self) -> None:
        self.buffers: dict[torch.dtype, Tensor] = {}
        self.stream: torch.cuda.Stream | None = None

    def copies(self, tensors: Tensors) -> tuple[Tensors, Callable[[], None]]:
        """The copies, and what waits until they have arrived. They last until the next call."""
        away = [v.detach() for named in tensors.values() for v in named.values() if on_gpu(v)]
        if not away:
            return copies(tensors), lambda: None
        device = away[0].device
        self.stream = self.stream or torch.cuda.Stream(device)
        training, places = torch.cuda.current_stream(device), self._places(away)
        there = iter(zip(places, away, strict=True))
        self.stream.wait_stream(training)
        staged: Tensors = {}
        with torch.cuda.stream(self.stream):
            for group, named in tensors.items():
                if isinstance(named, HostCopies):
                    staged[group] = named
                    continue
                staged[group] = {
                    name: fetched(*next(there))
                    if on_gpu(value)
                    else value.detach().to("cpu", copy=True)
                    for name, value in named.items()
                }
            arrived = self.stream.record_event()
        training.wait_event(arrived)
        return staged, arrived.synchronize

    def _places(self, away: list[Tensor]) -> list[Tensor]:
        """A part of a buffer for each of these."""
        needed: dict[torch.dtype, int] = {}
        spans = []
        for value in away:
            begin = needed.get(value.dtype, 0)
            needed[value.dtype] = begin + value.numel()
            spans.append((value, begin))
        for dtype, size in needed.items():
            if dtype not in self.buffers or self.buffers[dtype].numel() < size:
                self.buffers.pop(dtype, None)  # before the larger one is made
                self.buffers[dtype] = pinned(size, dtype)
        # one operation for each: the host's time for thousands of tensors is training's
        return [
            self.buffers[value.dtype].as_strided(value.shape, contiguous(value.shape), begin)
            for value, begin in spans
        ]


def fetched(place: Tensor, value: Tensor) -> Tensor:
    return place.copy_(value, non_blocking=True)


def contiguous(shape: Sequence[int]) -> list[int]:
    """Strides of a tensor without gaps."""
    strides, step = [], 1
    for size in reversed(shape):
        strides.append(step)
        step *= size
    return strides[::-1]


def on_gpu(value: Tensor) -> bool:
    return value.is_cuda


def pinned(size: int, dtype: torch.dtype) -> Tensor:
    """Memory that a GPU writes to by itself; where the system gives none, plain memory, into which
    copies are slower and waited for."""
    try:
        return torch.empty(size, dtype=dtype, pin_memory=True)
    except RuntimeError:
        return torch.empty(size, dtype=dtype)


def copies(tensors: Tensors) -> Tensors:
    """Host copies that training will not change."""
    return {
        group: named
        if isinstance(named, HostCopies)
        else {name: value.detach().to("cpu", copy=True) for name, value in named.items()}
        for group, named in tensors.items()
    }


def versions() -> dict[str, str]:
    """Versions worth knowing when a result is to be repeated."""
    return {**_versions()}


@functools.cache
def _versions() -> dict[str, str]:
    """Looked up once: that reads the files of every package, and each checkpoint asks."""
    import platform
    from importlib.metadata import PackageNotFoundError, version

    numbers = {"python": platform.python_version(), "torch": torch.__version__}
    for package in ("segfleet", "numpy", "zarr", "h5py", "deepspeed"):
        try:
            numbers[package] = version(package)
        except PackageNotFoundError:
            continue
    return numbers
