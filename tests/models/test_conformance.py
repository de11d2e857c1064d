"""Every registered network keeps the same promises. A new network is covered the moment its file
lies in `models/`."""

from __future__ import annotations

import copy
import io
import math

import einops
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from segfleet.models import registry
from segfleet.models.checkpointing import activation_checkpointing, checkpointed_stages
from segfleet.models.registry import (
    ModelError,
    ModelSpec,
    build_model,
    count_parameters,
    spec,
    specs,
    stage_table,
)
from tests.networks import LIKE, each_network

BATCH = 2


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(params=each_network())
def chosen(request) -> ModelSpec:
    """To compute with."""
    return spec(request.param)


@pytest.fixture(params=list(specs()))
def registered(request) -> ModelSpec:
    """To look at: every one."""
    return spec(request.param)


def twin(chosen: ModelSpec, seed: int = 0, **counts: int) -> nn.Module:
    """The small twin of a network."""
    torch.manual_seed(seed)
    counts = {"in_channels": chosen.in_channels, "num_classes": chosen.num_classes} | counts
    return build_model(chosen.name, options=chosen.reduced, **counts)


def shaken(model: nn.Module) -> nn.Module:
    """Moves every parameter off its initial value, so that a gate that starts at zero lets
    gradients through."""
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator))
    return model


def batch(chosen: ModelSpec) -> Tensor:
    return torch.randn(
        BATCH, chosen.in_channels, *chosen.small_input, generator=torch.Generator().manual_seed(1)
    )


def as_list(outputs: Tensor | list[Tensor]) -> list[Tensor]:
    return list(outputs) if isinstance(outputs, list | tuple) else [outputs]


def weighted_sum(outputs: Tensor | list[Tensor]) -> Tensor:
    """A scalar whose gradient differs from voxel to voxel (a plain sum or mean is blind to
    much)."""
    total = torch.zeros(())
    for output in as_list(outputs):
        weights = torch.randn(output.shape, generator=torch.Generator().manual_seed(2))
        total = total + (output.float() * weights).mean()
    return total


def gradients(model: nn.Module, x: Tensor) -> dict[str, Tensor | None]:
    torch.manual_seed(0)  # dropout, where there is any
    model.train().zero_grad(set_to_none=True)
    weighted_sum(model(x)).backward()
    return {name: parameter.grad for name, parameter in model.named_parameters()}


def test_spec_is_complete(registered):
    assert registered.source and registered.about
    assert len(registered.paper_input) in registered.dims
    assert len(registered.small_input) == len(registered.paper_input)
    if registered.stages:
        assert sum(registered.stages.values()) == registered.parameters


@pytest.mark.parametrize(("name", "like"), LIKE.items())
def test_a_small_twin_left_to_the_long_tests_is_made_as_its_like(name, like):
    """The same modules with the same kernels and strides: only widths and how many differ."""

    def kinds(name: str) -> set[tuple]:
        with torch.device("meta"):
            model = twin(spec(name))
        return {
            (type(part), *(getattr(part, key, None) for key in ("kernel_size", "stride", "dim")))
            for part in model.modules()
        }

    assert kinds(name) == kinds(like) and spec(name).small_input == spec(like).small_input
    assert spec(name).deep_supervision == spec(like).deep_supervision and like not in LIKE


def test_parameters_are_those_of_the_specification(registered):
    with torch.device("meta"):
        model = build_model(
            registered.name, in_channels=registered.in_channels, num_classes=registered.num_classes
        )
    assert count_parameters(model) == registered.parameters
    if registered.stages:
        assert stage_table(model, registered) == dict(registered.stages)


def test_output_shape_and_gradients(chosen):
    model, x = shaken(twin(chosen, num_classes=chosen.num_classes + 1)), batch(chosen)
    x.requires_grad_()
    outputs = as_list(model.train()(x))
    assert (len(outputs) > 1) == chosen.deep_supervision
    assert outputs[0].shape == (BATCH, chosen.num_classes + 1, *chosen.small_input)
    for finer, coarser in zip(outputs, outputs[1:], strict=False):
        assert finer.shape[:2] == coarser.shape[:2]
        assert all(f >= c for f, c in zip(finer.shape[2:], coarser.shape[2:], strict=True))
    assert all(output.isfinite().all() for output in outputs)
    weighted_sum(outputs).backward()
    assert x.grad is not None and x.grad.isfinite().all() and x.grad.any()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, f"no gradient reaches {name}"
        assert parameter.grad.isfinite().all(), f"the gradient of {name} is not finite"
    assert isinstance(model.eval()(x.detach()), Tensor)


def test_every_weight_matters(chosen):
    """Each weight has a gradient that is not zero, for at least one of a few initialisations (a
    narrow ReLU may sleep in one)."""
    x, asleep = batch(chosen), None
    for seed in range(8):
        found = gradients(shaken(twin(chosen, seed)), x)
        silent = {
            name for name, gradient in found.items() if gradient is None or not gradient.any()
        }
        asleep = silent if asleep is None else asleep & silent
        if not asleep:
            return
    pytest.fail(f"the gradient of {', '.join(sorted(asleep))} is always zero")


@pytest.fixture
def without_onednn():
    """oneDNN's bf16 weight gradient of a stride-1 conv3d with 16 or more channels on a map of depth
    2 is garbage (torch 2.13)."""
    before = torch._C._get_mkldnn_enabled()
    torch._C._set_mkldnn_enabled(False)  # torch.backends.mkldnn.flags warns about Intel GPUs
    yield
    torch._C._set_mkldnn_enabled(before)


def test_bf16_autocast(chosen, without_onednn):
    model, x = twin(chosen), batch(chosen)
    with torch.autocast("cpu", torch.bfloat16):
        outputs = as_list(model.train()(x))
    assert all(output.isfinite().all() for output in outputs)
    weighted_sum(outputs).backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None and parameter.grad.isfinite().all(), name


@torch.no_grad()
def test_evaluation_is_a_function_of_each_sample(chosen):
    model, x = shaken(twin(chosen)), batch(chosen)
    model.train()(x)  # running statistics away from their start
    model.eval()
    once = model(x)
    assert torch.equal(once, model(x))
    assert not torch.allclose(once[0], once[1])
    tolerance = 1e-4 * once.abs().max().item()
    torch.testing.assert_close(model(x.flip(0)).flip(0), once, rtol=1e-4, atol=tolerance)
    torch.testing.assert_close(model(x[:1]), once[:1], rtol=1e-4, atol=tolerance)


def test_state_dict_round_trip(chosen):
    model, other, x = twin(chosen), twin(chosen, seed=7), batch(chosen)
    buffer = io.BytesIO()
    torch.save(model.state_dict(), buffer)
    buffer.seek(0)
    other.load_state_dict(torch.load(buffer, weights_only=True))
    with torch.no_grad():
        assert torch.equal(model.eval()(x), other.eval()(x))


def test_refuses_a_wrong_input(chosen):
    model, x = twin(chosen), batch(chosen)
    with pytest.raises(
        ModelError, match=rf"{chosen.in_channels + 2}\b.*shape|shape.*\b{chosen.in_channels + 2}\b"
    ):
        model(torch.cat([x, x[:, :1], x[:, :1]], 1))
    with pytest.raises(ModelError, match=rf"{x.ndim}-dimensional.*found shape"):
        model(x[0])
    divisors = chosen.divisor if isinstance(chosen.divisor, tuple) else (chosen.divisor,)
    if max(divisors) > 1 or chosen.fixed_patch:
        odd = F.pad(x, (0, 1))
        with pytest.raises(ModelError, match=rf"\b{odd.shape[-1]}\b"):
            model(odd)


def test_refuses_an_unknown_option(registered):
    with pytest.raises(ModelError, match="'no_such_option' is no option of"):
        build_model(registered.name, in_channels=1, num_classes=1, options={"no_such_option": 1})


def test_only_what_the_user_can_mend_is_called_a_wrong_option(monkeypatch):
    """An error of the network's own code stays one, with its traceback."""

    def build(in_channels, num_classes, width=8, sizes=(1, 2), kind=None):
        return torch.nn.Conv2d(in_channels * width, num_classes, sizes[0]) + kind

    own = registry.ModelSpec(
        name="own", build=build, dims=(2,), in_channels=1, num_classes=1, paper_input=(8, 8),
        parameters=1,
    )  # fmt: skip
    monkeypatch.setitem(registry._SPECS, "own", own)
    counts = {"in_channels": 1, "num_classes": 1}
    for sound in ({"width": 4}, {"sizes": [3, 4]}, {"width": 2.0}, {"kind": [1, [2]]}):
        with pytest.raises(TypeError):
            build_model("own", options=sound, **counts)
    for wrong in ({"width": "4"}, {"width": None}, {"sizes": 3}, {"sizes": ["3"]}, {"kind": "x"}):
        with pytest.raises(
            ModelError, match=f"model.options: own cannot be built of .*{[*wrong][0]}"
        ):
            build_model("own", options=wrong, **counts)


def test_overfits_one_batch(chosen):
    """A slab of another width in each sample, seen through noise: the loss of the finest output
    falls to a tenth."""
    model, width = twin(chosen), chosen.small_input[-1]
    inside = torch.zeros(BATCH, 1, *chosen.small_input)
    inside[0, ..., : width // 2] = 1
    inside[1, ..., : width // 4] = 1
    x = 0.3 * batch(chosen) + inside
    optimizer = torch.optim.Adam(model.parameters(), lr=0.02)
    torch.manual_seed(0)

    def loss_of(output: Tensor) -> Tensor:
        target = F.interpolate(inside, output.shape[2:])
        if output.shape[1] == 1:
            return F.binary_cross_entropy_with_logits(output, target)
        return F.cross_entropy(output, target[:, 0].long())

    first = last = math.nan
    for _ in range(60):
        optimizer.zero_grad()
        losses = [loss_of(output) for output in as_list(model.train()(x))]
        sum(losses).backward()
        optimizer.step()
        last = losses[0].item()
        first = last if math.isnan(first) else first
        if last < first / 10:
            return
    pytest.fail(f"the loss fell only from {first:.3f} to {last:.3f}")


def test_activation_checkpointing_changes_nothing(chosen):
    plain, x = shaken(twin(chosen)), batch(chosen)
    thrifty = activation_checkpointing(copy.deepcopy(plain))
    assert len(checkpointed_stages(plain)) > 1
    expected, found = gradients(plain, x), gradients(thrifty, x)
    assert expected.keys() == found.keys()
    for name, gradient in expected.items():
        assert torch.equal(gradient, found[name]), name
    for (name, before), after in zip(plain.named_buffers(), thrifty.buffers(), strict=True):
        assert torch.equal(before, after), f"{name} was updated twice"
    assert plain.state_dict().keys() == thrifty.state_dict().keys()


def traced_equals_eager(model: nn.Module, x: Tensor) -> None:
    """In float64: a traced backward pass adds the gradients of a tensor with several readers in
    another order, and float32 shows that in gradients that are small differences of large terms
    (asc_seg: 6e-4 beside 16; 2e-14 in float64)."""
    model, x = model.double(), x.double()
    expected = gradients(copy.deepcopy(model), x)
    torch._dynamo.reset()
    found = gradients(torch.compile(model, backend="aot_eager", fullgraph=True), x)
    for parameter, gradient in expected.items():
        compiled = found[f"_orig_mod.{parameter}"]
        torch.testing.assert_close(
            compiled, gradient, rtol=1e-9, atol=1e-10, msg=lambda text, p=parameter: f"{p}: {text}"
        )


@pytest.mark.parametrize(
    "name", ["unet_lite_se", "resenc_unet_3d", pytest.param("asc_seg", marks=pytest.mark.long)]
)
def test_traced_graph_changes_nothing(name):
    traced_equals_eager(shaken(twin(spec(name))), batch(spec(name)))


@pytest.mark.parametrize(
    "name",
    [
        name if name == "nlie_unet_t" else pytest.param(name, marks=pytest.mark.long)
        for name in specs()
    ],
)
def test_every_network_is_one_graph_from_its_first_call_on(name):
    """As `engine.compile: auto` wants it; einops has not seen a tensor by then."""
    torch._dynamo.reset()
    einops._backends._type2backend.clear()
    graphs = []
    network = torch.compile(
        twin(spec(name)).train(), backend=lambda graph, _: graphs.append(1) or graph, fullgraph=True
    )
    network(batch(spec(name)))
    assert graphs == [1]


def shapes_of(chosen: ModelSpec, channels: int, classes: int) -> dict[str, torch.Size]:
    with torch.device("meta"):
        model = twin(chosen, in_channels=channels, num_classes=classes)
    return {name: value.shape for name, value in model.state_dict().items()}


def test_spec_says_which_parameters_are_the_encoder_and_the_head(registered):
    """What depends on the classes is the head, what depends on the image channels the encoder."""
    plain = shapes_of(registered, registered.in_channels, registered.num_classes)
    classes = shapes_of(registered, registered.in_channels, registered.num_classes + 1)
    channels = shapes_of(registered, registered.in_channels + 2, registered.num_classes)
    assert plain.keys() == classes.keys() == channels.keys()
    head = {name for name in plain if name.startswith(registered.head)}
    encoder = {name for name in plain if name.startswith(registered.encoder)}
    assert head and encoder and not head & encoder
    assert {name for name in plain if plain[name] != classes[name]} <= head
    assert {name for name in plain if plain[name] != channels[name]} <= encoder
    for prefix in registered.head if registered.head != ModelSpec.head else ():
        assert any(name.startswith(prefix) for name in head)
    # what is left makes a decoder, unless the head is all of it; a network is more than its encoder
    whole = any(name.startswith("decoder") for name in head)
    assert whole or len(encoder) < len(plain) - len(head)
