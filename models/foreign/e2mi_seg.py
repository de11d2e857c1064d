"""E2MISeg as released (SoloTillDawn/E2MISeg), one table for each data set: what a hybrid block
holds differs. Convolutions are MONAI's, whose tensors lie one level deeper (`conv1.conv.weight`).
The attention is `epa_block` in the older of two designs and `cs_block` in the newer: a file of one
does not fit a network of the other, though every shape does."""

from __future__ import annotations

import re

from torch import nn

from segfleet.models.foreign import LEAF, Table

NETWORKS = ("e2mi_seg_acdc", "e2mi_seg_brats", "e2mi_seg_mcl")
RESIDUAL = {"conv1": "convs.0", "norm1": "convs.1", "conv2": "convs.3", "norm2": "convs.4"}
RESIDUAL |= {"conv3": "shortcut.0", "norm3": "shortcut.1"}
ATTENTION = {
    "temperature1": "channel_scale", "temperature2": "spatial_scale", "qkvv": "qkvv",
    "out_proj": "merge.0", "out_proj2": "merge.1",
}  # fmt: skip
ENCODER = "(?:e2mis|unetr_pp)_encoder"  # ACDC's, the other two's
RESBLOCK = rf"(conv[123]|norm[123])(?:\.conv)?\.({LEAF})"


def _hybrid(normed: bool, blocks: int, projections: dict[str, str]) -> dict[str, str]:
    """Their name within a hybrid block -> ours. normed: the convolution branch has norms; blocks:
    residual blocks after the attention."""
    second = 3 if normed else 2
    local = {"conv31.conv": "local.0", "conv32.conv": f"local.{second}"}
    if normed:
        local |= {"norm31": "local.1", "norm32": f"local.{second + 1}"}
    names = {"norm": "norm", "gamma": "scale", "pos_embed": "position", "conv9.conv": "out"}
    names |= local | {"conv8.1": f"refine.{blocks + 1}"}
    for number in range(blocks):
        names |= {f"conv5{number + 1}.{a}": f"refine.{number}.{b}" for a, b in RESIDUAL.items()}
    inner = ATTENTION | projections
    return names | {f"attention.{a}": f"attention.{b}" for a, b in inner.items()}


def _table(
    hybrid: dict[str, str],
    attention: str,
    ignored: tuple[str, ...] = (),
    turned: tuple[str, ...] = (),
) -> Table:
    def block(match: re.Match[str]) -> str | None:
        encoder, encoder_block, decoder, decoder_block, rest = match.groups()
        where = (
            f"enc{int(encoder) + 1}.{encoder_block}"
            if encoder
            else f"dec{int(decoder) - 2}.blocks.{decoder_block}"
        )
        rest = re.sub(rf"^{attention}\.", "attention.", rest)
        rest = re.sub(r"^(conv5\d\.conv\d)\.conv\.", r"\1.", rest)
        for foreign, native in hybrid.items():
            if rest == foreign or rest.startswith(f"{foreign}."):
                return f"{where}.{native}{rest[len(foreign) :]}"
        return None

    return Table(
        rules=(
            (
                rf"(?:{ENCODER}\.stages\.(\d)\.(\d+)|decoder([345])\.decoder_block\.0\.(\d+))\.(.+)",
                block,
            ),
            (rf"{ENCODER}\.downsample_layers\.0\.0\.conv\.({LEAF})", r"stem.0.\1"),
            (rf"{ENCODER}\.downsample_layers\.0\.1\.({LEAF})", r"stem.1.\1"),
            (
                rf"{ENCODER}\.downsample_layers\.(\d)\.([01])(?:\.conv)?\.({LEAF})",
                lambda m: f"down{int(m[1]) + 1}.{m[2]}.{m[3]}",
            ),
            (rf"encoder\.{RESBLOCK}", lambda m: f"full.{RESIDUAL[m[1]]}.{m[2]}"),
            (
                rf"decoder2\.decoder_block\.0\.{RESBLOCK}",
                lambda m: f"dec0.blocks.{RESIDUAL[m[1]]}.{m[2]}",
            ),
            (
                rf"decoder([2-5])\.transp_conv\.conv\.({LEAF})",
                lambda m: f"dec{int(m[1]) - 2}.up.{m[2]}",
            ),
            (rf"mfgam(\d)\.transp_conv\.conv\.({LEAF})", r"mfga\1.up.\2"),
            (rf"mfgam(\d)\.maskout\.conv\.conv\.({LEAF})", r"mfga\1.guess.\2"),
            (rf"mfgam(\d)\.layernorm\.({LEAF})", r"mfga\1.group_norm.\2"),
            (rf"mfgam(\d)\.layernorm1\.({LEAF})", r"mfga\1.mix.0.\2"),
            (
                rf"mfgam(\d)\.dilation_conv(\d)\.({LEAF})",
                lambda m: f"mfga{m[1]}.convs.{int(m[2]) - 1}.{m[3]}",
            ),
            (rf"mfgam(\d)\.conv\.conv\.({LEAF})", r"mfga\1.mix.1.\2"),
            (rf"out(\d)\.conv\.conv\.({LEAF})", lambda m: f"head{int(m[1]) - 1}.{m[2]}"),
        ),
        ignored=ignored,
        turned=turned,
    )


def TABLE(network: str, model: nn.Module) -> Table:
    older = any(getattr(module, "from_tokens", False) for module in model.modules())
    attention = "epa_block" if older else "cs_block"
    if network == "e2mi_seg_acdc":
        inside = _hybrid(True, 2, {"E": "key_projection", "F": "value_projection"})
        return _table(inside, attention)
    if network == "e2mi_seg_brats":  # one matrix, tokens first; the newer file is not to be had
        inside = _hybrid(False, 1, {"EF": "key_projection.weight"})
        return _table(inside, "(?:cs|epa)_block", turned=(r".*_block\.EF",))
    inside = _hybrid(False, 1, {"E": "key_projection"})  # one layer under two names
    return _table(inside, attention, ignored=(r".*_block\.F\.(?:weight|bias)",))
