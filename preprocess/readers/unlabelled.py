"""Any layout without its labels: images to pre-train on. Every case is background, and the data set
has no class."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np

from segfleet.core.errors import Problem
from segfleet.preprocess.case import Geometry
from segfleet.preprocess.files.faults import is_regular
from segfleet.preprocess.readers.base import CaseRef, RawReader, duplicates
from segfleet.preprocess.stores.manifest import Dataset


class Unlabelled(RawReader):
    """The images of another reader. Labels are neither looked for nor opened, cases of which there
    is a label alone are none, and splits that were made for labelled cases are left out."""

    def __init__(self, inner: RawReader):
        self.inner, self.root, self.labelled = inner, inner.root, False
        self.folder = inner.folder  # where the table of patients may lie
        self.chosen = {**inner.chosen, "unlabelled": "yes"}
        self.about, self.layout, self.facts = inner.about, inner.layout, inner.facts
        self.patients_from = inner.patients_from

    def dataset(self) -> Dataset:
        none: dict[str, Any] = {"regions": {}, "region_order": (), "ignore_label": None}
        return self.inner.dataset().model_copy(update={"labels": {"background": 0}, **none})

    def cases(self) -> list[CaseRef]:
        refs = [replace(ref, labels=(), said="", stratum="") for ref in self.inner.cases()]
        return [ref for ref in refs if any(map(is_regular, ref.images))]

    def problems(self) -> list[Problem]:
        return duplicates([ref.id for ref in self.refs()])

    def may_be_empty(self, ref: CaseRef) -> bool:
        return True

    def image(self, ref: CaseRef, digest: Any = None) -> tuple[np.ndarray, Geometry]:
        return self.inner.image(ref, digest)
