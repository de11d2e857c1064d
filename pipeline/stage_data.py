"""What the stages of a recipe are trained on: their stores, the cases of a fold, steps of an
epoch."""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

from segfleet.core.errors import InputError
from segfleet.pipeline.recipe import Recipe, members, resolve
from segfleet.pipeline.stage import Stage
from segfleet.preprocess.stores.manifest import Manifest, load_manifest

# of the recipe of a stage, which is resolved: what its store holds
Manifests = Callable[[Recipe], Manifest]


def manifests_of(recipe: Recipe, known: Manifest | Manifests) -> Manifests:
    """Manifests of the stores of all stages; `known`: that of the recipe's own store, or such a
    function already. Others are read when they are asked for."""
    if not isinstance(known, Manifest):
        return known

    def manifest(settings: Recipe) -> Manifest:
        store = settings.data.store
        return known if store == recipe.data.store else _read(store, *_version(Path(store)))

    return manifest


def stages_of(
    recipe: Recipe, manifest: Manifest | Manifests
) -> Iterator[tuple[int, Recipe, Manifest]]:
    """Of every stage its number, the recipe resolved for it, and what its store holds, whose fold
    is there. Raises InputError that names the stage, if it has a store of its own."""
    manifests = manifests_of(recipe, manifest)
    for index, stage in enumerate(recipe.stages):
        own = resolve(recipe, index)
        try:
            stored = manifests(own)
            for settings in members(own):
                training_ids(settings, manifests(settings))
        except InputError as error:
            raise InputError(named(error, own is not recipe, index, stage)) from None
        yield index, own, stored


def named(error: Exception, several: bool, index: int, stage: Stage) -> str:
    """A message that says which stage it is about, where stages have `several` settings."""
    plain = not several or str(error).startswith("stages.")
    return str(error) if plain else f"stages.{index} ({stage.name}): {error}"


def _version(store: Path) -> tuple[int, int]:
    with suppress(OSError):
        status = (store / "manifest.json").stat()
        return status.st_ino, status.st_mtime_ns
    return 0, 0


@functools.lru_cache(maxsize=16)
def _read(store: str, _inode: int, _changed: int) -> Manifest:
    return load_manifest(Path(store))


def training_ids(recipe: Recipe, manifest: Manifest) -> tuple[str, ...]:
    """The cases that a stage trains on, `recipe` resolved for it: of its fold all, or the first
    `data.cases` in an order by hashes of their ids, the same for every fold and number."""
    ids = manifest.fold(recipe.data.split, recipe.data.fold)["train"]
    if recipe.data.cases is None:
        return ids
    if recipe.data.cases > len(ids):
        raise InputError(
            f"data.cases: found {recipe.data.cases}, but the fold has {len(ids)} training cases"
        )
    order = sorted(ids, key=lambda name: hashlib.sha256(name.encode()).digest())
    chosen = set(order[: recipe.data.cases])
    return tuple(name for name in ids if name in chosen)


def shares_of(recipe: Recipe, manifests: Manifests) -> list[tuple[Recipe, Manifest, int]]:
    """Of a resolved recipe's stores: the recipe for it alone, what it holds, its weight."""
    shares = []
    for number, own in enumerate(members(recipe)):
        stored = manifests(own)
        weight = recipe.data.stores[number].weight if recipe.data.stores else None
        shares.append((own, stored, weight or len(training_ids(own, stored))))
    return shares


def stage_steps(recipe: Recipe, manifest: Manifest | Manifests) -> list[int]:
    """Optimizer steps of an epoch of every stage; by default one pass over the training cases."""
    steps = []
    manifests = manifests_of(recipe, manifest)
    for index, own, _ in stages_of(recipe, manifests):
        cases = sum(len(training_ids(settings, manifests(settings))) for settings in members(own))
        steps.append(recipe.stages[index].steps or max(1, -(-cases // own.data.batch)))
    return steps
