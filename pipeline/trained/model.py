"""Trained networks, ready to predict: one, or several as an ensemble. `loading.load_run` opens
them."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from segfleet.core.errors import InputError
from segfleet.pipeline.checkpoint import Checkpoint, folder_name
from segfleet.pipeline.engines.common import load_weights
from segfleet.pipeline.inference.ensemble import Member
from segfleet.pipeline.inference.postprocess import AUTO, Rule, clean, for_all, parse_rule, rules_of
from segfleet.pipeline.inference.predict import Wishes, image_maps, predict_files
from segfleet.pipeline.inference.restore import combine
from segfleet.pipeline.inference.sliding_window import Forward
from segfleet.pipeline.parts import patch_of, task_of
from segfleet.pipeline.recipe import Recipe
from segfleet.pipeline.run import data_of, open_run
from segfleet.pipeline.scoring.external import check_store
from segfleet.pipeline.scoring.score import averaged, chosen_checkpoint, forward_of, with_weights
from segfleet.pipeline.scoring.scored import chosen_step
from segfleet.pipeline.task import Task
from segfleet.preprocess.case import Geometry
from segfleet.preprocess.stores.manifest import NAME, Dataset, Manifest, load_manifest

# Bytes of weights: networks that have no more in all stay loaded. Of a host it is little beside
# what one network takes for an image.
RESIDENT = {"cpu": 2**24, "cuda": 2**28}


@dataclass(frozen=True, kw_only=True)
class Trained:
    """One trained network, not loaded."""

    uid: str  # of its run
    checkpoint: str  # name of its folder
    recipe: Recipe
    manifest: Manifest  # data set and plan; no cases
    size: int  # bytes of its weights
    check: Callable[[], Any]  # raises InputError or CheckpointError if they are damaged
    read: Callable[[], dict[str, Tensor]]  # weights by name, averaged ones where there are any
    run: Path | None = None  # its folder, if it is a run's

    @property
    def task(self) -> Task:
        return task_of(self.recipe, self.manifest)

    @property
    def built_of(self) -> tuple[Any, ...]:
        """What its network is made of but its weights: of equal ones, one holds the weights of the
        other."""
        model, plan = self.recipe.model, self.manifest.plan
        return (
            (model.name, model.options, self.task.channels, len(self.dataset.channels)),
            (patch_of(self.recipe, self.manifest), plan.target_spacing),
            self.recipe.engine,
        )

    @property
    def dataset(self) -> Dataset:
        return self.manifest.dataset


def trained_run(folder: Path) -> Trained:
    """The network a finished run is judged by. Raises InputError; reads no weights."""
    recipe, folders = open_run(folder)
    *_, done = (stage.check_done() for stage in folders)

    @functools.cache
    def saved() -> Checkpoint:  # verified, once
        return chosen_checkpoint(recipe, folders)

    name = folder_name(chosen_step(recipe, done))
    weights = folders[-1].checkpoints / name / "weights.safetensors"
    return Trained(
        uid=folders[-1].path.name,
        checkpoint=name,
        recipe=recipe,
        manifest=data_of(folders[-1].path, recipe),
        size=weights.stat().st_size if weights.is_file() else 0,
        check=saved,
        read=lambda: averaged(saved()),
        run=folders[-1].path,
    )


def check_together(networks: Sequence[Trained]) -> None:
    """Raises InputError, one message, if the networks do not predict the same structures of the
    same channels, so that their probabilities have no mean. Spacings, patches and networks may
    differ: the mean is taken on the raw grid."""
    first = networks[0]
    for other in networks[1:]:
        for what, of in (
            ("channels", lambda network: list(network.manifest.dataset.channels)),
            ("labels", lambda network: network.manifest.dataset.labels),
            ("regions", lambda network: network.manifest.dataset.regions),
            ("model.head", lambda network: network.task.head),
        ):
            if of(first) != of(other):
                raise InputError(
                    f"ensemble: {what}: {other.uid} has {of(other)}, expected those of "
                    f"{first.uid}, {of(first)}; networks of an ensemble predict the same of the "
                    "same images"
                )


class Model:
    """One trained network, or an ensemble: the mean of their probabilities. `networks` are put in
    the order of their uids, so that the same ones give the same bits."""

    def __init__(
        self,
        networks: Sequence[Trained],
        device: torch.device | str = "cpu",
        postprocessing: dict[str, Any] | None = None,
    ):
        self.networks = sorted(
            {network.uid: network for network in networks}.values(), key=lambda n: n.uid
        )
        check_together(self.networks)
        self.device = torch.device(device)
        self.postprocessing = postprocessing  # what was decided on cases not trained on
        self._loaded: dict[str, tuple[Trained, nn.Module, Forward]] = {}
        resident = RESIDENT.get(self.device.type, RESIDENT["cpu"])
        self._stays = sum(network.size for network in self.networks) <= resident

    @property
    def dataset(self) -> Dataset:
        """Channels and labels, which all networks share."""
        return self.networks[0].dataset

    @property
    def task(self) -> Task:
        return self.networks[0].task

    @property
    def made_by(self) -> str:
        """Uids, then checkpoints: what predictions are known by."""
        uids, checkpoints = (
            "+".join(getattr(network, name) for network in self.networks)
            for name in ("uid", "checkpoint")
        )
        return f"{uids} {checkpoints}"

    def check(self) -> None:
        """Raises InputError or CheckpointError if any network's weights are damaged."""
        for network in self.networks:
            network.check()

    def check_stores(self, inputs: Sequence[str | Path]) -> None:
        """Raises InputError if a store among the inputs was not preprocessed as a network's
        training data were."""
        for path in map(Path, inputs):
            if (path / NAME).is_file():
                for network in self.networks:
                    check_store(network.recipe, network.manifest, load_manifest(path), "predict")

    def members(self) -> list[Member]:
        """The networks as `predict_files` takes them."""
        return [self.member(network) for network in self.networks]

    def member(self, trained: Trained) -> Member:
        options = trained.recipe.evaluation
        return Member(
            forward=lambda: self._forward(trained),
            plan=trained.manifest.plan,
            task=trained.task,
            patch=patch_of(trained.recipe, trained.manifest),
            overlap=options.overlap,
            mirror_axes=options.mirror,
            batch=options.batch,
            name=f"{trained.recipe.model.name} in {trained.recipe.engine.precision}",
        )

    def _forward(self, trained: Trained) -> Forward:
        """The network's forward pass. Few small networks stay loaded; else it takes the place of
        the one before, its very memory if they are built alike: what is given back and taken again
        comes out in pieces, and the next network does not fit between them."""
        if trained.uid not in self._loaded:
            network = None if self._stays else self._instead(trained)
            if network is None:
                network = self.network(trained)
            forward = forward_of(network, trained.task, trained.recipe, self.device)
            self._loaded[trained.uid] = (trained, network, forward)
        return self._loaded[trained.uid][2]

    def _instead(self, trained: Trained) -> nn.Module | None:
        """The network that was loaded, with the weights of this one; None if more differs."""
        if not self._loaded:
            return None
        _, (before, network, _) = self._loaded.popitem()
        if before.built_of != trained.built_of:
            return None
        load_weights(network, trained.read(), trained.uid)
        return network

    def network(self, trained: Trained) -> nn.Module:
        """The network itself, with its weights, in eval mode on the model's device. Raises
        CheckpointError if they do not fit."""
        return with_weights(
            trained.recipe, trained.manifest, trained.read(), trained.uid, self.device
        )

    def rules(self, text: str | None) -> dict[str, Rule] | None:
        """What is taken out of labels, from `auto`, `largest` or `min-size=N`. Raises
        InputError."""
        if text is None:
            return None
        if text != AUTO:
            return for_all(parse_rule(text), self.task)
        if self.postprocessing is None:
            raise InputError(
                "postprocess: nothing was decided for this model yet; `segfleet predict ... "
                "--postprocess auto` decides it where the store is"
            )
        return rules_of(self.postprocessing["rules"])

    def predict(
        self,
        array_CZYX: np.ndarray,
        spacing: Sequence[float],
        *,
        probabilities: bool = False,
        postprocess: str | None = None,
    ) -> np.ndarray | tuple[np.ndarray, np.ndarray]:
        """Segment one image that is in memory.

        array_CZYX: (channels, z, y, x) of any real type, the values as in the raw files: it is
        normalised here. A 2D image has one slice. spacing: mm between voxels (z, y, x); the axes
        must be in the order of the training data's files, as the readers give them (NIfTI's z
        first). Returns (z, y, x) uint8 label values on the same grid; with `probabilities` also
        (K, z, y, x) float16, the classes with background first, or the regions of a sigmoid
        network. postprocess: None, `auto`, `largest`, `min-size=N` or `min-size=Nmm3`.

        Raises InputError for another number of axes or channels, for values that are not finite,
        and for a spacing that cannot be meant.
        """
        array = np.asarray(array_CZYX)
        if array.ndim != 4:
            raise InputError(
                f"predict: found an array of shape {array.shape}, expected (channels, z, y, x); a "
                "2D image has one slice: array[:, None]"
            )
        steps = tuple(float(step) for step in spacing)
        if len(steps) != 3 or not all(0 < step < np.inf for step in steps):
            raise InputError(
                f"predict: spacing: found {tuple(spacing)}, expected three numbers of mm (z, y, x) "
                "above 0"
            )
        geometry = Geometry(shape=array.shape[1:], spacing=steps)
        maps = image_maps(
            self.members(), np.ascontiguousarray(array), geometry, "array", "array", self.device
        )
        keep = (
            np.zeros((len(maps[0].scores_KZYX), *array.shape[1:]), np.float16)
            if probabilities
            else None
        )
        label = combine(maps, array.shape[1:], keep)
        if rules := self.rules(postprocess):
            label = clean(label, rules, self.task, steps)
        return (label, keep) if keep is not None else label

    def predict_files(
        self,
        inputs: Sequence[str | Path],
        out: str | Path,
        *,
        probabilities: bool = False,
        postprocess: str | None = None,
    ) -> dict[str, Any]:
        """Segment image files, the images in folders and the cases of stores into the folder
        `out`, as `segfleet predict` does: {"done", "kept", "failed", "exit_code"}, see
        `segfleet.pipeline.inference.predict.predict_files`."""
        self.check_stores(inputs)
        return predict_files(
            self.members(),
            self.dataset,
            inputs,
            out,
            device=self.device,
            made_by=self.made_by,
            wishes=Wishes(probabilities=probabilities, rules=self.rules(postprocess)),
        )
