"""A store's copy on a disk of the node: made once, shared by all ranks and jobs there, checked
against the manifest.

DIR/segfleet-<user id>/
  <key>/          a whole copy; the key names the store's content and its manifest
  <key>.partial/  one in the making, or left by a job that was killed: the next one resumes it
  <key>.json      size, time and inode of every file when it was last found right
  <key>.making, <key>.used   locks: one process makes or repairs, all that read hold the second

The system frees the locks when their holders die, however they die. A copy is removed only when its
room is needed for another one and nobody reads it, the one that was not used for longest first.
"""

from __future__ import annotations

import errno
import hashlib
import json
import math
import os
import re
import shutil
import socket
import stat
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from segfleet.core.errors import InputError
from segfleet.core.files import file_facts, parse_json, sync_folder, write_atomically
from segfleet.core.lock import Lock
from segfleet.core.partial import temporary_name
from segfleet.preprocess.stores.case_entry import RESTORE
from segfleet.preprocess.stores.manifest import NAME, load_manifest

BLOCK = 2**22  # bytes copied at a time
SPARE = 2**26  # bytes that are left free
FULL = (errno.ENOSPC, errno.EDQUOT)


class Unwanted(RuntimeError):
    """The caller asked to stop; what is copied stays for the next time."""


@dataclass(frozen=True, kw_only=True)
class LocalCopy:
    """The copy, made or not, of the store `source` in the folder `place` of this node."""

    source: Path
    place: Path
    key: str

    @property
    def root(self) -> Path:
        return self.place / self.key

    @property
    def partial(self) -> Path:
        return self.place / f"{self.key}.partial"

    @property
    def record(self) -> Path:
        return self.place / f"{self.key}.json"

    def whole(self) -> bool:
        """Whether the copy is there and as it was when its hashes were last compared."""
        try:
            stamps = parse_json(self.record.read_text(encoding="utf-8"))
            return bool(stamps) and all(
                _stamp(self.root / path) == stamp for path, stamp in stamps.items()
            )
        except (OSError, ValueError, AttributeError):
            return False

    def make(
        self, report: Callable[[str], None], stopped: Callable[[], bool] = lambda: False
    ) -> bool:
        """Make the copy, or repair it, unless it is whole; while another process does, wait. False
        if there is no room, which `report` gets as a sentence.

        Raises InputError if the source is damaged, Unwanted when `stopped`.
        """
        with Lock(self.place / f"{self.key}.making") as lock:
            if not lock.acquire(math.inf, stopped):
                raise Unwanted
            if self.whole():
                return True
            manifest, target = (
                load_manifest(self.source),
                self.root if self.root.is_dir() else self.partial,
            )
            target.mkdir(exist_ok=True)
            files = {**manifest.tables, **manifest.files}
            missing = [
                path for path, expected in files.items() if not _right(target / path, expected)
            ]
            needed = sum(files[path]["bytes"] for path in missing)
            try:
                if not self._room(needed):
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
                began = time.monotonic()
                for path in missing:
                    _copy(self.source / path, target / path, files[path]["sha256"], stopped)
                _publish(manifest.id, (self.source / NAME).read_bytes(), target, self.root)
                write_atomically(
                    self.record,
                    json.dumps({path: _stamp(self.root / path) for path in (NAME, *files)}),
                )
            except OSError as error:
                if error.errno not in FULL:
                    raise
                shutil.rmtree(self.partial, ignore_errors=True)
                free = shutil.disk_usage(self.place).free
                report(
                    f"no room to copy the store to {self.place}: {needed:,} bytes needed, "
                    f"{free:,} free. It is read from {self.source}"
                )
                return False
            if missing:
                report(
                    f"store copied to {self.root}: {needed:,} bytes in "
                    f"{time.monotonic() - began:.1f} s"
                )
            return True

    @contextmanager
    def in_use(self) -> Iterator[Path]:
        """The copy's folder; a copy that is there when this begins is not removed meanwhile."""
        used = self.place / f"{self.key}.used"
        with Lock(used, shared=True) as lock:
            lock.acquire(math.inf)
            os.utime(used)
            yield self.root

    def _room(self, needed: int) -> bool:
        """Whether so many bytes fit, after unused copies of other stores have gone if it takes that
        and helps."""
        lacking = needed + SPARE - shutil.disk_usage(self.place).free
        if lacking <= 0:
            return True
        with ExitStack() as locks:
            idle = [
                other
                for other in self._others()
                if _free(other.place / f"{other.key}.making", locks)
            ]
            idle = [other for other in idle if _free(other.place / f"{other.key}.used", locks)]
            sizes = [sum(_size(folder) for folder in (other.root, other.partial)) for other in idle]
            if sum(sizes) < lacking:
                return False
            for other, size in zip(idle, sizes, strict=True):
                if lacking > 0:
                    other.record.unlink(missing_ok=True)
                    shutil.rmtree(other.root, ignore_errors=True)
                    shutil.rmtree(other.partial, ignore_errors=True)
                    lacking -= size
        return lacking <= 0

    def _others(self) -> list[LocalCopy]:
        """Of other stores, the least recently used first."""
        used = sorted(self.place.glob("*.used"), key=lambda path: path.stat().st_mtime)
        keys = dict.fromkeys(
            [
                *(path.stem for path in used),
                *(path.stem for path in sorted(self.place.glob("*.making"))),
            ]
        )
        return [
            LocalCopy(source=self.source, place=self.place, key=key)
            for key in keys
            if key != self.key
        ]


def local_copy(source: str | Path, folder: str) -> LocalCopy:
    """Where the copy of a store lies below `folder`, in which variables of this node stand. Raises
    InputError if it cannot be used."""
    where = f"on {os.environ.get('SLURMD_NODENAME') or socket.gethostname()}"
    path = os.path.expanduser(os.path.expandvars(folder))
    if unset := re.search(r"\$\{?\w+\}?", path):
        raise InputError(
            f"stage-to: found '{folder}', but {unset[0]} is not set {where}. Name a variable that "
            "is, or a folder."
        )
    if not os.path.isabs(path):
        raise InputError(
            f"stage-to: found '{folder}', expected an absolute path, or one that begins with a "
            "variable such as $TMPDIR"
        )
    source = Path(source).resolve()
    content = load_manifest(source).id
    # stores of one content may differ in format and splits
    digest = hashlib.sha256((source / NAME).read_bytes()).hexdigest()
    place = Path(path) / f"segfleet-{os.getuid()}"
    made = not os.path.lexists(place)
    try:
        place.mkdir(parents=True, exist_ok=True, mode=0o700)
        if not os.access(place, os.W_OK | os.X_OK):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
        _refuse_strangers(place)
    except InputError:
        if made:
            place.rmdir()
        raise
    except OSError as error:
        if error.errno in FULL:
            raise
        raise InputError(
            f"stage-to: {path} cannot be used {where} ({_no_folder(place) or error.strerror}). "
            "Name a folder you may write to."
        ) from None
    return LocalCopy(source=source, place=place, key=f"{content}-{digest[:8]}")


def _no_folder(place: Path) -> str:
    """What in a path stands where a folder ought to be; "" if nothing does."""
    for path in (place, *place.parents):
        if os.path.lexists(path) and not path.is_dir():
            return f"{path} is {'a link to no folder' if path.is_symlink() else 'a file'}"
    return ""


def _refuse_strangers(place: Path) -> None:
    """Raises InputError if anybody else may read or replace what is put into `place`."""
    status, above = os.lstat(place), os.stat(place.parent)
    mend = "Remove it, or name another folder."
    if not stat.S_ISDIR(status.st_mode):
        raise InputError(f"stage-to: {place} is a link or a file, expected a folder. {mend}")
    if status.st_uid != os.getuid():
        raise InputError(
            f"stage-to: {place} belongs to user {status.st_uid}, who could read and change the "
            f"copy. {mend}"
        )
    if status.st_mode & 0o077:
        raise InputError(
            f"stage-to: {place} is open to others (mode {stat.S_IMODE(status.st_mode):o}, expected "
            f"700), who may have changed what is in it. {mend}"
        )
    replaceable = above.st_mode & stat.S_IWOTH and not above.st_mode & stat.S_ISVTX
    if replaceable or above.st_uid not in (0, os.getuid()):
        raise InputError(
            f"stage-to: whoever owns or may write to {place.parent} can replace folders in it. "
            "Name a folder of your own, or one with the sticky bit, as /tmp has."
        )


def _copy(source: Path, target: Path, sha256: str, stopped: Callable[[], bool]) -> None:
    """Copy a file and compare its hash on the way. Whoever has the old one open reads on in it."""
    partial, digest = temporary_name(target), hashlib.sha256()
    try:
        file = open(source, "rb")
    except OSError as error:
        raise InputError(f"store: {source} cannot be read ({error.strerror}). {RESTORE}") from None
    target.parent.mkdir(parents=True, exist_ok=True)
    with file, open(partial, "wb") as out:
        while block := file.read(BLOCK):
            if stopped():
                raise Unwanted
            digest.update(block)
            out.write(block)
        out.flush()
        os.fsync(out.fileno())
    if digest.hexdigest() != sha256:
        partial.unlink()
        raise InputError(
            f"store: {source} is damaged (sha256 differs from the manifest). Restore it, or "
            "preprocess the raw data again."
        )
    os.replace(partial, target)


def _publish(content: str, text: bytes, target: Path, root: Path) -> None:
    (target / NAME).write_bytes(text)
    assert load_manifest(target).id == content, "the manifest changed while its store was copied"
    if target != root:
        sync_folder(target)
        os.replace(target, root)
        sync_folder(root.parent)


def _free(path: Path, locks: ExitStack) -> bool:
    """Whether nobody holds the lock; then `locks` does."""
    return locks.enter_context(Lock(path)).try_acquire()


def _right(path: Path, expected: dict[str, Any]) -> bool:
    try:
        return path.stat().st_size == expected["bytes"] and file_facts(path) == expected
    except OSError:
        return False


def _stamp(path: Path) -> list[int]:
    status = path.stat()
    return [status.st_size, status.st_mtime_ns, status.st_ino]


def _size(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
