"""A model as a bundle of MONAI, for `python -m monai.bundle run` and tools built on it.

    configs/metadata.json        what goes in and comes out, in MONAI's words
    configs/inference.json       network_def; run: predict `images` into `output_dir`
    models/model.segfleet        the model itself, see `trained/modelfile.py`
    docs/README.md               model card

MONAI's own transforms would prepare images otherwise than the networks were trained on, so the
bundle calls segfleet, which has to be installed: its predictions are those of `segfleet predict`.

Source: MONAI's bundle specification, metadata schema of 2024-07-25.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from segfleet.core.making import making
from segfleet.pipeline.checkpoint import versions
from segfleet.pipeline.exporting.card import UNKNOWN
from segfleet.pipeline.parts import patch_of
from segfleet.pipeline.trained.model import Model
from segfleet.pipeline.trained.modelfile import write_model

MONAI = "1.6.1"  # the version that runs these bundles in our test
SCHEMA = (
    "https://github.com/Project-MONAI/MONAI-extra-test-data/releases/download/0.8.1/"
    "meta_schema_20240725.json"
)
INFERENCE = {
    "bundle_root": ".",
    "images": ["$@bundle_root + '/images'"],
    "output_dir": "$@bundle_root + '/predictions'",
    "device": "$'cuda' if __import__('torch').cuda.is_available() else 'cpu'",
    "model": {
        "_target_": "segfleet.pipeline.load_run",
        "path": "$@bundle_root + '/models/model.segfleet'",
        "device": "@device",
    },
    "network_def": {
        "_target_": "segfleet.pipeline.exporting.graphs.Logits",
        "network": "$@model.network(@model.networks[0])",
    },
    "run": ["$@model.predict_files(@images, @output_dir)"],
}


def write_bundle(model: Model, out: Path, card: str, *, use: str = "", licence: str = "") -> Path:
    """Write `model` as the bundle `out`, a new folder. Raises InputError if that exists."""
    with making(out) as folder:
        for part in ("configs", "models", "docs"):
            (folder / part).mkdir()
        write_model(model, folder / "models" / "model.segfleet", card)
        (folder / "docs" / "README.md").write_text(card, encoding="utf-8")
        for name, document in (
            ("inference", INFERENCE),
            ("metadata", metadata(model, use, licence)),
        ):
            (folder / "configs" / f"{name}.json").write_text(json.dumps(document, indent=1) + "\n")
    return Path(out)


def metadata(model: Model, use: str, licence: str) -> dict[str, Any]:
    """metadata.json. Inputs are patches as the first network takes them: (channels, *patch)."""
    first, dataset, task, installed = model.networks[0], model.dataset, model.task, versions()
    patch = list(patch_of(first.recipe, first.manifest))
    patch = patch[1:] if patch[0] == 1 else patch
    of_values = {value: name for name, value in dataset.labels.items()}
    classes = (
        [of_values[value] for value in task.values] if task.head == "softmax" else list(task.names)
    )
    tensor = {"type": "image", "spatial_shape": patch, "dtype": "float32", "value_range": []}
    return {
        "schema": SCHEMA,
        "version": "1.0.0",
        "monai_version": MONAI,
        "pytorch_version": installed["torch"],
        "numpy_version": installed["numpy"],
        "required_packages_version": {"segfleet": installed["segfleet"]},
        "task": f"Segmentation of {', '.join(task.names)} in {dataset.dims}D images",
        "description": f"{len(model.networks)} network(s) trained by segfleet on {dataset.name}; "
        "of several the mean of their probabilities",
        "authors": UNKNOWN,
        "copyright": licence or UNKNOWN,
        "intended_use": use or UNKNOWN,
        "network_data_format": {
            "inputs": {
                "image": tensor
                | {"format": "magnitude", "num_channels": len(dataset.channels)}
                | {"is_patch_data": True, "channel_def": _numbered(dataset.channels)}
            },
            "outputs": {
                "pred": tensor
                | {"format": "segmentation", "num_channels": len(classes)}
                | {"is_patch_data": True, "channel_def": _numbered(classes)}
            },
        },
    }


def _numbered(names: Sequence[str]) -> dict[str, str]:
    return {str(index): name for index, name in enumerate(names)}
