"""From a run folder, a run's name or a model file to a model that predicts."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import torch

from segfleet.core.files import absolute
from segfleet.pipeline.run import find_run
from segfleet.pipeline.scoring.folds import find_folds
from segfleet.pipeline.trained.model import Model, trained_run
from segfleet.pipeline.trained.modelfile import is_modelfile, read_model
from segfleet.pipeline.trained.out_of_fold import read_decision


def find_models(
    text: str, root: Path, fold: int | Literal["all"] | None = None, best: bool = False
) -> list[Path]:
    """A model file, or a run's folder from its path, the beginning of its uid or its recipe's name;
    with `fold` "all" those of every fold. Raises InputError."""
    if is_modelfile(Path(text)):
        return [absolute(text)]
    return find_folds(text, root) if fold == "all" else [find_run(text, root, fold, best)]


def open_model(paths: Sequence[Path], device: torch.device | str = "cpu") -> Model:
    """Run folders, and model files or folders, as one model. Raises InputError."""
    networks, decision = [], None
    for path in paths:
        if is_modelfile(path):
            trained, decision = read_model(path)
            networks += trained
        else:
            networks.append(trained_run(path))
    if len(paths) > 1 or not is_modelfile(paths[0]):
        decision = read_decision(networks)
    return Model(networks, device, decision)


def load_run(
    path: str | Path | Sequence[str | Path],
    *,
    runs: str | Path = "runs",
    fold: int | Literal["all"] | None = None,
    device: str = "cpu",
) -> Model:
    """A trained model: of a run folder, the beginning of its uid, its recipe's name below `runs`,
    or a model file; several are an ensemble.

    fold: of several runs of a recipe the one of this fold, or "all" as an ensemble. device: cpu,
    cuda, cuda:1. Raises InputError if there is none, if it fits several, or if its training is not
    finished.
    """
    several = [path] if isinstance(path, str | Path) else list(path)
    paths = [run for text in several for run in find_models(str(text), Path(runs), fold)]
    model = open_model(paths, device)
    model.check()
    return model
