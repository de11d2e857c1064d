"""What is wrong with a user's input, said once and completely."""

from __future__ import annotations

from dataclasses import asdict, dataclass


class InputError(ValueError):
    """The user's input is wrong. The message is all the user sees; the command line exits with `exit_code`."""

    exit_code = 2


@dataclass(frozen=True, kw_only=True)
class Problem:
    """One fault of a data set: which case, which field, what was found, what was expected and how to mend it."""

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
        lines = [f"{p.case}: {p.field}: found {p.found}, expected {p.expected}. {p.mend}" for p in problems]
        super().__init__(f"{len(problems)} problem(s) in {where}\n" + "\n".join(lines))
