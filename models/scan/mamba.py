"""The Mamba-1 layer with the arguments, initialisation and state-dict keys of `mamba_ssm`, on any
device."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from segfleet.models.registry import ModelError
from segfleet.models.scan.interface import selective_scan_fn


class Mamba(nn.Module):
    """(batch, length, d_model) to the same shape, causal in length. Source: Gu and Dao, arXiv
    2312.00752.

    d_state: N; d_conv: taps of the causal depthwise convolution; expand: inner width / d_model;
    dt_rank: "auto" is ceil(d_model / 16). dt_min, dt_max, dt_init ("random" or "constant"),
    dt_scale, dt_init_floor: initial step sizes. `use_fast_path` is accepted and has no
    effect: the scan picks its own back end. `layer_idx` is the key of this layer's states in
    `inference_params`.
    """

    def __init__(
        self,
        d_model: int,
        d_state: int = 16,
        d_conv: int = 4,
        expand: int = 2,
        dt_rank: int | str = "auto",
        dt_min: float = 0.001,
        dt_max: float = 0.1,
        dt_init: str = "random",
        dt_scale: float = 1.0,
        dt_init_floor: float = 1e-4,
        conv_bias: bool = True,
        bias: bool = False,
        use_fast_path: bool = True,
        layer_idx: int | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if dt_init not in ("random", "constant"):
            raise ModelError(f"Mamba: dt_init is '{dt_init}', expected one of: random, constant")
        factory: dict[str, Any] = {"device": device, "dtype": dtype}
        self.d_model, self.d_state, self.d_conv, self.expand = d_model, d_state, d_conv, expand
        self.d_inner = int(expand * d_model)
        self.dt_rank = math.ceil(d_model / 16) if dt_rank == "auto" else int(dt_rank)
        self.use_fast_path, self.layer_idx = use_fast_path, layer_idx

        self.in_proj = nn.Linear(d_model, 2 * self.d_inner, bias=bias, **factory)
        self.conv1d = nn.Conv1d(
            self.d_inner,
            self.d_inner,
            d_conv,
            groups=self.d_inner,
            padding=d_conv - 1,
            bias=conv_bias,
            **factory,
        )
        self.activation, self.act = "silu", nn.SiLU()
        self.x_proj = nn.Linear(self.d_inner, self.dt_rank + 2 * d_state, bias=False, **factory)
        self.dt_proj = nn.Linear(self.dt_rank, self.d_inner, bias=True, **factory)
        self._init_steps(dt_min, dt_max, dt_init, dt_scale, dt_init_floor)

        rates = torch.arange(1, d_state + 1, dtype=torch.float32, device=device).repeat(
            self.d_inner, 1
        )
        self.A_log = nn.Parameter(torch.log(rates))  # float32 whatever dtype is
        self.D = nn.Parameter(torch.ones(self.d_inner, device=device))
        self.A_log._no_weight_decay = self.D._no_weight_decay = True
        self.out_proj = nn.Linear(self.d_inner, d_model, bias=bias, **factory)

    def _init_steps(self, low: float, high: float, how: str, scale: float, floor: float) -> None:
        """Step sizes log-uniform in [low, high] through the inverse of softplus; the projection
        keeps their variance."""
        bound = self.dt_rank**-0.5 * scale
        with torch.no_grad():
            if how == "constant":
                self.dt_proj.weight.fill_(bound)
            else:
                self.dt_proj.weight.uniform_(-bound, bound)
            drawn = torch.rand(self.d_inner, device=self.dt_proj.bias.device)
            dt = torch.exp(drawn * (math.log(high) - math.log(low)) + math.log(low)).clamp(
                min=floor
            )
            self.dt_proj.bias.copy_(dt + torch.log(-torch.expm1(-dt)))
        self.dt_proj.bias._no_reinit = True

    def forward(self, hidden_states: Tensor, inference_params: Any = None) -> Tensor:
        """(batch, length, d_model) to the same shape. With `inference_params` the states of
        `layer_idx` are kept for `step`."""
        if hidden_states.ndim != 3 or hidden_states.shape[-1] != self.d_model:
            raise ModelError(
                f"Mamba takes (batch, length, {self.d_model}), found shape "
                f"{tuple(hidden_states.shape)}"
            )
        states = None
        if inference_params is not None:
            states = self._get_states_from_cache(inference_params, hidden_states.shape[0])
            if inference_params.seqlen_offset > 0:
                return self.step(hidden_states, *states)[0]
        length = hidden_states.shape[1]
        x, z = self.in_proj(hidden_states).transpose(1, 2).chunk(2, dim=1)
        if states is not None:
            states[0].copy_(F.pad(x, (self.d_conv - length, 0)))
        x = self.act(self.conv1d(x)[..., :length])
        dt, B, C = self._selected(x.transpose(1, 2))
        y = selective_scan_fn(
            x, dt.transpose(1, 2), -torch.exp(self.A_log.float()), B.transpose(1, 2),
            C.transpose(1, 2), self.D.float(), z=z,
            delta_bias=self.dt_proj.bias.float(), delta_softplus=True,
            return_last_state=states is not None,
        )  # fmt: skip
        if states is not None:
            y, last = y
            states[1].copy_(last)
        return self.out_proj(y.transpose(1, 2))

    def _selected(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(..., d_inner) to delta without its bias (..., d_inner), B and C (..., d_state)."""
        dt, B, C = self.x_proj(x).split([self.dt_rank, self.d_state, self.d_state], dim=-1)
        return F.linear(dt, self.dt_proj.weight), B, C

    def step(
        self, hidden_states: Tensor, conv_state: Tensor, ssm_state: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """One step (batch, 1, d_model): the output and the two states, which are updated in
        place."""
        if hidden_states.shape[1] != 1:
            raise ModelError(
                f"Mamba.step takes one step, (batch, 1, {self.d_model}), found shape "
                f"{tuple(hidden_states.shape)}"
            )
        x, z = self.in_proj(hidden_states.squeeze(1)).chunk(2, dim=-1)
        conv_state.copy_(
            torch.cat([conv_state[..., 1:], x.to(conv_state.dtype).unsqueeze(-1)], dim=-1)
        )
        x = (conv_state * self.conv1d.weight.squeeze(1)).sum(-1)
        if self.conv1d.bias is not None:
            x = x + self.conv1d.bias
        x = self.act(x).to(hidden_states.dtype)
        dt, B, C = self._selected(x)
        dt = F.softplus(dt.float() + self.dt_proj.bias.float()).unsqueeze(-1)
        decay = torch.exp(dt * -torch.exp(self.A_log.float()))
        ssm_state.copy_(decay * ssm_state + dt * B.float().unsqueeze(1) * x.float().unsqueeze(-1))
        y = (ssm_state * C.float().unsqueeze(1)).sum(-1) + self.D.float() * x.float()
        out = self.out_proj((y * F.silu(z.float())).to(hidden_states.dtype))
        return out.unsqueeze(1), conv_state, ssm_state

    def allocate_inference_cache(
        self, batch_size: int, max_seqlen: int, dtype: torch.dtype | None = None, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Zero states: (batch, d_inner, d_conv) and (batch, d_inner, d_state). Their size does not
        depend on `max_seqlen`."""
        weight = self.conv1d.weight
        conv = torch.zeros(
            batch_size, self.d_inner, self.d_conv, device=weight.device, dtype=dtype or weight.dtype
        )
        ssm = torch.zeros(
            batch_size,
            self.d_inner,
            self.d_state,
            device=weight.device,
            dtype=dtype or self.dt_proj.weight.dtype,
        )
        return conv, ssm

    def _get_states_from_cache(
        self, inference_params: Any, batch_size: int, initialize_states: bool = False
    ) -> tuple[Tensor, Tensor]:
        cache = inference_params.key_value_memory_dict
        if self.layer_idx is None:
            raise ModelError(
                "Mamba: inference_params needs a layer_idx, given when the layer is built"
            )
        if self.layer_idx not in cache:
            cache[self.layer_idx] = self.allocate_inference_cache(batch_size, 0)
        elif initialize_states:
            for state in cache[self.layer_idx]:
                state.zero_()
        return cache[self.layer_idx]
