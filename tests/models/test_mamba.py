"""The Mamba layer: names, sizes, initial values, the formula, and stepping."""

from __future__ import annotations

import math
from types import SimpleNamespace

import pytest
import torch
from torch.nn import functional as F

from segfleet.models.registry import ModelError, count_parameters
from segfleet.models.scan import Mamba, selective_scan_ref


def layer(d_model=12, **more):
    torch.manual_seed(5)
    return Mamba(d_model, **more)


@pytest.mark.parametrize(
    ("d_model", "d_state", "d_conv", "expand"), [(12, 16, 4, 2), (40, 8, 3, 1)]
)
def test_state_dict_is_that_of_mamba_ssm(d_model, d_state, d_conv, expand):
    made = layer(d_model, d_state=d_state, d_conv=d_conv, expand=expand)
    e, r = expand * d_model, math.ceil(d_model / 16)
    assert {k: tuple(v.shape) for k, v in made.state_dict().items()} == {
        "A_log": (e, d_state),
        "D": (e,),
        "in_proj.weight": (2 * e, d_model),
        "conv1d.weight": (e, 1, d_conv),
        "conv1d.bias": (e,),
        "x_proj.weight": (r + 2 * d_state, e),
        "dt_proj.weight": (e, r),
        "dt_proj.bias": (e,),
        "out_proj.weight": (d_model, e),
    }
    formula = (
        2 * d_model * e
        + e * (d_conv + 1)
        + e * (r + 2 * d_state)
        + r * e
        + e
        + e * d_state
        + e
        + e * d_model
    )
    assert count_parameters(made) == formula


def test_biases_come_and_go():
    keys = layer(conv_bias=False, bias=True).state_dict()
    assert "conv1d.bias" not in keys and {"in_proj.bias", "out_proj.bias"} <= set(keys)


def test_initial_values():
    made = layer(64, d_state=5)
    torch.testing.assert_close(made.A_log, torch.log(torch.arange(1.0, 6)).repeat(128, 1))
    assert torch.equal(made.D, torch.ones(128))
    steps = F.softplus(made.dt_proj.bias.detach())
    assert 1e-3 * 0.99 <= steps.min() < 3e-3 and 3e-2 < steps.max() <= 0.1 * 1.01
    assert 0.35 < (steps < 1e-2).float().mean() < 0.65  # log-uniform: half below the geometric mean
    assert made.dt_proj.weight.abs().max() <= made.dt_rank**-0.5
    assert made.A_log._no_weight_decay and made.D._no_weight_decay and made.dt_proj.bias._no_reinit
    assert torch.equal(
        layer(dt_init="constant", dt_scale=0.5).dt_proj.weight, torch.full((24, 1), 0.5)
    )
    assert F.softplus(layer(dt_min=1e-9, dt_max=1e-8).dt_proj.bias).min() > 0.99e-4  # the floor
    half = layer(dtype=torch.bfloat16)
    assert (
        half.in_proj.weight.dtype == torch.bfloat16
        and half.A_log.dtype == half.D.dtype == torch.float32
    )


def formula(m, x):
    """The layer written out step by step."""
    x, z = F.linear(x, m.in_proj.weight).split(m.d_inner, dim=-1)
    length = x.shape[1]
    padded = F.pad(x, (0, 0, m.d_conv - 1, 0))
    x = F.silu(
        m.conv1d.bias
        + sum(m.conv1d.weight[:, 0, k] * padded[:, k : k + length] for k in range(m.d_conv))
    )
    dt, B, C = F.linear(x, m.x_proj.weight).split([m.dt_rank, m.d_state, m.d_state], dim=-1)
    dt = F.linear(dt, m.dt_proj.weight)
    x, dt, B, C, z = (y.transpose(1, 2) for y in (x, dt, B, C, z))
    y = selective_scan_ref(x, dt, -torch.exp(m.A_log), B, C, m.D, z, m.dt_proj.bias, True)
    return F.linear(y.transpose(1, 2), m.out_proj.weight)


def test_layer_and_gradients_follow_the_formula():
    made, x = (
        layer(),
        torch.randn(2, 70, 12, generator=torch.Generator().manual_seed(1), requires_grad=True),
    )
    found, expected = made(x), formula(made, x)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6)
    leaves = [x, *made.parameters()]
    torch.testing.assert_close(
        torch.autograd.grad(found.sin().sum(), leaves),
        torch.autograd.grad(expected.sin().sum(), leaves),
        rtol=1e-3,
        atol=1e-5,
    )


def test_causal():
    made, x = layer(), torch.randn(1, 30, 12)
    changed = x.clone()
    changed[:, 20:] = 0
    a, b = made(x), made(changed)
    torch.testing.assert_close(a[:, :20], b[:, :20])
    assert not torch.allclose(a[:, 20], b[:, 20])


@torch.no_grad()
def test_steps_continue_the_sequence():
    made, x = layer(layer_idx=3), torch.randn(2, 9, 12)
    whole = made(x)
    states = made.allocate_inference_cache(2, 100)
    assert [tuple(s.shape) for s in states] == [(2, 24, 4), (2, 24, 16)]
    one_by_one = torch.cat([made.step(x[:, i : i + 1], *states)[0] for i in range(9)], dim=1)
    torch.testing.assert_close(one_by_one, whole, rtol=1e-4, atol=1e-6)
    for prefix in (2, 6):  # shorter and longer than the convolution
        memory = SimpleNamespace(seqlen_offset=0, key_value_memory_dict={})
        out = [made(x[:, :prefix], memory)]
        for memory.seqlen_offset in range(prefix, 9):
            out.append(made(x[:, memory.seqlen_offset : memory.seqlen_offset + 1], memory))
        torch.testing.assert_close(torch.cat(out, dim=1), whole, rtol=1e-4, atol=1e-6)
        assert set(memory.key_value_memory_dict) == {3}


def test_bfloat16_by_autocast_and_by_type():
    made, x = layer(32), torch.randn(2, 40, 32, generator=torch.Generator().manual_seed(2))
    expected = made(x)
    with torch.autocast("cpu", torch.bfloat16):
        mixed = made(x)
    mixed.float().sum().backward()
    assert all(p.grad.dtype == torch.float32 and p.grad.isfinite().all() for p in made.parameters())
    for found in (mixed, made.to(torch.bfloat16)(x.bfloat16())):
        assert found.dtype == torch.bfloat16
        torch.testing.assert_close(found.float(), expected, rtol=5e-2, atol=1e-2)


def test_bad_use_is_refused():
    made = layer()
    with pytest.raises(
        ModelError, match=r"Mamba takes \(batch, length, 12\), found shape \(2, 5, 11\)"
    ):
        made(torch.zeros(2, 5, 11))
    with pytest.raises(
        ModelError, match=r"Mamba.step takes one step, \(batch, 1, 12\), found shape \(2, 2, 12\)"
    ):
        made.step(torch.zeros(2, 2, 12), *made.allocate_inference_cache(2, 1))
    with pytest.raises(ModelError, match="dt_init is 'zero', expected one of: random, constant"):
        layer(dt_init="zero")
    with pytest.raises(ModelError, match="inference_params needs a layer_idx"):
        made(torch.zeros(2, 5, 12), SimpleNamespace(seqlen_offset=0, key_value_memory_dict={}))


@pytest.mark.compile
def test_compiles_in_one_graph():
    made, x = layer(), torch.randn(2, 70, 12)
    torch.testing.assert_close(
        torch.compile(made, fullgraph=True)(x), made(x), rtol=1e-4, atol=1e-5
    )
