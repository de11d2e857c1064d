"""The scale-sensitive Dice against its formula and published values."""

from __future__ import annotations

from math import sqrt

import pytest
import torch
from torch.nn.functional import binary_cross_entropy_with_logits, cross_entropy, one_hot

from segfleet.core.errors import InputError
from segfleet.pipeline.losses.base import build_loss
from segfleet.pipeline.losses.ss import volume_agreement


def ss(head="softmax", **options):
    return build_loss("ss", head=head, options=options)


def draw(*, classes=3, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(2, classes, 4, 5, 6, generator=generator), torch.randint(
        classes, (2, 4, 5, 6), generator=generator
    )


def by_hand(p, y, smooth=1e-5, scale=1.0):
    """Σ over one region of α · dc with the four soft counts written out; p and y are flat lists of
    one class in one sample."""
    tp, fp, fn = (p * y).sum(), (p * (1 - y)).sum(), ((1 - p) * y).sum()
    predicted, present = (tp + fp) * scale, (tp + fn) * scale
    dis = ((predicted - present) / 2) ** 2
    alpha = (min(predicted, present) + dis + smooth) / (max(predicted, present) + dis + smooth)
    return alpha * (2 * tp + smooth) / (2 * tp + fp + fn + smooth + 1e-8)


@pytest.mark.parametrize(
    ("predicted", "present", "alpha"),
    [
        (120, 100, 0.909),
        (200, 100, 0.963),
        (1000, 100, 0.996),
        (1100, 1000, 0.972),
        (12000, 10000, 0.998),
        (100, 120, 0.909),
        (0, 0, 1),
    ],
)
def test_volume_agreement_has_the_listed_values(predicted, present, alpha):
    found = volume_agreement(torch.tensor(float(predicted)), torch.tensor(float(present)))
    assert found.item() == pytest.approx(alpha, abs=1e-3)


def test_volume_agreement_is_lowest_at_twice_the_root():
    m = 100.0
    deltas = torch.linspace(0, 400, 4001, dtype=torch.float64)
    alpha = volume_agreement(m + deltas, torch.full_like(deltas, m))
    assert deltas[alpha.argmin()].item() == pytest.approx(2 * sqrt(m), abs=0.1)
    assert alpha.min().item() == pytest.approx(1 - 1 / (1 + sqrt(m)), abs=1e-6)


@pytest.mark.parametrize("batch", [False, True])
@pytest.mark.parametrize("background", [False, True])
@pytest.mark.parametrize("normalised", [False, True])
def test_softmax_by_hand(batch, background, normalised):
    logits, target = draw()
    p, y = logits.softmax(1), one_hot(target, 3).movedim(-1, 1).float()
    classes, samples = range(0 if background else 1, 3), [slice(None)] if batch else [0, 1]
    scale = 1 / (240 if batch else 120) if normalised else 1.0
    terms = [
        by_hand(p[b].select(-4, k).flatten(), y[b].select(-4, k).flatten(), scale=scale)
        for b in samples
        for k in classes
    ]
    expected = cross_entropy(logits, target) - 1.45 * sum(terms) / len(terms)
    found = ss(ss_weight=1.45, batch=batch, background=background, normalised=normalised)(
        logits, target, None
    )
    torch.testing.assert_close(found, expected)


def test_regions():
    logits, _ = draw(classes=2)
    target = (torch.rand(logits.shape, generator=torch.Generator().manual_seed(1)) > 0.6).float()
    p = logits.sigmoid()
    terms = [by_hand(p[b, k].flatten(), target[b, k].flatten()) for b in range(2) for k in range(2)]
    expected = binary_cross_entropy_with_logits(logits, target) - 2 * sum(terms) / 4
    torch.testing.assert_close(ss(head="sigmoid")(logits, target, None), expected)
    with pytest.raises(InputError, match="no background channel"):
        ss(head="sigmoid", background=True)


def test_ignored_voxels_count_nowhere():
    logits, target = draw()
    valid = torch.ones(2, 4, 5, 6, dtype=torch.bool)
    valid[:, 2:] = False
    torch.testing.assert_close(
        ss()(logits, target, valid), ss()(logits[:, :, :2], target[:, :2], None)
    )
    valid[1] = False
    torch.testing.assert_close(
        ss()(logits, target, valid), ss()(logits[:1, :, :2], target[:1, :2], None)
    )
    nothing = ss()(logits.requires_grad_(), target, torch.zeros_like(valid))
    nothing.backward()
    assert nothing.item() == 0 and not logits.grad.any()


def test_range_empty_classes_and_gradients():
    logits, target = draw()
    # class 2 absent and not predicted
    certain = 50.0 * one_hot(target.clamp(max=1), 3).movedim(-1, 1).float()
    assert ss(ss_weight=1.45)(certain, target.clamp(max=1), None).item() == pytest.approx(
        -1.45, abs=1e-4
    )
    loss = ss(ce_weight=0)(logits.bfloat16().requires_grad_(), target, None)
    assert loss.dtype == torch.float32 and -2 <= loss.item() <= 0
    double = logits[:, :, :1, :2, :2].clone().requires_grad_()
    loss, target = ss(), target[:, :1, :2, :2]
    step, base = torch.zeros_like(double), loss(double, target, None)
    (slope,) = torch.autograd.grad(base, double)
    step[0, 1, 0, 0, 0] = 1e-2
    difference = (loss(double + step, target, None) - loss(double - step, target, None)) / 2e-2
    # α is not detached
    assert difference.item() == pytest.approx(slope[0, 1, 0, 0, 0].item(), abs=1e-3)
