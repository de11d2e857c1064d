"""What describes a data set, damaged: JSON, tables and lists of every layout, as people edit them
and as disks lose them. The files of images are damaged by `files_mutants.py`, which runs this one
too.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
from files_quirks import LAYOUTS

from segfleet.core.errors import InputError
from segfleet.preprocess.checking.check import survey
from segfleet.preprocess.phantoms.phantom import PHANTOMS
from segfleet.preprocess.readers.base import open_reader

DOCUMENTS = (".json", ".csv", ".tsv", ".cfg", ".txt")
ODD = (
    None, True, -1, 0, 1, 3.5, 10**30, math.inf, math.nan, "", "0", "-1", "\u00b2", "x" * 300,
    "a\0b", "..", "../../x.png", "/", [], {}, [[]], [1, 2, 3], ["a"], {"a": None}, {"0": "a"},
)  # fmt: skip
WORDS = ("", "0", "-1", "\u00b2", "1e999", '"', ",", ";", "\t", "\0", "x" * 200_000, "../x", "nan")


class Layout:
    """A small sound data set in one layout, with the documents that people put into it."""

    def __init__(self, name: str, root: Path):
        self.name, self.root = name, root
        if name in PHANTOMS:
            PHANTOMS[name](root, 4)
        else:
            LAYOUTS[name](root)
        reader = open_reader(name, root)
        names = [ref.id for ref in reader.refs()]
        lines = [
            f"{n},p{i // 2},s{i % 2},{'val' if i > 2 else 'train'}" for i, n in enumerate(names)
        ]
        (root / "patients.csv").write_text("case,patient,site,split\n" + "\n".join(lines) + "\n")
        labels = reader.dataset().labels
        for folder in {root, getattr(reader, "folder", root)}:
            (folder / "labels.json").write_text(json.dumps(labels))
        if name == "nnunet":
            fold = {"train": names[:2], "val": names[2:]}
            (root / "splits_final.json").write_text(json.dumps([fold]))
        self.facts = survey(open_reader(name, root), workers=1).facts
        found = [p for p in root.rglob("*") if p.suffix.lower() in DOCUMENTS and p.is_file()]
        self.documents = {path: path.read_bytes() for path in sorted(found)}

    def damage(self, rng: np.random.Generator, mutated: Any) -> None:
        """Put one of the documents wrong: a value of it, or bytes."""
        path = list(self.documents)[int(rng.integers(0, len(self.documents)))]
        data = self.documents[path]
        if rng.random() < 0.3:
            path.write_bytes(mutated(data, rng))
        elif path.suffix == ".json":
            path.write_text(json.dumps(_replaced(json.loads(data), rng)), encoding="utf-8")
        else:
            text = data.decode("utf-8")
            at = int(rng.integers(0, len(text) + 1))
            end = min(len(text), at + int(rng.integers(0, 6)))
            odd = WORDS[int(rng.integers(0, len(WORDS)))]
            path.write_text(text[:at] + odd + text[end:], encoding="utf-8")

    def look(self) -> str:
        """As the check does. "read", "refused", or the error that should not be."""
        try:
            reader = open_reader(self.name, self.root)
            survey(reader, workers=1, known=self.facts)
            reader.splits()
            return "read"
        except InputError:
            return "refused"
        except BaseException as error:
            last = error.__traceback__
            while last.tb_next:
                last = last.tb_next
            where = f"{Path(last.tb_frame.f_code.co_filename).name}:{last.tb_lineno}"
            return f"TRACEBACK: {type(error).__name__} in {where}: {str(error)[:150]}"

    def mend(self) -> None:
        for path, data in self.documents.items():
            path.write_bytes(data)


def _replaced(document: Any, rng: np.random.Generator) -> Any:
    """The document with one of its values, at any depth, an odd one, or gone."""
    places = list(_places(document))
    if not places:
        return ODD[int(rng.integers(0, len(ODD)))]
    holder, key = places[int(rng.integers(0, len(places)))]
    odd = ODD[int(rng.integers(0, len(ODD)))]
    kind = rng.integers(0, 8)
    if kind == 0:
        del holder[key]
    elif kind == 1 and isinstance(holder, dict):
        holder[str(odd)] = holder.pop(key)
    elif kind == 2 and isinstance(holder, list):
        holder.append(holder[key])
    else:
        holder[key] = odd
    return document


def _places(node: Any) -> Any:
    keys = (
        node.keys()
        if isinstance(node, dict)
        else range(len(node))
        if isinstance(node, list)
        else ()
    )
    for key in list(keys):
        yield node, key
        yield from _places(node[key])
