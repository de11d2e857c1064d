"""Identity of a stage: a hash of everything that changes its result, of its parent's identity, and
of nothing else (no workers, launcher, logging). Equal identity means equal result."""

from __future__ import annotations

import functools
import hashlib
import itertools
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from segfleet.core.errors import InputError
from segfleet.core.files import read_json, write_json
from segfleet.pipeline.recipe import Recipe, resolve
from segfleet.pipeline.sections import Engine
from segfleet.pipeline.sources import NUMERICS, changed_sources
from segfleet.pipeline.stage import OVERRIDES, Inherit, Stage
from segfleet.pipeline.stage_data import (
    Manifests,
    manifests_of,
    shares_of,
    stages_of,
    training_ids,
)
from segfleet.preprocess.stores.manifest import Manifest

IDENTITY = "identity.json"  # in the folder of a stage: what its uid was made of

# Options that some other option leaves without effect.
IDLE_OF_OPTIMIZER = {
    "adamw": ("momentum", "nesterov"),
    "adam": ("momentum", "nesterov"),
    "sgd": ("betas",),
}
IDLE_OF_SCHEDULE = {
    "constant": ("power", "period", "floor"),
    "poly": ("period",),
    "cosine": ("power",),
}

# Added after runs had uids: left out where they are as everything was before.
LATER_OF_ENGINE = ("deterministic", "tf32")


def stage_facts(recipe: Recipe, manifest: Manifest | Manifests, index: int) -> dict[str, Any]:
    """Everything about stage `index` that changes its result, its parents left out. `recipe` is
    resolved for that stage, `manifest` that of its store."""
    manifests = manifests_of(recipe, manifest)
    stored, whole = manifests(recipe), recipe.model_dump(mode="json")
    rebuilds = recipe.task == "reconstruct"
    several = [
        [its.id, weight, list(training_ids(settings, its))]
        for settings, its, weight in (shares_of(recipe, manifests) if recipe.data.stores else ())
    ]
    changed = changed_sources(recipe.model.name, recipe.loss.name)
    stage = own_facts(recipe.stages[index], whole["stages"][index], index)
    if stage.get("patience"):  # only then does validation decide how long a stage is
        stage["validation"] = [
            without(whole["evaluation"], "tolerance"),
            list(stored.fold(recipe.data.split, recipe.data.fold)["val"]),
        ]
    return {
        "numerics": NUMERICS,
        **({"sources": changed} if changed else {}),
        **({"task": recipe.task} if rebuilds else {"loss": whole["loss"]}),
        "store": stored.id,
        **({"stores": several} if several else {}),
        "train": list(training_ids(recipe, stored)),
        "seed": recipe.seed,
        "data": data_facts(whole["data"], rebuilds),
        "model": model_facts(whole["model"], index),
        "optimizer": without(
            whole["optimizer"],
            *IDLE_OF_OPTIMIZER[recipe.optimizer.name],
            *(() if recipe.optimizer.weight_decay else ("decay",)),
        ),
        "engine": engine_facts(recipe.engine, whole["engine"]),
        "index": index,
        "stage": stage,
    }


def without(section: dict[str, Any], *keys: str) -> dict[str, Any]:
    return {key: value for key, value in section.items() if key not in keys}


def data_facts(data: dict[str, Any], rebuilds: bool) -> dict[str, Any]:
    idle = ("made_for", "store", "stores", "workers", "split", "fold", "cases")
    facts = without(data, *idle, *(() if rebuilds else ("mask",)))
    if facts["augment"]:  # where it is computed is no more part of an identity than the device
        facts["augment"] = without(facts["augment"], "device")
    return facts


def engine_facts(engine: Engine, said: dict[str, Any]) -> dict[str, Any]:
    later = (k for k in LATER_OF_ENGINE if said[k] == Engine.model_fields[k].default)
    facts = without(said, "name", "options", "checkpoint_activations", *later)
    # auto is the device's choice, and no more part of an identity than the device
    facts["compile"] = engine.compile in (True, "reduce-overhead")
    return facts


def own_facts(stage: Stage, said: dict[str, Any], index: int) -> dict[str, Any]:
    """Of the stage's own settings, in `said` as plain values."""
    facts = without(
        said,
        "name",
        *OVERRIDES,
        *IDLE_OF_SCHEDULE[stage.schedule],
        *(() if index else ("inherit",)),
    )
    for key in ("unfreeze_at", "freeze_statistics", "layer_decay", "rates", "anchor", "lora"):
        if facts[key] == Stage.model_fields[key].get_default(call_default_factory=True):
            del facts[key]
    if "rates" in facts and order_counts(list(facts["rates"])):  # a hash of a mapping knows none
        facts["rates"] = [list(pair) for pair in facts["rates"].items()]
    if facts["freeze"]:  # said even where it is the default: once, statistics went on
        facts["freeze_statistics"] = stage.freeze_statistics
    else:
        facts.pop("freeze_statistics", None)
    if index:
        facts["inherit"] = inherit_facts(stage.inherit)
    return facts


def order_counts(parts: Sequence[str]) -> bool:
    """Whether `rates` of these roles and prefixes may mean another thing than the same ones sorted:
    two that a parameter may belong to, of which the last counts, stand the other way round."""
    apart = {"encoder", "decoder", "head"}
    roles = {*apart, "backbone", "all"}
    return any(
        first > then
        and not {first, then} <= apart
        and (not roles.isdisjoint({first, then}) or first.startswith(then))
        for first, then in itertools.combinations(parts, 2)
    )


def inherit_facts(inherit: Inherit) -> str | dict[str, Any]:
    """In the words of before there were more than two, where these will do."""
    if inherit.plain:
        return "weights+optimizer" if inherit.optimizer else "weights"
    return inherit.model_dump(mode="json")


def model_facts(model: dict[str, Any], index: int) -> dict[str, Any]:
    """Weights to start from count in the first stage, by what is in the file, not by where it
    lies."""
    facts = {key: model[key] for key in ("name", "options", "head")}
    if model["weights"] is not None and index == 0:
        if model["weights_sha256"] is None:
            raise InputError("model.weights_sha256: missing; read the recipe by `load_recipe`")
        facts |= {key: model[key] for key in ("weights_sha256", "mapping", "strict")}
    return facts


def stage_uids(recipe: Recipe, manifest: Manifest | Manifests) -> list[str]:
    """One uid per stage; beginnings of two recipes that resolve to the same have equal uids."""
    uids: list[str] = []
    manifests = manifests_of(recipe, manifest)
    for index, own, _ in stages_of(recipe, manifests):
        uids.append(stage_uid(uids[-1] if uids else None, stage_facts(own, manifests, index)))
    return uids


def stage_uid(parent: str | None, facts: dict[str, Any]) -> str:
    """The uid of a stage from its parent's uid and its own facts: a hash of `json.dumps([parent,
    facts], sort_keys=True)`."""
    head = json.dumps(
        [parent, {key: value for key, value in facts.items() if key != "train"}], sort_keys=True
    )
    # "train" is the last key, long, and the same for many stages
    whole = f'{head[:-2]}, "train": {_encoded(tuple(facts["train"]))}}}]'
    return hashlib.sha256(whole.encode()).hexdigest()[:12]


@functools.lru_cache(maxsize=64)
def _encoded(ids: tuple[str, ...]) -> str:
    return json.dumps(ids)


def note_identity(path: Path, recipe: Recipe, manifest: Manifest | Manifests, index: int) -> None:
    """Keep in the folder of stage `index` what its uid was made of, so that a later run can say how
    it differs."""
    if not (path / IDENTITY).exists():
        facts = _noted(recipe, manifest, index)
        write_json(path / IDENTITY, {"name": recipe.name, "facts": facts})


def _noted(recipe: Recipe, manifest: Manifest | Manifests, index: int) -> dict[str, Any]:
    """The facts of a stage, with a hash for the training cases."""
    facts = stage_facts(resolve(recipe, index), manifests_of(recipe, manifest), index)
    train = hashlib.sha256(_encoded(tuple(facts["train"])).encode()).hexdigest()[:16]
    return {**facts, "train": train}


def differences(
    recipe: Recipe, manifest: Manifest | Manifests, index: int, other: Path
) -> list[str] | None:
    """How stage `index` of a recipe differs from the stage in the folder `other`, a few words each;
    None if that one has no note of its identity."""
    noted = read_json(other / IDENTITY)
    if noted is None or not isinstance(noted.get("facts"), dict):
        return None
    before = _flat(noted["facts"])
    now = _flat(json.loads(json.dumps(_noted(recipe, manifest, index))))
    keys = [key for key in {**before, **now} if before.get(key) != now.get(key)]
    return [_in_words(key, index, before.get(key), now.get(key)) for key in keys]


def _flat(facts: dict[str, Any], before: str = "") -> dict[str, Any]:
    """{"a": {"b": 1}} -> {"a.b": 1}."""
    flat: dict[str, Any] = {}
    for key, value in facts.items():
        flat |= (
            _flat(value, f"{before}{key}.") if isinstance(value, dict) else {before + key: value}
        )
    return flat


def _in_words(key: str, index: int, before: Any, now: Any) -> str:
    section, _, rest = key.partition(".")
    if section == "sources":
        return f"the code of {rest}"
    if section in ("numerics", "store", "stores", "train"):
        return {
            "numerics": "the version of segfleet, whose results differ",
            "store": "the store's content",
            "stores": "the stores, their weights or their training cases",
            "train": "the training cases",
        }[section]
    name = f"stages.{index}.{rest}" if section == "stage" else key
    return f"{name} ({json.dumps(now)}, there {json.dumps(before)})"
