"""nnU-Net's side of `benchmarks/gpu.py`: its network (dynamic_network_architectures), and the bare
loop of its trainer (nnunetv2 2.8, nnUNetTrainer.train_step) around it.

SGD with Nesterov's momentum 0.99, weight decay 3e-5, gradients clipped to 12, fp16 autocast with a
scaler, its Dice and cross-entropy with weights halving by scale, the loss fetched in every step.
Data come from whoever calls: the same patches for both sides.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

FEATURES = (32, 64, 128, 256, 320, 320)


def network(channels: int, classes: int, features: tuple[int, ...] = FEATURES) -> nn.Module:
    """Its default 3D network, planned for 128 x 128 x 128. Raises ImportError without the
    package."""
    from dynamic_network_architectures.architectures.unet import PlainConvUNet

    stages = len(features)
    return PlainConvUNet(
        channels,
        n_stages=stages,
        features_per_stage=features,
        conv_op=nn.Conv3d,
        kernel_sizes=[[3, 3, 3]] * stages,
        strides=[[1, 1, 1]] + [[2, 2, 2]] * (stages - 1),
        n_conv_per_stage=[2] * stages,
        num_classes=classes,
        n_conv_per_stage_decoder=[2] * (stages - 1),
        conv_bias=True,
        norm_op=nn.InstanceNorm3d,
        norm_op_kwargs={"eps": 1e-5, "affine": True},
        nonlin=nn.LeakyReLU,
        nonlin_kwargs={"inplace": True},
        deep_supervision=True,
    )


def dice_and_ce(logits: Tensor, target: Tensor) -> Tensor:
    """Its DC_and_CE_loss: soft Dice of the foreground, memory-efficient form, and cross-entropy.
    logits (B, K, Z, Y, X), target (B, 1, Z, Y, X) int64."""
    p = logits.softmax(1)
    with torch.no_grad():
        truth = torch.zeros_like(logits, dtype=torch.bool).scatter_(1, target, 1)[:, 1:]
        size = truth.sum((2, 3, 4))
    p = p[:, 1:]
    both, found = (p * truth).sum((2, 3, 4)), p.sum((2, 3, 4))
    dice = (2 * both + 1e-5) / (size + found + 1e-5).clip(1e-8)
    return F.cross_entropy(logits, target[:, 0]) - dice.mean()


def targets(label: Tensor, sizes: list[torch.Size]) -> list[Tensor]:
    """(B, Z, Y, X) labels at the size of every output, nearest, as its augmentation makes them on
    the host (here on the device, in its favour)."""
    label = label[:, None].float()
    return [F.interpolate(label, size=size[2:], mode="nearest-exact").long() for size in sizes]


def trainer(model: nn.Module, device: torch.device, compiled: bool) -> Callable:
    """`step(image, label) -> loss`, a float as it keeps one of every step."""
    model = model.to(device).train()
    if device.type == "cuda":
        torch.backends.cudnn.benchmark = True  # its run_training.py
    forward = torch.compile(model) if compiled else model
    optimizer = torch.optim.SGD(
        model.parameters(), 1e-2, momentum=0.99, weight_decay=3e-5, nesterov=True
    )
    scaler = torch.amp.GradScaler(device.type, enabled=device.type == "cuda")
    dtype = torch.float16 if device.type == "cuda" else torch.bfloat16

    def step(image: Tensor, label: Tensor) -> float:
        image, label = (value.to(device, non_blocking=True) for value in (image, label))
        optimizer.zero_grad(set_to_none=True)
        with torch.autocast(device.type, dtype):
            outputs = forward(image)
            weights = torch.tensor([0.5**k for k in range(len(outputs))])
            weights[-1] = 0
            weights = (weights / weights.sum()).tolist()
            wanted = targets(label, [output.shape for output in outputs])
            loss = sum(
                weight * dice_and_ce(output, target)
                for weight, output, target in zip(weights, outputs, wanted, strict=True)
                if weight
            )
        scaler.scale(loss).backward()
        scaler.unscale_(optimizer)
        torch.nn.utils.clip_grad_norm_(model.parameters(), 12)
        scaler.step(optimizer)
        scaler.update()
        return float(loss.detach().cpu())

    return step
