"""The encoder block of ASC-Seg: an inverted pyramid of convolutions, then a token mixer beside a
deformable convolution.

Source: specification `asc_seg` section 2. Convolutions have a bias and keep the size; GELU is the
exact one.
"""

from __future__ import annotations

from collections.abc import Callable

from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional as F

from segfleet.models.deform import deform_conv2d
from segfleet.models.scan import Mamba

GROUPS = 4  # channel groups that share one token mixer


def conv(a: int, b: int, kernel: int = 1, *, dilation: int = 1, groups: int = 1) -> nn.Conv2d:
    """Same-size convolution with bias, a -> b channels."""
    return nn.Conv2d(
        a, b, kernel, padding=dilation * (kernel // 2), dilation=dilation, groups=groups
    )


class RasterMamba(Mamba):
    """Mamba over the pixels of a map, row by row from the top left: one causal direction. (B, Y, X,
    C) -> the same shape."""

    def forward(self, x_BYXC: Tensor) -> Tensor:
        scanned = super().forward(rearrange(x_BYXC, "b y x c -> b (y x) c"))
        return rearrange(scanned, "b (y x) c -> b y x c", y=x_BYXC.shape[1])


class GatedConv(nn.Module):
    """What is left of a Mamba layer when its causal convolution and scan give way to a depthwise
    7×7 convolution.

    out(SiLU(dwconv7(u)) · SiLU(z)) with (u, z) = in(x), inner width 2C: the gated convolution of
    MambaOut (Yu and Wang, arXiv
    2405.07992). 6C² + 100C parameters against Mamba's 6C² + 114C, for C <= 16. It looks 3 pixels
    far in every direction, where Mamba looks at all pixels before. (B, Y, X, C) -> the same shape.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        inner = 2 * channels
        self.in_proj = nn.Linear(channels, 2 * inner, bias=False)
        self.conv = conv(inner, inner, 7, groups=inner)
        self.out_proj = nn.Linear(inner, channels, bias=False)

    def forward(self, x_BYXC: Tensor) -> Tensor:
        u, z = self.in_proj(x_BYXC).chunk(2, -1)
        u = self.conv(rearrange(u, "b y x c -> b c y x"))
        return self.out_proj(F.silu(rearrange(u, "b c y x -> b y x c")) * F.silu(z))


MIXERS: dict[str, Callable[[int], nn.Module]] = {"mamba": RasterMamba, "gated_conv": GatedConv}


class Pyramid(nn.Sequential):
    """IPCB: convolutions 7, 3, 1, each with batch normalisation and ReLU. a -> c channels."""

    def __init__(self, a: int, c: int) -> None:
        layers: list[nn.Module] = []
        for width, kernel in ((a, 7), (c, 3), (c, 1)):
            layers += [conv(width, c, kernel), nn.BatchNorm2d(c), nn.ReLU(inplace=True)]
        super().__init__(*layers)


class ParallelMixer(nn.Module):
    """PMB: four channel groups through one shared token mixer, then a convolutional tail. (B, C, Y,
    X) -> the same shape.

    One LayerNorm serves at three places. The residuals end before the tail, as published.
    """

    def __init__(self, c: int, mixer: str) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(c)
        self.mixer = MIXERS[mixer](c // GROUPS)
        self.linear = nn.Linear(c, c)
        self.tail = nn.Sequential(conv(c, c), conv(c, c, 7, groups=c), nn.GELU(), conv(c, c))

    def forward(self, x_BCYX: Tensor) -> Tensor:
        x = rearrange(x_BCYX, "b c y x -> b y x c")
        mixed = self.linear(self.norm(self.mix(self.norm(x)))) + x
        return self.tail(rearrange(self.norm(mixed), "b y x c -> b c y x"))

    def mix(self, n_BYXC: Tensor) -> Tensor:
        """mixer(n_j) + n_j for each of the four channel groups; one call, with the groups on the
        batch axis."""
        n = rearrange(n_BYXC, "b y x (group c) -> (group b) y x c", group=GROUPS)
        return rearrange(self.mixer(n) + n, "(group b) y x c -> b y x (group c)", group=GROUPS)


class DeformableGate(nn.Module):
    """DCB: x + x · g(x), where g reads the map through a depthwise deformable 3×3 convolution. (B,
    C, Y, X) -> the same shape.

    The offsets are batch-normalised, so they start about a pixel long; `zero_offsets` starts them
    at zero.
    """

    def __init__(self, c: int, zero_offsets: bool) -> None:
        super().__init__()
        self.enter = nn.Sequential(conv(c, c), nn.BatchNorm2d(c), nn.GELU())
        self.offset = nn.Sequential(conv(c, 18, 3), nn.BatchNorm2d(18))
        self.deform = conv(c, c, 3, groups=c)  # holds and initialises the weight; never called
        self.deform.bias = None
        self.leave = nn.Sequential(conv(c, c), nn.BatchNorm2d(c), nn.GELU())
        if zero_offsets:
            nn.init.zeros_(self.offset[1].weight)

    def forward(self, x_BCYX: Tensor) -> Tensor:
        q = self.enter(x_BCYX)
        w = deform_conv2d(
            q, self.offset(q), self.deform.weight, groups=q.shape[1], layout="interleaved"
        )
        return self.leave(w) * x_BCYX + x_BCYX


class EncoderBlock(nn.Module):
    """ASE: a = IPCB(x), then PMB(a) + DCB(a), with no residual around. (B, a, Y, X) -> (B, c, Y,
    X)."""

    def __init__(self, a: int, c: int, *, mixer: str, zero_offsets: bool) -> None:
        super().__init__()
        self.ipcb = Pyramid(a, c)
        self.pmb = ParallelMixer(c, mixer)
        self.dcb = DeformableGate(c, zero_offsets)

    def forward(self, x_BCYX: Tensor) -> Tensor:
        a = self.ipcb(x_BCYX)
        return self.pmb(a) + self.dcb(a)
