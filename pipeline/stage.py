"""A stage of a recipe: one stretch of training, what it takes over from the stage before it, and
which of the recipe's settings are others in it."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import (
    BeforeValidator,
    Field,
    create_model,
    field_validator,
    model_serializer,
    model_validator,
)

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
