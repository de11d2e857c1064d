"""VM-UNet's own files, and VMamba's (first generation), which hold the encoder alone. VMamba's
deeper encoders come with as many blocks as there are here, the first of each stage, and start the
decoder's blocks of equal width too, as in the published code."""

from __future__ import annotations

import re

from torch import nn

from segfleet.models.foreign import Table

NETWORKS = ("vm_unet",)
MIXER = (
    "in_proj.weight|conv2d.weight|conv2d.bias|x_proj_weight|dt_projs_weight|dt_projs_bias|A_logs|"
    "Ds|out_norm.weight|out_norm.bias|out_proj.weight"
)
INSIDE = rf"(ln_1|self_attention)\.(weight|bias|{MIXER})"
PART = {"ln_1": "norm", "self_attention": "mixer"}
LAST = 3  # stage without a patch merging, whose width the decoder begins with


def _first_block(stage: int) -> int:
    """In a decoder stage the expansion comes first, so blocks count from 1 but in stage 0."""
    return 0 if stage == 0 else 1


def _decoder_block(match: re.Match[str]) -> str:
    stage, block, part, leaf = match.groups()
    return f"decoder{stage}.{int(block) + _first_block(int(stage))}.{PART[part]}.{leaf}"


def TABLE(network: str, model: nn.Module) -> Table:
    """In a stage of the encoder the patch merging comes after the blocks, and files may have more
    of these than the network."""
    merging = (
        re.fullmatch(r"encoder(\d)\.(\d+)\.linear\.weight", name)
        for name, _ in model.named_parameters()
    )
    blocks = {int(match[1]): int(match[2]) for match in merging if match}

    def is_block(stage: int, number: int) -> bool:
        return number < blocks.get(stage, number + 1)

    def encoder_block(match: re.Match[str]) -> str | None:
        stage, block, part, leaf = int(match[1]), int(match[2]), match[3], match[4]
        return f"encoder{stage}.{block}.{PART[part]}.{leaf}" if is_block(stage, block) else None

    def mirrored(match: re.Match[str]) -> str | None:
        """The decoder's block that has an encoder block's width."""
        stage, block, rest = int(match[1]), int(match[2]), match[3]
        native = f"decoder{LAST - stage}.{block + _first_block(LAST - stage)}.{rest}"
        return native if is_block(stage, block) else None  # else the patch merging's norm

    def merge(match: re.Match[str]) -> str | None:
        stage, layer = int(match[1]), {"norm": "norm", "reduction": "linear"}[match[2]]
        return f"encoder{stage}.{blocks[stage]}.{layer}.{match[3]}" if stage in blocks else None

    return Table(
        rules=(
            (r"patch_embed\.proj\.(weight|bias)", r"embed.conv.\1"),
            (r"patch_embed\.norm\.(weight|bias)", r"embed.norm.\1"),
            (rf"layers\.(\d)\.blocks\.(\d+)\.{INSIDE}", encoder_block),
            (r"layers\.(\d)\.downsample\.(norm|reduction)\.(weight|bias)", merge),
            (rf"layers_up\.(\d)\.blocks\.(\d+)\.{INSIDE}", _decoder_block),
            (r"layers_up\.(\d)\.upsample\.norm\.(weight|bias)", r"decoder\1.0.norm.\2"),
            (r"layers_up\.(\d)\.upsample\.expand\.weight", r"decoder\1.0.linear.weight"),
            (r"final_up\.norm\.(weight|bias)", r"expand.norm.\1"),
            (r"final_up\.expand\.weight", "expand.linear.weight"),
            (r"final_conv\.(weight|bias)", r"head.\1"),
        ),
        # VMamba's classifier
        ignored=(r"(?:norm|head|classifier)\..*",),
        prefixes=("vmunet.",),
        mirrored=((r"encoder(\d)\.(\d+)\.((?:norm|mixer)\..*)", mirrored),),
    )
