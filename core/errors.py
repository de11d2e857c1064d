"""What is wrong with a user's input, said once and completely."""

from __future__ import annotations

import difflib
import errno
import importlib
import traceback
from collections import Counter
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from enum import IntEnum
from pathlib import Path
from types import ModuleType

# they call themselves folder by folder
WALKERS = ("glob", "os", "pathlib", "pathlib._local", "shutil")


class ExitCode(IntEnum):
    """How every process of segfleet ends."""

    OK = 0
    FAULT = 1  # of segfleet or of the machine
    INPUT = 2  # the user's to correct: wrong input, a disk that is full or can only be read
    INTERRUPTED = 75  # EX_TEMPFAIL of sysexits.h: all is saved, the same command resumes


class InputError(ValueError):
    """The user's input is wrong. The message is all the user sees; the command line exits with
    `exit_code`."""

    exit_code = ExitCode.INPUT


@dataclass(frozen=True, kw_only=True)
class Problem:
    """One fault of a data set: which case, which field, what was found, what was expected and how
    to repair it (`mend`)."""

    case: str
    field: str
    found: str
    expected: str
    mend: str

    def as_dict(self) -> dict[str, str]:
        return asdict(self)


class DataError(InputError):
    """A data set has problems. `problems` holds all of them, in the order of the cases."""

    def __init__(self, where: str, problems: list[Problem]):
        self.where, self.problems = where, problems
        lines = [
            f"{p.case}: {p.field}: found {p.found}, expected {p.expected}. {p.mend}"
            for p in problems
        ]
        super().__init__(f"{len(problems)} problem(s) in {where}\n" + "\n".join(lines))


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """ " Did you mean 'train'?" if something known is spelt nearly like `word`, else ""."""
    close = difflib.get_close_matches(word, list(known), n=1)
    return f" Did you mean '{close[0]}'?" if close else ""


def check_one_of(what: str, found: object, legal: Iterable[object]) -> None:
    """Raises InputError with what is legal, if `found` is none of it."""
    if found not in (names := list(legal)):
        expected = ", ".join(map(str, names))
        raise InputError(f"{what}: found '{found}', expected one of: {expected}")


def import_part(module: str, what: str) -> ModuleType:
    """A module of ours that is one of several of its kind, such as a loss or a layout. Raises
    InputError in one sentence if its file is broken: the others work without it."""
    try:
        return importlib.import_module(module)
    except Exception as error:
        if getattr(error, "exit_code", None) is not None:
            raise
        last = traceback.extract_tb(error.__traceback__)[-1]
        file = getattr(error, "filename", None) or last.filename
        line = getattr(error, "lineno", None) or last.lineno
        text = " ".join((getattr(error, "msg", None) or str(error)).split())
        raise InputError(
            f"the {what} '{module.rpartition('.')[2]}' cannot be used: {type(error).__name__}: "
            f"{text} ({file}, line {line}). Correct that file or choose another"
        ) from error


def is_full(error: BaseException) -> bool:
    """Whether a file could not be written for want of space."""
    return isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT)


def explain(error: BaseException) -> tuple[str, int] | None:
    """(message, exit code) of an error that is no fault of ours, in one sentence the user can act
    on; None for any other."""
    if (code := getattr(error, "exit_code", None)) is not None:
        return str(error), code
    if isinstance(error, KeyboardInterrupt):
        return (
            "interrupted. Run the same command again: it goes on where it stopped.",
            ExitCode.INTERRUPTED,
        )
    if is_full(error) and "multiprocessing.synchronize" in _modules(error):  # of a semaphore
        return (
            "no space left in /dev/shm, which processes share memory by. Make it larger (docker: "
            "--shm-size=2g), or do without: data.workers=0 in a training, --workers 1 elsewhere.",
            ExitCode.INPUT,
        )
    if is_full(error):
        filename = getattr(error, "filename", None)
        where = f" at {filename}" if filename else ""
        return (
            f"no space left on the device{where}. Free some and run the same command again: it "
            "goes on.",
            ExitCode.INPUT,
        )
    if isinstance(error, NotADirectoryError | FileExistsError) and (
        file := _file_above(error.filename)
    ):
        return (
            f"{file} is a file, expected a folder. Choose another folder, or move the file away.",
            ExitCode.INPUT,
        )
    if isinstance(error, OSError) and error.errno == errno.ENAMETOOLONG:
        name = Path(str(error.filename or "")).name or "a file"
        return (
            f"{name[:40]}...: the name is too long for the file system. Choose a shorter one.",
            ExitCode.INPUT,
        )
    if isinstance(error, UnicodeEncodeError) and "surrogates" in error.reason:
        return f"{error.object!a} is no UTF-8. Rename the file, or choose another.", ExitCode.INPUT
    if isinstance(error, OSError) and error.errno in (errno.EISDIR, errno.ELOOP):
        what = "a folder" if error.errno == errno.EISDIR else "a link to itself"
        return f"{error.filename} is {what}, expected a file. Move it away.", ExitCode.INPUT
    if isinstance(error, OSError) and error.errno == errno.EROFS:
        return (
            f"{error.filename or 'output'}: the file system can only be read. Choose a folder you "
            "may write to.",
            ExitCode.INPUT,
        )
    if isinstance(error, RecursionError) and (where := _walked(error)):
        return (
            f"{where}: its folders lie too deeply inside one another, more than about 900. Move "
            "what is needed to another place.",
            ExitCode.INPUT,
        )
    if isinstance(error, PermissionError):
        return (
            f"{error.filename}: permission denied. Choose a folder you may write to, or correct "
            "its permissions.",
            ExitCode.INPUT,
        )
    return None


def _modules(error: BaseException) -> set[str]:
    """That it came through."""
    return {
        frame.f_globals.get("__name__", "") for frame, _ in traceback.walk_tb(error.__traceback__)
    }


def _walked(error: BaseException) -> str:
    """The folder that Python's own functions for files went down into or made, if that is what had
    no end; "" for any other recursion."""
    frames = [frame for frame, _ in traceback.walk_tb(error.__traceback__)]
    modules = Counter(frame.f_globals.get("__name__") for frame in frames)
    if modules.most_common(1)[0][0] not in WALKERS:
        return ""
    first = next(frame for frame in frames if frame.f_globals.get("__name__") in WALKERS)
    paths = [value for value in first.f_locals.values() if isinstance(value, str | Path)]
    return f"{str(next(iter(paths), 'a path'))[:100]}..."


def _file_above(path: str | None) -> Path | None:
    """What is no folder in a path that ought to be made of folders."""
    return (
        next(
            (
                part
                for part in (Path(path), *Path(path).parents)
                if part.exists() and not part.is_dir()
            ),
            None,
        )
        if path
        else None
    )
