"""Files that are there whole or not at all, and what they are known by."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
import stat
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from segfleet.core.errors import InputError
from segfleet.core.partial import remove_partial_once, temporary_name


def absolute(path: str | Path) -> Path:
    """`path` from the root, as its user sees it: through the links of $PWD. What a link leads to
    (an automounted home's /net/...) need not be there on other machines."""
    pwd = os.environ.get("PWD", "")
    try:
        usable = os.path.isabs(pwd) and os.path.samefile(pwd, ".")
    except OSError:
        usable = False
    whole = os.path.join(pwd if usable else os.getcwd(), path)
    plain = os.path.normpath(whole)
    # `link/..` is the folder above what the link leads to
    same = os.pardir not in Path(path).parts or os.path.realpath(plain) == os.path.realpath(whole)
    return Path(plain if same else os.path.realpath(whole))


@contextmanager
def replacing(path: Path, suffix: str = "") -> Iterator[Path]:
    """A temporary file's name to write to; it becomes `path` when the block ends well, and goes
    otherwise. A reader sees the old file or the new one, never half of one. Those that killed
    writers left in the folder go before. An OSError names `path`, whatever the writer said: a full
    disk says no name.

    `suffix`: of the temporary name, for writers that go by it.
    """
    remove_partial_once(path.parent)
    temporary = temporary_name(path, suffix)
    try:
        yield temporary
        sync_file(temporary)
        os.replace(temporary, path)
    except OSError as error:
        if error.filename in (None, str(temporary)) and error.errno is not None:
            error.filename = str(path)
        raise
    finally:
        temporary.unlink(missing_ok=True)
    sync_folder(path.parent)


def write_atomically(path: Path, content: str | bytes) -> None:
    """Write a whole file, text as UTF-8, so that a reader sees the old one or the new one."""
    with replacing(path) as temporary:
        temporary.write_bytes(content.encode() if isinstance(content, str) else content)


def share_as_others(path: Path) -> None:
    """Give a file that a library made private the mode of any new file of its folder: umask, setgid
    and ACLs decide who reads it. The umask itself cannot be asked without changing it for all
    threads."""
    beside = temporary_name(path)
    beside.touch()
    try:
        path.chmod(beside.stat().st_mode & 0o777)
    finally:
        beside.unlink()


def read_json(path: Path, kind: type = dict) -> Any | None:
    """The document in `path`; None if there is none. A damaged one (another `kind`, a "sha256" that
    is not its own) is named on stderr and counts as none, as is one that was written for another
    run's folder: its writer writes it again."""
    document = None
    try:
        document = parse_json(read_file(path))
    except (FileNotFoundError, NotADirectoryError):
        return None
    except ValueError:
        pass
    whole, fault = isinstance(document, kind), "is damaged"
    if whole and isinstance(document, dict) and "sha256" in document:
        whole = document.pop("sha256") == digest_of(document)
    if whole and isinstance(document, dict):
        of = document.pop("of", None)
        if isinstance(of, str) and is_uid(path.absolute().parent.name) and of != owner(path):
            whole, fault = False, f"was written for {of}"
    if whole:
        return document
    sys.stderr.write(f"segfleet: {path} {fault} and is left out\n")
    return None


def regular(path: str, flags: int) -> int:
    """How `open` opens a file that anybody may have put there (its `opener`). Raises InputError for
    a pipe, which would be waited for, a folder, or a link to itself."""
    try:
        handle = os.open(path, flags | getattr(os, "O_NONBLOCK", 0), 0o666)
    except OSError as error:
        if error.errno in (errno.ELOOP, errno.EISDIR, errno.ENXIO):
            raise InputError(f"{path} is no file. Move it away.") from None
        raise
    if stat.S_ISREG(os.fstat(handle).st_mode):
        return handle
    os.close(handle)
    raise InputError(f"{path} is no file. Move it away.")


def read_file(path: Path) -> bytes:
    """What is in a file. Raises InputError as `regular` does."""
    with open(path, "rb", opener=regular) as file:
        return file.read()


def parse_json(text: str | bytes) -> Any:
    """As `json.loads`, of a text that anybody may have written: whatever is wrong with it, such as
    brackets without end, is a ValueError."""
    try:
        return json.loads(text)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None


def write_json(path: Path, document: dict[str, Any]) -> None:
    """Write a document with its "sha256" and whose it is ("of"), which `read_json` checks and takes
    off again."""
    whole = {**document, "of": owner(path)} if owner(path) else document
    write_atomically(path, json.dumps({**whole, "sha256": digest_of(whole)}, indent=1))


def owner(path: Path) -> str:
    """The uid in whose folder a document lies; "" if that is named in another way."""
    name = path.absolute().parent.name
    return name if is_uid(name) else ""


def is_uid(name: str) -> bool:
    """Whether a folder is called by a hash, as those of stages are."""
    return re.fullmatch(r"[0-9a-f]{12}", name) is not None


def unstamped(document: Any) -> Any:
    """A document without what `write_json` added, wherever it was read."""
    if not isinstance(document, dict):
        return document
    return {key: value for key, value in document.items() if key not in ("of", "sha256")}


def digest_of(document: Any) -> str:
    """sha256 of a plain JSON document, however it is written down."""
    text = json.dumps(document, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()


def make_folder(path: Path) -> None:
    """`path` and the folders above it, each entry synced: a file synced in a folder that a power
    cut takes away is gone."""
    folders = [path, *path.parents]
    above = next((at for at, folder in enumerate(folders) if folder.is_dir()), len(folders))
    path.mkdir(parents=True, exist_ok=True)
    for folder in reversed(folders[:above]):
        sync_folder(folder.parent)


def sync_folder(folder: Path) -> None:
    """Make a rename inside `folder` survive a power cut, where the file system can."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):
            raise
    finally:
        os.close(handle)


def sync_file(path: Path) -> None:
    """Make the bytes of a written file survive a power cut."""
    with open(path, "rb") as file:
        os.fsync(file.fileno())


def file_facts(path: Path) -> dict[str, int | str]:
    """{"bytes": size, "sha256": hex} of one file: what the manifest keeps about it. Raises
    OSError."""
    with open(path, "rb") as file:
        return {
            "bytes": path.stat().st_size,
            "sha256": hashlib.file_digest(file, "sha256").hexdigest(),
        }
