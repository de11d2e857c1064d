"""The recipe: one YAML document that says everything about a run. Strict: an unknown key or an
illegal value is refused by name."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from segfleet.core import settings
from segfleet.core.errors import InputError, did_you_mean
from segfleet.core.files import absolute, file_facts, unstamped
from segfleet.pipeline.sections import (
    Above,
    Augment,
    Data,
    Engine,
    Evaluation,
    Loss,
    Model,
    Optimizer,
    Positive,
    Section,
)
from segfleet.pipeline.stage import OVERRIDES, Changes, Stage

RECIPES = Path(__file__).parent / "recipes"


class Recipe(Section):
    """Everything about a run."""

    name: str = Field(description="for people; does not change the result")
    seed: Annotated[int, Field(ge=0, le=2**63 - 1)] = Field(
        0, description="of weights, sampling and augmentation"
    )
    task: Literal["segment", "reconstruct"] = Field(
        "segment",
        description="reconstruct: a masked autoencoder, which needs no labels and is not scored; "
        "skip connections are off, the loss is the squared error of what is hidden",
    )
    data: Data = Field(default_factory=Data, description="cases and patches")
    model: Model = Field(description="which network")
    loss: Loss = Field(default_factory=Loss, description="what is minimised")
    optimizer: Optimizer = Field(default_factory=Optimizer, description="how")
    stages: tuple[Stage, ...] = Field(min_length=1, description="in order")
    engine: Engine = Field(default_factory=Engine, description="on what")
    evaluation: Evaluation = Field(default_factory=Evaluation, description="how it is scored")
    trackers: tuple[Literal["tensorboard", "wandb", "mlflow"], ...] = Field(
        ("tensorboard",),
        description="what the curves, pictures and scores are also written for; wandb and mlflow "
        "write files unless their own variables name a server. Changes no result",
    )
    save_minutes: Above = Field(
        10.0, description="minutes between checkpoints; a stop saves at once, too"
    )
    save_every: Positive | None = Field(
        None, description="steps between checkpoints, beside those by the clock; none: only these"
    )

    @model_validator(mode="after")
    def _fits_together(self) -> Recipe:
        for index, stage in enumerate(self.stages):
            own = resolve(self, index)
            where = "" if own is self else f"stages.{index} ({stage.name}): "
            if own.data.batch % own.engine.accumulate:
                raise ValueError(
                    f"{where}data.batch {own.data.batch} must be a multiple of engine.accumulate "
                    f"{own.engine.accumulate}"
                )
            if stage.patience and own.task == "reconstruct":
                raise ValueError(
                    f"stages.{index}.patience: a reconstruction is not validated; set 0"
                )
            if stage.patience and not own.evaluation.every:
                raise ValueError(f"{where}a stage with patience needs evaluation.every > 0")
            if stage.unfreeze_at and not stage.freeze:
                raise ValueError(f"stages.{index}.unfreeze_at: nothing is frozen; set freeze")
            if stage.lora and (
                clash := [k for k in ("anchor", "unfreeze_at") if getattr(stage, k)]
            ):
                raise ValueError(
                    f"stages.{index}.{clash[0]}: does not go with lora, whose stage keeps what it "
                    "inherits as it is; leave one out"
                )
            if stage.lora and own.engine.name != "ddp":
                raise ValueError(
                    f"stages.{index}.lora: found engine.name={own.engine.name}; expected ddp"
                )
            if stage.lora and not index and own.model.weights is None:
                raise ValueError(
                    f"stages.{index}.lora: there is nothing to adapt; a first stage needs "
                    "model.weights"
                )
            if stage.anchor and not index and own.model.weights is None:
                raise ValueError(
                    f"stages.{index}.anchor: there is nothing to be near to; a first stage needs "
                    "model.weights"
                )
            given = own.model.weights
            if index and given is not None and given != resolve(self, 0).model.weights:
                raise ValueError(
                    f"stages.{index}.model.weights: found {given}, but this stage starts from the "
                    "one before; a file is what the first stage starts from"
                )
            if not index or not stage.inherit.optimizer:
                continue
            before = resolve(self, index - 1).optimizer.name
            if before != own.optimizer.name:
                raise ValueError(
                    f"stages.{index}.inherit.optimizer: found true, but the stage before is "
                    f"trained by {before}, whose moments {own.optimizer.name} does not have"
                )
        return self


def resolve(recipe: Recipe, index: int = -1) -> Recipe:
    """The same run with the settings of stage `index` as the recipe's own; by default the last
    stage's, by which a run is scored.

    The other stages then say what is another thing for them, so that every stage means what it
    meant, and recipes that say the same in different words become equal.
    """
    if not any(getattr(stage, key) is not None for stage in recipe.stages for key in OVERRIDES):
        return recipe
    settled = [
        {key: _merged(getattr(recipe, key), getattr(stage, key)) for key in OVERRIDES}
        for stage in recipe.stages
    ]
    own = settled[index]
    stages = tuple(
        stage.model_copy(
            update={
                key: None
                if value == own[key]
                else _changed(Stage.model_fields[key], value, own[key])
                for key, value in merged.items()
            }
        )
        for stage, merged in zip(recipe.stages, settled, strict=True)
    )
    return recipe.model_copy(update={**own, "stages": stages})


def _merged(section: Any, changes: Any) -> Any:
    """A section of the recipe with a stage's changes."""
    if not isinstance(changes, Changes):
        return section if changes is None else changes
    said = {key: getattr(changes, key) for key in changes.model_fields_set}
    if isinstance(section, Data) and said.get("store", section.store) != section.store:
        alone = {
            key: Data.model_fields[key].default for key in ("split", "fold", "made_for", "stores")
        }
        said = alone | said  # of one store they say nothing of another
        section = section.model_copy(update={"made_for": None})
    if "options" in type(section).model_fields and said.get("name", section.name) != section.name:
        said = {"options": {}} | said
    for key, value in said.items():
        if isinstance(value, Changes):  # of augmentation, which may have been off
            said[key] = _merged(getattr(section, key) or Augment(), value)
    return section.model_copy(update=said)


def _changed(field: Any, value: Any, base: Any) -> Any:
    """The changes that make a section of another one, as `_merged` reads them."""
    if not isinstance(value, Section):
        return value
    kind = settings.section_of(field.annotation)
    assert kind is not None, "a section's value has a section's type"
    said = {key: getattr(value, key) for key in type(value).model_fields}
    needed = (
        {"split", "fold", "made_for", "stores"}
        if said.get("store") != getattr(base, "store", None)
        else ()
    )
    needed = {*needed, *({"options"} if said.get("name") != getattr(base, "name", None) else ())}
    said = {k: v for k, v in said.items() if k in needed or v != getattr(base, k)}
    if isinstance(said.get("augment"), Augment):
        inner = kind.model_fields["augment"]
        said["augment"] = _changed(inner, said["augment"], base.augment or Augment())
    return kind.model_construct(set(said), **said)


def members(recipe: Recipe) -> list[Recipe]:
    """A resolved recipe for each of its stores alone: itself where there is but one."""
    if not recipe.data.stores:
        return [recipe]
    return [
        recipe.model_copy(
            update={"data": recipe.data.model_copy(update={"store": store.store, "stores": ()})}
        )
        for store in recipe.data.stores
    ]


def cut(recipe: Recipe, index: int) -> Recipe:
    """The run that ends with stage `index`."""
    return resolve(recipe.model_copy(update={"stages": recipe.stages[: index + 1]}))


TEXTS = settings.text_keys(Recipe)  # keys whose values stay text
NAMED = settings.named_keys(Recipe)  # keys that map names, of parameters or structures, to a value


def recipe_names() -> list[str]:
    """Names of the shipped recipes."""
    return sorted(path.stem for path in RECIPES.glob("*.yaml"))


def read_document(source: str) -> dict[str, Any]:
    """The YAML mapping of a file or of a shipped recipe's name. Raises InputError."""
    path = Path(source)
    if not path.is_file():
        path = RECIPES / f"{source}.yaml"
        if source == "auto":
            raise InputError(
                "recipe: 'auto' is planned by `segfleet train auto data.store=STORE` where it "
                "trains; for other commands `segfleet plan STORE --out recipe.yaml` writes it"
            )
        if not path.is_file() or "/" in source:
            settings.check_regular(source, "recipe")
            raise InputError(
                f"recipe: found no file '{source}' and no shipped recipe of that name; shipped: "
                f"{', '.join(recipe_names())}.{did_you_mean(source, recipe_names())}"
            )
    document = settings.read(path, "recipe", TEXTS)
    if not isinstance(document, dict):
        raise InputError(
            f"recipe: {path} holds {type(document).__name__}, expected a mapping of keys to values"
        )
    return document


def override(document: dict[str, Any], changes: list[str]) -> dict[str, Any]:
    """A copy with every change `key.path=value` applied. Raises InputError."""
    return settings.override(document, changes, TEXTS, named=NAMED)


def parse(document: dict[str, Any], source: str = "recipe") -> Recipe:
    """A validated recipe. Raises InputError that names every wrong key, its value and the legal
    ones."""
    return settings.validate(Recipe, unstamped(document), source)


def load_recipe(source: str, changes: list[str] | None = None) -> Recipe:
    """Read, override and validate. `source` is a file or the name of a shipped recipe."""
    return with_digest(parse(override(read_document(source), changes or []), source))


def with_digest(recipe: Recipe) -> Recipe:
    """The recipe with the sha256 and the absolute path of its `model.weights`, and of its stages'.
    Raises InputError if the file is not there or another one than the recipe says."""
    stages = tuple(
        stage.model_copy(update={"model": _with_digest(stage.model, f"stages.{index}.model")})
        for index, stage in enumerate(recipe.stages)
    )
    return recipe.model_copy(
        update={"model": _with_digest(recipe.model, "model"), "stages": stages}
    )


def _with_digest(model: Any, where: str) -> Any:
    if model is None or model.weights is None:
        return model
    path = absolute(model.weights)
    if not path.is_file():
        raise InputError(f"{where}.weights: found no file {path}; relative to the working folder")
    sha256 = str(file_facts(path)["sha256"])
    if model.weights_sha256 not in (None, sha256):
        raise InputError(
            f"{where}.weights: {path} has sha256 {sha256}, but the recipe says "
            f"{model.weights_sha256}"
        )
    return model.model_copy(update={"weights": str(path), "weights_sha256": sha256})


def with_absolute_store(recipe: Recipe) -> Recipe:
    """The resolved recipe, its stores as absolute paths, so that any working folder will do. Raises
    InputError if a stage has none."""
    recipe = resolve(recipe)
    stages = tuple(
        stage.model_copy(update={"data": _absolute(stage.data, f"stages.{index}.data")})
        for index, stage in enumerate(recipe.stages)
    )
    return recipe.model_copy(update={"data": _absolute(recipe.data, "data"), "stages": stages})


def _absolute(data: Any, where: str) -> Any:
    if data is None or (isinstance(data, Changes) and "store" not in data.model_fields_set):
        return data
    if not data.store:
        raise InputError(
            f"{where}.store: missing; name the folder of a store, for example "
            f"{where}.store=stores/hippocampus"
        )
    update: dict[str, Any] = {"store": _resolved(data.store)}
    if data.stores:
        update["stores"] = tuple(
            store.model_copy(update={"store": _resolved(store.store)}) for store in data.stores
        )
    return data.model_copy(update=update)


def _resolved(store: str) -> str:
    return str(absolute(Path(store).expanduser()))
