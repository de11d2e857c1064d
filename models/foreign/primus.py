"""Primus as nnU-Net and nnssl (OpenMind) train it: the transformer is `eva`. Contrastive methods of
nnssl have the whole network as their `encoder`."""

from __future__ import annotations

import re

from segfleet.models.foreign import LEAF, Table

NETWORKS = ("primus_m", "primus_v3_s", "primus_v3_m")
LAYERS = {
    "attn.q_proj": "attention.query", "attn.k_proj": "attention.key",
    "attn.v_proj": "attention.value", "attn.norm": "attention.norm", "attn.proj": "attention.out",
    "mlp.fc1_g": "mlp.gate", "mlp.fc1_x": "mlp.value", "mlp.norm": "mlp.norm", "mlp.fc2": "mlp.out",
    "norm1": "norm1", "norm2": "norm2",
}  # fmt: skip
LAYER = {"conv": 0, "norm": 1}
BLOCK = rf"(conv1|conv2)\.(conv|norm)\.({LEAF})"
SHORTCUT = rf"skip\.(\d)\.(conv|norm)\.({LEAF})"


def _layer(match: re.Match[str]) -> str:
    number, layer, leaf = match.groups()
    return f"blocks.{number}.{LAYERS[layer]}.{leaf}"


def _residual(where: str):
    def rename(match: re.Match[str]) -> str:
        *number, part, layer, leaf = match.groups()
        return f"embed.{where.format(*number)}.{part}.{LAYER[layer]}.{leaf}"

    return rename


def _shortcut(where: str):
    def rename(match: re.Match[str]) -> str:
        *number, place, layer, leaf = match.groups()
        return f"embed.{where.format(*number)}.shortcut.{int(place) + LAYER[layer]}.{leaf}"

    return rename


STEM, STAGE = r"down_projection\.stem\.blocks\.0", r"down_projection\.stages\.(\d)\.blocks\.0"
RULES = (
    (r"eva\.pos_embed", "position"),
    (rf"eva\.blocks\.(\d+)\.({'|'.join(map(re.escape, LAYERS))})\.({LEAF})", _layer),
    (r"eva\.blocks\.(\d+)\.gamma_([12])", r"blocks.\1.scale\2"),
    (rf"eva\.norm\.({LEAF})", r"norm.\1"),
    (rf"down_projection\.proj\.({LEAF})", r"embed.\1"),
    (rf"{STEM}\.{BLOCK}", _residual("stem")),
    (rf"{STEM}\.{SHORTCUT}", _shortcut("stem")),
    (rf"{STAGE}\.{BLOCK}", _residual("halve.{}")),
    (rf"{STAGE}\.{SHORTCUT}", _shortcut("halve.{}")),
    (rf"down_projection\.final_proj\.({LEAF})", r"embed.project.\1"),
    (rf"down_projection\.proj_to_tokens\.(\d)\.({LEAF})", r"embed.shortcuts.\1.\2"),
    (r"down_projection\.scale_proj_to_tokens\.(\d)", r"embed.scales.\1"),
    (rf"up_projection\.decode\.([01]\.[01]\.{LEAF})", r"decoder.\1"),
    (rf"up_projection\.decode\.2\.({LEAF})", r"decoder.2.\1"),
)
TABLE = Table(
    rules=[(rf"(?:encoder\.)?{foreign}", native) for foreign, native in RULES],
    # of masked training; places that follow from the grid; layers that are there twice
    ignored=("mask_token", r".*eva\.rope\..*", r".*\.all_modules\..*"),
)
