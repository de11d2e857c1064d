"""Why a file cannot be used, and how much memory one may take."""

from __future__ import annotations

import errno
import stat
from collections.abc import Sequence
from pathlib import Path

from segfleet.core.errors import InputError, Problem
from segfleet.core.machine import memory_budget

# No compression that the formats here use packs better than this: deflate reaches 1032.
MOST_PACKED = 1100
OTHERS = (  # than files
    (stat.S_ISDIR, "a folder"),
    (stat.S_ISFIFO, "a pipe or device"),
    (stat.S_ISSOCK, "a socket"),
    (stat.S_ISCHR, "a pipe or device"),
    (stat.S_ISBLK, "a pipe or device"),
)
ALWAYS_FITS = 64 * 2**20  # bytes nobody needs to ask for


class ImageError(InputError):
    """A file cannot be used. `problem(case)` puts it into a table of problems."""

    def __init__(self, path: Path, field: str, found: str, expected: str, mend: str):
        found = "".join(c if c.isprintable() else "?" for c in found)  # of a damaged file
        self.path, self.facts = (
            Path(path),
            {"field": field, "found": found, "expected": expected, "mend": mend},
        )
        super().__init__(f"{path}: {field}: found {found}, expected {expected}. {mend}")

    def __reduce__(self):
        return ImageError, (self.path, *self.facts.values())

    def problem(self, case: str) -> Problem:
        return Problem(case=case, **self.facts)


def damaged(path: Path, reason: str) -> ImageError:
    found = f"{path.name} damaged or truncated ({reason})"
    return ImageError(path, "file", found, "a readable image", "Copy or download the file again.")


def crashed(path: Path, cause: str = "") -> ImageError:
    """Of a file that killed the process which read it."""
    found = f"{path.name}, which ended the process that read it" + (f" ({cause})" if cause else "")
    mend = "It is damaged, or too large for this machine: save it anew, or remove it."
    return ImageError(path, "file", found, "a readable image", mend)


def is_regular(path: Path) -> bool:
    """Whether a path is a file with bytes: reading a pipe or a device would wait for ever."""
    try:
        return stat.S_ISREG(path.stat().st_mode)
    except (OSError, ValueError):
        return False


def instead_of_file(path: Path) -> str:
    """What stands where a file is expected: "" for a file; "no file", or what it is instead."""
    try:
        mode = path.lstat().st_mode
        if stat.S_ISLNK(mode):
            if not path.exists():
                return f"a link to {path.readlink()}, which is not there"
            mode = path.stat().st_mode
    except OSError as error:
        circle = error.errno == errno.ELOOP
        return "a link to itself" if circle else "no file"
    except ValueError:  # a zero byte in its name
        return "no file"
    return next((text for test, text in OTHERS if test(mode)), "")


def read_bytes(path: Path) -> bytes:
    """The whole file. Raises ImageError."""
    try:
        if (kind := instead_of_file(path)) and kind != "no file":
            mend = "Put the file there, or remove it."
            raise ImageError(path, "file", f"{path.name}, {kind}", "a file", mend)
        data = path.read_bytes()
    except (OSError, ValueError) as error:
        if isinstance(error, ImageError):
            raise
        found = f"{path.name}: {getattr(error, 'strerror', None) or error}"
        mend = "Check the path and its permissions."
        raise ImageError(path, "file", found, "a readable file", mend) from None
    if not data:
        mend = "Copy or download the file again."
        raise ImageError(path, "file", f"{path.name} with 0 bytes", "an image", mend)
    return data


def check_size(path: Path, shape: Sequence[int], width: int, stored: int | None = None) -> int:
    """Bytes of an array of `shape` with `width` bytes a value. Raises ImageError where the file's
    `stored` bytes cannot hold that many, or this machine cannot."""
    size = width
    for length in shape:
        size *= max(0, int(length))
    if stored is not None and size > MOST_PACKED * stored + 2**16:
        raise damaged(
            path, f"its header speaks of {text_of(size)}, the file holds {text_of(stored)}"
        )
    # the file, its values, and these as real numbers
    if size > ALWAYS_FITS and 3 * size > (budget := memory_budget()):
        found = f"{text_of(size)} of values ({'x'.join(map(str, shape))})"
        expected = f"at most {text_of(budget // 3)} on this machine"
        mend = "Cut the image into tiles, or give the job more memory."
        raise ImageError(path, "size", found, expected, mend)
    return size


def text_of(size: int) -> str:
    for power, unit in ((30, "GiB"), (20, "MiB"), (10, "KiB")):
        if size >= 2**power:
            return f"{size / 2**power:.1f} {unit}"
    return f"{size} bytes"
