"""Batch normalisation on several ranks is that of one rank that has the whole batch."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
import yaml
from safetensors.torch import load_file
from torch import Tensor, nn

from segfleet.models.checkpointing import activation_checkpointing
from segfleet.models.registry import build_model, spec
from segfleet.pipeline.launch.job import Train
from segfleet.pipeline.ranks import Ranks
from segfleet.pipeline.training import fused_norm
from segfleet.pipeline.training.fused_norm import fuse
from segfleet.pipeline.training.sync_norm import synchronise

SHAPES = {
    "flat": (8, 3, 6, 5),
    "solid": (4, 3, 5, 4, 3),
    "bf16": (4, 3, 6, 5),
    "one voxel each": (4, 3, 1, 1),
    "averaged": (4, 3, 6, 5),
}


def one_layer(
    ranks: Ranks,
    name: str,
    join: Callable[[nn.Module, Ranks], None] = synchronise,
    precise: bool = False,
) -> dict[str, Tensor]:
    """Two training steps of a layer on this rank's share of a batch, then one image as in
    evaluation; `precise`: in float64."""
    shape, draw = SHAPES[name], torch.Generator().manual_seed(1)
    layer = (nn.BatchNorm3d if len(shape) == 5 else nn.BatchNorm2d)(
        3, momentum=None if name == "averaged" else 0.1
    )
    with torch.no_grad():
        layer.weight.copy_(torch.randn(3, generator=draw))
        layer.bias.copy_(torch.randn(3, generator=draw))
    dtype = torch.bfloat16 if name == "bf16" else torch.float32
    if precise:
        layer, dtype = layer.double(), torch.float64
    join(layer, ranks)
    found = {}
    for step in range(2):
        whole, gradient = (torch.randn(shape, generator=draw) * 2 + 3 for _ in range(2))
        mine, its = (
            value.chunk(ranks.size)[ranks.rank].to(dtype).requires_grad_()
            for value in (whole, gradient)
        )
        output = layer(mine)
        output.backward(its.detach())
        found |= {f"output {step}": output.detach(), f"gradient {step}": mine.grad}
    found |= {
        f"sum of {key}": ranks.sum(parameter.grad) for key, parameter in layer.named_parameters()
    }
    return (
        found
        | dict(copy.deepcopy(layer).state_dict())
        | {"evaluated": layer.eval()(whole[:1].to(dtype)).detach()}
    )


def networks(ranks: Ranks) -> dict[str, list[Tensor]]:
    """Gradients of a network's weights for one batch, summed over the ranks, plain and with
    recomputed activations."""
    found = {}
    for name in ("unet_lite_standard", "rec_unet", "unext"):
        for recompute in (False, True):
            torch.manual_seed(3)
            # float64: in float32 rounding grows to half a percent on the way
            options = dict(spec(name).reduced)
            model = build_model(name, in_channels=1, num_classes=2, options=options).double()
            synchronise(model, ranks)
            if recompute:
                activation_checkpointing(model)
            image = torch.randn(4, 1, 32, 32, generator=torch.Generator().manual_seed(4)).double()
            output = model(image.chunk(ranks.size)[ranks.rank])
            output = output[0] if isinstance(output, list | tuple) else output
            label = torch.randint(2, (4, 32, 32), generator=torch.Generator().manual_seed(5)).chunk(
                ranks.size
            )[ranks.rank]
            nn.functional.cross_entropy(output, label, reduction="sum").backward()
            weights = [
                ranks.sum(p.grad) for p in model.parameters() if p.grad is not None and p.ndim > 1
            ]
            found[f"{name} {recompute}"] = [*weights, *(b.double() for b in model.buffers())]
    return found


@pytest.fixture(scope="module")
def shares(run_in_ranks):
    """What two ranks found."""
    return run_in_ranks("test_sync_norm.py:everything", 2)


def everything(ranks: Ranks) -> dict[str, dict]:
    return {name: one_layer(ranks, name) for name in SHAPES} | {"networks": networks(ranks)}


@pytest.mark.parametrize("name", SHAPES)
def test_a_layer_is_that_of_one_rank(name, shares):
    alone = one_layer(Ranks(torch.device("cpu")), name)
    tolerance = {"rtol": 0.02, "atol": 0.02} if name == "bf16" else {"rtol": 1e-5, "atol": 1e-5}
    for key, expected in alone.items():
        found = [share[name][key] for share in shares]
        if key.startswith(("output", "gradient")):
            torch.testing.assert_close(torch.cat(found), expected, **tolerance)
        else:
            for value in found:
                torch.testing.assert_close(value, expected, **tolerance)
                assert torch.equal(value, found[0]), "the same on every rank, bit by bit"
    assert alone["num_batches_tracked"] == 2


def fused(ranks: Ranks) -> dict[str, Any]:
    """The layers as GPUs compute them, by the formulas of the kernels; collectives of a step; a
    network, traced as one graph and not."""
    import fused_pieces

    registered = fused_pieces.register("CPU")
    layers = {
        f"{name} {precise}": one_layer(ranks, name, fuse, precise)
        for name in SHAPES
        for precise in (False, True)
    }
    torch.manual_seed(1)
    model = nn.Sequential(
        nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.BatchNorm2d(4, affine=False)
    )
    model = model.to(memory_format=torch.channels_last)
    fuse(model, ranks)
    image = torch.randn(2, 2, 8, 8, generator=torch.Generator().manual_seed(ranks.rank))
    ways, asked = [], []
    for traced in (False, True):
        own = copy.deepcopy(model)
        network = torch.compile(own, backend="aot_eager", fullgraph=True) if traced else own
        with counted(asked):
            output = network(image)
            output.square().mean().backward()
        ways.append([output.detach(), *(p.grad for p in own.parameters()), *own.buffers()])
    del registered
    return {"layers": layers, "ways": ways, "collectives": asked}


@contextmanager
def counted(asked: list[str]) -> Iterator[None]:
    """Notes the collectives, of another group than the gradients'."""

    def noting(name: str) -> Callable[..., Any]:
        plain = getattr(dist, name)

        def call(*args: Any, group: Any = None, **options: Any) -> Any:
            assert group is not None and group is not dist.group.WORLD
            asked.append(name)
            return plain(*args, group=group, **options)

        return call

    names = (fused_norm.ALL_GATHER, "all_reduce", "all_gather", "broadcast")
    with mock.patch.multiple(dist, **{name: noting(name) for name in names}):
        yield


@pytest.fixture(scope="module")
def fused_shares(run_in_ranks):
    """What two and four ranks found."""
    return {n: run_in_ranks("test_sync_norm.py:fused", n) for n in (2, 4)}


@pytest.mark.parametrize("ranks", [2, 4])
@pytest.mark.parametrize("precise", [False, True])
@pytest.mark.parametrize("name", SHAPES)
def test_the_fused_layer_is_that_of_one_rank(name, precise, ranks, fused_shares):
    """On any number of ranks: to rounding in float32, since the kernels merge the ranks' statistics
    in it, exactly but for float64's own."""
    alone = one_layer(Ranks(torch.device("cpu")), name, precise=precise)
    close = 1e-10 if precise else 0.02 if name == "bf16" else 2e-4
    shares = [share["layers"][f"{name} {precise}"] for share in fused_shares[ranks]]
    for key, expected in alone.items():
        found = [share[key] for share in shares]
        if key.startswith(("output", "gradient")):
            torch.testing.assert_close(torch.cat(found), expected, rtol=close, atol=close)
            continue
        for value in found:
            torch.testing.assert_close(value, expected, rtol=close, atol=close)
            assert torch.equal(value, found[0]), "the same on every rank, bit by bit"


def test_a_fused_layer_has_one_collective_each_way_and_is_traced(fused_shares):
    for found in (*fused_shares[2], *fused_shares[4]):
        each_way = [fused_norm.ALL_GATHER] * 2 + ["all_reduce"] * 2  # of two layers
        assert found["collectives"] == each_way * 2
        for plain, traced in zip(*found["ways"], strict=True):
            torch.testing.assert_close(traced, plain, rtol=1e-5, atol=1e-6)


def test_a_gpu_takes_the_fused_layers(monkeypatch):
    monkeypatch.setattr(fused_norm._Group, "make", lambda device: None)
    layer = nn.Sequential(nn.BatchNorm3d(3))
    synchronise(layer, SimpleNamespace(size=2, device=torch.device("cuda", 0)), compiled=True)
    assert type(layer[0]) is fused_norm.FUSED[nn.BatchNorm3d] and layer[0].over == 2
    image = torch.randn(2, 3, 2, 2, 2)
    assert torch.equal(layer.eval()(image), nn.BatchNorm3d(3).eval()(image))


def test_networks_have_the_gradients_of_one_rank(shares):
    for name, expected in networks(Ranks(torch.device("cpu"))).items():
        for value, first, second in zip(
            expected, *(share["networks"][name] for share in shares), strict=True
        ):
            assert torch.equal(first, second)
            torch.testing.assert_close(
                first, value, rtol=1e-7, atol=1e-9 * float(value.abs().max())
            )


def test_one_rank_and_copies_are_left_alone():
    layer = nn.BatchNorm2d(3)
    synchronise(layer, Ranks(torch.device("cpu")))
    assert type(layer) is nn.BatchNorm2d


def train(ranks: Ranks, recipe: dict, root: str) -> None:
    from segfleet.pipeline.jobs import run_job
    from segfleet.pipeline.stop import StopRequest

    run_job(Train(recipe=recipe, root=root, score=False), ranks, StopRequest())


def test_training_on_two_ranks_is_training_on_one(tiny_recipe, run_in_ranks, tmp_path):
    """The whole way, with a network full of batch normalisations. Plain SGD: Adam turns the signs
    of rounding errors into steps."""
    folder = tiny_recipe([{"name": "train", "epochs": 1, "steps": 6, "lr": 0.05}], batch=4)
    recipe = yaml.safe_load((folder / "tiny.yaml").read_text()) | {
        "optimizer": {"name": "sgd", "momentum": 0.0}
    }
    weights = []
    for ranks in (1, 2):
        root = tmp_path / str(ranks)
        run_in_ranks("test_sync_norm.py:train", ranks, recipe=recipe, root=str(root))
        weights.append(load_file(next(root.rglob("step-00000006/weights.safetensors"))))
    assert any("running_var" in name for name in weights[0])
    for name, one in weights[0].items():
        torch.testing.assert_close(weights[1][name], one, rtol=1e-4, atol=1e-4)


def test_a_network_that_is_compiled_leaves_collectives_out():
    """Torch's compiler is imported for such a network alone."""
    layer = nn.BatchNorm2d(3)
    ranks = SimpleNamespace(size=2, device=torch.device("cpu"))
    synchronise(layer, ranks, compiled=True)
    for _ in range(2):  # every stage does it again
        assert layer._normalise.__func__._torchdynamo_disable
        synchronise(nn.BatchNorm2d(3), ranks, compiled=True)
