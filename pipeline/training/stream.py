"""What a stage is trained on: from its stores to micro-batches on the device."""

from __future__ import annotations

import time
from collections.abc import Iterator

import torch
from torch import Tensor

from segfleet.pipeline.data import loader
from segfleet.pipeline.data.sampler import MixedSampler, PatchSampler
from segfleet.pipeline.parts import augments_on_device, patch_of
from segfleet.pipeline.recipe import Recipe, resolve
from segfleet.pipeline.stage_data import shares_of, training_ids
from segfleet.pipeline.training.context import Context
from segfleet.preprocess.stores.base import ShardStore


def patches_of(context: Context, index: int, steps: int) -> loader.Patches:
    """All that a stage may draw, whose epochs have so many steps."""
    recipe, device = resolve(context.recipe, index), context.ranks.device
    stores, sampler = sampler_of(context, recipe)
    parts = (stores, sampler, index, steps, recipe.data.augment, device.type != "cpu")
    if recipe.task == "reconstruct":
        return loader.MaskedPatches(*parts, mask=recipe.data.mask)
    return loader.Patches(*parts, on_device=augments_on_device(recipe, device))


def sampler_of(
    context: Context, recipe: Recipe
) -> tuple[list[ShardStore], PatchSampler | MixedSampler]:
    """The stores of a stage, whose recipe is resolved, and what is drawn from them."""
    patch, stores, samplers, weights = patch_of(recipe, context.manifests(recipe)), [], [], []
    for settings, manifest, weight in shares_of(recipe, context.manifests):
        samplers.append(
            PatchSampler(
                cases=manifest.cases.among(set(training_ids(settings, manifest))),
                patch=patch,
                batch=recipe.data.batch,
                foreground=recipe.data.foreground,
                seed=recipe.seed,
            )
        )
        stores.append(context.stores(settings))
        weights.append(weight)
    if len(samplers) == 1:
        return stores, samplers[0]
    return stores, MixedSampler(parts=tuple(samplers), weights=tuple(weights))


class Stream:
    """Micro-batches on the device, and how long the loop waited for them."""

    def __init__(
        self,
        batches: Iterator[loader.Batch | loader.Boxes],
        device: torch.device,
        channels_last: bool,
    ):
        self.batches, self.device, self.channels_last = batches, device, channels_last
        self.waited, self.cases = 0.0, ()

    def __iter__(self) -> Stream:
        return self

    def __next__(self) -> tuple[Tensor, Tensor]:
        start = time.perf_counter()
        batch = next(self.batches)
        self.waited += time.perf_counter() - start
        self.cases += batch.cases
        return loader.on_device(batch, self.device, self.channels_last)
