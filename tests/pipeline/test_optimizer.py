"""Which parameters decay, against PyTorch's own optimizers; idle options and a run's identity."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from segfleet.models.registry import build_model
from segfleet.pipeline import sections
from segfleet.pipeline.engines.common import build_optimizer
from segfleet.pipeline.identity import stage_facts
from segfleet.pipeline.recipe import parse
from segfleet.preprocess.stores.manifest import load_manifest


def vm_unet() -> nn.Module:
    """It has biases, norms and parameters marked no-decay."""
    torch.manual_seed(0)
    options = {"width": 8, "depths": (1,) * 4, "decoder_depths": (1,) * 4, "drop_path": 0.0}
    return build_model("vm_unet", in_channels=1, num_classes=1, options=options)


def stepped(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    for parameter in model.parameters():
        parameter.grad = torch.randn(parameter.shape, generator=generator)
    optimizer.step()
    return {name: value.detach() for name, value in model.named_parameters()}


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("adamw", lambda p: torch.optim.AdamW(p, lr=0.1, weight_decay=0.3)),
        ("adam", lambda p: torch.optim.Adam(p, lr=0.1, weight_decay=0.3)),
        ("sgd", lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, weight_decay=0.3)),
    ],
)
def test_decay_all_is_what_the_framework_does_with_every_parameter(name, kind):
    ours, theirs = vm_unet(), vm_unet()
    options = sections.Optimizer(
        name=name, weight_decay=0.3, decay="all", momentum=0.9, nesterov=False
    )
    found = stepped(ours, build_optimizer(dict(ours.named_parameters()), options, 0.1))
    expected = stepped(theirs, kind(theirs.parameters()))
    for parameter, value in expected.items():
        torch.testing.assert_close(found[parameter], value, msg=parameter)


def test_decay_weights_leaves_biases_norms_and_marked_parameters_alone():
    model = vm_unet()
    before = copy.deepcopy(model.state_dict())
    options = sections.Optimizer(name="adamw", weight_decay=0.3)
    optimizer = build_optimizer(dict(model.named_parameters()), options, 0.1)
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()  # without gradients, decay alone moves a parameter
    for name, value in model.named_parameters():
        spared = value.ndim == 1 or name.rpartition(".")[2] in ("A_logs", "Ds")
        assert torch.equal(value, before[name]) == (spared or not before[name].any()), name


def test_identity_knows_what_decays_only_where_something_does(tiny_store):
    manifest = load_manifest(tiny_store())

    def facts(**optimizer):
        document = {"name": "x", "model": {"name": "plain_unet_3d"}, "optimizer": optimizer}
        return stage_facts(parse(document | {"stages": [{"epochs": 1, "lr": 0.1}]}), manifest, 0)

    assert facts(decay="all") != facts(decay="weights")
    assert facts(decay="all", weight_decay=0) == facts(decay="weights", weight_decay=0)
