"""VM-UNet: a U-shaped network of visual state space blocks that scan an image in four directions;
27.4 M parameters, 2D.

Source: specification `asc_seg` section 9 (Ruan et al., arXiv 2402.02491; selective scan in 2D from
VMamba, arXiv 2401.10166). Maps are channels last, (B, Y, X, C), inside. Parameters of the scan
carry VMamba's names.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional as F

from segfleet.models.drop_path import DropPath
from segfleet.models.registry import ModelError, check_input, register
from segfleet.models.scan import selective_scan_fn
from segfleet.models.skips import skip

DIRECTIONS = 4
DIVISOR = 32


def unfold_directions(x_BDYX: Tensor) -> Tensor:
    """The map as four sequences (B, 4, D, Y·X): row by row, column by column, and both
    backwards."""
    by_row, by_column = (rearrange(x_BDYX, f"b d y x -> b d ({order})") for order in ("y x", "x y"))
    forwards = torch.stack([by_row, by_column], 1)
    return torch.cat([forwards, forwards.flip(-1)], 1)


def fold_directions(y_BKDL: Tensor, size: tuple[int, int]) -> Tensor:
    """Sum of the four sequences, each put back to its pixels: (B, 4, D, Y·X) -> (B, D, Y, X)."""
    rows, columns = size
    both = y_BKDL[:, :2] + y_BKDL[:, 2:].flip(-1)
    by_row = rearrange(both[:, 0], "b d (y x) -> b d y x", y=rows, x=columns)
    by_column = rearrange(both[:, 1], "b d (x y) -> b d y x", y=rows, x=columns)
    return by_row + by_column


class SS2D(nn.Module):
    """Selective scan of a map in four directions, each with its own projections, in one grouped
    scan. (B, Y, X, C) -> the same shape."""

    def __init__(self, width: int, state: int = 16) -> None:
        super().__init__()
        inner, rank = 2 * width, math.ceil(width / 16)
        self.rank, self.state = rank, state
        self.in_proj = nn.Linear(width, 2 * inner, bias=False)
        self.conv2d = nn.Conv2d(inner, inner, 3, padding=1, groups=inner)
        self.x_proj_weight = nn.Parameter(
            _uniform(DIRECTIONS, rank + 2 * state, inner, bound=inner**-0.5)
        )
        self.dt_projs_weight = nn.Parameter(_uniform(DIRECTIONS, inner, rank, bound=rank**-0.5))
        self.dt_projs_bias = nn.Parameter(_step_bias(DIRECTIONS, inner))
        self.A_logs = nn.Parameter(torch.arange(1.0, state + 1).log().repeat(DIRECTIONS * inner, 1))
        self.Ds = nn.Parameter(torch.ones(DIRECTIONS * inner))
        for parameter in (self.A_logs, self.Ds):
            parameter._no_weight_decay = True
        self.out_norm = nn.LayerNorm(inner)
        self.out_proj = nn.Linear(inner, width, bias=False)

    def forward(self, x_BYXC: Tensor) -> Tensor:
        x, z = self.in_proj(x_BYXC).chunk(2, -1)
        x = F.silu(self.conv2d(rearrange(x, "b y x d -> b d y x")))
        y = self.out_norm(rearrange(self.scan(x), "b d y x -> b y x d"))
        return self.out_proj(y * F.silu(z))

    def scan(self, x_BDYX: Tensor) -> Tensor:
        """Sum over the directions of the selective scans of a map (B, D, Y, X), without gate;
        float32 or better."""
        u_BKDL = unfold_directions(x_BDYX)
        projected = torch.einsum("bkdl,kcd->bkcl", u_BKDL, self.x_proj_weight)
        steps, B_BKNL, C_BKNL = projected.split([self.rank, self.state, self.state], 2)
        delta_BKDL = torch.einsum("bkrl,kdr->bkdl", steps, self.dt_projs_weight)
        y = selective_scan_fn(
            # the type of y, and of the sum over directions
            rearrange(u_BKDL, "b k d l -> b (k d) l").to(
                torch.promote_types(u_BKDL.dtype, torch.float32)
            ),
            rearrange(delta_BKDL, "b k d l -> b (k d) l"),
            -self.A_logs.exp(),
            B_BKNL,
            C_BKNL,
            self.Ds,
            delta_bias=rearrange(self.dt_projs_bias, "k d -> (k d)"),
            delta_softplus=True,
        )
        y_BKDL = rearrange(y, "b (k d) l -> b k d l", k=DIRECTIONS)
        return fold_directions(y_BKDL, x_BDYX.shape[2:])


def _uniform(*shape: int, bound: float) -> Tensor:
    return torch.empty(shape).uniform_(-bound, bound)


def _step_bias(*shape: int, low: float = 1e-3, high: float = 1e-1) -> Tensor:
    """Biases whose softplus is log-uniform in [low, high], as in Mamba."""
    step = torch.empty(shape).uniform_(math.log(low), math.log(high)).exp().clamp(min=1e-4)
    return step + torch.log(-torch.expm1(-step))


class VSSBlock(nn.Module):
    """x + DropPath(SS2D(LN(x))); no feed-forward part. (B, Y, X, C) -> the same shape."""

    def __init__(self, width: int, state: int, drop_path: float) -> None:
        super().__init__()
        self.norm, self.mixer, self.drop_path = (
            nn.LayerNorm(width),
            SS2D(width, state),
            DropPath(drop_path),
        )

    def forward(self, x_BYXC: Tensor) -> Tensor:
        return x_BYXC + self.drop_path(self.mixer(self.norm(x_BYXC)))


class PatchEmbed(nn.Module):
    """(B, in_channels, Y, X) -> (B, Y/4, X/4, width): 4×4 convolution with stride 4, LayerNorm."""

    def __init__(self, in_channels: int, width: int) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(in_channels, width, 4, stride=4), nn.LayerNorm(width)

    def forward(self, x_BCYX: Tensor) -> Tensor:
        return self.norm(rearrange(self.conv(x_BCYX), "b c y x -> b y x c"))


class PatchMerge(nn.Module):
    """(B, Y, X, C) -> (B, Y/2, X/2, 2C): the pixels (0,0), (1,0), (0,1), (1,1) of each 2×2 square
    joined, LayerNorm, Linear."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm, self.linear = (
            nn.LayerNorm(4 * width),
            nn.Linear(4 * width, 2 * width, bias=False),
        )

    def forward(self, x_BYXC: Tensor) -> Tensor:
        squares = rearrange(
            x_BYXC, "b (y row) (x column) c -> b y x (column row c)", row=2, column=2
        )
        return self.linear(self.norm(squares))


class PatchExpand(nn.Module):
    """(B, Y, X, a) -> (B, factor·Y, factor·X, c): Linear, each token's features dealt out to
    factor² pixels, LayerNorm."""

    def __init__(self, a: int, c: int, factor: int) -> None:
        super().__init__()
        self.factor = factor
        self.linear, self.norm = nn.Linear(a, factor * factor * c, bias=False), nn.LayerNorm(c)

    def forward(self, x_BYXC: Tensor) -> Tensor:
        dealt = "b y x (row column c) -> b (y row) (x column) c"
        pixels = rearrange(self.linear(x_BYXC), dealt, row=self.factor, column=self.factor)
        return self.norm(pixels)


class VMUNet(nn.Module):
    """(B, in_channels, Y, X) -> logits (B, num_classes, Y, X); Y and X multiples of 32. Raises
    ModelError for another shape.

    The embedding takes the channels there are; repeating a grey image to three channels, as
    published, is the same function.
    """

    def __init__(
        self,
        in_channels: int,
        num_classes: int,
        *,
        width: int,
        depths: Sequence[int],
        decoder_depths: Sequence[int],
        state: int,
        drop_path: float,
    ) -> None:
        super().__init__()
        if width <= 0 or width % 4:
            raise ModelError(f"model.options.width: found {width}, expected a multiple of 4")
        for name, counts in (("depths", depths), ("decoder_depths", decoder_depths)):
            if len(counts) != 4 or min(counts) < 1:
                raise ModelError(
                    f"model.options.{name}: found {list(counts)}, expected four numbers of blocks, "
                    "each at least 1"
                )
        if not 0 <= drop_path < 1:
            raise ModelError(
                f"model.options.drop_path: found {drop_path}, expected a probability in [0, 1)"
            )
        self.in_channels = in_channels
        widths = [width * 2**stage for stage in range(4)]
        self.embed = PatchEmbed(in_channels, width)
        rates = _rates(depths, drop_path)
        for stage, (c, stage_rates) in enumerate(zip(widths, rates, strict=True)):
            blocks = [VSSBlock(c, state, rate) for rate in stage_rates]
            self.add_module(
                f"encoder{stage}", nn.Sequential(*blocks, *([PatchMerge(c)] if stage < 3 else []))
            )
        rates = _rates(decoder_depths[::-1], drop_path)[::-1]
        for stage, (c, stage_rates) in enumerate(zip(widths[::-1], rates, strict=True)):
            blocks = [VSSBlock(c, state, rate) for rate in stage_rates[::-1]]
            self.add_module(
                f"decoder{stage}",
                nn.Sequential(*([PatchExpand(2 * c, c, 2)] if stage else []), *blocks),
            )
        self.expand = PatchExpand(width, width // 4, 4)
        self.head = nn.Conv2d(width // 4, num_classes, 1)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02)

    def forward(self, x_BCYX: Tensor) -> Tensor:
        check_input(x_BCYX, name="vm_unet", dims=2, in_channels=self.in_channels, divisor=DIVISOR)
        s1 = self.encoder0(self.embed(x_BCYX))
        s2 = self.encoder1(s1)
        s3 = self.encoder2(s2)
        x = self.decoder0(self.encoder3(s3))
        x = self.decoder1(x + skip(self, s3))
        x = self.decoder2(x + skip(self, s2))
        x = self.decoder3(x + skip(self, s1))
        return self.head(rearrange(self.expand(x), "b y x c -> b c y x"))


def _rates(depths: Sequence[int], highest: float) -> list[list[float]]:
    """Drop rates per stage and block, from 0 at the first block to `highest` at the last."""
    steps = max(sum(depths) - 1, 1)
    rates = [highest * block / steps for block in range(sum(depths))]
    starts = [sum(depths[:stage]) for stage in range(len(depths))]
    return [rates[start : start + depth] for start, depth in zip(starts, depths, strict=True)]


@register(
    name="vm_unet",
    dims=(2,),
    in_channels=3,
    num_classes=1,
    paper_input=(256, 256),
    parameters=27_427_561,
    divisor=DIVISOR,
    stages={
        "embed": 4_896,
        "encoder0": 285_312,
        "encoder1": 976_128,
        "encoder2": 3_574_272,
        "encoder3": 8_911_872,
        "decoder0": 8_911_872,
        "decoder1": 3_571_968,
        "decoder2": 974_976,
        "decoder3": 179_328,
        "expand": 36_912,
        "head": 25,
    },
    reduced={"width": 32, "depths": (1, 1, 1, 1), "decoder_depths": (1, 1, 1, 1), "drop_path": 0.0},
    reduced_input=(64, 32),
    source="VM-UNet (Ruan et al., arXiv 2402.02491), specification asc_seg section 9",
    about="U-shaped network of visual state space blocks, scanned in four directions",
)
def vm_unet(
    in_channels: int,
    num_classes: int,
    *,
    width: int = 96,
    depths: Sequence[int] = (2, 2, 2, 2),
    decoder_depths: Sequence[int] = (2, 2, 2, 1),
    state: int = 16,
    drop_path: float = 0.2,
) -> nn.Module:
    """`depths`, `decoder_depths`: blocks per stage; `state`: size of the scan's state; `drop_path`:
    highest rate of left-out branches."""
    return VMUNet(
        in_channels,
        num_classes,
        width=width,
        depths=depths,
        decoder_depths=decoder_depths,
        state=state,
        drop_path=drop_path,
    )
