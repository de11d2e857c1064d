"""Identity and folders of a run. `runs/<uid of stage 1>/<uid of stage 2>/...`: the tree on disk is
the state.

Equal identity means equal result: the hash takes in everything that changes it and nothing else (no
workers, launcher, logging).
"""

from __future__ import annotations

import functools
import hashlib
import itertools
import json
import os
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from segfleet.core.errors import InputError, did_you_mean
from segfleet.core.files import absolute, read_json, write_json
from segfleet.core.lock import Lock, holder
from segfleet.pipeline.recipe import OVERRIDES, Inherit, Recipe, Stage, members, parse, resolve
from segfleet.pipeline.sections import Engine
from segfleet.pipeline.sources import NUMERICS, changed_sources
from segfleet.preprocess.stores.manifest import Manifest, load_manifest

if TYPE_CHECKING:  # it needs torch, which a process that only looks at runs must not load
    from segfleet.pipeline import checkpoint

RECIPE, DONE, LOCK = "recipe.json", "done.json", "lock"
CHECKPOINTS = "checkpoints"
IDENTITY, DATA = "identity.json", "data.json"
FOLDS = "folds"  # folder below that of all runs: scores over all folds, see `scoring/folds.py`

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
            for one in members(own):
                training_ids(one, manifests(one))
        except InputError as error:
            raise InputError(named(error, own is not recipe, index, stage)) from None
        yield index, own, stored


def named(error: Exception, several: bool, index: int, stage: Stage) -> str:
    """A message that says which stage it is about, where stages have `several` settings."""
    plain = not several or str(error).startswith("stages.")
    return str(error) if plain else f"stages.{index} ({stage.name}): {error}"


def _version(store: Path) -> tuple[int, int]:
    with suppress(OSError):
        facts = (store / "manifest.json").stat()
        return facts.st_ino, facts.st_mtime_ns
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
    found = []
    for number, one in enumerate(members(recipe)):
        stored = manifests(one)
        weight = recipe.data.stores[number].weight if recipe.data.stores else None
        found.append((one, stored, weight or len(training_ids(one, stored))))
    return found


def stage_facts(recipe: Recipe, manifest: Manifest | Manifests, index: int) -> dict[str, Any]:
    """Everything about stage `index` that changes its result, its parents left out. `recipe` is
    resolved for that stage, `manifest` that of its store."""
    manifests = manifests_of(recipe, manifest)
    manifest = manifests(recipe)
    whole = recipe.model_dump(mode="json")
    rebuilds = recipe.task == "reconstruct"
    data = {
        key: value
        for key, value in whole["data"].items()
        if key not in ("made_for", "store", "stores", "workers", "split", "fold", "cases")
        and (key != "mask" or rebuilds)
    }
    if data["augment"]:  # where it is computed is no more part of an identity than the device
        data["augment"] = {k: v for k, v in data["augment"].items() if k != "device"}
    engine = {
        key: value
        for key, value in whole["engine"].items()
        if key not in ("name", "options", "checkpoint_activations")
        and not (key in LATER_OF_ENGINE and value == Engine.model_fields[key].default)
    }
    # auto is the device's choice, and no more part of an identity than the device
    engine["compile"] = recipe.engine.compile in (True, "reduce-overhead")
    idle = (
        "name",
        *OVERRIDES,
        *IDLE_OF_SCHEDULE[recipe.stages[index].schedule],
        *(() if index else ("inherit",)),
    )
    stage = {key: value for key, value in whole["stages"][index].items() if key not in idle}
    for key in ("unfreeze_at", "freeze_statistics", "layer_decay", "rates", "anchor", "lora"):
        if stage[key] == Stage.model_fields[key].get_default(call_default_factory=True):
            del stage[key]
    if "rates" in stage and order_counts(list(stage["rates"])):  # a hash of a mapping knows none
        stage["rates"] = [list(pair) for pair in stage["rates"].items()]
    if stage["freeze"]:  # said even where it is the default: once, statistics went on
        stage["freeze_statistics"] = recipe.stages[index].freeze_statistics
    else:
        stage.pop("freeze_statistics", None)
    if index:
        stage["inherit"] = inherit_facts(recipe.stages[index].inherit)
    optimizer = {
        key: value
        for key, value in whole["optimizer"].items()
        if key not in IDLE_OF_OPTIMIZER[recipe.optimizer.name]
        and (key != "decay" or recipe.optimizer.weight_decay)
    }
    if stage.get("patience"):  # only then does validation decide how long a stage is
        stage["validation"] = [
            {key: value for key, value in whole["evaluation"].items() if key != "tolerance"},
            list(manifest.fold(recipe.data.split, recipe.data.fold)["val"]),
        ]
    several = [
        [stored.id, weight, list(training_ids(one, stored))]
        for one, stored, weight in (shares_of(recipe, manifests) if recipe.data.stores else ())
    ]
    changed = changed_sources(recipe.model.name, recipe.loss.name)
    return {
        "numerics": NUMERICS,
        **({"sources": changed} if changed else {}),
        **({"task": recipe.task} if rebuilds else {"loss": whole["loss"]}),
        "store": manifest.id,
        **({"stores": several} if several else {}),
        "train": list(training_ids(recipe, manifest)),
        "seed": recipe.seed,
        "data": data,
        "model": model_facts(whole["model"], index),
        "optimizer": optimizer,
        "engine": engine,
        "index": index,
        "stage": stage,
    }


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


def stage_steps(recipe: Recipe, manifest: Manifest | Manifests) -> list[int]:
    """Optimizer steps of an epoch of every stage; by default one pass over the training cases."""
    found = []
    manifests = manifests_of(recipe, manifest)
    for index, own, _ in stages_of(recipe, manifests):
        cases = sum(len(training_ids(one, manifests(one))) for one in members(own))
        found.append(recipe.stages[index].steps or max(1, -(-cases // own.data.batch)))
    return found


@dataclass(frozen=True, kw_only=True)
class StageFolder:
    """The folder of one stage of a run."""

    path: Path
    index: int

    @property
    def checkpoints(self) -> Path:
        return self.path / CHECKPOINTS

    def done(self) -> dict[str, Any] | None:
        """{"checkpoint": folder name, ...} once the stage is finished, else None."""
        found = read_json(self.path / DONE)
        if found is None:
            return None
        best, step = (
            found.get("best") or {},
            re.fullmatch(r"step-\d{8,}", str(found.get("checkpoint"))),
        )
        whole = step and isinstance(best, dict) and isinstance(best.get("step", 0), int)
        return {**found, "best": best} if whole else None

    def check_done(self) -> dict[str, Any]:
        """`done`. Raises InputError if the stage is not finished; looks into no checkpoint."""
        if (found := self.done()) is None:
            raise InputError(
                f"checkpoint: stage {self.index + 1} in {self.path} is not finished; train it first"
            )
        return found

    def final(self) -> checkpoint.Checkpoint:
        """The checkpoint of a finished stage. Raises CheckpointError."""
        from segfleet.pipeline import checkpoint

        done = self.done()
        if done is None:
            raise checkpoint.CheckpointError(
                f"checkpoint: stage {self.index + 1} in {self.path} is not finished; train it first"
            )
        return self.load(done["checkpoint"])

    def load(self, name: str) -> checkpoint.Checkpoint:
        """A checkpoint that a finished stage must have, by its folder's name. Raises
        CheckpointError that says how to mend it."""
        from segfleet.pipeline import checkpoint

        try:
            return checkpoint.load(self.checkpoints / name)
        except checkpoint.CheckpointError as error:
            raise checkpoint.CheckpointError(
                f"{error}; run `segfleet train` again: it trains this stage again"
            ) from None

    def finish(self, name: str, **facts: Any) -> None:
        write_json(self.path / DONE, {"checkpoint": name, **facts})


def note_identity(folder: StageFolder, recipe: Recipe, manifest: Manifest | Manifests) -> None:
    """Keep in a stage's folder what its uid was made of, so that a later run can say how it
    differs."""
    if not (folder.path / IDENTITY).exists():
        own = resolve(recipe, folder.index)
        facts = stage_facts(own, manifests_of(recipe, manifest), folder.index)
        facts["train"] = hashlib.sha256(_encoded(tuple(facts["train"])).encode()).hexdigest()[:16]
        document = {"name": recipe.name, "facts": facts}
        write_json(folder.path / IDENTITY, document)


def differences(
    recipe: Recipe, manifest: Manifest | Manifests, index: int, other: Path
) -> list[str] | None:
    """How stage `index` of a recipe differs from the stage in the folder `other`, a few words each;
    None if that one has no note of its identity."""
    noted = read_json(other / IDENTITY)
    if noted is None or not isinstance(noted.get("facts"), dict):
        return None
    before = _flat(noted["facts"])
    own = resolve(recipe, index)
    facts = json.loads(json.dumps(stage_facts(own, manifests_of(recipe, manifest), index)))
    facts["train"] = hashlib.sha256(_encoded(tuple(facts["train"])).encode()).hexdigest()[:16]
    now = _flat(facts)
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


def stage_folders(root: Path, recipe: Recipe, manifest: Manifest | Manifests) -> list[StageFolder]:
    """The folders of all stages, first to last; not created here. `manifest`: that of the recipe's
    own store."""
    folders, path = [], Path(root)
    try:
        str(path.absolute()).encode()
    except UnicodeEncodeError:
        raise InputError(
            f"runs: {str(path)!a} is no UTF-8, as safetensors wants paths to be; choose another"
        ) from None
    for index, uid in enumerate(stage_uids(recipe, manifest)):
        path = path / uid
        folders.append(StageFolder(path=path, index=index))
    return folders


def folder_at(path: Path) -> Path:
    """A run's own folder, absolute. Links above it stay; it lies in its earlier stages, so one that
    is itself a link is followed."""
    path = absolute(path)
    while path.is_symlink():
        path = absolute(path.parent / os.readlink(path))
    return path


def open_run(path: Path) -> tuple[Recipe, list[StageFolder]]:
    """Recipe, resolved for the last stage, and stage folders of the run whose last stage is in
    `path`. Raises InputError."""
    path = folder_at(path)
    if not (path / RECIPE).is_file():
        raise InputError(
            f"run: {path} holds no {RECIPE}, so it is no run folder; `segfleet status` lists the "
            "runs under a folder"
        )
    if (document := read_json(path / RECIPE)) is None:
        raise InputError(
            f"run: {path / RECIPE} is damaged; the command that began the run writes it again"
        )
    recipe = resolve(parse(document, str(path / RECIPE)))
    chain = [path, *path.parents][: len(recipe.stages)][::-1]
    return recipe, [StageFolder(path=folder, index=index) for index, folder in enumerate(chain)]


def note_data(path: Path, manifest: Manifest) -> None:
    """Keep data set and plan of the store in a run folder: a trained network does not need its
    training data."""
    known: dict[str, Any] = {"cases": (), "splits": {}, "files": {}}
    known |= {"joined": None, "fingerprint": {}}
    document = manifest.model_copy(update=known).model_dump(mode="json")
    if read_json(path / DATA) != document:
        path.mkdir(parents=True, exist_ok=True)
        write_json(path / DATA, document)


def data_of(path: Path, recipe: Recipe) -> Manifest:
    """Data set and plan of a run, without cases: from its own folder; of runs that kept none, from
    their store. Raises InputError."""
    if (path / DATA).exists():
        try:
            return Manifest.model_validate(read_json(path / DATA))
        except ValueError:
            raise InputError(
                f"run: {path / DATA} is damaged; remove it, and the store is asked"
            ) from None
    try:
        return load_manifest(Path(recipe.data.store))
    except InputError as error:
        raise InputError(
            f"{error.args[0]} The run {path.name} was made before runs kept what they need of it: "
            f"once, `segfleet evaluate {path.name} data.store=FOLDER` with where the store is now"
        ) from None


def find_run(text: str, root: Path, fold: int | None = None, best: bool = False) -> Path:
    """A run folder from its path, the beginning of its uid, or its recipe's name below `root`. Of
    several: that of `fold`, and with `best` that of the highest score. Raises InputError that
    lists them."""
    if (Path(text) / RECIPE).is_file():
        return folder_at(Path(text))
    known = {folder: _outline(folder) for folder in run_folders(absolute(root))}
    fitting = {
        folder: facts
        for folder, facts in known.items()
        if folder.name.startswith(text) or facts["name"] == text
    }
    if not fitting:
        others = ", ".join(f"{f.name} ({facts['name']})" for f, facts in known.items())
        others = others or "none; `segfleet train RECIPE` makes one"
        near = did_you_mean(text, {facts["name"] for facts in known.values()})
        raise InputError(f"run: found no run '{text}'; runs under {root}: {others}.{near}")
    found = {
        folder: facts for folder, facts in fitting.items() if fold is None or facts["fold"] == fold
    }
    if best and (scored := {f: facts for f, facts in found.items() if facts["score"] is not None}):
        return max(scored, key=lambda folder: scored[folder]["score"])
    if len(found) == 1:
        return next(iter(found))
    lines = [
        f"  {folder.name}  fold {facts['fold']}  "
        + ("not scored" if facts["score"] is None else f"Dice {facts['score']:.4f}")
        for folder, facts in (found or fitting).items()
    ]
    what = f"'{text}'" + ("" if fold is None else f" with fold {fold}")
    raise InputError(
        f"run: {what} fits {len(found)} runs under {root}; give the uid of one, or --fold N, or "
        "--best, the highest score; predict and export take --fold all, an ensemble:\n"
        + "\n".join(lines)
    )


def _outline(folder: Path) -> dict[str, Any]:
    """Name, fold and score (None before there is one) of a run, as far as its files can be read."""
    facts: dict[str, Any] = {"name": "", "fold": None, "score": None}
    recipe, scores = read_json(folder / RECIPE) or {}, read_json(folder / "evaluation.json") or {}
    facts["name"] = str(recipe.get("name", ""))
    with suppress(KeyError, TypeError):
        facts["fold"] = recipe["data"]["fold"]
    with suppress(KeyError, TypeError):
        facts["score"] = scores["summary"]["mean_foreground_dice"]
    return facts


def run_folders(root: Path) -> list[Path]:
    """Folders that hold a whole run's recipe, in a fixed order."""
    found = []
    for folder, inner, files in os.walk(root):  # passes over what a running job removes meanwhile
        inner[:] = [name for name in inner if name != CHECKPOINTS and not name.startswith(".")]
        if RECIPE in files:
            found.append(Path(folder))
    return sorted(folder for folder in found if folder.parent.name != FOLDS)


def root_of(folder: Path, recipe: Recipe) -> Path:
    """The folder of all runs, from a run's: its stages lie inside one another."""
    return Path(folder).parents[len(recipe.stages) - 1]


ADVICE = "; wait or stop it, then run the same command again"


def lock_stage(folder: Path, stopped: Callable[[], bool] = lambda: False) -> Lock:
    """The lock of one stage, or of a sweep: one process at a time works there. Raises InputError
    that names the holder."""
    folder.mkdir(parents=True, exist_ok=True)
    lock = Lock(folder / LOCK)
    if not lock.acquire(stopped=stopped):
        who = holder(folder / LOCK) or "another process"
        raise InputError(f"run: {folder} is being trained by {who}{ADVICE}")
    lock.sign()
    return lock
