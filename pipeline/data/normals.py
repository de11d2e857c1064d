"""Normal numbers on any device, from a counter: no state, nothing that the host waits for."""

from __future__ import annotations

import math

import torch
from torch import Tensor

WORD = 2**32 - 1
FACTORS, WEYL = (0xD2511F53, 0xCD9E8D57), (0x9E3779B9, 0xBB67AE85)


def philox(keys: Tensor, count: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Four words of 32 bits for each of `count` counters under each of the keys (k,) int64, each
    (k, count) int64: Philox 4x32 with ten rounds (Salmon et al. 2011)."""
    low, high = (keys & WORD)[:, None], (keys >> 32 & WORD)[:, None]
    a = torch.arange(count, device=keys.device).expand(len(keys), count)
    b = c = d = torch.zeros_like(a)
    for _ in range(10):
        p, q = a * FACTORS[0], c * FACTORS[1]  # of 64 bits; the sign is one of them
        a, c = (q >> 32 & WORD) ^ b ^ low, (p >> 32 & WORD) ^ d ^ high
        b, d = q & WORD, p & WORD
        low, high = low + WEYL[0] & WORD, high + WEYL[1] & WORD
    return a, b, c, d


def normals(keys: Tensor, count: int) -> Tensor:
    """(k, count) normal numbers, float32 (Box and Muller 1958): a function of a row's key and the
    place in the row alone."""
    words = philox(keys, -(-count // 4))
    unit = [(word >> 8).float() for word in words]  # 24 bits
    pairs = []
    for first, second in (unit[:2], unit[2:]):
        radius = torch.sqrt(-2 * torch.log((first + 0.5) * 2.0**-24))
        angle = second * (2 * math.pi * 2.0**-24)
        pairs += [radius * torch.cos(angle), radius * torch.sin(angle)]
    return torch.stack(pairs, -1).view(len(keys), -1)[:, :count]
