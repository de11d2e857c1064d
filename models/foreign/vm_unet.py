"""VM-UNet's own files, and VMamba's (first generation), which hold the encoder alone."""

from __future__ import annotations

import re

from segfleet.models.foreign import Table

NETWORKS = ("vm_unet",)
MIXER = (
    "in_proj.weight|conv2d.weight|conv2d.bias|x_proj_weight|dt_projs_weight|dt_projs_bias|A_logs|"
    "Ds|out_norm.weight|out_norm.bias|out_proj.weight"
)
DEPTHS = 2  # blocks before the patch merging in the published encoder


def _upsampled(match: re.Match[str]) -> str:
    """In a decoder stage the expansion comes first, so blocks count from 1 but in stage 0."""
    stage, block, rest = match.groups()
    part = rest.replace("ln_1", "norm").replace("self_attention", "mixer")
    return f"decoder{stage}.{int(block) + (stage != '0')}.{part}"


def _block(match: re.Match[str]) -> str:
    stage, block, rest = match.groups()
    return (
        f"encoder{stage}.{block}.{rest.replace('ln_1', 'norm').replace('self_attention', 'mixer')}"
    )


INSIDE = rf"(ln_1\.(?:weight|bias)|self_attention\.(?:{MIXER}))"
TABLE = Table(
    rules=(
        (r"patch_embed\.proj\.(weight|bias)", r"embed.conv.\1"),
        (r"patch_embed\.norm\.(weight|bias)", r"embed.norm.\1"),
        (rf"layers\.(\d)\.blocks\.(\d+)\.{INSIDE}", _block),
        (r"layers\.(\d)\.downsample\.norm\.(weight|bias)", rf"encoder\1.{DEPTHS}.norm.\2"),
        (r"layers\.(\d)\.downsample\.reduction\.weight", rf"encoder\1.{DEPTHS}.linear.weight"),
        (rf"layers_up\.(\d)\.blocks\.(\d+)\.{INSIDE}", _upsampled),
        (r"layers_up\.(\d)\.upsample\.norm\.(weight|bias)", r"decoder\1.0.norm.\2"),
        (r"layers_up\.(\d)\.upsample\.expand\.weight", r"decoder\1.0.linear.weight"),
        (r"final_up\.norm\.(weight|bias)", r"expand.norm.\1"),
        (r"final_up\.expand\.weight", "expand.linear.weight"),
        (r"final_conv\.(weight|bias)", r"head.\1"),
    ),
    # VMamba's classifier
    ignored=(r"(?:norm|head|classifier)\..*",),
    prefixes=("vmunet.",),
)
