"""The model card: what a network was trained on, how well it does, and what it is for."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from segfleet.core.errors import InputError
from segfleet.pipeline.checkpoint import versions
from segfleet.pipeline.parts import patch_of
from segfleet.pipeline.recipe import members, resolve
from segfleet.pipeline.run import root_of
from segfleet.pipeline.scoring.folds import folder_of
from segfleet.pipeline.scoring.scored import optimism, read_evaluation
from segfleet.pipeline.trained.model import Model, Trained
from segfleet.preprocess.stores.manifest import Manifest, load_manifest

UNKNOWN = "Not said by whoever exported it."


def model_card(model: Model, *, use: str = "", licence: str = "") -> str:
    """README.md of a model, with the front matter of Hugging Face's hub."""
    dataset, first = model.dataset, model.networks[0]
    front = {
        "library_name": "segfleet",
        "license": licence or "other",
        "pipeline_tag": "image-segmentation",
        "tags": ["medical", "segmentation", f"{dataset.dims}d", first.recipe.model.name],
    }
    foreground = [f"`{name}` ({value})" for name, value in dataset.labels.items() if value]
    regions = [f"`{name}` ({', '.join(map(str, of))})" for name, of in dataset.regions.items()]
    parts = [
        "---",
        *(f"{key}: {json.dumps(value)}" for key, value in front.items()),
        "---",
        f"# {first.recipe.name}",
        "",
        f"Segments {', '.join(regions or foreground)} in {dataset.dims}D images with the "
        f"channel(s) {', '.join(dataset.channels)}.",
        "",
        "```",
        "segfleet predict THIS IMAGES --out predictions",
        "```",
        "",
        "## Intended use",
        "",
        use or UNKNOWN,
        "",
        "It is a research model: it is no medical device, and nobody has approved it as one.",
        "",
        "## Data",
        "",
        *dict.fromkeys(_store(trained.manifest) for trained in model.networks),
        *dict.fromkeys(line for trained in model.networks for line in _before(trained)),
        "- Spacing (mm, z y x): "
        f"{', '.join(f'{s:g}' for s in first.manifest.plan.target_spacing)}; "
        f"normalisation: {', '.join(first.manifest.plan.normalisation)}",
        "",
        "## Networks",
        "",
        *(_network(trained) for trained in model.networks),
        "",
        "## Scores",
        "",
        *_scores(model),
        "",
        "## Licence",
        "",
        f"Weights: {licence or UNKNOWN}",
        "",
        "## Made with",
        "",
        ", ".join(f"{name} {number}" for name, number in versions().items()),
        "",
    ]
    return "\n".join(parts)


def _store(manifest: Manifest) -> str:
    dataset = manifest.dataset
    licence = f"licence {dataset.licence}" if dataset.licence else "licence not recorded"
    return f"- Data set: {dataset.name}, {licence}; store `{manifest.id}` (identity of its content)"


def _before(trained: Trained) -> Iterator[str]:
    """What else is in the weights: the data of earlier stages, and a file of others' weights."""
    first = resolve(trained.recipe, 0).model
    if first.weights is not None:
        yield (
            f"- Began with the weights of `{Path(first.weights).name}`, sha256 "
            f"`{first.weights_sha256}`, whose licence is their authors'"
        )
    for index, stage in enumerate(trained.recipe.stages[:-1]):
        for settings in members(resolve(trained.recipe, index)):
            if settings.data.store in ("", trained.recipe.data.store):
                continue
            try:
                source = _store(load_manifest(Path(settings.data.store))).removeprefix("- ")
            except InputError:
                source = "a data set whose store is not there any more"
            yield f"- Earlier stage `{stage.name}`: {source}"


def _network(trained: Trained) -> str:
    size = " x ".join(map(str, patch_of(trained.recipe, trained.manifest)))
    epochs = sum(stage.epochs for stage in trained.recipe.stages)
    return (
        f"- `{trained.uid}`: {trained.recipe.model.name}, patch {size}, {epochs} epochs, split "
        f"{trained.recipe.data.split}, fold {trained.recipe.data.fold}, seed {trained.recipe.seed}"
    )


def _scores(model: Model) -> list[str]:
    """The scores of the runs, each on its own validation cases, and of all folds together."""
    if any(trained.run is None for trained in model.networks):
        return ["See the model file that this one was made from."]
    documents = [
        (trained.uid, read_evaluation(trained.run, whole=True)) for trained in model.networks
    ]
    if len(documents) > 1:
        together = _together(model.networks)
        documents.append(("all folds, each case by the network not trained on it", together))
    rows, warnings = [], []
    for name, document in documents:
        if document and "summary" in document:
            rows += _rows(name, document)
            warnings += [text for text in optimism(document) if text not in warnings]
    if not rows:
        return ["Not scored."]
    return [
        "Dice of whole cases on their raw grid, none of them trained on unless it says so.",
        "",
        "| network | structure | cases | mean Dice | 95 % interval over patients |",
        "| --- | --- | --- | --- | --- |",
        *rows,
        *(f"\n{text}" for text in warnings),
    ]


def _rows(name: str, document: dict[str, Any]) -> list[str]:
    rows = []
    for structure, scores in document["summary"]["structures"].items():
        dice = scores["dice"]
        mean = "-" if dice["mean"] is None else f"{dice['mean']:.4f}"
        bounds = dice.get("ci95")
        between = f"{bounds[0]:.4f} to {bounds[1]:.4f}" if bounds else "-"
        rows.append(f"| {name} | {structure} | {dice['n']} | {mean} | {between} |")
    return rows


def _together(networks: list[Trained]) -> dict[str, Any] | None:
    root = root_of(networks[0].run, networks[0].recipe)
    return read_evaluation(folder_of(root, [trained.uid for trained in networks]), whole=True)
