"""nnU-Net v2 and nnssl (OpenMind): PlainConvUNet and ResidualEncoderUNet of
dynamic-network-architectures."""

from __future__ import annotations

import re

from segfleet.models.foreign import Table

NETWORKS = ("plain_unet_2d", "plain_unet_3d", "resenc_unet_2d", "resenc_unet_3d")
PART = {"conv": 0, "norm": 1}


def _layer(match: re.Match[str]) -> str:
    """`...conv.weight` -> `...0.weight`, `...norm.weight` -> `...1.weight`."""
    *parts, kind, leaf = match.groups()
    return f"{FORMS[match.re.pattern].format(*parts)}.{PART[kind]}.{leaf}"


def _shortcut(match: re.Match[str]) -> str:
    stage, block, place, kind, leaf = match.groups()
    return f"encoder.{stage}.{block}.shortcut.{int(place) + PART[kind]}.{leaf}"


LEAF = r"(conv|norm)\.(weight|bias)"
FORMS = {
    rf"encoder\.stem\.convs\.0\.{LEAF}": "stem",
    rf"encoder\.stages\.(\d+)\.0\.convs\.(\d+)\.{LEAF}": "encoder.{}.{}",
    rf"encoder\.stages\.(\d+)\.blocks\.(\d+)\.(conv1|conv2)\.{LEAF}": "encoder.{}.{}.{}",
    rf"decoder\.stages\.(\d+)\.convs\.(\d+)\.{LEAF}": "decoder.{}.convs.{}",
}
TABLE = Table(
    rules=(
        *((pattern, _layer) for pattern in FORMS),
        (rf"encoder\.stages\.(\d+)\.blocks\.(\d+)\.skip\.(\d+)\.{LEAF}", _shortcut),
        (r"decoder\.transpconvs\.(\d+)\.(weight|bias)", r"decoder.\1.up.\2"),
        (r"decoder\.seg_layers\.(\d+)\.(weight|bias)", r"heads.\1.\2"),
    ),
    # every layer is there twice, and the decoder holds the encoder once more
    ignored=(r".*\.all_modules\..*", r"decoder\.encoder\..*"),
)
