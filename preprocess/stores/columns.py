"""Named arrays and columns of text in one file, which is mapped, not read: all processes of a
machine share its memory.

The file is a safetensors file (https://huggingface.co/docs/safetensors): eight bytes of length, a
JSON header, the arrays. Text is UTF-8, one after the other (`NAME.text`), with where each ends
(`NAME.end`); values that repeat are written once and counted (`NAME.code`).
"""

from __future__ import annotations

import hashlib
import json
import math
from array import array
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np

from segfleet.core.files import replacing

Arrays = Mapping[str, np.ndarray]
KINDS = {"U8": "<u1", "I32": "<i4", "U32": "<u4", "U64": "<u8"}
NAMES = {np.dtype(kind): name for name, kind in KINDS.items()}
MOST_HEADER = 2**20  # bytes; ours has some twenty short lines


class Text(Sequence[str]):
    """A column of strings, each decoded when it is asked for."""

    def __init__(self, arrays: Arrays, name: str):
        self.bytes, self.end = arrays[f"{name}.text"], arrays[f"{name}.end"]

    def __len__(self) -> int:
        return len(self.end)

    def __getitem__(self, index: int) -> str:
        start = int(self.end[index - 1]) if index else 0
        return self.bytes[start : int(self.end[index])].tobytes().decode()

    def __iter__(self) -> Iterator[str]:
        start, block = 0, 2**16
        for first in range(0, len(self.end), block):  # few large copies, and never all at once
            ends = self.end[first : first + block].tolist()
            whole, offset = self.bytes[start : ends[-1]].tobytes(), start
            for end in ends:
                yield whole[start - offset : end - offset].decode()
                start = end


class Coded(Sequence[str]):
    """A column of strings that repeat: the different ones, and which each row has."""

    def __init__(self, arrays: Arrays, name: str):
        self.values, self.code = Text(arrays, name), arrays[f"{name}.code"]

    def __len__(self) -> int:
        return len(self.code)

    def __getitem__(self, index: int) -> str:
        return self.values[int(self.code[index])]

    def __iter__(self) -> Iterator[str]:
        values = tuple(self.values)
        return (values[code] for code in self.code.tolist())


class TextBuilder:
    """A `Text` column in the making; small even when it is long."""

    def __init__(self, values: Iterable[str] = ()):
        self.bytes, self.end = bytearray(), array("Q")
        for value in values:
            self.add(value)

    def add(self, value: str) -> None:
        self.bytes += value.encode()
        self.end.append(len(self.bytes))

    def arrays(self, name: str) -> dict[str, np.ndarray]:
        text = np.frombuffer(bytes(self.bytes), np.uint8)
        return {f"{name}.text": text, f"{name}.end": narrow(self.end)}


class CodedBuilder:
    """A `Coded` column in the making; values are numbered as they come."""

    def __init__(self, values: Iterable[str] = ()):
        self.numbers: dict[str, int] = {}
        self.code = array("Q")
        for value in values:
            self.add(value)

    def add(self, value: str) -> None:
        self.code.append(self.numbers.setdefault(value, len(self.numbers)))

    def arrays(self, name: str) -> dict[str, np.ndarray]:
        return {**TextBuilder(self.numbers).arrays(name), f"{name}.code": narrow(self.code)}


def narrow(numbers: Sequence[int] | np.ndarray) -> np.ndarray:
    """As uint32 where all of them fit, else as uint64."""
    whole = np.asarray(numbers, np.uint64)
    return whole.astype("<u4") if not len(whole) or whole.max() < 2**32 else whole.astype("<u8")


def write_columns(path: Path, arrays: Arrays) -> None:
    """The file, whole or not at all; equal arrays, equal bytes. Names are sorted, wide numbers come
    first, so that every array is aligned."""
    order = sorted(arrays, key=lambda name: (-arrays[name].itemsize, name))
    header, at = {}, 0
    for name in order:
        data = arrays[name]
        header[name] = {
            "dtype": NAMES[data.dtype],
            "shape": list(data.shape),
            "data_offsets": [at, at + data.nbytes],
        }
        at += data.nbytes
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with replacing(path) as temporary, open(temporary, "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name in order:
            file.write(np.ascontiguousarray(arrays[name]).data)


def map_columns(path: Path) -> dict[str, np.ndarray]:
    """The arrays of a file, mapped, for reading. Raises OSError, ValueError or KeyError if it is
    none."""
    whole = np.memmap(path, np.uint8, "r")
    size = int.from_bytes(whole[:8].tobytes(), "little")
    if size > min(MOST_HEADER, len(whole)):
        raise ValueError(f"{path}: its header is longer than the file")
    header, data = json.loads(whole[8 : 8 + size].tobytes()), whole[8 + size :]
    arrays = {}
    for name, entry in header.items():
        kind, (start, stop) = np.dtype(KINDS[entry["dtype"]]), entry["data_offsets"]
        if not 0 <= start <= stop <= len(data) or stop - start != kind.itemsize * math.prod(
            entry["shape"]
        ):
            raise ValueError(f"{path}: array {name} lies outside the file")
        arrays[name] = np.asarray(data[start:stop]).view(kind).reshape(entry["shape"])
    return arrays


def sha256_of(path: Path) -> str:
    """Of the file, read in pieces: no page of it counts as this process's own."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
