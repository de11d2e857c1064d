"""ASC-Seg as released (ILoveBSPC/ASC-Seg): encoder blocks `eb`, decoder blocks `cnsd`, connectors
`fac`, heads `ph`."""

from __future__ import annotations

import re

from segfleet.models.foreign import LEAF, Table

NETWORKS = ("asc_seg",)
MIXER = r"(?:A_log|D|(?:in_proj|conv1d|x_proj|dt_proj|out_proj)\.(?:weight|bias))"
TOKENS = {"proj": "linear", "pro1": "tail.0", "dwconv": "tail.1", "pro2": "tail.3"}
DEFORMABLE = {"pro": "enter", "deform.offset": "offset", "deform.balance": "leave"}
NOISE = {"weight.0": "gate.0", "weight.1": "gate.1", "norm1": "enter", "norm2": "join"}
BRANCH = {"extract.0": 0, "extract.1": 1, "integrate.0": 3, "integrate.1": 4}


def _any(names: dict[str, object]) -> str:
    return "|".join(map(re.escape, names))


def _decoder(inside: str):
    """A part of `cnsd.0`, which is decoder1's."""
    return lambda m: f"decoder{int(m[1]) + 1}.{inside.format(*m.groups())}"


def _pooled(match: re.Match[str]) -> str:
    """The published branches begin with their pooling."""
    level, branch, place, leaf = match.groups()
    pooling = {"ave": "mean", "max": "peak"}[branch]
    return f"decoder{int(level) + 1}.sab.{pooling}.{int(place) - 1}.{leaf}"


def _branch(match: re.Match[str]) -> str:
    level, number, layer, leaf = match.groups()
    return f"decoder{int(level) + 1}.msfa.branches.{int(number) - 1}.{BRANCH[layer]}.{leaf}"


def _noise(match: re.Match[str]) -> str:
    level, layer, leaf = match.groups()
    return f"decoder{int(level) + 1}.dfb.{NOISE[layer]}.{leaf}"


EB, CNSD = r"encoder\.eb(\d)", r"decoder\.cnsd\.(\d)"
TABLE = Table(
    rules=(
        (rf"{EB}\.ipc\.(\d\.{LEAF})", r"encoder\1.ipcb.\2"),
        (rf"{EB}\.pm\.norm\.({LEAF})", r"encoder\1.pmb.norm.\2"),
        (rf"{EB}\.pm\.mamba\.({MIXER})", r"encoder\1.pmb.mixer.\2"),
        (
            rf"{EB}\.pm\.({_any(TOKENS)})\.({LEAF})",
            lambda m: f"encoder{m[1]}.pmb.{TOKENS[m[2]]}.{m[3]}",
        ),
        (rf"{EB}\.dc\.deform\.deform\.weight", r"encoder\1.dcb.deform.weight"),
        (
            rf"{EB}\.dc\.({_any(DEFORMABLE)})\.([01]\.{LEAF})",
            lambda m: f"encoder{m[1]}.dcb.{DEFORMABLE[m[2]]}.{m[3]}",
        ),
        (rf"{CNSD}\.msfa\.cfe(\d)\.({_any(BRANCH)})\.({LEAF})", _branch),
        (rf"{CNSD}\.msfa\.extract\.(\d\.{LEAF})", _decoder("msfa.fuse.{1}")),
        (
            rf"{CNSD}\.sf\.attention\.0\.AP(\d)\.(\d\.{LEAF})",
            lambda m: f"decoder{int(m[1]) + 1}.dfb.scales.{int(m[2]) - 1}.{m[3]}",
        ),
        (rf"{CNSD}\.sf\.attention\.0\.({_any(NOISE)})\.({LEAF})", _noise),
        (rf"{CNSD}\.sf\.attention\.1\.(ave|max)\.(\d)\.({LEAF})", _pooled),
        (rf"{CNSD}\.sf\.attention\.1\.conv\.(\d\.{LEAF})", _decoder("sab.gate.{1}")),
        (rf"{CNSD}\.sf\.attention\.2\.conv\.(\d\.{LEAF})", _decoder("cab.gate.{1}")),
        (
            rf"decoder\.fac\.(\d)\.pro\.([12])\.({LEAF})",
            lambda m: f"connect{int(m[1]) + 1}.{('conv', 'norm')[int(m[2]) - 1]}.{m[3]}",
        ),
        (rf"final\.ph(\d)\.pro\.0\.({LEAF})", r"head\1.\2"),
    ),
)
