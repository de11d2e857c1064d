"""What a network is asked to predict: softmax over classes, or independent sigmoids over
regions."""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch
from torch import Tensor

from segfleet.core.errors import InputError, check_one_of
from segfleet.preprocess.stores.manifest import Dataset

RECONSTRUCT = "reconstruct"


@dataclass(frozen=True, kw_only=True)
class Task:
    """`head` "softmax": one channel per label, background first. "sigmoid": one channel per region,
    no background.

    `names` are the scored structures in order; `members[i]` the label values that make up
    `names[i]`.
    """

    head: str
    names: tuple[str, ...]
    members: tuple[tuple[int, ...], ...]
    # softmax: label value of each channel; sigmoid: label painted for each region
    values: tuple[int, ...]
    ignore_label: int | None = None
    averages: str = "probabilities"  # what `scores` gives and `labels` takes: these, or logits

    @property
    def channels(self) -> int:
        """Output channels of the network."""
        return len(self.values)

    def target(self, label: Tensor) -> Tensor:
        """(B, *S) integer labels -> (B, *S) int64 channel indices (softmax) or (B, R, *S) float32
        (sigmoid). Ignored voxels become 0."""
        if self.head == "softmax":
            target = torch.zeros_like(label, dtype=torch.int64)
            for channel, value in enumerate(self.values):
                if channel:
                    target[label == value] = channel
            return target
        # compared one by one: a tensor of values would be a copy from the host in every step
        regions = [
            functools.reduce(torch.logical_or, [label == v for v in group])
            for group in self.members
        ]
        return torch.stack(regions, 1).float()

    def valid(self, label: Tensor) -> Tensor | None:
        """(B, *S) bool, False where the label is to be ignored; None when nothing can be."""
        return None if self.ignore_label is None else label != self.ignore_label

    def probabilities(self, logits: Tensor) -> Tensor:
        """(B, K, *S) logits -> probabilities of the same shape, float32."""
        return logits.float().softmax(1) if self.head == "softmax" else logits.float().sigmoid()

    def scores(self, logits: Tensor) -> Tensor:
        """What tiles and mirrored copies average: probabilities or the logits, float32."""
        return logits.float() if self.averages == "logits" else self.probabilities(logits)

    def labels(self, probabilities: Tensor) -> Tensor:
        """(K, *S) averaged scores -> (*S) uint8 label values; of equals the first; later regions
        are painted over earlier ones."""
        # channel by channel: torch's argmax over the slowest axis takes ten times as long on a CPU
        if self.head == "softmax":
            best = probabilities[0].clone()
            label = torch.full_like(best, self.values[0], dtype=torch.uint8)
            for channel, value in enumerate(self.values[1:], start=1):
                label[probabilities[channel] > best] = value
                torch.maximum(best, probabilities[channel], out=best)
            return label
        label = torch.zeros(probabilities.shape[1:], dtype=torch.uint8, device=probabilities.device)
        for channel, value in enumerate(self.values):
            label[probabilities[channel] > (0.0 if self.averages == "logits" else 0.5)] = value
        return label


def reconstruction(dataset: Dataset) -> Task:
    """The image itself, channel by channel."""
    return Task(
        head=RECONSTRUCT,
        names=dataset.channels,
        members=(),
        values=tuple(range(len(dataset.channels))),
    )


def make_task(dataset: Dataset, head: str = "auto") -> Task:
    """The task of a data set. `auto`: regions when it has them, sigmoid for a single foreground
    label, else softmax."""
    check_one_of("model.head", head, ("auto", "softmax", "sigmoid"))
    foreground = {name: value for name, value in dataset.labels.items() if value != 0}
    if not foreground and not dataset.regions:
        raise InputError(
            f"data.store: {dataset.name} has no labels, which only a stage of `task: reconstruct` "
            "does without"
        )
    if dataset.regions:
        if head == "softmax":
            raise InputError(
                f"model.head: found 'softmax', but {dataset.name} has overlapping regions, which "
                "need 'sigmoid' (or 'auto')"
            )
        return Task(
            head="sigmoid",
            names=tuple(dataset.regions),
            members=tuple(dataset.regions.values()),
            values=dataset.region_order,
            ignore_label=dataset.ignore_label,
        )
    names, values = tuple(foreground), tuple(foreground.values())
    members = tuple((value,) for value in values)
    if head == "sigmoid" or (head == "auto" and len(foreground) == 1):
        return Task(
            head="sigmoid",
            names=names,
            members=members,
            values=values,
            ignore_label=dataset.ignore_label,
        )
    return Task(
        head="softmax",
        names=names,
        members=members,
        values=(0, *values),
        ignore_label=dataset.ignore_label,
    )
