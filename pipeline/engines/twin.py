"""A whole copy of a network for evaluation, which takes memory only while it is evaluated."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn


class Twin:
    """Made before an engine takes the network's weights."""

    def __init__(self, model: nn.Module):
        self.model, self.device = model, next(model.parameters()).device
        # a copy, but for its parameters: they keep shapes and layouts alone
        blanks = {id(p): _blank(p) for p in model.parameters()}
        self.network = copy.deepcopy(model, blanks)

    @contextmanager
    def whole(self, value_of: Callable[[str], Tensor]) -> Iterator[nn.Module]:
        """The copy in eval mode with `value_of(name)` for every parameter, which are asked for one
        by one, and with the model's buffers as they are."""
        places = [
            (name, self.network.get_submodule(name.rpartition(".")[0]), name.rpartition(".")[2], p)
            for name, p in self.network.named_parameters(remove_duplicate=False)
        ]
        given: dict[Tensor, nn.Parameter] = {}
        try:
            with torch.no_grad():
                for name, owner, leaf, blank in places:
                    if blank not in given:
                        value = torch.empty_like(blank, device=self.device).copy_(value_of(name))
                        given[blank] = nn.Parameter(value, requires_grad=False)
                    owner._parameters[leaf] = given[blank]
                for own, live in zip(self.network.buffers(), self.model.buffers(), strict=True):
                    own.copy_(live)
            yield self.network.eval()
        finally:
            for _, owner, leaf, blank in places:
                owner._parameters[leaf] = blank


def _blank(parameter: Tensor) -> nn.Parameter:
    return nn.Parameter(torch.empty_like(parameter, device="meta"), requires_grad=False)
