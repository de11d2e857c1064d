"""Batch normalisation on several ranks is that of one rank that has the whole batch."""

from __future__ import annotations

import copy
from types import SimpleNamespace

import pytest
import torch
import yaml
from safetensors.torch import load_file
from torch import Tensor, nn

from segfleet.models.checkpointing import activation_checkpointing
from segfleet.models.registry import build_model, spec
from segfleet.pipeline.launch.job import Train
from segfleet.pipeline.ranks import Ranks
from segfleet.pipeline.training.sync_norm import synchronise

SHAPES = {
    "flat": (8, 3, 6, 5),
    "solid": (4, 3, 5, 4, 3),
    "bf16": (4, 3, 6, 5),
    "one voxel each": (4, 3, 1, 1),
    "averaged": (4, 3, 6, 5),
}


def one_layer(ranks: Ranks, name: str) -> dict[str, Tensor]:
    """Two training steps of a layer on this rank's share of a batch, then one image as in
    evaluation."""
    shape, draw = SHAPES[name], torch.Generator().manual_seed(1)
    layer = (nn.BatchNorm3d if len(shape) == 5 else nn.BatchNorm2d)(
        3, momentum=None if name == "averaged" else 0.1
    )
    with torch.no_grad():
        layer.weight.copy_(torch.randn(3, generator=draw))
        layer.bias.copy_(torch.randn(3, generator=draw))
    synchronise(layer, ranks)
    dtype = torch.bfloat16 if name == "bf16" else torch.float32
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
    synchronise(layer, SimpleNamespace(size=2), compiled=True)
    for _ in range(2):  # every stage does it again
        assert layer._normalise.__func__._torchdynamo_disable
        synchronise(nn.BatchNorm2d(3), SimpleNamespace(size=2), compiled=True)
