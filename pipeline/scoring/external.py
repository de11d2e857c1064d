"""A test set for a run: cases of another store, which must look to the network as its training data
did. No torch."""

from __future__ import annotations

from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from segfleet.core.errors import InputError
from segfleet.pipeline.recipe import Recipe
from segfleet.pipeline.task import make_task
from segfleet.preprocess.stores.manifest import Manifest, Plan, load_manifest

# of a plan: what the network's input depends on
INPUT = (
    *("target_spacing", "transpose", "size", "interpolation"),
    *("normalisation", "nonzero_mask", "anisotropic_axis"),
)


@dataclass(frozen=True, kw_only=True)
class TestSet:
    """All cases of a store, or with `split` the validation cases of its fold `fold`."""

    __test__ = False  # for pytest

    split: str | None = None
    fold: int = 0

    def ids(self, manifest: Manifest) -> list[str]:
        """In the order of their ids. Raises InputError."""
        if self.split is None:
            return sorted(manifest.cases.column("id"))
        return sorted(manifest.fold(self.split, self.fold)["val"])

    def folder(self, manifest: Manifest) -> str:
        return manifest.id[:12] + (f"-{self.split}-{self.fold}" if self.split else "")

    def check(self, recipe: Recipe, trained: Manifest, manifest: Manifest) -> None:
        check_store(recipe, trained, manifest)


def check_store(
    recipe: Recipe, trained: Manifest, manifest: Manifest, command: str = "evaluate"
) -> None:
    """Raises InputError if a run, trained on the data and plan of `trained`, cannot be used on the
    cases of this store: one message."""
    own_task, store_task = (make_task(m.dataset, recipe.model.head) for m in (trained, manifest))
    reasons = []
    if (own_task.names, own_task.members) != (store_task.names, store_task.members):
        described = (
            ", ".join(
                f"{name} {'+'.join(map(str, values))}"
                for name, values in zip(task.names, task.members, strict=True)
            )
            for task in (store_task, own_task)
        )
        reasons.append("its labels are {}, those of the run {}".format(*described))
    channels = len(manifest.dataset.channels), len(trained.dataset.channels)
    if channels[0] != channels[1]:
        reasons.append("it has {} channel(s), the run {}".format(*channels))
    if reasons:
        raise InputError(
            f"{command}: the store of {manifest.dataset.name} does not fit the run: "
            + "; ".join(reasons)
        )
    if different := differences(manifest.plan, trained.plan):
        raise InputError(
            f"{command}: the store of {manifest.dataset.name} was preprocessed in another way "
            f"than the run's training data: {'; '.join(different)}. Preprocess it with `--like "
            f"{recipe.data.store or 'STORE'}`, the store the run was trained on"
        )


def differences(actual: Plan, expected: Plan) -> list[str]:
    """What makes the network's input another one."""
    names = [*INPUT, *(["intensity"] if "ct" in expected.normalisation else [])]
    lines = []
    for name in names:
        value, expected_value = getattr(actual, name), getattr(expected, name)
        if value != expected_value:
            shown = (
                "of other cases" if name == "intensity" else f"{value}, of the run {expected_value}"
            )
            lines.append(f"{name} {shown}")
    return lines


def overlap_with_training(recipe: Recipe, manifest: Manifest, ids: list[str]) -> dict[str, Any]:
    """What an evaluation says of training cases among the scored ones, found by the hash of their
    raw files; nothing where the training store is not at hand."""
    with suppress(InputError):
        trained = load_manifest(recipe.data.store)
        fold = trained.fold(recipe.data.split, recipe.data.fold)
        hashes = dict(trained.cases.columns("id", "source_sha256"))
        scored_ids = set(ids)
        columns = manifest.cases.columns("id", "source_sha256")
        scored = {source for case, source in columns if case in scored_ids} - {""}
        trained_on = len(scored & {hashes[case] for case in fold["train"]})
        chosen = bool(scored & {hashes[case] for case in fold["val"]})
        return {
            "training_cases": len(fold["train"]),
            "seen_in_training": {"cases": trained_on, "others_of_the_same_patients": 0},
            "selected_on_these_cases": chosen and recipe.evaluation.weights == "best",
        }
    return {}
