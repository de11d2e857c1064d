"""Runs that were trained elsewhere: weights and how to prepare images become a run's folder, as if
a stage of no steps had ended there."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

from segfleet.core.errors import InputError, check_one_of
from segfleet.core.files import absolute, parse_json, replacing, share_as_others, write_atomically
from segfleet.models import registry
from segfleet.models.foreign import translated
from segfleet.pipeline import checkpoint, run
from segfleet.pipeline.parts import build_network, task_of
from segfleet.pipeline.recipe import Recipe, parse, with_digest
from segfleet.pipeline.training.progress import Progress
from segfleet.pipeline.training.weights import load_foreign, read_tensors, read_torch
from segfleet.preprocess.readers.nnunet import dataset_of
from segfleet.preprocess.stores.manifest import (
    Dataset,
    Manifest,
    Plan,
    layout_of,
    load_manifest,
    save_manifest,
    with_id,
)
from segfleet.preprocess.transforms.case_transforms import anisotropic_axis

NORMALISATION = {
    "ZScoreNormalization": "zscore",
    "CTNormalization": "ct",
    "NoNormalization": "none",
    "RescaleTo01Normalization": "rescale_to_0_1",
    "RGBTo01Normalization": "rgb_to_0_1",
}
NETWORKS = {"PlainConvUNet": "plain_unet", "ResidualEncoderUNet": "resenc_unet"}
CHECKPOINT = "checkpoint_final.pth"


def write_run(root: Path, recipe: Recipe, manifest: Manifest) -> Path:
    """The folder of a run whose only stage trains nothing and holds `model.weights`. A run that is
    there already is kept. Raises InputError or ModelError, and then leaves nothing."""
    recipe = with_digest(recipe)
    folder = run.stage_folders(root, recipe, manifest)[0]
    if folder.done():
        return folder.path
    model = build_network(recipe, manifest, task_of(recipe, manifest))
    load_foreign(model, recipe.model)
    lock = run.lock_stage(folder.path)
    try:
        checkpoint.clean(folder.checkpoints)
        tensors = {"weights": {k: v.contiguous() for k, v in model.state_dict().items()}}
        checkpoint.save(folder.checkpoints, 0, tensors, Progress().state(recipe, 0))
        write_atomically(
            folder.path / run.RECIPE, json.dumps(recipe.model_dump(mode="json"), indent=1)
        )
        folder.finish(checkpoint.folder_name(0), steps=0, best={}, skipped=0)
    finally:
        lock.release()
    return folder.path


def write_weights(path: Path, recipe: Recipe) -> Path:
    """The tensors of `model.weights` by our names, as safetensors: all of the published network's,
    or its encoder's. Raises InputError or ModelError, and then writes nothing."""
    from safetensors.torch import save_file

    chosen = registry.spec(recipe.model.name)
    with torch.device("meta"):
        model = registry.build_model(
            chosen.name,
            in_channels=chosen.in_channels,
            num_classes=chosen.num_classes,
            options=recipe.model.options,
        )
    source = Path(str(recipe.model.weights))
    tensors = translated(
        read_tensors(source), model, chosen, mapping=recipe.model.mapping,
        strict=recipe.model.strict, where=str(source),
    )  # fmt: skip
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as partial:
        save_file({name: value.contiguous().clone() for name, value in tensors.items()}, partial)
        share_as_others(partial)
    return path


def import_nnunet(folder: Path, root: Path, name: str = CHECKPOINT) -> list[Path]:
    """One run per fold of a trained nnU-Net v2 model folder, below `root`; what the network needs
    to know of the data lies in `root`/stores. Raises InputError."""
    folder, root = absolute(folder), absolute(root)
    plans, described = (_json(folder / file) for file in ("plans.json", "dataset.json"))
    checkpoints = {
        path.parent.name.removeprefix("fold_"): path
        for path in sorted(folder.glob(f"fold_*/{name}"))
        if path.parent.name.removeprefix("fold_").isdecimal()
    }
    if not checkpoints:
        raise InputError(
            f"import: {folder} holds no fold_N/{name}; give nnU-Net's model folder, with "
            "plans.json, dataset.json and fold_0, fold_1, ... in it"
        )
    by_fold = {fold: _facts(path) for fold, path in checkpoints.items()}
    names = {stored["configuration"] for stored in by_fold.values()}
    if len(names) > 1:
        raise InputError(f"import: {folder}: folds of different configurations: {sorted(names)}")
    configuration = names.pop()
    settings = _settings(plans, configuration, folder)
    dims = len(settings["patch_size"])
    dataset = dataset_of(
        described, folder / "dataset.json", name=str(plans["dataset_name"]), dims=3,
        ending=str(described.get("file_ending", ".nii.gz")),
    )  # fmt: skip
    plan = plan_of(plans, settings, dataset)
    manifest = Manifest(
        format="zarr",
        layout=layout_of("zarr"),
        dataset=dataset,
        plan=plan,
        cases=(),
        splits={
            "nnunet": tuple({"train": (), "val": ()} for _ in range(max(map(int, checkpoints)) + 1))
        },
    )
    manifest = with_id(manifest)
    store = root / "stores" / f"{dataset.name}-{configuration}-{manifest.id[:8]}"
    store.mkdir(parents=True, exist_ok=True)
    if not (store / "manifest.json").exists():
        save_manifest(store, manifest)
    manifest = load_manifest(store)
    network, options = network_of(settings, folder)
    runs = []
    for fold, path in checkpoints.items():
        mirror = by_fold[fold]["inference_allowed_mirroring_axes"] or ()
        recipe = parse(
            {
                "name": f"{dataset.name}-{configuration}-fold{fold}",
                "data": {
                    "store": str(store),
                    "split": "nnunet",
                    "fold": int(fold),
                    "patch": list(settings["patch_size"]),
                    "batch": settings["batch_size"],
                },
                "model": {
                    "name": f"{network}_{dims}d",
                    "options": options,
                    "head": "sigmoid" if dataset.regions else "softmax",
                    "weights": str(path),
                },
                "optimizer": {"name": "sgd", "weight_decay": 3e-5, "decay": "all"},
                "stages": [{"name": "imported", "epochs": 0, "lr": 0.01, "schedule": "poly"}],
                "evaluation": {"mirror": [axis + 3 - dims for axis in mirror], "average": "logits"},
            },
            str(path),
        )
        runs.append(write_run(root, recipe, manifest))
    return runs


def plan_of(plans: dict[str, Any], settings: dict[str, Any], dataset: Dataset) -> Plan:
    """nnU-Net's preparation of images in our words. Raises InputError for what we do not have."""
    spacing, patch = list(settings["spacing"]), list(settings["patch_size"])
    schemes = settings["normalization_schemes"]
    unknown = [scheme for scheme in schemes if scheme not in NORMALISATION]
    if unknown:
        raise InputError(
            f"import: normalization_schemes: found {unknown[0]}, expected one of: "
            f"{', '.join(NORMALISATION)}"
        )
    masked = {
        bool(use)
        for use, scheme in zip(settings["use_mask_for_norm"], schemes, strict=True)
        if scheme == "ZScoreNormalization"
    }
    if len(masked) > 1:
        raise InputError(
            "import: use_mask_for_norm: found true for some z-scored channels and false for "
            "others, expected one for all"
        )
    turned = tuple(plans.get("transpose_forward", (0, 1, 2)))  # as our plans say it
    if sorted(turned) != [0, 1, 2]:
        raise InputError(
            f"import: transpose_forward: found {list(turned)}, expected an order of [0, 1, 2]"
        )
    properties = plans["foreground_intensity_properties_per_channel"]
    return Plan(
        transpose=turned,
        target_spacing=tuple(spacing) if len(spacing) == 3 else (0.0, *spacing),
        patch=tuple(patch) if len(patch) == 3 else (1, *patch),
        normalisation=tuple(NORMALISATION[scheme] for scheme in schemes),
        intensity=tuple(
            {key: float(value) for key, value in properties[str(channel)].items()}
            for channel in range(len(dataset.channels))
        ),
        nonzero_mask=True in masked,
        anisotropic_axis=anisotropic_axis(spacing) if len(spacing) == 3 else None,
        median_shape=(1,) * (3 - len(patch))
        + tuple(round(n) for n in settings["median_image_size_in_voxels"][-len(patch) :]),
        dtype="float32",
    )


def network_of(settings: dict[str, Any], folder: Path) -> tuple[str, dict[str, Any]]:
    """(our network, its options). Raises InputError for another architecture."""
    architecture = settings.get("architecture") or {}
    kind = str(architecture.get("network_class_name", "")).rpartition(".")[2]
    named = kind or "none (plans of before 2024)"
    check_one_of(f"import: {folder}: architecture", named, NETWORKS)
    arguments = architecture["arch_kwargs"]
    expected = {
        "conv_bias": (True,),
        "norm_op": tuple(f"torch.nn.modules.instancenorm.InstanceNorm{d}d" for d in (2, 3)),
        "dropout_op": (None,),
        "nonlin": ("torch.nn.LeakyReLU",),
    }
    for key, legal in expected.items():
        if arguments.get(key) not in legal:
            raise InputError(
                f"import: {folder}: arch_kwargs.{key}: found {arguments.get(key)!r}, expected "
                f"{legal[0]!r}, as nnU-Net's own planners choose"
            )
    options = {
        "features": list(arguments["features_per_stage"]),
        "strides": [_each(s) for s in arguments["strides"]],
        "kernels": [_each(k) for k in arguments["kernel_sizes"]],
        "conv_per_decoder": arguments["n_conv_per_stage_decoder"],
    }
    blocks = "n_blocks_per_stage" if kind == "ResidualEncoderUNet" else "n_conv_per_stage"
    option = "blocks_per_stage" if kind == "ResidualEncoderUNet" else "conv_per_stage"
    return NETWORKS[kind], options | {option: arguments[blocks]}


def _each(value: Any) -> Any:
    return list(value) if isinstance(value, list | tuple) else value


def _settings(plans: dict[str, Any], name: str, folder: Path) -> dict[str, Any]:
    """A configuration with what it inherits. Raises InputError."""
    configurations = plans.get("configurations", {})
    check_one_of(f"import: {folder}: configuration", name, configurations)
    settings = configurations[name]
    if parent := settings.get("inherits_from"):
        settings = _settings(plans, parent, folder) | settings
    if settings.get("previous_stage"):
        raise InputError(
            f"import: {folder}: '{name}' is the second stage of a cascade, which takes another "
            "network's labels; only single networks can be imported"
        )
    return settings


def _facts(path: Path) -> dict[str, Any]:
    """What a checkpoint says beside its weights."""
    stored = read_torch(path)
    try:
        return {
            "configuration": str(stored["init_args"]["configuration"]),
            "inference_allowed_mirroring_axes": stored.get("inference_allowed_mirroring_axes"),
        }
    except (KeyError, TypeError):
        raise InputError(f"import: {path} is no checkpoint of nnU-Net v2: no init_args") from None


def _json(path: Path) -> dict[str, Any]:
    try:
        return parse_json(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise InputError(
            f"import: found no {path}; give nnU-Net's model folder, with plans.json, dataset.json "
            "and fold_0, fold_1, ... in it"
        ) from None
    except ValueError as error:
        raise InputError(f"import: {path} is no JSON: {error}") from None
