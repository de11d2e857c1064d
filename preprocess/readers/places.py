"""Finding a layout's folder: exactly where the user points, or one level below; anything else is
answered with a hint."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from segfleet.core.errors import InputError

DEPTH = 5  # levels searched for the hint


def locate(root: Path, fits: Callable[[Path], bool], layout: str) -> Path:
    """`root` or its only subfolder that fits. Raises InputError that says what was expected and
    where it seems to lie."""
    if fits(root):
        return root
    below = subfolders(root)
    fitting = [folder for folder in below if fits(folder)]
    if len(fitting) == 1:
        return fitting[0]
    depth = 1
    while not fitting and below and depth < DEPTH:
        below = [inner for folder in below for inner in subfolders(folder)][:500]
        fitting = [folder for folder in below if fits(folder)]
        depth += 1
    fitting += [parent for parent in list(root.resolve().parents)[:2] if fits(parent)]
    hint = f" It seems to be {fitting[0]}: give that folder." if fitting else ""
    present = (
        ", ".join(sorted(p.name for p in root.iterdir() if not p.name.startswith("."))[:6])
        or "nothing"
    )
    raise InputError(
        f"raw: {root} holds no such data set. Expected {layout}. Found: {present}.{hint}"
    )


def subfolders(folder: Path) -> list[Path]:
    """Visible folders inside, without what macOS leaves in archives."""
    return sorted(
        p
        for p in folder.iterdir()
        if p.is_dir() and not p.name.startswith(".") and p.name != "__MACOSX"
    )
