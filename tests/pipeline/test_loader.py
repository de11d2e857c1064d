"""What arrives from the loader is what was made."""

from __future__ import annotations

import pytest
import torch
from torch.utils.data._utils.pin_memory import pin_memory

from segfleet.pipeline.data import loader
from segfleet.pipeline.training.stream import Stream


@pytest.fixture
def pinned(monkeypatch):
    """Pinning without a GPU: which tensors were asked for it."""
    asked: list[torch.Tensor] = []

    def pin(tensor: torch.Tensor) -> torch.Tensor:
        asked.append(tensor)
        return tensor

    monkeypatch.setattr(torch.Tensor, "pin_memory", pin)
    return asked


def test_pinning_touches_the_tensors_alone(pinned):
    """By PyTorch's own function: up to torch 2.9.1 it turns tuples into lists, at any depth."""
    batch = loader.Batch(torch.zeros(1, 1, 4, 4), torch.zeros(1, 4, 4), ("a",))
    found = pin_memory(batch)
    assert found.cases is batch.cases
    assert [id(tensor) for tensor in pinned] == [id(batch.image), id(batch.label)]
    stream = Stream(iter([found, found]), torch.device("cpu"), channels_last=False)
    assert next(stream)[0].shape == next(stream)[0].shape == (1, 1, 4, 4)
    assert stream.cases == ("a", "a")


def test_a_failure_passes_through_pinning(pinned):
    failure = loader.Failure("case1", "loading", "no such file", "Traceback", True)
    assert pin_memory(failure) is failure and not pinned
