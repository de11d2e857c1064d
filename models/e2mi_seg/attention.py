"""The attention of E2MISeg: channel and spatial attention in one, with queries and keys from a
convolutional branch.

Source: E2MISeg (Jiang et al. 2026) and its specification in this project; the pairing comes from
UNETR++ (Shaker et al. 2023).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from segfleet.models.registry import ModelError

LEGAL = {
    "projection": ("separate", "shared", "shared_no_bias"),
    "merge": ("concat", "sum"),
    "qk_source": ("conv", "tokens"),
}


class PairedAttention(nn.Module):
    """Tokens t (B, N, C) and a local map y (B, C, N) -> tokens (B, N, C); cost grows as N ·
    projected, not N².

    Per head, with q = k = y: channel attention softmax(τ1 q̂ k̂ᵀ) v_C over d × d, spatial attention
    softmax(τ2 q̂ᵀ k_p) v_pᵀ over N × projected, where k_p and v_p project the token axis of k and
    v_S, and ^ divides by the norm along the tokens.

    projection: two linear maps of the token axis ("separate"), one for keys and values ("shared"),
    or one without bias.
    merge: "concat" reduces each attention to C/2 channels, "sum" adds them. qk_source "tokens":
    queries and keys are linear maps of t.
    legacy_qkvv: hold the 4C-wide projection of the released network although half of it is not used
    (nor computed).
    legacy_scramble: lay out the spatial attention as the released code does, which mixes tokens
    with channels.
    """

    def __init__(
        self,
        channels: int,
        tokens: int,
        projected: int,
        heads: int,
        *,
        projection: str,
        merge: str,
        dropout: float,
        qk_source: str,
        legacy_qkvv: bool,
        legacy_scramble: bool,
    ) -> None:
        super().__init__()
        for option, value in (
            ("projection", projection),
            ("merge", merge),
            ("qk_source", qk_source),
        ):
            if value not in LEGAL[option]:
                raise ModelError(
                    f"e2mi_seg: {option} is '{value}', expected one of: {', '.join(LEGAL[option])}"
                )
        if channels % heads:
            raise ModelError(
                f"e2mi_seg: every width must be a multiple of the {heads} heads, found {channels}"
            )
        self.heads, self.dropout = heads, dropout
        self.from_tokens, self.scramble = qk_source == "tokens", legacy_scramble
        self.qkvv = nn.Linear(
            channels, channels * (4 if legacy_qkvv or self.from_tokens else 2), bias=False
        )
        self.key_projection = nn.Linear(tokens, projected, bias=projection != "shared_no_bias")
        self.value_projection = nn.Linear(tokens, projected) if projection == "separate" else None
        self.channel_scale = nn.Parameter(torch.ones(heads, 1, 1))
        self.spatial_scale = nn.Parameter(torch.ones(heads, 1, 1))
        self.merge = (
            nn.ModuleList(nn.Linear(channels, channels // 2) for _ in range(2))
            if merge == "concat"
            else None
        )
        if projection == "shared_no_bias":  # released as a bare matrix with a draw of its own
            nn.init.uniform_(self.key_projection.weight, -(projected**-0.5), projected**-0.5)

    def start_narrow(self) -> None:
        """Linear layers anew from a normal of 0.02, biases zero: in the encoder, as released. A
        token projection without bias keeps its draw."""
        for module in self.modules():
            if isinstance(module, nn.Linear) and (
                module is not self.key_projection or module.bias is not None
            ):
                nn.init.trunc_normal_(module.weight, std=0.02)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)

    def forward(self, t_BNC: Tensor, y_BCN: Tensor) -> Tensor:
        used = 4 if self.from_tokens else 2  # the last parts are the values
        parts = F.linear(t_BNC, self.qkvv.weight[-used * t_BNC.shape[-1] :])
        parts = rearrange(parts, "b n (part h d) -> part b h d n", part=used, h=self.heads)
        value_c, value_s = parts[-2], parts[-1]
        q, k = (
            (parts[0], parts[1])
            if self.from_tokens
            else (rearrange(y_BCN, "b (h d) n -> b h d n", h=self.heads),) * 2
        )
        k_p = self.key_projection(k)  # (B, h, d, p), of the keys before normalisation
        v_p = (self.value_projection or self.key_projection)(value_s)
        q_unit = _unit(q)
        k_unit = _unit(k) if self.from_tokens else q_unit

        scores = (self.channel_scale * (q_unit @ k_unit.mT)).softmax(-1)
        by_channel = F.dropout(scores, self.dropout, self.training) @ value_c  # (B, h, d, N)
        by_channel = rearrange(by_channel, "b h d n -> b n (h d)")

        scores = (self.spatial_scale * (q_unit.mT @ k_p)).softmax(-1)
        by_space = F.dropout(scores, self.dropout, self.training) @ v_p.mT  # (B, h, N, d)
        if self.scramble:
            by_space = rearrange(by_space, "b h n d -> b d h n").reshape(t_BNC.shape)
        else:
            by_space = rearrange(by_space, "b h n d -> b n (h d)")

        if self.merge is None:
            return by_space + by_channel
        return torch.cat((self.merge[0](by_space), self.merge[1](by_channel)), -1)


def _unit(x: Tensor) -> Tensor:
    """`x` over its norm along the tokens, summed in float32 at least: there are tens of thousands
    of them."""
    return F.normalize(x.to(torch.promote_types(x.dtype, torch.float32)), dim=-1, eps=1e-12).to(
        x.dtype
    )
