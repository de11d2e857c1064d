"""Losses against values worked out by hand."""

from __future__ import annotations

from math import log

import pytest
import torch
from torch.nn.functional import binary_cross_entropy_with_logits, cross_entropy, one_hot

from segfleet.core.errors import InputError
from segfleet.pipeline.losses.base import build_loss, losses
from segfleet.pipeline.losses.deep_supervision import DeepSupervision, nearest
from segfleet.pipeline.losses.soft_dice import soft_dice, soft_dice_loss
from segfleet.pipeline.ranks import Ranks


def dice_ce(**options):
    return build_loss("dice_ce", head="softmax", options=options)


def bce_dice(**options):
    return build_loss("bce_dice", head="sigmoid", options=options)


def logits_of(probabilities):
    """Binary probabilities (list per sample) -> softmax logits (B, 2, X) and sigmoid logits (B, 1,
    X)."""
    p = torch.tensor(probabilities)
    return torch.stack([(1 - p).log(), p.log()], 1), (p / (1 - p)).log().unsqueeze(1)


# Two samples of two pixels. Sample 0: Σpt 0.8, Σp 1.0, Σt 1. Sample 1: Σpt 0.5+0.25, Σp 0.75, Σt 2.
P = [[0.8, 0.2], [0.5, 0.25]]
T = torch.tensor([[1, 0], [1, 1]])
CE = -(2 * log(0.8) + log(0.5) + log(0.25)) / 4
DICE_SAMPLES = [1.6 / 2.0, 1.5 / 2.75]
DICE_BATCH = 2 * 1.55 / (1.75 + 3)


def test_dice_ce_by_hand():
    logits, _ = logits_of(P)
    assert dice_ce()(logits, T, None).item() == pytest.approx(
        1 - sum(DICE_SAMPLES) / 2 + CE, abs=1e-5
    )
    assert dice_ce(batch=True)(logits, T, None).item() == pytest.approx(
        1 - DICE_BATCH + CE, abs=1e-5
    )
    assert dice_ce(dice_weight=0, ce_weight=3)(logits, T, None).item() == pytest.approx(
        3 * CE, abs=1e-6
    )
    assert dice_ce(dice_weight=2, ce_weight=0, smooth=1)(logits, T, None).item() == pytest.approx(
        2 - (2.6 / 3 + 2.5 / 3.75), abs=1e-6
    )


def test_dice_ce_background_enters_only_on_request():
    logits, _ = logits_of(P)
    background = [2 * 0.8 / (1 + 1), 0.0]  # sample 1 has no background, but 1.25 of it is predicted
    expected = 1 - (sum(DICE_SAMPLES) + sum(background)) / 4
    assert dice_ce(ce_weight=0, background=True)(logits, T, None).item() == pytest.approx(
        expected, abs=1e-4
    )


def test_dice_ce_class_weights_agree_with_torch():
    torch.manual_seed(0)
    logits, target = torch.randn(2, 3, 4, 5, 6), torch.randint(3, (2, 4, 5, 6))
    ours = dice_ce(dice_weight=0, class_weights=[0.2, 1.0, 3.0])(logits, target, None)
    torch.testing.assert_close(ours, cross_entropy(logits, target, torch.tensor([0.2, 1.0, 3.0])))
    torch.testing.assert_close(
        dice_ce(dice_weight=0)(logits, target, None), cross_entropy(logits, target)
    )


def test_bce_dice_by_hand():
    _, logits = logits_of(P)
    target = T.unsqueeze(1).float()
    assert bce_dice()(logits, target, None).item() == pytest.approx(
        CE + 1 - sum(DICE_SAMPLES) / 2, abs=1e-5
    )
    assert bce_dice(pool="batch", smooth=1)(logits, target, None).item() == pytest.approx(
        CE + 1 - (3.1 + 1) / (4.75 + 1), abs=1e-6
    )
    half = bce_dice(bce_weight=0.5, dice_weight=0.5, smooth=1)(logits, target, None).item()
    assert half == pytest.approx(0.5 * CE + 0.5 * (1 - (2.6 / 3 + 2.5 / 3.75) / 2), abs=1e-6)


def test_rec_unet_uses_channel_one_in_the_dice_and_both_in_the_bce():
    torch.manual_seed(1)
    logits, target = torch.randn(2, 2, 4, 4), (torch.rand(2, 2, 4, 4) > 0.5).float()
    p, t = logits[:, 1].sigmoid(), target[:, 1]
    dice = [(2 * (p[b] * t[b]).sum() + 1e-5) / (p[b].sum() + t[b].sum() + 1e-5) for b in range(2)]
    expected = 0.5 * binary_cross_entropy_with_logits(logits, target) + 1 - (dice[0] + dice[1]) / 2
    torch.testing.assert_close(
        bce_dice(bce_weight=0.5, channels=[1])(logits, target, None), expected
    )


@pytest.mark.parametrize("pool", ["sample", "batch"])
def test_ignored_voxels_are_as_if_absent(pool):
    torch.manual_seed(2)
    softmax, sigmoid = torch.randn(2, 3, 4, 8), torch.randn(2, 2, 4, 8)
    labels, regions = torch.randint(3, (2, 4, 8)), (torch.rand(2, 2, 4, 8) > 0.6).float()
    valid = torch.zeros(2, 4, 8, dtype=torch.bool)
    valid[..., :5] = True
    loss = dice_ce(batch=pool == "batch", class_weights=[1, 2, 3])
    torch.testing.assert_close(
        loss(softmax, labels, valid), loss(softmax[..., :5], labels[..., :5], None)
    )
    loss = bce_dice(pool=pool)
    torch.testing.assert_close(
        loss(sigmoid, regions, valid), loss(sigmoid[..., :5], regions[..., :5], None)
    )


def test_a_sample_that_is_all_ignored_does_not_dilute_the_others():
    torch.manual_seed(3)
    logits, target = torch.randn(2, 1, 6), torch.ones(2, 1, 6)
    valid = torch.tensor([[True] * 6, [False] * 6])
    torch.testing.assert_close(
        bce_dice()(logits, target, valid), bce_dice()(logits[:1], target[:1], None)
    )


@pytest.mark.parametrize("name", ["dice_ce", "bce_dice"])
@pytest.mark.parametrize("pool", ["sample", "batch"])
def test_a_batch_that_is_all_ignored_gives_zero_and_a_graph(name, pool):
    logits = torch.randn(2, 2, 3, 3, requires_grad=True)
    valid = torch.zeros(2, 3, 3, dtype=torch.bool)
    if name == "dice_ce":
        loss = dice_ce(batch=pool == "batch")(logits, torch.ones(2, 3, 3, dtype=torch.int64), valid)
    else:
        loss = bce_dice(pool=pool)(logits, torch.ones(2, 2, 3, 3), valid)
    loss.backward()
    assert loss.item() == 0
    assert torch.equal(logits.grad, torch.zeros_like(logits))


@pytest.mark.parametrize("autocast", [False, True])
def test_half_precision_logits_are_summed_in_float32(autocast):
    # bfloat16 cannot count beyond 256: a sum over 64·64 pixels in it would be far off.
    torch.manual_seed(4)
    logits = torch.randn(1, 2, 64, 64).bfloat16()
    labels, regions = torch.randint(2, (1, 64, 64)), torch.randint(2, (1, 2, 64, 64)).float()
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
        found = dice_ce()(logits, labels, None), bce_dice()(logits, regions, None)
    expected = dice_ce()(logits.float(), labels, None), bce_dice()(logits.float(), regions, None)
    assert all(loss.dtype == torch.float32 for loss in found)
    assert [loss.item() for loss in found] == [loss.item() for loss in expected]


@pytest.mark.parametrize(
    "valid", [None, torch.rand(2, 5, generator=torch.Generator().manual_seed(5)) > 0.3]
)
def test_gradients(valid):
    torch.manual_seed(5)
    p, t = torch.rand(2, 3, 5, dtype=torch.float64, requires_grad=True), torch.rand(2, 3, 5) > 0.5
    for pool in ("sample", "batch"):
        assert torch.autograd.gradcheck(
            lambda p, pool=pool: soft_dice_loss(p, t, valid, pool=pool, smooth=1e-5), p
        )


def test_absent_and_not_predicted_scores_one():
    empty = torch.zeros(1, 1, 4)
    assert soft_dice(empty, empty, None, pool="sample", smooth=1e-5).item() == 1


def test_perfect_logits_lose_nothing_and_extreme_ones_stay_finite():
    target = torch.tensor([[0, 1, 2, 1]])
    logits = torch.nn.functional.one_hot(target, 3).movedim(-1, 1) * 2e4 - 1e4
    assert dice_ce()(logits, target, None).item() == pytest.approx(0, abs=1e-6)
    wrong = dice_ce()(-logits.float().requires_grad_(), target, None)
    assert torch.isfinite(wrong) and wrong.item() > 1e3
    assert torch.isfinite(
        bce_dice()(
            -logits.float(), torch.nn.functional.one_hot(target, 3).movedim(-1, 1).float(), None
        )
    )


def test_nothing_but_whole_labels():
    with pytest.raises(AssertionError, match="soft labels"):
        dice_ce()(torch.randn(1, 2, 3), torch.rand(1, 3), None)


@pytest.mark.parametrize(
    ("name", "options", "said"),
    [
        (
            "bce_dice",
            {"pool": "voxel"},
            "loss.options.pool: found 'voxel', expected one of: sample, batch",
        ),
        ("bce_dice", {"smooth": 0}, "loss.options.smooth: found 0"),
        ("bce_dice", {"channels": []}, "loss.options.channels"),
        ("dice_ce", {"gamma": 2}, "'gamma' is no option of dice_ce"),
    ],
)
def test_wrong_options_are_named(name, options, said):
    with pytest.raises(InputError) as caught:
        build_loss(name, head="softmax" if name == "dice_ce" else "sigmoid", options=options)
    assert said in str(caught.value)


def test_options_that_do_not_fit_the_network_are_named():
    with pytest.raises(InputError, match="channel 2, expected channels of 0..1"):
        bce_dice(channels=[2])(torch.randn(1, 2, 3), torch.ones(1, 2, 3), None)
    with pytest.raises(InputError, match="found 2 weights, expected 3"):
        dice_ce(class_weights=[1, 2])(
            torch.randn(1, 3, 4), torch.zeros(1, 4, dtype=torch.int64), None
        )
    with pytest.raises(InputError, match="needs a sigmoid head"):
        build_loss("bce_dice", head="softmax")
    assert {"dice_ce", "bce_dice"} <= set(losses())


def test_nnunet_weights_halve_and_drop_the_lowest():
    levels = DeepSupervision(dice_ce()).level_weights
    assert levels(1) == (1.0,)
    assert levels(2) == (1.0, 0.0)
    assert levels(4) == pytest.approx((4 / 7, 2 / 7, 1 / 7, 0))


def test_given_weights_are_used_as_they_are():
    torch.manual_seed(6)
    loss, target = bce_dice(), (torch.rand(2, 1, 8, 8) > 0.5).float()
    heads = [torch.randn(2, 1, 8, 8) for _ in range(4)]  # ASC-Seg: all heads at full size
    expected = sum(loss(head, target, None) for head in heads)
    torch.testing.assert_close(DeepSupervision(loss, [1, 1, 1, 1])(heads, target), expected)
    with pytest.raises(InputError, match="found 4 weights, expected 2"):
        DeepSupervision(loss, [1, 1, 1, 1])(heads[:2], target)
    for wrong in ("halving", [0, 0], [1, -1], 3):
        with pytest.raises(InputError, match="loss.deep_supervision"):
            DeepSupervision(loss, wrong)


def test_lower_levels_see_the_nearest_voxel_of_target_and_mask():
    torch.manual_seed(7)
    loss, target, valid = dice_ce(), torch.randint(3, (1, 4, 8, 8)), torch.rand(1, 4, 8, 8) > 0.2
    fine, coarse, dropped = (
        torch.randn(1, 3, 4, 8, 8),
        torch.randn(1, 3, 4, 4, 2),
        torch.randn(1, 3, 2, 2, 1),
    )
    expected = 2 / 3 * loss(fine, target, valid) + 1 / 3 * loss(
        coarse, target[..., 1::2, 2::4], valid[..., 1::2, 2::4]
    )
    torch.testing.assert_close(
        DeepSupervision(loss)([fine, coarse, dropped], target, valid), expected
    )
    torch.testing.assert_close(
        DeepSupervision(loss)(fine, target, valid), loss(fine, target, valid)
    )
    for old, new in ((7, 3), (16, 4), (9, 9), (10, 4)):
        line = torch.arange(old)
        expected = torch.nn.functional.interpolate(
            line[None, None].float(), size=new, mode="nearest-exact"
        )
        assert nearest(line, (new,)).tolist() == expected[0, 0].long().tolist()
    assert nearest(torch.arange(16), (4,)).tolist() == [2, 6, 10, 14]


def test_a_dropped_head_still_gets_a_gradient_of_zeros():
    heads = [
        torch.randn(1, 2, 4, 4, requires_grad=True),
        torch.full((1, 2, 2, 2), float("inf"), requires_grad=True),
    ]
    total = DeepSupervision(dice_ce())(heads, torch.zeros(1, 4, 4, dtype=torch.int64))
    total.backward()
    assert torch.isfinite(total) and heads[0].grad.abs().sum() > 0
    assert torch.equal(heads[1].grad, torch.zeros(1, 2, 2, 2))


OVER_RANKS = {
    "a mean of equal shares": ("dice_ce", "softmax", {}, False),
    "ignored voxels": ("dice_ce", "softmax", {}, True),
    "weighted classes": (
        "dice_ce",
        "softmax",
        {"class_weights": [1.0, 2.0, 5.0], "batch": True},
        False,
    ),
    "one Dice of the batch": ("bce_dice", "sigmoid", {"pool": "batch", "smooth": 1.0}, False),
    "ignored voxels, sigmoid": ("bce_dice", "sigmoid", {}, True),
    "scale-sensitive": ("ss", "softmax", {"batch": True, "normalised": True}, True),
    "scale-sensitive, per sample": ("ss", "sigmoid", {}, True),
}


def losses_of_a_share(ranks) -> dict[str, list[torch.Tensor]]:
    """Loss and gradient of this rank's part of a batch of four, one sample of which has no valid
    voxel."""
    found = {}
    for name, (kind, head, options, ignoring) in OVER_RANKS.items():
        draw = torch.Generator().manual_seed(7)
        logits, labels = (
            torch.randn(4, 3, 6, 5, generator=draw),
            torch.randint(3, (4, 6, 5), generator=draw),
        )
        valid = torch.rand(4, 6, 5, generator=draw) < torch.tensor([0.9, 0.3, 0.0, 0.6]).view(
            4, 1, 1
        )
        target = labels if head == "softmax" else one_hot(labels, 3).movedim(-1, 1).float()
        logits, target, valid = (
            value.chunk(ranks.size)[ranks.rank] for value in (logits, target, valid)
        )
        logits = logits.clone().requires_grad_()
        value = build_loss(kind, head=head, options=options)(
            logits, target, valid if ignoring else None
        )
        value.backward()
        found[name] = [value.detach(), logits.grad]
    return found


def test_a_loss_is_that_of_the_whole_batch_on_any_number_of_ranks(run_in_ranks):
    alone, shares = (
        losses_of_a_share(Ranks(torch.device("cpu"))),
        run_in_ranks("test_losses.py:losses_of_a_share", 2),
    )
    for name, (value, gradient) in alone.items():
        values, gradients = zip(*(share[name] for share in shares), strict=True)
        torch.testing.assert_close(sum(values) / 2, value, msg=name)
        # the engines average over the ranks
        torch.testing.assert_close(torch.cat(gradients) / 2, gradient, msg=name)


def test_bce_dice_over_all_channels_in_one_sum():
    """As UNeXt's loss with several classes: Dice of a sample's flattened pixels and channels."""
    torch.manual_seed(0)
    logits, target = torch.randn(3, 2, 4, 5), (torch.rand(3, 2, 4, 5) > 0.6).float()
    loss = build_loss(
        "bce_dice", head="sigmoid", options={"bce_weight": 0.0, "pool_channels": True}
    )
    p, t = logits.sigmoid().reshape(3, -1), target.reshape(3, -1)
    dice = (2 * (p * t).sum(1) + 1e-5) / (p.sum(1) + t.sum(1) + 1e-5)
    torch.testing.assert_close(loss(logits, target, None), 1 - dice.mean())
    valid = torch.ones(3, 4, 5, dtype=torch.bool)
    valid[:, :2] = False
    p, t = (x[:, :, 2:].reshape(3, -1) for x in (logits.sigmoid(), target))
    dice = (2 * (p * t).sum(1) + 1e-5) / (p.sum(1) + t.sum(1) + 1e-5)
    torch.testing.assert_close(loss(logits, target, valid), 1 - dice.mean())
