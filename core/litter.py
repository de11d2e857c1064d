"""What a killed process leaves behind, found and removed by the next one.

Nothing is removed for its name or age alone. A temporary folder holds a note of the process that
made it; a temporary file has its host and process in its name. It goes once that process is gone.
"""

from __future__ import annotations

import json
import multiprocessing.util
import os
import re
import shutil
import socket
import stat
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from segfleet.core.files import read_json
from segfleet.core.process import alive, process_of
from segfleet.core.tracker import keep_tracker, recorded

PREFIX, NOTE = "segfleet-", "made-by.json"
SHARED, SHARES = Path("/dev/shm"), "shares-"  # beginning of a file: this process shares memory
SEMAPHORES = "semaphores"  # a file beside the note: their names
UNNOTED = re.compile(rf"{PREFIX}(\d+)-[a-z0-9_]{{8}}")  # as _new_folder names them
LONGEST = 85  # bytes of a folder's path; a socket's may have 107, "/listener-12345678" among them
_sockets: tuple[int, Path] | None = None  # process and folder of multiprocessing


@contextmanager
def temporary_folder() -> Iterator[Path]:
    """A folder for this process alone, which goes with the block; those of killed processes of this
    user go before."""
    folder = _new_folder()
    try:
        yield folder
    finally:
        remove_marked(folder, NOTE)


@contextmanager
def temporary_files() -> Iterator[None]:
    """What libraries of this process put into the temporary folder meanwhile lies in one with a
    note."""
    before = tempfile.tempdir
    with temporary_folder() as folder:
        tempfile.tempdir = str(folder)
        try:
            yield
        finally:
            tempfile.tempdir = before


def _new_folder() -> Path:
    remove_folders()
    folder = Path(tempfile.mkdtemp(prefix=f"{PREFIX}{os.getpid()}-"))
    (folder / NOTE).write_text(json.dumps(_this_process()), encoding="utf-8")
    return folder


def note_multiprocessing() -> None:
    """Have the multiprocessing of this process keep its sockets in a folder with a note, and its
    tracker. Its own folder (`pymp-...`) stays for ever when the process is killed or ends by
    `os._exit`. To be called before it starts its first server."""
    global _sockets
    keep_tracker()
    config = multiprocessing.current_process()._config  # type: ignore[attr-defined]
    if config.get("tempdir") is None:
        folder = _new_folder()
        if len(os.fsencode(folder)) > LONGEST:
            shutil.rmtree(folder, ignore_errors=True)
            return
        config["tempdir"], _sockets = str(folder), (os.getpid(), folder)
        keep_tracker(folder / SEMAPHORES)
        multiprocessing.util.Finalize(None, forget_multiprocessing, exitpriority=-100)


def note_shared_memory() -> None:
    """Note beside its parent's sockets that this process shares memory by torch, which gives a file
    in /dev/shm a name and takes it away at once: whoever ends in between leaves it for ever."""
    place = multiprocessing.current_process()._config.get("tempdir")  # type: ignore[attr-defined]
    if place is not None and (Path(place) / NOTE).is_file():
        (Path(place) / f"{SHARES}{os.getpid()}").touch()


def remove_shared_memory(process: int) -> None:
    """What a process that has ended, or ends now, left in /dev/shm."""
    _remove(SHARED.glob(f"torch_{process}_*"))


def _remove(paths: Iterable[Path]) -> None:
    """Those of this user."""
    for path in paths:
        with suppress(OSError):
            if os.lstat(path).st_uid == os.getuid():
                path.unlink()


def forget_multiprocessing() -> None:
    """Remove the folder of this process' sockets, at its end."""
    if _sockets and _sockets[0] == os.getpid():
        remove_marked(_sockets[1], NOTE)


def remove_marked(folder: Path, mark: str) -> None:
    """Remove a folder that a file `mark` in it says to be ours. That goes last: whoever is killed
    here leaves a folder that still says it."""
    with suppress(OSError):
        for path in folder.iterdir():
            if path.name == mark:
                continue
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path, ignore_errors=True)
            else:
                path.unlink()
        (folder / mark).unlink(missing_ok=True)
        folder.rmdir()


def remove_folders(place: Path | None = None) -> None:
    """The folders in `place` (by default where temporary files lie) that killed processes of this
    user and host left."""
    for folder in Path(place or tempfile.gettempdir()).glob(f"{PREFIX}*"):
        with suppress(OSError):
            status = os.lstat(folder)
            if not stat.S_ISDIR(status.st_mode) or status.st_uid != os.getuid():
                continue
            note = folder / NOTE
            if note.is_file() and note.stat().st_size:
                if _gone(read_json(note) or {}):
                    for path in folder.glob(f"{SHARES}*"):
                        number = path.name.removeprefix(SHARES)
                        if number.isdecimal() and not alive(int(number)):
                            remove_shared_memory(int(number))
                    _remove([SHARED / name for name in recorded(folder / SEMAPHORES)])
                    remove_marked(folder, NOTE)
            elif (maker := UNNOTED.fullmatch(folder.name)) and not alive(int(maker[1])):
                note.unlink(missing_ok=True)  # killed before it had written its note
                folder.rmdir()  # refuses what holds anything


def _this_process() -> dict:
    return {"host": socket.gethostname(), "process": os.getpid(), "began": _began(os.getpid())}


def _gone(note: dict) -> bool:
    """Whether the process of a note has ended; of another host, or unreadable: nobody knows."""
    if note.get("host") != socket.gethostname() or not isinstance(note.get("process"), int):
        return False
    return not alive(note["process"]) or _began(note["process"]) != note.get("began")


def _began(process: int) -> str | None:
    """When a process began, in the kernel's own count, and which boot of the machine that was: its
    number may be another's now."""
    started = process_of(process)
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        return None
    return f"{started.began} of {boot}" if started else None
