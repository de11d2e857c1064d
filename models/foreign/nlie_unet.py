"""NLIE-UNet as released (0neDawn/NLIE-UNet): `conv1` to `conv51` down, `conv6` to `conv9` up, the
bridge is `Skip1`."""

from __future__ import annotations

import re

from segfleet.models.foreign import LEAF, Table

NETWORKS = ("nlie_unet_t", "nlie_unet_s", "nlie_unet_b", "nlie_unet_l")
DOUBLE = {"conv1": "enc1", "conv2": "enc2", "conv8": "dec2.block", "conv9": "dec1.block"}
CYCLIC = {
    "conv3": "enc3", "conv4": "enc4", "conv51": "enc5", "conv6": "dec4.block",
    "conv7": "dec3.block",
}  # fmt: skip
FUSE = {f"hifm{k}": f"dec{10 - k}.fuse" for k in (6, 7, 8, 9)}
FUSE |= {f"Skip1.hifm{k}": f"neb.fuse.{k - 1}" for k in range(1, 6)}
RESAMPLE = {
    "Down11": "gather.0.0", "Down12": "gather.0.1", "Down2": "gather.1", "Up4": "gather.3",
    "Up51": "gather.4.0", "Up52": "gather.4.1", "Up11": "send.0.0", "Up12": "send.0.1",
    "Up2": "send.1", "Down4": "send.3", "Down51": "send.4.0", "Down52": "send.4.1",
}  # fmt: skip
PART = {"conv": "point", "conv1": "conv"}
INPUT = {"x": 0, "g": 1, "d": 2}  # the base, then its neighbours
SPATIAL = {"": "first", "3": "scales.0", "5": "scales.1", "7": "scales.2", "9": "scales.3"}
SPATIAL |= {"_": "mix"}
LAYER = {"0": "norm", "2": "wide"}


def _any(names: dict[str, str]) -> str:
    return "|".join(map(re.escape, names))


def _spatial(match: re.Match[str]) -> str:
    module, which, layer, leaf = match.groups()
    return f"{FUSE[module]}.spatial.{INPUT[which]}.{SPATIAL[layer]}.{leaf}"


TABLE = Table(
    rules=(
        (rf"({_any(DOUBLE)})\.conv\.(\d\.{LEAF})", lambda m: f"{DOUBLE[m[1]]}.{m[2]}"),
        (
            rf"({_any(CYCLIC)})\.(conv1?)\.(\d\.{LEAF})",
            lambda m: f"{CYCLIC[m[1]]}.{PART[m[2]]}.{m[3]}",
        ),
        (
            rf"({_any(CYCLIC)})\.CDC\.convs\.(\d)\.conv\.weight",
            lambda m: f"{CYCLIC[m[1]]}.chain.kernels.{m[2]}.kernel.weight",
        ),
        (
            rf"({_any(CYCLIC)})\.CDC\.convs\.(\d)\.p_conv\.({LEAF})",
            lambda m: f"{CYCLIC[m[1]]}.chain.kernels.{m[2]}.offset.{m[3]}",
        ),
        (rf"({_any(CYCLIC)})\.CA\.conv\.weight", lambda m: f"{CYCLIC[m[1]]}.gate.conv.weight"),
        (r"up([6-9])\.(weight|bias)", lambda m: f"dec{10 - int(m[1])}.up.{m[2]}"),
        (
            rf"({_any(FUSE)})\.mlp_([xgd])\.1\.({LEAF})",
            lambda m: f"{FUSE[m[1]]}.channel.{INPUT[m[2]]}.{m[3]}",
        ),
        (rf"({_any(FUSE)})\.conv([xgd])([3579_]?)\.({LEAF})", _spatial),
        (
            rf"Skip1\.({_any(RESAMPLE)})\.(?:Down|Up)\.({LEAF})",
            lambda m: f"neb.{RESAMPLE[m[1]]}.resize.{m[2]}",
        ),
        (
            rf"Skip1\.({_any(RESAMPLE)})\.conv\.([02])\.({LEAF})",
            lambda m: f"neb.{RESAMPLE[m[1]]}.{LAYER[m[2]]}.{m[3]}",
        ),
        (rf"final\.({LEAF})", r"head.\1"),
    ),
)
