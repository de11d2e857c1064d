"""What an evaluation.json must look like, so that its readers need not doubt it: it may have
been written by a hand or by another program."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

Number = Annotated[float, Field(allow_inf_nan=False)]
Known = Number | None
Counts = dict[str, Annotated[int, Field(ge=0, lt=2**63)]]


class Part(BaseModel):
    """A part of the document; it may hold more than is said here."""

    model_config = ConfigDict(extra="allow", strict=True)


class Mean(Part):
    mean: Known = None
    sd: Known = None
    median: Known = None
    n: Annotated[int, Field(ge=0, lt=2**63)] = 0
    ci95: list[Number] | None = None


class Structure(Part):
    """Every further key is a metric."""

    __pydantic_extra__: dict[str, Mean]

    counts: Counts = {}
    variants: dict[str, Known] = {}
    pooled: dict[str, dict[str, Known]] = {}


class Summary(Part):
    cases: Annotated[int, Field(ge=0, lt=2**63)] = 0
    patients: Annotated[int, Field(ge=0, lt=2**63)] = 0
    mean_foreground_dice: Known = None
    mean_foreground_dice_ci95: list[Number] | None = None
    variants: dict[str, Known] = {}
    structures: dict[str, Structure] = {}


class Case(Part):
    id: str
    group: str = ""
    mean_dice: Known = None
    scores: dict[str, dict[str, Known | list[Known]]] = {}


class Settings(Part):
    patch: list[Annotated[int, Field(gt=0, lt=2**31)]] | None = None
    overlap: Number = 0.5
    mirror_axes: list[int] = []
    tolerance: dict[str, Number] = {}


class Evaluation(Part):
    dataset: str = ""
    store: str = ""
    unit: str = "mm"
    settings: Settings = Settings()
    structures: list[str] = []
    cases: list[Case] = []
    summary: Summary = Summary()
    definitions: dict[str, str] = {}
    checkpoint: str | None = None
    parameters: Annotated[int, Field(ge=0, lt=2**63)] | None = None
    scored: dict[str, Any] = {}


def is_evaluation(document: dict[str, Any], *, whole: bool = True) -> bool:
    """Whether a document has this form. Not `whole`: what a list of runs shows of it, for cases may
    be many."""
    try:
        if not whole:
            Summary.model_validate(document.get("summary", {}))
            return isinstance(document.get("scored", {}), dict)
        evaluation = Evaluation.model_validate(document)
    except (ValidationError, RecursionError, OverflowError):
        return False
    names = set(evaluation.structures)
    return all(names <= case.scores.keys() for case in evaluation.cases)
