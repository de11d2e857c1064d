"""UNeXt: a small U-Net whose two deepest levels mix pixels by shifting channels between linear
layers.

Source: UNeXt (Valanarasu and Patel, 2022); widths of the released code (16-32-128-160-256), the
paper prints another first stage.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from segfleet.models.norm import ChannelNorm
from segfleet.models.registry import ModelError, check_input, register
from segfleet.models.skips import skip


def shift(x_BCYX: Tensor, axis: int) -> Tensor:
    """Move five channel chunks by -2..2 pixels along `axis` (2 rows, 3 columns); zeros enter at the
    border."""
    size = x_BCYX.shape[axis]
    padded = F.pad(x_BCYX, (0, 0, 2, 2) if axis == 2 else (2, 2, 0, 0))
    return torch.cat(
        [
            chunk.narrow(axis, 2 - step, size)
            for step, chunk in zip(range(-2, 3), padded.chunk(5, 1), strict=True)
        ],
        1,
    )


class TokenMLP(nn.Module):
    """`x + linear(shift columns(gelu(depthwise(linear(shift rows(norm(x)))))))`; the linear layers
    act on the channels."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm = ChannelNorm(channels)
        self.first = nn.Linear(channels, channels)
        self.depthwise = nn.Conv2d(channels, channels, 3, padding=1, groups=channels)
        self.second = nn.Linear(channels, channels)

    def forward(self, x: Tensor) -> Tensor:
        t = _on_channels(self.first, shift(self.norm(x), 2))
        t = F.gelu(self.depthwise(t))
        return x + _on_channels(self.second, shift(t, 3))


def _on_channels(linear: nn.Linear, x_BCYX: Tensor) -> Tensor:
    return rearrange(linear(rearrange(x_BCYX, "b c y x -> b y x c")), "b y x c -> b c y x")


def conv_encoder(a: int, b: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(a, b, 3, padding=1), nn.BatchNorm2d(b), nn.MaxPool2d(2), nn.ReLU()
    )


def token_encoder(a: int, b: int) -> nn.Sequential:
    """Patch embedding (conv 3, stride 2, norm), token MLP, norm."""
    return nn.Sequential(
        nn.Conv2d(a, b, 3, stride=2, padding=1), ChannelNorm(b), TokenMLP(b), ChannelNorm(b)
    )


class DecoderStep(nn.Module):
    """Conv 3 -> BN -> bilinear ×2 -> ReLU, plus the skip, then (deep levels) a token MLP and a
    norm."""

    def __init__(self, a: int, b: int, *, norm: bool = True, tokens: bool = False) -> None:
        super().__init__()
        self.conv = nn.Conv2d(a, b, 3, padding=1)
        self.norm = nn.BatchNorm2d(b) if norm else nn.Identity()
        self.tokens = nn.Sequential(TokenMLP(b), ChannelNorm(b)) if tokens else nn.Identity()

    def forward(self, deep: Tensor, skip: Tensor | None = None) -> Tensor:
        up = F.relu(F.interpolate(self.norm(self.conv(deep)), scale_factor=2, mode="bilinear"))
        return self.tokens(up if skip is None else up + skip)


class UNeXt(nn.Module):
    """x (B, C, Y, X), Y and X multiples of 32 -> logits (B, K, Y, X).

    widths: channels of the five levels, at 1/2 to 1/32 of the input's size. Raises ModelError for
    wrong widths or input.
    """

    def __init__(
        self, in_channels: int, num_classes: int, widths: tuple[int, ...] = (16, 32, 128, 160, 256)
    ) -> None:
        super().__init__()
        if len(widths) != 5 or any(
            len(range(width)[:: math.ceil(width / 5)]) != 5 for width in widths[2:]
        ):
            raise ModelError(
                "unext: widths must be five numbers, the last three divisible into five channel "
                f"chunks, found {list(widths)}"
            )
        w1, w2, w3, w4, w5 = widths
        self.in_channels = in_channels
        self.enc1 = conv_encoder(in_channels, w1)
        self.enc2 = conv_encoder(w1, w2)
        self.enc3 = conv_encoder(w2, w3)
        self.enc4 = token_encoder(w3, w4)
        self.enc5 = token_encoder(w4, w5)
        self.dec5 = DecoderStep(w5, w4, tokens=True)
        self.dec4 = DecoderStep(w4, w3, tokens=True)
        self.dec3 = DecoderStep(w3, w2)
        self.dec2 = DecoderStep(w2, w1)
        self.dec1 = DecoderStep(w1, w1, norm=False)
        self.head = nn.Conv2d(w1, num_classes, 1)
        for level in (self.enc4, self.enc5, self.dec5.tokens, self.dec4.tokens):
            level.apply(_initialise_tokens)

    def forward(self, x_BCYX: Tensor) -> Tensor:
        check_input(x_BCYX, name="unext", dims=2, in_channels=self.in_channels, divisor=32)
        x, skips = x_BCYX, []
        for encode in (self.enc1, self.enc2, self.enc3, self.enc4, self.enc5):
            x = encode(x)
            skips.append(x)
        x = skips.pop()
        for decode in (self.dec5, self.dec4, self.dec3, self.dec2):
            x = decode(x, skip(self, skips.pop()))
        return self.head(self.dec1(x))


def _initialise_tokens(module: nn.Module) -> None:
    """Patch embeddings and token MLPs as released; the plain convolutions keep the framework's
    draw."""
    if isinstance(module, nn.Linear):
        nn.init.trunc_normal_(module.weight, std=0.02)
        nn.init.zeros_(module.bias)
    elif isinstance(module, nn.Conv2d):
        fan_out = module.weight[:, 0].numel() // module.groups
        nn.init.normal_(module.weight, std=math.sqrt(2 / fan_out))
        nn.init.zeros_(module.bias)


# fmt: off
STAGES = {
    "enc1": 480, "enc2": 4_704, "enc3": 37_248, "enc4": 238_560, "enc5": 504_576,
    "dec5": 422_880, "dec4": 219_520, "dec3": 36_960, "dec2": 4_656, "dec1": 2_320, "head": 17,
}
# fmt: on
register(
    name="unext",
    dims=(2,),
    in_channels=3,
    num_classes=1,
    paper_input=(256, 256),
    parameters=1_471_921,
    divisor=32,
    stages=STAGES,
    reduced={"widths": (16, 16, 20, 20, 20)},
    reduced_input=(64, 64),
    source="UNeXt: MLP-based rapid medical image segmentation network (2022), released widths",
    about="convolutional U-Net with tokenised, shifted MLP at the two deepest levels; widths "
    "16-32-128-160-256",
)(UNeXt)
