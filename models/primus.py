"""Primus: a plain vision transformer over blocks of 8 x 8 x 8 voxels; 3D.

Source: Wald et al. 2025 (arXiv 2503.01835), sizes and starting values as in nnU-Net's own version.
The transformer's blocks are EVA-02's (Fang et al. 2023, arXiv 2303.11331), its rotary positions are
carried over to three axes. Version 3 reads the volume with residual convolutions first. The weights
depend on the patch: every block has a learnt position.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial

import torch
import torch.nn.functional as F
from einops import rearrange, repeat
from torch import Tensor, nn

from segfleet.models.drop_path import DropPath
from segfleet.models.nnunet.resenc_unet import ResidualBlock
from segfleet.models.norm import ChannelNorm
from segfleet.models.registry import ModelError, check_input, register

BLOCK = 8  # voxels of a token along each axis
SLOPE = 0.01


def rotations(grid: Sequence[int], width: int, base: float = 1e4) -> tuple[Tensor, Tensor]:
    """Sine and cosine (N, width) of every token's angles: a third of the channel pairs turns with
    the place along each axis, at frequencies that fall from 1 to nearly 1 / base."""
    bands = width // 6
    frequency = base ** -(torch.arange(bands, dtype=torch.float32) / bands)
    axes = [torch.arange(size, dtype=torch.float32) for size in grid]
    place = torch.stack(torch.meshgrid(*axes, indexing="ij"), -1)
    angle = rearrange(place[..., None] * frequency, "z y x way band -> (z y x) (way band)")
    return repeat(angle.sin(), "n a -> n (a 2)"), repeat(angle.cos(), "n a -> n (a 2)")


def rotate(x: Tensor, sine: Tensor, cosine: Tensor) -> Tensor:
    """Every pair of neighbouring channels (a, b) of (..., N, width) turned by its token's angle."""
    a, b = rearrange(x, "... (pair two) -> two ... pair", two=2)
    turned = rearrange([-b, a], "two ... pair -> ... (pair two)")
    return x * cosine + turned * sine


class RotaryAttention(nn.Module):
    """Self-attention whose queries and keys are turned by their places; the keys have no bias, the
    result is normalised before the last linear layer. (B, N, C) -> the same shape."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.query, self.value = nn.Linear(width, width), nn.Linear(width, width)
        self.key = nn.Linear(width, width, bias=False)
        self.norm, self.out = nn.LayerNorm(width), nn.Linear(width, width)

    def forward(self, t_BNC: Tensor, sine: Tensor, cosine: Tensor) -> Tensor:
        q, k, v = (
            rearrange(linear(t_BNC), "b n (h d) -> b h n d", h=self.heads)
            for linear in (self.query, self.key, self.value)
        )
        q, k = (rotate(part, sine, cosine).type_as(v) for part in (q, k))
        mixed = F.scaled_dot_product_attention(q, k, v)
        return self.out(self.norm(rearrange(mixed, "b h n d -> b n (h d)")))


class GatedMLP(nn.Module):
    """SwiGLU: out(norm(SiLU(gate(t)) · value(t))), 8/3 times as wide inside."""

    def __init__(self, width: int) -> None:
        super().__init__()
        inner = width * 8 // 3
        self.gate, self.value = nn.Linear(width, inner), nn.Linear(width, inner)
        self.norm, self.out = nn.LayerNorm(inner), nn.Linear(inner, width)

    def forward(self, t: Tensor) -> Tensor:
        return self.out(self.norm(F.silu(self.gate(t)) * self.value(t)))


class TransformerBlock(nn.Module):
    """t + s1 · attention(LN(t)), then t + s2 · mlp(LN(t)), s learnt per channel."""

    def __init__(self, width: int, heads: int, drop_path: float, scale: float) -> None:
        super().__init__()
        self.norm1, self.attention = nn.LayerNorm(width), RotaryAttention(width, heads)
        self.norm2, self.mlp = nn.LayerNorm(width), GatedMLP(width)
        self.scale1 = nn.Parameter(torch.full((width,), scale))
        self.scale2 = nn.Parameter(torch.full((width,), scale))
        self.drop_path = DropPath(drop_path)

    def forward(self, t: Tensor, sine: Tensor, cosine: Tensor) -> Tensor:
        t = t + self.drop_path(self.scale1 * self.attention(self.norm1(t), sine, cosine))
        return t + self.drop_path(self.scale2 * self.mlp(self.norm2(t)))


class Tokenizer(nn.Module):
    """Version 3's way from voxels to tokens: a residual block at full size and one per halving,
    then a linear layer; each map before the last adds its own, scaled from almost nothing.
    (B, C, Z, Y, X) -> (B, width, Z/8, Y/8, X/8)."""

    def __init__(self, in_channels: int, width: int, channels: Sequence[int]) -> None:
        super().__init__()
        three, one, two = (3,) * 3, (1,) * 3, (2,) * 3
        self.stem = ResidualBlock(in_channels, channels[0], three, one)
        self.halve = nn.ModuleList(
            ResidualBlock(a, b, three, two, bias=False)
            for a, b in zip(channels, channels[1:], strict=False)
        )
        self.project = nn.Conv3d(channels[-1], width, 1)
        self.shortcuts = nn.ModuleList(
            nn.Conv3d(c, width, BLOCK >> level, stride=BLOCK >> level)
            for level, c in enumerate(channels[:-1])
        )
        self.scales = nn.ParameterList(torch.tensor(1e-5) for _ in self.shortcuts)
        for block in (self.stem, *self.halve):  # nnU-Net's own encoder starts this norm at zero
            nn.init.ones_(block.conv2[1].weight)

    def forward(self, x_BCZYX: Tensor) -> Tensor:
        x, beside = self.stem(x_BCZYX), []
        for halve, shortcut, scale in zip(self.halve, self.shortcuts, self.scales, strict=True):
            beside.append(scale * shortcut(x))
            x = halve(x)
        return self.project(x) + sum(beside[1:], beside[0])


class Primus(nn.Module):
    """x (B, in_channels, *patch) -> logits (B, num_classes, *patch).

    patch: (Z, Y, X), multiples of 8. width, depth, heads: of the transformer; width / heads must be
    a multiple of 6, for rotary positions along three axes. drop_path: of the last block, falling to
    0 at the first. channels: of version 3's tokenizer, or none: one strided convolution, as in
    version 1. Raises ModelError for a wrong option or input.
    """

    def __init__(
        self,
        in_channels: int,
        num_classes: int,
        patch: Sequence[int] = (160, 160, 160),
        width: int = 864,
        depth: int = 16,
        heads: int = 12,
        channels: Sequence[int] = (),
        drop_path: float = 0.2,
        scale: float = 0.1,
    ) -> None:
        super().__init__()
        _check_options(patch, width, heads, channels, drop_path)
        self.in_channels, self.patch = in_channels, tuple(patch)
        grid = tuple(size // BLOCK for size in patch)
        self.embed = (
            Tokenizer(in_channels, width, channels)
            if channels
            else nn.Conv3d(in_channels, width, BLOCK, stride=BLOCK)
        )
        self.position = nn.Parameter(torch.empty(1, math.prod(grid), width))
        rates = [drop_path * block / max(depth - 1, 1) for block in range(depth)]
        self.blocks = nn.ModuleList(TransformerBlock(width, heads, rate, scale) for rate in rates)
        self.norm = nn.LayerNorm(width)
        self.decoder = decoder(width, num_classes)
        for name, table in zip(("sine", "cosine"), rotations(grid, width // heads), strict=True):
            self.register_buffer(name, table, persistent=False)
        self._initialise()

    def _initialise(self) -> None:
        """Linear layers from a normal of 0.02, those that end a branch the narrower the deeper;
        convolutions from He's normal."""
        nn.init.trunc_normal_(self.position, std=0.02)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02)
            elif isinstance(module, nn.Conv3d | nn.ConvTranspose3d):
                nn.init.kaiming_normal_(module.weight, a=SLOPE)
            else:
                continue
            if module.bias is not None:
                nn.init.zeros_(module.bias)
        with torch.no_grad():
            for number, block in enumerate(self.blocks, 1):
                for last in (block.attention.out, block.mlp.out):
                    last.weight.div_(math.sqrt(2 * number))

    def forward(self, x_BCZYX: Tensor) -> Tensor:
        check_input(x_BCZYX, name="primus", dims=3, in_channels=self.in_channels, divisor=BLOCK)
        if not torch.compiler.is_compiling() and tuple(x_BCZYX.shape[2:]) != self.patch:
            raise ModelError(
                f"primus was built for patches of {self.patch}, found {tuple(x_BCZYX.shape[2:])}; "
                "its weights fit no other (option `patch`)"
            )
        t_BNC = rearrange(self.embed(x_BCZYX), "b c z y x -> b (z y x) c") + self.position
        for block in self.blocks:
            t_BNC = block(t_BNC, self.sine, self.cosine)
        z, y, x = (size // BLOCK for size in self.patch)
        tokens = rearrange(self.norm(t_BNC), "b (z y x) c -> b c z y x", z=z, y=y, x=x)
        return self.decoder(tokens)


def decoder(width: int, num_classes: int) -> nn.Sequential:
    """Tokens to voxels by three transposed convolutions, each times 2; channels fall by one factor
    each time, towards twice the classes, in steps of eight."""
    factor = (width / (2 * num_classes)) ** (1 / 3)
    a, b = (max(8, 8 * round(width / factor**step / 8)) for step in (1, 2))

    def double(c: int, d: int) -> nn.ConvTranspose3d:
        return nn.ConvTranspose3d(c, d, 2, stride=2)

    return nn.Sequential(
        nn.Sequential(double(width, a), ChannelNorm(a, eps=1e-6), nn.GELU()),
        nn.Sequential(double(a, b), ChannelNorm(b, eps=1e-6), nn.GELU()),
        double(b, num_classes),
    )


def _check_options(
    patch: Sequence[int], width: int, heads: int, channels: Sequence[int], drop_path: float
) -> None:
    if len(patch) != 3 or any(size < BLOCK or size % BLOCK for size in patch):
        raise ModelError(f"primus: patch must be three multiples of {BLOCK}, found {tuple(patch)}")
    if width % heads or width // heads % 6:
        raise ModelError(
            f"primus: width / heads must be a multiple of 6, found {width} / {heads}; published "
            "are 396 / 6, 792 / 12, 864 / 12 and 1056 / 16"
        )
    if len(channels) not in (0, 4):
        raise ModelError(f"primus: channels must be none or four numbers, found {list(channels)}")
    if not 0 <= drop_path < 1:
        raise ModelError(f"primus: drop_path is {drop_path}, expected a probability in [0, 1)")


CHANNELS = (32, 64, 256, 1024)
SIZES = {"s": (396, 12, 6), "b": (792, 12, 12), "m": (864, 16, 12), "l": (1056, 24, 16)}
SMALL = {"patch": (16, 16, 16), "width": 24, "depth": 2, "heads": 2}


def _register(name: str, size: str, channels: tuple[int, ...], counts: tuple[int, ...]) -> None:
    width, depth, heads = SIZES[size]
    version = "3, residual convolutions before the tokens" if channels else "1"
    register(
        name=name,
        dims=(3,),
        in_channels=1,
        num_classes=2,
        paper_input=(160, 160, 160),
        parameters=sum(counts),
        divisor=BLOCK,
        fixed_patch=True,
        encoder=("embed", "position", "blocks", "norm"),
        head=("decoder",),  # its widths follow the number of classes
        stages=dict(zip(("position", "embed", "blocks", "norm", "decoder"), counts, strict=True)),
        reduced=SMALL | ({"channels": (8, 8, 16, 16)} if channels else {}),
        source="Primus (Wald et al. 2025, arXiv 2503.01835), sizes of nnU-Net's version",
        about=f"vision transformer over 8x8x8 voxels; size {size.upper()}, version {version}",
    )(partial(Primus, width=width, depth=depth, heads=heads, channels=channels))


# fmt: off
_register("primus_m", "m", (), (6_912_000, 443_232, 143_640_576, 1_728, 1_023_866))
_register("primus_v3_s", "s", CHANNELS, (3_168_000, 47_412_787, 22_689_216, 792, 290_618))
_register("primus_v3_m", "m", CHANNELS, (6_912_000, 58_436_995, 143_640_576, 1_728, 1_023_866))
# fmt: on
