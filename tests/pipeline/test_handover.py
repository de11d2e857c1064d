"""Batches from loader processes: what arrives is what was made, whatever is sent after it."""

from __future__ import annotations

import time
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from torch import Tensor

from segfleet.pipeline.data import handover, loader


@dataclass(frozen=True)
class Two:
    image: Tensor
    label: Tensor
    words: tuple[str, ...]


def two(number: int, size: int = 5) -> Two:
    image = torch.full((2, size, 3), float(number), dtype=torch.float16)
    return Two(image, torch.full((size,), number % 200, dtype=torch.uint8), (str(number),))


def sent_over(sender: handover.Sender, batch: Two) -> handover.Held:
    """As it comes out of a queue: the memory is there the first time only."""
    held = sender(batch)
    assert isinstance(held, handover.Held)
    assert not any(isinstance(part, Tensor) for part in vars(held.batch).values())
    return held


def test_a_slot_is_filled_again_only_when_its_batch_was_taken():
    """As many batches are under way as a loader process is asked for, and one is being taken."""
    sender, under_way, fresh = handover.Sender("one"), [], 0
    for number in range(20):
        held = sent_over(sender, two(number))
        fresh += held.memory is not None
        under_way.append(held)
        if len(under_way) == handover.SLOTS:
            found, expected = under_way.pop(0).taken(), two(number - handover.SLOTS + 1)
            assert torch.equal(found.image, expected.image) and found.words == expected.words
            assert torch.equal(found.label, expected.label)
    assert fresh == 1
    handover.forget("one")
    assert not [name for name in handover.ROOMS if name.startswith("one")]


def test_a_batch_that_was_written_over_is_an_error():
    sender = handover.Sender("over")
    first = sent_over(sender, two(0))
    for number in range(handover.SLOTS):
        sent_over(sender, two(number))
    with pytest.raises(RuntimeError, match="wrote batch 4 over 1"):
        first.taken()
    handover.forget("over")


def test_a_larger_batch_gets_a_larger_room_and_those_under_way_stay():
    sender = handover.Sender("grows")
    small, large, again = (
        sent_over(sender, two(n, size)) for n, size in ((1, 5), (2, 900), (3, 5))
    )
    assert large.memory is not None and again.memory is None
    for held, (number, size) in ((small, (1, 5)), (large, (2, 900)), (again, (3, 5))):
        assert torch.equal(held.taken().image, two(number, size).image)
    handover.forget("grows")


def test_what_has_no_tensors_is_sent_as_it_is():
    failure = loader.Failure("a", "loading", "m", "t", True)
    assert handover.Sender("")(failure) == failure


class Counting(torch.utils.data.Dataset):
    pinned = False

    def __getitems__(self, places):
        number = places[0][1]
        image = torch.full((2, 1, 64, 64), float(number))
        return loader.Batch(
            image, torch.full((2, 64, 64), number, dtype=torch.uint8), (str(number),)
        )


@pytest.mark.parametrize("slow", ["rank", "loader"])
def test_batches_of_two_processes_arrive_in_order_and_stay(slow):
    """A rank that keeps them all, slower or faster than those who make them."""
    schedule = loader.Schedule(0, 1, 40, 2, 1, 0, 1)
    kept, before = [], set(handover.ROOMS)
    for batch in loader.batches(Counting(), schedule, 2):
        kept.append(batch)
        time.sleep(0.02 if slow == "rank" else 0)
    assert [batch.cases[0] for batch in kept] == [str(2 * n) for n in range(40)]
    for n, batch in enumerate(kept):
        assert (batch.image == 2 * n).all() and (batch.label == 2 * n).all()
    assert set(handover.ROOMS) == before


def test_a_batch_in_a_pipe_is_left_to_the_rank_where_memory_is_pinned():
    """The thread that pins cannot pin arrays; the rank says once why they come so."""
    piped = loader.Batch(np.ones((1, 1, 2, 2)), np.ones((1, 2, 2)), ("a",))
    assert isinstance(piped.pin_memory().image, np.ndarray)
