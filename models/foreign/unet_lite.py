"""U-NetLite as released (tapjason/U-NetLite): the blocks are `double_conv`, wrapped once more where
squeeze-excitation follows."""

from __future__ import annotations

import re

from segfleet.models.foreign import LEAF, Table

NETWORKS = (
    "unet_lite_standard", "unet_lite_depthwise", "unet_lite_se", "unet_lite_se_depthwise",
    "unet_lite_se_depthwise_r32", "unet_lite_spatial", "unet_lite_ultralight",
)  # fmt: skip
# where the layers of a block lie: a depthwise and a pointwise convolution are one module there and
# two here
STANDARD = {str(place): place for place in (0, 1, 3, 4)}
LIGHT = {"0.depthwise": 0, "0.pointwise": 1, "1": 2, "3.depthwise": 4, "3.pointwise": 5, "4": 6}
GROUPED = {
    "conv1_depthwise": 0, "conv1_pointwise": 1, "bn1": 2,
    "conv2_depthwise": 4, "conv2_pointwise": 5, "bn2": 6,
}  # fmt: skip
STAGE = r"(inc|down\d\.maxpool_conv\.1|up\d\.conv)"
WITHIN = {"maxpool_conv.1": "1", "conv": "block"}


def _stage(foreign: str) -> str:
    first, _, rest = foreign.partition(".")
    return f"{first}.{WITHIN[rest]}" if rest else first


def _table(layers: dict[str, int], end: int = 8, within: str = r"\.double_conv") -> Table:
    """`end`: layers of a block, after which squeeze-excitation and spatial attention come."""

    def attended(match: re.Match[str]) -> str:
        number = int(match[1]) - 1
        return f"{f'down{number}.1' if number else 'inc'}.{end + 1}.conv.weight"

    names = "|".join(map(re.escape, layers))
    return Table(
        rules=(
            (
                rf"{STAGE}(?:\.(?:double_)?conv)?{within}\.({names})\.({LEAF})",
                lambda m: f"{_stage(m[1])}.{layers[m[2]]}.{m[3]}",
            ),
            (
                rf"{STAGE}\.se\.fc\.([02])\.weight",
                lambda m: f"{_stage(m[1])}.{end}.gate.{m[2]}.weight",
            ),
            (r"spatial_attention(\d)\.conv\.weight", attended),
            (rf"up(\d)\.up\.({LEAF})", r"up\1.up.\2"),
            (rf"outc\.conv\.({LEAF})", r"outc.\1"),
        )
    )


TABLE = dict.fromkeys(NETWORKS, _table(LIGHT)) | {
    "unet_lite_standard": _table(STANDARD, 6),
    "unet_lite_se": _table(STANDARD, 6),
    "unet_lite_ultralight": _table(GROUPED, within=""),
}
