"""How ZeRO lays tensors out over the ranks, and how they come back to one: a few at a time, so that
saving a network takes no more of a GPU the larger the network is.

ZeRO 1 and 2 lay the tensors of a group end to end and cut that into one equal piece per rank.
ZeRO 3 cuts every tensor into one equal piece per rank and lays a rank's pieces end to end.
Whatever is cut is first padded at its end.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from segfleet.pipeline.ranks import Ranks

ALIGNMENT = 2  # ZeRO 1 and 2 pad a group to a multiple of this times the number of ranks
AT_ONCE = 2**24  # elements of all ranks together that are gathered at once: 64 MiB


def cut(values: Sequence[Tensor], zero: int, ranks: int, rank: int) -> Tensor:
    """Tensors of one group -> the piece of a rank, (n,)."""
    if zero == 3:
        return torch.cat([_rows(value.flatten(), ranks, ranks)[rank] for value in values])
    return _rows(torch.cat([value.flatten() for value in values]), ranks, ALIGNMENT * ranks)[rank]


def join(pieces: Tensor, shapes: Sequence[torch.Size], zero: int) -> list[Tensor]:
    """The inverse of `cut`: the pieces of all ranks, (ranks, n) -> tensors of these shapes."""
    ranks = len(pieces)
    if zero == 3:
        rows = pieces.split([-(-shape.numel() // ranks) for shape in shapes], 1)
        return [
            row.flatten()[: shape.numel()].view(shape)
            for row, shape in zip(rows, shapes, strict=True)
        ]
    sizes = [shape.numel() for shape in shapes]
    return [
        value.view(shape)
        for value, shape in zip(pieces.flatten()[: sum(sizes)].split(sizes), shapes, strict=True)
    ]


def _rows(flat: Tensor, ranks: int, multiple: int) -> Tensor:
    return nn.functional.pad(flat, (0, -flat.numel() % multiple)).view(ranks, -1)


@torch.no_grad()
def to_first(piece: Tensor, ranks: Ranks) -> Tensor | None:
    """The piece of every rank, of equal lengths -> (ranks, n) in the host memory of rank 0; None on
    the others."""
    whole = on_host(ranks.size, piece) if ranks.rank == 0 else None
    _collect(piece, ranks, whole, lambda own, rows: dist.gather(own, rows))
    return whole


def on_host(ranks: int, piece: Tensor) -> Tensor:
    return torch.empty(ranks, piece.numel(), dtype=piece.dtype)


@torch.no_grad()
def to_all(piece: Tensor, shape: torch.Size, ranks: Ranks) -> Tensor:
    """A tensor that ZeRO 3 has cut, whole on every rank."""
    whole = torch.empty(ranks.size, piece.numel(), dtype=piece.dtype, device=ranks.device)
    _collect(piece, ranks, whole, lambda own, rows: dist.all_gather(rows, own))
    return whole.flatten()[: shape.numel()].view(shape)


def _collect(
    piece: Tensor,
    ranks: Ranks,
    whole: Tensor | None,
    gather: Callable[[Tensor, Any], Any],
) -> None:
    """Fill `whole`, (ranks, n), part by part: as much as may be gathered at once."""
    step = max(1, AT_ONCE // ranks.size)
    for start in range(0, piece.numel(), step):
        own = piece.detach()[start : start + step].to(ranks.device)
        rows = None if whole is None else [torch.empty_like(own) for _ in range(ranks.size)]
        gather(own, rows)
        for row, received in zip(whole, rows, strict=True) if rows else ():
            row[start : start + step].copy_(received)
