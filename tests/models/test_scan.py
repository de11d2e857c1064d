"""The selective scan: the numbers and the properties of its specification, on every back end that
runs here."""

from __future__ import annotations

import importlib.machinery
import logging
import sys
import types
from functools import partial

import pytest
import torch

from segfleet.models.registry import ModelError
from segfleet.models.scan import backends, external, native, selective_scan_fn, selective_scan_ref
from segfleet.models.scan.inputs import chunk_length

NATIVE = native.unavailable(torch.device("cpu"))
COMPILED = pytest.param(
    "native",
    marks=pytest.mark.skipif(
        bool(NATIVE), reason=f"the compiled kernel is not available: {NATIVE}"
    ),
)
BACKENDS = [COMPILED, "chunked"]
TENSORS = ("u", "delta", "A", "B", "C", "D", "z", "delta_bias")


def inputs(  # noqa: PLR0913
    batch=2, channels=6, length=150, state=4, groups=2, B="varied", C="varied", z=True, D=True,
    bias=True, dtype=torch.float64, **more
):  # fmt: skip
    """Random arguments of a scan, A negative, all asking for gradients."""
    draw = torch.Generator().manual_seed(7)

    def normal(*shape, scale=1.0):
        return (
            (torch.randn(*shape, generator=draw, dtype=torch.float64) * scale)
            .to(dtype)
            .requires_grad_()
        )

    matrix = {
        "varied": (batch, groups, state, length),
        "flat": (batch, state, length),
        "constant": (channels, state),
    }
    return {
        "u": normal(batch, channels, length),
        "delta": normal(batch, channels, length),
        "A": (-torch.rand(channels, state, generator=draw, dtype=torch.float64) * 2 - 0.05)
        .to(dtype)
        .requires_grad_(),
        "B": normal(*matrix[B]),
        "C": normal(*matrix[C]),
        "D": normal(channels) if D else None,
        "z": normal(batch, channels, length) if z else None,
        "delta_bias": normal(channels, scale=0.5) if bias else None,
        "delta_softplus": True,
        **more,
    }


def run(scan, arguments, last=True):
    """Output, last state and gradients of a fixed random functional of both, by name."""
    out, state = scan(**arguments, return_last_state=True)
    draw = torch.Generator().manual_seed(11)
    loss = sum(
        (x.double() * torch.randn(x.shape, generator=draw, dtype=torch.float64)).sum()
        for x in ((out, state) if last else (out,))
    )
    given = {k: x for k, x in arguments.items() if k in TENSORS and x is not None}
    return {
        "out": out,
        "last": state,
        **dict(zip(given, torch.autograd.grad(loss, list(given.values())), strict=True)),
    }


def worst(found, expected):
    """Largest error of each result, relative to the largest expected value."""
    return {
        k: (
            (found[k].double() - x.double()).abs().max() / x.double().abs().max().clamp(min=1e-30)
        ).item()
        for k, x in expected.items()
    }


def double(arguments):
    return {
        k: x.detach().double().requires_grad_() if isinstance(x, torch.Tensor) else x
        for k, x in arguments.items()
    }


SPEC = {
    "out": [
        [-0.12079939, -0.24406575, 0, -0.27298592, -0.42675844],
        [-0.21750726, 0.33441740, 0, -0.09496282, -0.07975466],
    ],
    "last": [[0.40862977, -0.17142459], [0.38857855, -0.21745631]],
    "u": [
        [-0.10571865, 0.00915779, 0.36199287, 0.77611386, 0.46687422],
        [-0.02820023, -0.14891808, -0.17648858, -0.04242631, 0.09882023],
    ],
    "delta": [
        [0.00836423, 0.06883375, -0.12539561, -0.41850013, 0.31132581],
        [0.28396142, 0.00899629, 0.11904727, 0.11437263, -0.03329721],
    ],
    "A": [[0.54361916, -0.02444805], [-0.06975805, -0.05277457]],
    "B": [
        [1.56618410, 0.23224474, 0.16317764, -0.61005644, -1.34999767],
        [-1.35790679, -0.05506346, 0.03999170, -0.26569910, -1.34999767],
    ],
    "C": [
        [1.27672332, 0.43851318, 0, 0.03436994, 0.62720042],
        [1.07432563, 0.25427900, 0, -0.11824541, -0.25013770],
    ],
    "D": [-2.68766170, 2.57866924],
    "delta_bias": [-0.15537195, 0.49308039],
    "z": [
        [-0.04600006, 0.06563939, 0.25942490, -0.34640314, -0.26425007],
        [-0.13468113, 0.42435609, 0.29337091, 0.02553943, -0.03037034],
    ],
}


def spec_case(dtype):
    t = torch.arange(5, dtype=torch.float64)
    case = {
        "u": torch.stack([torch.sin(t + 1), torch.cos(t)])[None],
        "delta": torch.stack([0.1 * t - 0.2, 0.3 - 0.1 * t])[None],
        "A": torch.tensor([[-1.0, -2.0], [-0.5, -1.5]], dtype=torch.float64),
        "B": torch.stack([torch.cos(0.5 * t), torch.sin(0.5 * t + 1)])[None],
        "C": torch.stack([torch.ones(5, dtype=torch.float64), 0.5 * t - 1])[None],
        "D": torch.tensor([0.5, -0.25], dtype=torch.float64),
        "z": torch.stack([t - 2, 2 - t])[None],
        "delta_bias": torch.tensor([0.1, -0.1], dtype=torch.float64),
    }
    return {k: x.to(dtype).requires_grad_() for k, x in case.items()} | {"delta_softplus": True}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("backend", [*BACKENDS, "reference"])
def test_vectors_of_the_specification(backend, dtype):
    arguments = spec_case(dtype)
    scan = (
        selective_scan_ref
        if backend == "reference"
        else partial(selective_scan_fn, backend=backend)
    )
    out, last = scan(**arguments, return_last_state=True)
    found = {"out": out, "last": last}
    tensors = {k: arguments[k] for k in TENSORS}
    found |= dict(zip(tensors, torch.autograd.grad(out.sum(), list(tensors.values())), strict=True))
    for name, expected in SPEC.items():
        torch.testing.assert_close(
            found[name].reshape(torch.tensor(expected).shape).double(),
            torch.tensor(expected, dtype=torch.float64),
            rtol=1e-5,
            atol=2e-7,
        )


@pytest.mark.parametrize("backend", BACKENDS)
def test_closed_form(backend):
    delta, length = 0.3, 200
    one = torch.ones(1, 1, length, dtype=torch.float64)
    out = selective_scan_fn(
        one, delta * one, -torch.ones(1, 1, dtype=torch.float64), one, one, backend=backend
    )
    t = torch.arange(1, length + 1, dtype=torch.float64)
    torch.testing.assert_close(
        out[0, 0],
        delta
        * (1 - torch.exp(-delta * t))
        / (1 - torch.exp(torch.tensor(-delta, dtype=torch.float64))),
    )


@pytest.mark.parametrize("length", [1, 64, 65, 150])
@pytest.mark.parametrize("state", [1, 5, 16, 20])
@pytest.mark.parametrize("backend", BACKENDS)
def test_every_result_equals_the_definition(backend, length, state):
    arguments = inputs(length=length, state=state)
    assert (
        max(
            worst(
                run(partial(selective_scan_fn, backend=backend), arguments),
                run(selective_scan_ref, arguments),
            ).values()
        )
        < 1e-12
    )


@pytest.mark.parametrize(
    "options",
    [
        {"B": "constant"},
        {"C": "constant"},
        {"B": "constant", "C": "constant"},
        {"B": "flat", "C": "varied"},
        {"B": "flat", "C": "constant", "groups": 1},
        {"groups": 6},
        {"z": False},
        {"D": False, "bias": False},
        {"delta_softplus": False, "length": 40},
        {"batch": 1, "channels": 1, "groups": 1, "state": 40, "length": 700},
    ],
    ids=lambda o: ",".join(f"{k}={v}" for k, v in o.items()),
)
@pytest.mark.parametrize("backend", BACKENDS)
def test_every_form_of_input(backend, options):
    arguments = inputs(**options)
    assert (
        max(
            worst(
                run(partial(selective_scan_fn, backend=backend), arguments),
                run(selective_scan_ref, arguments),
            ).values()
        )
        < 1e-12
    )


@pytest.mark.parametrize("backend", BACKENDS)
def test_single_precision_is_exact_to_1e5(backend):
    arguments = inputs(batch=1, channels=8, length=1500, state=16, groups=1, dtype=torch.float32)
    expected = run(partial(selective_scan_fn, backend="chunked"), double(arguments))
    assert (
        max(worst(run(partial(selective_scan_fn, backend=backend), arguments), expected).values())
        < 1e-5
    )


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float16, 1e-3), (torch.bfloat16, 8e-3)])
@pytest.mark.parametrize("backend", BACKENDS)
def test_half_types_compute_in_single(backend, dtype, tolerance):
    arguments = inputs(channels=8, groups=2, state=16, dtype=dtype)
    for name in ("A", "D", "delta_bias"):
        arguments[name] = arguments[name].detach().float().requires_grad_()
    found, expected = (
        run(partial(selective_scan_fn, backend=backend), arguments),
        run(selective_scan_ref, double(arguments)),
    )
    assert found["out"].dtype == found["u"].dtype == found["B"].dtype == dtype
    assert found["last"].dtype == found["A"].dtype == torch.float32
    errors = worst(found, expected)
    assert max(errors.values()) < tolerance
    assert errors["last"] < 1e-5  # nothing rounds to the short type on the way to the state


@pytest.mark.parametrize("backend", BACKENDS)
def test_gradcheck(backend):
    for options in (
        {"length": 70, "z": True},
        {"length": 3, "B": "constant", "C": "constant", "z": False},
    ):
        arguments = inputs(batch=1, channels=2, state=2, groups=1, **options)
        names = [k for k in TENSORS if arguments[k] is not None]

        def scan(*tensors, names=names, arguments=arguments):
            return selective_scan_fn(
                **(arguments | dict(zip(names, tensors, strict=True))),
                return_last_state=True,
                backend=backend,
            )

        assert torch.autograd.gradcheck(scan, [arguments[k] for k in names], fast_mode=True)


@pytest.mark.parametrize("backend", BACKENDS)
def test_two_halves_with_the_carried_state_are_one_pass(backend):
    x = {
        k: v.detach() if isinstance(v, torch.Tensor) else v
        for k, v in inputs(length=180, groups=1, z=False).items()
    }
    whole, end = selective_scan_fn(**x, return_last_state=True, backend=backend)
    timed = ("u", "delta", "B", "C")
    first, second = (
        {k: v[..., part] if k in timed else v for k, v in x.items()}
        for part in (slice(90), slice(90, None))
    )
    out1, carried = selective_scan_fn(**first, return_last_state=True, backend=backend)
    out2, own = selective_scan_fn(**second, return_last_state=True, backend=backend)
    steps = torch.nn.functional.softplus(second["delta"] + x["delta_bias"][:, None]).cumsum(-1)
    decayed = torch.exp(steps[:, :, None] * x["A"][:, :, None]) * carried[..., None]  # (B, D, N, L)
    torch.testing.assert_close(
        torch.cat([out1, out2 + (decayed * second["C"]).sum(2)], dim=-1), whole
    )
    torch.testing.assert_close(own + decayed[..., -1], end)


@pytest.mark.parametrize("backend", BACKENDS)
def test_permuted_batch_and_channels(backend):
    x = {
        k: v.detach() if isinstance(v, torch.Tensor) else v
        for k, v in inputs(batch=3, groups=1).items()
    }
    b, d = torch.tensor([2, 0, 1]), torch.tensor([3, 1, 5, 0, 4, 2])
    moved = {k: x[k][d] for k in ("A", "D", "delta_bias")} | {k: x[k][b] for k in ("B", "C")}
    moved |= {k: x[k][b][:, d] for k in ("u", "delta", "z")}
    found = selective_scan_fn(**moved, delta_softplus=True, backend=backend)
    torch.testing.assert_close(
        found, selective_scan_fn(**x, backend=backend)[b][:, d], rtol=1e-14, atol=1e-14
    )


@pytest.mark.parametrize("backend", BACKENDS)
def test_any_strides(backend):
    arguments = inputs(dtype=torch.float32)
    expected = run(partial(selective_scan_fn, backend=backend), arguments)
    strided = dict(arguments)
    for name in TENSORS:
        x = arguments[name].detach()
        # reordered and every second element
        wide = torch.stack([x, x], dim=-1).transpose(0, -2).contiguous().transpose(0, -2)
        strided[name] = wide[..., 0].requires_grad_()
        assert not strided[name].is_contiguous() or x.ndim == 1
    assert (
        max(worst(run(partial(selective_scan_fn, backend=backend), strided), expected).values())
        < 1e-6
    )
    # the gradient of a sum is one number spread with stride 0
    torch.testing.assert_close(
        torch.autograd.grad(selective_scan_fn(**arguments, backend=backend).sum(), arguments["u"]),
        torch.autograd.grad(selective_scan_fn(**strided, backend=backend).sum(), strided["u"]),
    )


@pytest.mark.parametrize("backend", BACKENDS)
def test_one_group_in_four_dimensions_is_three_dimensions(backend):
    arguments = inputs(groups=1)
    flat = arguments | {k: arguments[k].detach().squeeze(1).requires_grad_() for k in ("B", "C")}
    found, expected = (
        run(partial(selective_scan_fn, backend=backend), x) for x in (flat, arguments)
    )
    assert all(torch.equal(found[k].reshape(-1), expected[k].reshape(-1)) for k in expected)


@pytest.mark.parametrize("backend", BACKENDS)
def test_what_is_not_finite_spreads_to_all_later_steps_only(backend):
    x = {
        k: v.detach().float() if isinstance(v, torch.Tensor) else v
        for k, v in inputs(groups=1).items()
    }
    x["delta"][0, 1, 100] = torch.nan
    bad = ~selective_scan_fn(**x, backend=backend).isfinite()
    assert bad[0, 1, 100:].all() and bad.sum() == 50


@pytest.mark.parametrize("backend", BACKENDS)
def test_extreme_steps(backend):
    arguments = inputs(dtype=torch.float32, state=16)
    with torch.no_grad():
        arguments["delta"].mul_(40)  # softplus from 0 to its linear part, decays down to 0
        arguments["A"].mul_(30)
    expected = run(partial(selective_scan_fn, backend="chunked"), double(arguments))
    assert (
        max(worst(run(partial(selective_scan_fn, backend=backend), arguments), expected).values())
        < 1e-5
    )


def test_kept_states_are_an_eighth_of_the_input():
    assert all(n / chunk_length(n) <= 1 / 8 for n in range(1, 129))


@pytest.mark.parametrize("backend", BACKENDS)
def test_operator_contract(backend):
    """Schema, fake tensors, autograd registration and traced gradients with sizes unknown, as torch
    checks them."""
    x = inputs(length=70, state=2, dtype=torch.float32)
    sample = (*(x[k] for k in TENSORS), True, backend)
    torch.library.opcheck(torch.ops.segfleet.selective_scan.default, sample)


@pytest.mark.compile
def test_compiles_in_one_graph():
    arguments = inputs(dtype=torch.float32)

    def f(u, delta, z):
        y, last = selective_scan_fn(
            **(arguments | {"u": u * 2, "delta": delta, "z": z}), return_last_state=True
        )
        return y.relu(), last

    leaves = [arguments[k] for k in ("u", "delta", "z")]
    results = []
    for g in (f, torch.compile(f, fullgraph=True)):
        y, last = g(*leaves)
        results.append(
            [
                y,
                last,
                *torch.autograd.grad(y.square().sum() + last.sum(), [*leaves, arguments["A"]]),
            ]
        )
    torch.testing.assert_close(results[0], results[1], rtol=1e-5, atol=1e-5)


def shape(*sizes, dtype=torch.float32, device=None):
    return torch.zeros(*sizes, dtype=dtype, device=device)


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"u": shape(2, 6)}, r"u has shape \(2, 6\), expected \(batch, channels, length\)"),
        ({"u": shape(2, 6, 0)}, r"u has shape \(2, 6, 0\).*no size 0"),
        (
            {"delta": shape(2, 6, 9)},
            r"delta has shape \(2, 6, 9\), expected that of u, \(2, 6, 10\)",
        ),
        ({"z": shape(2, 5, 10)}, r"z has shape \(2, 5, 10\)"),
        (
            {"A": shape(5, 4)},
            r"A has shape \(5, 4\), expected \(channels, state\) with u's 6 channels",
        ),
        (
            {"B": shape(2, 3, 10)},
            r"B has shape \(2, 3, 10\), expected \(batch, state, length\) with batch 2, state 4 "
            r"\(from A\)",
        ),
        (
            {"C": shape(2, 4, 4, 10)},
            r"C has shape \(2, 4, 4, 10\), so 4 groups, of which the number of channels, 6, must "
            r"be a multiple",
        ),
        (
            {"B": shape(2, 2, 4, 10), "C": shape(2, 3, 4, 10)},
            r"C has shape \(2, 3, 4, 10\), so 3 groups, expected as many as B, 2, or one",
        ),
        (
            {"B": shape(6, 5)},
            r"B has shape \(6, 5\), expected \(channels, state\) = \(6, 4\) for a constant B",
        ),
        ({"B": shape(10)}, r"B has shape \(10,\)"),
        ({"D": shape(5)}, r"D has shape \(5,\), expected \(channels,\) = \(6,\)"),
        ({"delta_bias": shape(6, 1)}, r"delta_bias has shape \(6, 1\)"),
        (
            {"delta": shape(2, 6, 10, dtype=torch.int64)},
            r"delta has type torch.int64, expected one of float32",
        ),
        ({"A": shape(6, 4, dtype=torch.complex64)}, r"A has type torch.complex64"),
        ({"C": shape(2, 4, 10, device="meta")}, r"C is on meta but u is on cpu"),
        ({"A": None}, r"A must be a tensor, found NoneType"),
        (
            {"backend": "cuda"},
            r"backend is 'cuda', expected one of: auto, mamba_ssm, triton, native, chunked",
        ),
        (
            {"backend": "mamba_ssm"},
            r"backend asks for 'mamba_ssm', which cannot run on cpu: its kernels are for CUDA "
            r"tensors",
        ),
    ],
)
def test_bad_input_is_refused_in_one_sentence(change, expected):
    good = {
        "u": shape(2, 6, 10),
        "delta": shape(2, 6, 10),
        "A": shape(6, 4),
        "B": shape(2, 4, 10),
        "C": shape(2, 4, 10),
    }
    selective_scan_fn(**good)
    with pytest.raises(ModelError, match=expected) as refused:
        selective_scan_fn(**(good | change))
    assert "\n" not in str(refused.value)


def test_variable_forces_a_back_end_and_the_choice_is_logged_once(monkeypatch, caplog):
    monkeypatch.setattr(backends, "_logged", set())
    used = []
    load = backends.load
    monkeypatch.setattr(backends, "load", lambda name: used.append(name) or load(name))
    x = {k: v.detach() if isinstance(v, torch.Tensor) else v for k, v in inputs(length=4).items()}
    monkeypatch.setenv("SEGFLEET_SCAN", "chunked")
    with caplog.at_level(logging.INFO, logger="segfleet.scan"):
        for _ in range(3):
            selective_scan_fn(**x)
    assert set(used) == {"chunked"}
    assert [r.getMessage() for r in caplog.records] == [
        "selective scan on cpu runs with back end 'chunked' (forced by SEGFLEET_SCAN)"
    ]
    monkeypatch.setenv("SEGFLEET_SCAN", "fast")
    with pytest.raises(
        ModelError, match="SEGFLEET_SCAN is 'fast', expected one of: auto, mamba_ssm"
    ):
        selective_scan_fn(**x)
    selective_scan_fn(**x, backend="chunked")  # the argument goes before the variable


CUDA = torch.device("cuda")


@pytest.fixture
def installed(monkeypatch):
    """`installed(name, **contents)` makes a module importable; the adapter looks again."""

    def add(name, **contents):
        module = types.ModuleType(name)
        module.__spec__ = importlib.machinery.ModuleSpec(name, None)
        vars(module).update(contents)
        monkeypatch.setitem(sys.modules, name, module)
        external._missing.cache_clear()

    monkeypatch.setattr(backends, "_logged", set())
    monkeypatch.delenv("SEGFLEET_SCAN", raising=False)
    external._missing.cache_clear()
    yield add
    external._missing.cache_clear()


def test_on_cuda_mamba_ssm_goes_first_if_it_has_its_kernels(installed, monkeypatch):
    monkeypatch.setitem(backends.MODULES, "triton", "chunked")  # as if installed
    installed("mamba_ssm")
    assert "without its Mamba-1 kernels" in external.unavailable(CUDA)
    assert backends.choose("auto", CUDA) == "triton"
    installed("selective_scan_cuda")
    assert "does not import" in external.unavailable(CUDA)
    installed("mamba_ssm.ops")
    installed("mamba_ssm.ops.selective_scan_interface")
    assert backends.choose("auto", CUDA) == backends.choose("mamba_ssm", CUDA) == "mamba_ssm"
    assert (
        backends.choose("auto", CUDA, own_only=True)
        == backends.choose("mamba_ssm", CUDA, own_only=True)
        == "triton"
    )
    torch.use_deterministic_algorithms(True)
    try:
        assert backends.choose("auto", CUDA) == backends.choose("mamba_ssm", CUDA) == "triton"
    finally:
        torch.use_deterministic_algorithms(False)
    assert external.unavailable(torch.device("cpu"))


def test_mamba_ssm_gets_what_its_kernels_take(installed):
    seen = {}

    def fake(u, delta, A, B, C, D, z, bias, softplus, last):
        seen.update(u=u, delta=delta, A=A, B=B, C=C, D=D, z=z, bias=bias)
        return selective_scan_ref(u, delta, A, B, C, D, z, bias, softplus, last)

    for name in ("mamba_ssm", "mamba_ssm.ops"):
        installed(name)
    installed("mamba_ssm.ops.selective_scan_interface", selective_scan_fn=fake)
    x = inputs(C="constant", dtype=torch.float32)
    half = {k: v.detach().bfloat16() if isinstance(v, torch.Tensor) else v for k, v in x.items()}
    half["u"] = half["u"].mT.contiguous().mT
    out = external.scan(*(half[k] for k in TENSORS), True, False)
    assert out.dtype == torch.bfloat16 and all(
        seen[k].dtype == torch.bfloat16 for k in ("u", "delta", "B", "z")
    )
    assert (
        all(seen[k].dtype == torch.float32 for k in ("A", "C", "D", "bias"))
        and seen["u"].stride(-1) == 1
    )
    assert (
        external.fits(out, x["A"])
        and not external.fits(out, torch.zeros(6, 300))
        and not external.fits(out.double(), x["A"])
    )
