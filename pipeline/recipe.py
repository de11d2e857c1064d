"""The recipe: one YAML document that says everything about a run. Strict: an unknown key or an
illegal value is refused by name."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import (
    BeforeValidator,
    Field,
    create_model,
    field_validator,
    model_serializer,
    model_validator,
)

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
    first_store,
)

RECIPES = Path(__file__).parent / "recipes"


class Changes(Section):
    """Some keys of a section, each of which may be left out: what a stage says otherwise."""

    @model_serializer(mode="wrap")
    def _said(self, handler: Callable[[Any], dict[str, Any]]) -> dict[str, Any]:
        return {key: value for key, value in handler(self).items() if key in self.model_fields_set}


def _changes(section: type[Section]) -> type[Changes]:
    """`section` with all keys optional."""
    fields: dict[str, Any] = {}
    for name, field in section.model_fields.items():
        annotation: Any = field.annotation
        field = copy.copy(field)
        field.default, field.default_factory = None, None
        if annotation == Augment | None:
            annotation = AUGMENT_CHANGES | None
        fields[name] = (annotation, field)
    first: Any = model_validator(mode="before")(first_store)
    checks = {"first": first} if section is Data else None
    return create_model(
        f"{section.__name__}Changes", __base__=Changes, __doc__=section.__doc__,
        __validators__=checks, **fields,
    )  # fmt: skip


# what a stage may say otherwise than its recipe
if TYPE_CHECKING:  # a class that is made is no type to mypy
    AUGMENT_CHANGES = Changes
    DATA_CHANGES = Changes
    MODEL_CHANGES = Changes
    LOSS_CHANGES = Changes
    OPTIMIZER_CHANGES = Changes
    ENGINE_CHANGES = Changes
    EVALUATION_CHANGES = Changes
else:
    AUGMENT_CHANGES = _changes(Augment)
    DATA_CHANGES, MODEL_CHANGES, LOSS_CHANGES = map(_changes, (Data, Model, Loss))
    OPTIMIZER_CHANGES, ENGINE_CHANGES = map(_changes, (Optimizer, Engine))
    EVALUATION_CHANGES = _changes(Evaluation)
OVERRIDES = ("seed", "task", "data", "model", "loss", "optimizer", "engine", "evaluation")


class Inherit(Section):
    """What a stage takes over from the stage before it."""

    weights: Literal["all", "encoder", "backbone"] | tuple[str, ...] = Field(
        "all",
        description="all; encoder; backbone, all but the head; or a list of roles (also decoder, "
        "head) and of beginnings of parameter names",
    )
    head: Literal["keep", "new", "map"] = Field(
        "keep",
        description="keep: as it is, for the same classes; new: as initialised; map: the rows of "
        "labels that both stages know by name",
    )
    classes: dict[str, str] = Field(
        default_factory=dict, description="with map: label here -> label of the stage before"
    )
    optimizer: bool = Field(
        False, description="whether the moments of what is taken over as it is come along"
    )
    channels: Literal["repeat", "mean", "new"] = Field(
        "repeat",
        description="first layer for other image channels: theirs in turn, their mean for each, or "
        "as initialised",
    )

    @model_validator(mode="after")
    def _classes_are_read(self) -> Inherit:
        if self.classes and self.head == "keep":
            raise ValueError(
                "classes: nothing reads them where the head is kept as it is; set head: map"
            )
        return self

    @field_validator("weights")
    @classmethod
    def _parts(cls, given: str | tuple[str, ...]) -> str | tuple[str, ...]:
        if not given:
            raise ValueError(
                "A stage that takes over nothing is no stage of this run; name a part, or leave "
                "out the stages before it"
            )
        if "all" in given and len(given) > 1 and not isinstance(given, str):
            raise ValueError(
                "all leaves nothing for the others to add; expected one of them, and as values of "
                "a sweep lists in a list: [[all], [encoder]]"
            )
        # one part is the same in a list or not
        return given[0] if given in (("all",), ("encoder",), ("backbone",)) else given

    @property
    def plain(self) -> bool:
        """Whether everything is taken over, weights at least."""
        return self == Inherit(optimizer=self.optimizer)


# how it was said before there was more to say
PLAIN = {"weights": {}, "weights+optimizer": {"optimizer": True}}


def _inherit(value: Any) -> Any:
    if isinstance(value, str):
        if value not in PLAIN:
            raise ValueError(f"Expected {' or '.join(PLAIN)}, or keys of its own")
        return PLAIN[value]
    return value


class Lora(Section):
    """Adapters of low rank."""

    rank: Positive = Field(8, description="columns of the thin matrices")
    alpha: Above = Field(16.0, description="what they add is scaled by alpha / rank")


class Stage(Section):
    """One stretch of training. The next stage starts from the last checkpoint of this one."""

    name: str = Field("train", description="shown in logs and reports; does not change the result")
    epochs: Annotated[int, Field(ge=0)] = Field(
        description="epochs of this stage; 0 trains nothing and keeps what it starts from, such as "
        "the weights of `model.weights`"
    )
    steps: Positive | None = Field(
        None, description="optimizer steps of an epoch; none: one pass over the training cases"
    )
    lr: Above = Field(description="peak learning rate")
    schedule: Literal["constant", "poly", "cosine"] = Field(
        "constant", description="how the rate falls to `floor` over the stage"
    )
    power: Above = Field(0.9, description="exponent of the poly schedule")
    period: Positive | None = Field(
        None,
        description="epochs in which the cosine falls; then it rises as long, and so on; none: "
        "the stage",
    )
    warmup: Annotated[int, Field(ge=0)] = Field(0, description="steps of linear warm-up from 0")
    floor: Annotated[float, Field(ge=0)] = Field(
        0.0, description="lowest rate of the cosine and poly schedules"
    )
    patience: Annotated[int, Field(ge=0)] = Field(
        0,
        description="end the stage after so many validations without a better "
        "`evaluation.select`; 0: never",
    )
    inherit: Annotated[Inherit, BeforeValidator(_inherit)] = Field(
        Inherit(),
        description="what is taken over from the stage before: weights, weights+optimizer, or keys",
    )
    freeze: tuple[str, ...] = Field(
        (),
        description="what is not trained in this stage: roles (encoder, decoder, head, backbone) "
        "or beginnings of parameter names",
    )
    unfreeze_at: Positive | None = Field(
        None, description="epochs after which what is frozen trains, too; none: the stage's end"
    )
    freeze_statistics: bool = Field(
        True, description="whether frozen batch normalisations keep their running statistics"
    )
    layer_decay: Annotated[float, Field(gt=0, le=1)] = Field(
        1.0, description="the rate of each layer as a share of the one behind it, head first"
    )
    rates: dict[str, Annotated[float, Field(ge=0)]] = Field(
        default_factory=dict,
        description="role or beginning of a parameter name -> factor of its rate; of several that "
        "fit the last counts",
    )
    lora: Lora | None = Field(
        None,
        description="train adapters of low rank on the linear and convolution layers, and the "
        "head; all else stays. Checkpoints hold the sums",
    )
    anchor: Annotated[float, Field(ge=0)] = Field(
        0.0,
        description="pulls what is inherited towards the weights it began with (L2-SP), in place "
        "of optimizer.weight_decay",
    )
    seed: Annotated[int, Field(ge=0, le=2**63 - 1)] | None = Field(
        None, description="another seed than the recipe's"
    )
    task: Literal["segment", "reconstruct"] | None = Field(
        None, description="another task than the recipe's"
    )
    data: DATA_CHANGES | None = Field(
        None,
        description="keys of `data` that are others in this stage; one with a store of its own "
        "takes split, fold and made_for from here alone",
    )
    model: MODEL_CHANGES | None = Field(None, description="keys of `model` that are others")
    loss: LOSS_CHANGES | None = Field(None, description="keys of `loss` that are others")
    optimizer: OPTIMIZER_CHANGES | None = Field(
        None, description="keys of `optimizer` that are others"
    )
    engine: ENGINE_CHANGES | None = Field(None, description="keys of `engine` that are others")
    evaluation: EVALUATION_CHANGES | None = Field(
        None, description="keys of `evaluation` that are others"
    )

    @model_serializer(mode="wrap")
    def _without_idle(self, handler: Callable[[Any], dict[str, Any]]) -> dict[str, Any]:
        """Overrides are left out where there are none."""
        said = handler(self)
        return {k: v for k, v in said.items() if v is not None or k not in OVERRIDES}


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
                for key, value in found.items()
            }
        )
        for stage, found in zip(recipe.stages, settled, strict=True)
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
            update={"data": recipe.data.model_copy(update={"store": one.store, "stores": ()})}
        )
        for one in recipe.data.stores
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
    found = str(file_facts(path)["sha256"])
    if model.weights_sha256 not in (None, found):
        raise InputError(
            f"{where}.weights: {path} has sha256 {found}, but the recipe says "
            f"{model.weights_sha256}"
        )
    return model.model_copy(update={"weights": str(path), "weights_sha256": found})


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
    found: dict[str, Any] = {"store": _resolved(data.store)}
    if data.stores:
        found["stores"] = tuple(
            one.model_copy(update={"store": _resolved(one.store)}) for one in data.stores
        )
    return data.model_copy(update=found)


def _resolved(store: str) -> str:
    return str(absolute(Path(store).expanduser()))
