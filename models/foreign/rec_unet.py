"""REC-UNet as released (459806555/REC-UNet), both files: `conv1` and `EM_block` in the tumour
network, one `conv` in the variant for the liver."""

from __future__ import annotations

import re

from segfleet.models.foreign import LEAF, Table

NETWORKS = ("rec_unet", "rec_unet_em")
GATES = {"ChannelGateH": 0, "ChannelGateW": 1, "SpatialGate": 2}
GATE_LAYER = {"conv": "conv", "bn": "norm"}
ATTENTION = {"W_g": "deep", "W_x": "skip"}
BLOCK = r"(Conv|Up_conv)(\d)"


def _block(match: re.Match[str]) -> str:
    """`Conv3` is e3, `Up_conv3` the block of d3."""
    kind, level = match[1], match[2]
    return f"e{level}" if kind == "Conv" else f"d{level}.block"


def _gate(match: re.Match[str]) -> str:
    _, _, gate, layer, leaf = match.groups()
    return f"{_block(match)}.attention.gates.{GATES[gate]}.{GATE_LAYER[layer]}.{leaf}"


TABLE = Table(
    rules=(
        (rf"{BLOCK}\.conv1\.(\d\.{LEAF})", lambda m: f"{_block(m)}.first.{m[3]}"),
        (rf"{BLOCK}\.EM_block\.([01]\.{LEAF})", lambda m: f"{_block(m)}.second.{m[3]}"),
        (rf"{BLOCK}\.conv\.([01]\.{LEAF})", lambda m: f"{_block(m)}.first.{m[3]}"),
        (
            rf"{BLOCK}\.conv\.([34])\.({LEAF})",
            lambda m: f"{_block(m)}.second.{int(m[3]) - 3}.{m[4]}",
        ),
        (
            rf"{BLOCK}\.(?:EM_block\.3|conv\.6)\.({'|'.join(GATES)})\.spatial\.(conv|bn)\.({LEAF})",
            _gate,
        ),
        (rf"Up(\d)\.up\.([12]\.{LEAF})", r"d\1.up.\2"),
        (
            rf"Att(\d)\.(W_[gx])\.([01]\.{LEAF})",
            lambda m: f"d{m[1]}.calibrate.{ATTENTION[m[2]]}.{m[3]}",
        ),
        (
            rf"Att(\d)\.psi\.([01])\.({LEAF})",
            lambda m: f"d{m[1]}.calibrate.gate.{int(m[2]) + 1}.{m[3]}",
        ),
        (rf"Conv\.({LEAF})", r"head.\1"),
    ),
)
