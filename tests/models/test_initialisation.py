"""How every tensor of every network starts, over five seeds, against the authors' rules.

The rules are written out here from the specifications, tensor by tensor; PyTorch's own draw for a
convolution or linear layer is uniform within 1/sqrt(fan_in), weight and bias. A network whose
initialisation changes by accident, or whose new tensor nobody wrote a rule for, fails.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from segfleet.models.registry import build_model, spec, specs

SEEDS = 5
Rule = tuple[str, float]  # ("constant" | "uniform" | "normal", value | bound | standard deviation)
NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.InstanceNorm2d, nn.InstanceNorm3d,
         nn.LayerNorm, nn.GroupNorm)  # fmt: skip


def framework(module: nn.Module, leaf: str) -> Rule | None:
    """PyTorch's documented draw of a layer's weight or bias."""
    if isinstance(module, NORMS):
        return ("constant", 1.0 if leaf == "weight" else 0.0)
    if isinstance(module, nn.Linear | nn.Conv1d | nn.Conv2d | nn.Conv3d):
        return ("uniform", module.weight[0].numel() ** -0.5)
    if isinstance(module, nn.ConvTranspose2d | nn.ConvTranspose3d):  # as PyTorch counts its fan
        return ("uniform", module.weight[0].numel() ** -0.5)
    return None


def narrow(leaf: str) -> Rule:
    return ("normal", 0.02) if leaf == "weight" else ("constant", 0.0)


def unext(name: str, module: nn.Module, leaf: str) -> Rule | None:
    tokens = name.startswith(("enc4", "enc5")) or ".tokens." in name
    if isinstance(module, nn.Linear):
        return narrow(leaf)
    if isinstance(module, nn.Conv2d) and tokens:
        fan_out = 9 * module.out_channels // module.groups
        return ("normal", math.sqrt(2 / fan_out)) if leaf == "weight" else ("constant", 0.0)
    return framework(module, leaf)


def e2mi_seg(name: str, module: nn.Module, leaf: str) -> Rule | None:
    if leaf == "position":
        return ("constant", 0.0)
    if leaf == "scale":
        return ("constant", 1e-6)
    if leaf in ("channel_scale", "spatial_scale"):
        return ("constant", 1.0)
    if name.endswith("key_projection.weight") and module.bias is None:
        return ("uniform", module.out_features**-0.5)
    if isinstance(module, nn.Linear) and name.startswith("enc"):
        return narrow(leaf)
    return framework(module, leaf)


def vm_unet(name: str, module: nn.Module, leaf: str) -> Rule | None:
    if isinstance(module, nn.Linear):
        return narrow(leaf)
    if leaf == "x_proj_weight":
        return ("uniform", module.x_proj_weight.shape[2] ** -0.5)
    if leaf == "dt_projs_weight":
        return ("uniform", module.dt_projs_weight.shape[2] ** -0.5)
    return selective(leaf) or framework(module, leaf)


def asc_seg(name: str, module: nn.Module, leaf: str) -> Rule | None:
    if name.endswith("dt_proj.weight"):
        return ("uniform", module.weight.shape[1] ** -0.5)
    return (
        ("steps", 0.0)
        if name.endswith("dt_proj.bias")
        else selective(leaf) or framework(module, leaf)
    )


def selective(leaf: str) -> Rule | None:
    """Mamba's own tensors: A rows log(1..N), D ones, step biases with softplus in [1e-3, 0.1]."""
    return {
        "A_log": ("rows", 0.0),
        "A_logs": ("rows", 0.0),
        "D": ("constant", 1.0),
        "Ds": ("constant", 1.0),
        "dt_projs_bias": ("steps", 0.0),
    }.get(leaf)


def nlie_unet(name: str, module: nn.Module, leaf: str) -> Rule | None:
    return ("constant", 0.0) if name.endswith("offset.weight") else framework(module, leaf)


def nnunet(name: str, module: nn.Module, leaf: str) -> Rule | None:
    """He's normal for LeakyReLU 0.01, biases zero; the residual blocks' last norms start at 0."""
    if re.search(r"conv2\.1\.weight$", name):
        return ("constant", 0.0)
    if isinstance(module, nn.Conv2d | nn.Conv3d | nn.ConvTranspose2d | nn.ConvTranspose3d):
        fan_in = module.weight[0].numel()
        he = math.sqrt(2 / (1 + 0.01**2) / fan_in)
        return ("normal", he) if leaf == "weight" else ("constant", 0.0)
    return framework(module, leaf)


def primus(name: str, module: nn.Module, leaf: str) -> Rule | None:
    """Linear layers and positions narrow, a branch's last layer over sqrt(2 · number of its block);
    convolutions He's normal for slope 0.01, biases zero; scales 0.1, the tokenizer's 1e-5."""
    if name == "position":
        return ("normal", 0.02)
    if leaf in ("scale1", "scale2"):
        return ("constant", 0.1)
    if ".scales." in name:
        return ("constant", 1e-5)
    if isinstance(module, nn.Linear) and leaf == "weight" and ".out." in name:
        return ("normal", 0.02 / math.sqrt(2 * (int(name.split(".")[1]) + 1)))
    if isinstance(module, nn.Linear):
        return narrow(leaf)
    if isinstance(module, nn.Conv3d | nn.ConvTranspose3d):
        return nnunet("", module, leaf)
    return framework(module, leaf)


def plain(name: str, module: nn.Module, leaf: str) -> Rule | None:
    return framework(module, leaf)


NETWORKS: dict[str, Callable[[str, nn.Module, str], Rule | None]] = {
    "unext": unext,
    "e2mi_seg_acdc": e2mi_seg,
    "e2mi_seg_brats": e2mi_seg,
    "e2mi_seg_mcl": e2mi_seg,
    "vm_unet": vm_unet,
    "asc_seg": asc_seg,
    "nlie_unet_b": nlie_unet,
    "rec_unet": plain,
    "rec_unet_em": plain,
    "unet_lite_se_depthwise": plain,
    "unet_lite_standard": plain,
    "plain_unet_2d": nnunet,
    "plain_unet_3d": nnunet,
    "resenc_unet_2d": nnunet,
    "resenc_unet_3d": nnunet,
    "mednext_s3": plain,
    "primus_m": primus,
    "primus_v3_m": primus,
}


def test_every_family_has_a_rule():
    known = {name.split("_")[0] for name in NETWORKS}
    assert {name.split("_")[0] for name in specs()} == known


@pytest.mark.parametrize("name", NETWORKS)
def test_every_tensor_starts_as_its_authors_start_it(name):
    draws: dict[str, list[Tensor]] = {}
    for seed in range(SEEDS):
        torch.manual_seed(seed)
        chosen = spec(name)
        model = build_model(
            name,
            in_channels=chosen.in_channels,
            num_classes=chosen.num_classes,
            options=chosen.reduced,
        )
        for parameter, value in model.named_parameters():
            draws.setdefault(parameter, []).append(value.detach().flatten().double())
    shapes = {parameter: value.shape for parameter, value in model.named_parameters()}
    for parameter, found in draws.items():
        where, _, leaf = parameter.rpartition(".")
        rule = NETWORKS[name](parameter, model.get_submodule(where), leaf)
        assert rule is not None, f"{name}: nobody says how {parameter} starts"
        check(f"{name}.{parameter}", torch.stack(found), rule, shapes[parameter])


def check(name: str, draws: Tensor, rule: Rule, shape: torch.Size) -> None:
    """`draws` (seeds, values) against a rule; five standard errors, so that one draw in a million
    is unlucky."""
    kind, number = rule
    values = draws.flatten()
    if kind == "constant":
        assert torch.equal(values, torch.full_like(values, number).float().double()), name
        return
    if kind == "rows":
        rows = torch.arange(1.0, shape[-1] + 1).log().double()
        assert torch.allclose(draws[0].view(shape), rows.expand(shape), atol=1e-6), name
        return
    assert len({tuple(row.tolist()) for row in draws}) == SEEDS, f"{name}: seeds draw the same"
    if kind == "steps":
        steps = torch.nn.functional.softplus(values)
        assert 1e-3 * 0.999 <= steps.min() and steps.max() <= 0.1 * 1.001, name
        return
    count = len(values)
    std, kurtosis = (number, 3.0) if kind == "normal" else (number / math.sqrt(3), 1.8)
    if kind == "uniform":
        assert values.abs().max() <= number * (1 + 1e-6), name
    assert values.mean().abs() <= 5 * std / math.sqrt(count), name
    error = std * math.sqrt((kurtosis - 1) / (4 * count))
    assert (values.std(correction=0) - std).abs() <= 5 * error + 2 * std / count, (
        f"{name}: standard deviation {values.std().item():.4g}, expected {std:.4g}"
    )
