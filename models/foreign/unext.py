"""UNeXt as released: encoder and decoder numbered from 1, token stages 1 (1/16) and 2 (1/32)."""

from __future__ import annotations

import re

from segfleet.models.foreign import Table

NETWORKS = ("unext",)
NORM = r"(weight|bias|running_mean|running_var|num_batches_tracked)"
LAYERS = {"fc1": "first", "dwconv.dwconv": "depthwise", "fc2": "second"}
DECODER = {"1": "dec5", "2": "dec4", "3": "dec3", "4": "dec2", "5": "dec1"}


def _tokens(place: dict[str, str]):
    def rename(match: re.Match[str]) -> str:
        number, layer, leaf = match.groups()
        return f"{place[number]}.{LAYERS[layer]}.{leaf}"

    return rename


def _norm(place: dict[str, str], inner: str):
    return lambda match: f"{place[match.group(1)]}.{inner}{match.group(2)}"


def _dec(inner: str):
    return lambda match: f"{DECODER[match.group(1)]}.{inner}.{match.group(2)}"


DEEP = {"1": "enc4", "2": "enc5"}
UP = {"1": "dec5", "2": "dec4"}
MLP = r"(fc1|dwconv\.dwconv|fc2)\.(weight|bias)"
TABLE = Table(
    rules=(
        (r"encoder(\d)\.(weight|bias)", r"enc\1.0.\2"),
        (rf"ebn(\d)\.{NORM}", r"enc\1.1.\2"),
        (r"patch_embed3\.proj\.(weight|bias)", r"enc4.0.\1"),
        (r"patch_embed3\.norm\.(weight|bias)", r"enc4.1.\1"),
        (r"patch_embed4\.proj\.(weight|bias)", r"enc5.0.\1"),
        (r"patch_embed4\.norm\.(weight|bias)", r"enc5.1.\1"),
        (r"block(\d)\.0\.norm2\.(weight|bias)", _norm(DEEP, "2.norm.")),
        (rf"block(\d)\.0\.mlp\.{MLP}", _tokens({k: f"{v}.2" for k, v in DEEP.items()})),
        (r"norm3\.(weight|bias)", r"enc4.3.\1"),
        (r"norm4\.(weight|bias)", r"enc5.3.\1"),
        (r"dblock(\d)\.0\.norm2\.(weight|bias)", _norm(UP, "tokens.0.norm.")),
        (rf"dblock(\d)\.0\.mlp\.{MLP}", _tokens({k: f"{v}.tokens.0" for k, v in UP.items()})),
        (r"dnorm3\.(weight|bias)", r"dec5.tokens.1.\1"),
        (r"dnorm4\.(weight|bias)", r"dec4.tokens.1.\1"),
        (r"decoder(\d)\.(weight|bias)", _dec("conv")),
        (rf"dbn(\d)\.{NORM}", _dec("norm")),
        (r"final\.(weight|bias)", r"head.\1"),
    ),
    # layers that the released network makes and never uses
    ignored=(r"soft\..*", r"norm5\..*", r"dnorm2\..*", r".*\.drop_path\..*"),
)
