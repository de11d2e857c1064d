"""The sections of a recipe: which cases, which network, which loss, how a step is computed and how
the result is scored. Every key says what it does; unknown keys and illegal values are refused."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, model_validator

Positive = Annotated[int, Field(gt=0)]
Above = Annotated[float, Field(gt=0)]
Share = Annotated[float, Field(ge=0, le=1)]
Decay = Annotated[float, Field(ge=0, lt=1)]
MOST_WORKERS = {"cpu": 2, "cuda": 14}  # loader processes of a rank, of `data.workers: auto`


def _distinct(axes: tuple[int, ...]) -> tuple[int, ...]:
    if len(set(axes)) < len(axes):
        raise ValueError("An axis stands twice")
    return axes


def _rising(ends: tuple[float, float]) -> tuple[float, float]:
    if ends[0] > ends[1]:
        raise ValueError("The first value should not be greater than the second")
    return ends


Axes = Annotated[tuple[Annotated[int, Field(ge=0, le=2)], ...], AfterValidator(_distinct)]


Tolerance = Annotated[float, Field(gt=0)]


class Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class Augment(Section):
    """Probabilities are per sample. Spatial transforms are drawn before reading and cost one
    resampling pass together."""

    flip: Axes | None = Field(
        None, description="axes that may be mirrored (0 z, 1 y, 2 x); none: all"
    )
    rotation: Share = Field(0.2, description="probability of a rotation")
    angle: Annotated[float, Field(ge=0, le=180)] | None = Field(
        None,
        description="largest angle in degrees, in plane only when the patch is flat; null: 30, "
        "flat 180, 2D patches longer than 1.5 times their width 15",
    )
    rot90: bool = Field(
        False,
        description="turn by a multiple of 90 degrees in plane; the patch's y and x sizes must "
        "agree",
    )
    scale: Share = Field(0.2, description="probability of a change of scale")
    scale_range: Annotated[tuple[Above, Above], AfterValidator(_rising)] = Field(
        (0.7, 1.4),
        description="smallest and largest field of view against the patch: below 1 magnifies",
    )
    elastic: Share = Field(0.0, description="probability of an elastic deformation")
    elastic_size: Annotated[float, Field(ge=0)] = Field(
        8.0, description="typical displacement in voxels"
    )
    gamma: Share = Field(0.3, description="probability of a gamma transform")
    gamma_inverted: Share = Field(
        0.1, description="probability of a gamma transform of the inverted image"
    )
    contrast: Share = Field(0.15, description="probability of a change of contrast")
    brightness: Share = Field(0.15, description="probability of a change of brightness")
    noise: Share = Field(0.1, description="probability of Gaussian noise")
    blur: Share = Field(0.2, description="probability of a Gaussian blur")
    low_resolution: Share = Field(0.25, description="probability of a simulated low resolution")
    per_channel: bool = Field(
        True,
        description="intensity changes of each channel are drawn alone, blur and low resolution "
        "take half of the channels; false: all channels alike",
    )
    device: Literal["cpu", "auto"] = Field(
        "cpu",
        description="where patches are computed: cpu, in the loader; auto, on the GPU where one "
        "trains. The draws are the same, the noise has other bits; no part of a run's identity",
    )


class MadeFor(Section):
    """What a recipe expects of a store. It changes no result."""

    dataset: str = Field(
        description="name of the data set; training on another one is warned about"
    )
    channels: Positive | None = Field(
        None, description="image channels; a store with other ones is refused"
    )
    classes: Positive | None = Field(
        None, description="structures that are scored; a store with other ones is refused"
    )


class Mask(Section):
    """What is hidden of a patch that is to be reconstructed."""

    ratio: Annotated[float, Field(gt=0, lt=1)] = Field(0.6, description="share that is hidden")
    block: Positive = Field(8, description="edge of the hidden cubes (2D: squares), voxels")


class Source(Section):
    """One of several stores that patches are drawn from."""

    store: str = Field(min_length=1, description="folder of a shard store")
    weight: Positive | None = Field(
        None,
        description="how often it is drawn from, as a share of all weights; none: the number of "
        "its training cases",
    )


def first_store(document: Any) -> Any:
    """Of `stores` without `store`: the first is the one that says channels, classes and patch."""
    if not isinstance(document, dict) or not isinstance(document.get("stores"), list | tuple):
        return document
    sources = [
        {"store": source} if isinstance(source, str) else source for source in document["stores"]
    ]
    first = sources[0].get("store") if sources and isinstance(sources[0], dict) else None
    if first and document.get("store") not in (None, "", first):
        raise ValueError(
            f"data.store: found {document['store']}, but the first of data.stores is {first}; "
            "name one"
        )
    return document | {"stores": sources} | ({"store": first} if first else {})


class Data(Section):
    """Which cases, and how patches are drawn from them."""

    _first = model_validator(mode="before")(first_store)

    made_for: MadeFor | None = Field(
        None, description="the data set that the recipe was written for; null: any"
    )
    store: str = Field("", description="folder of the shard store; relative to the working folder")
    stores: tuple[Source, ...] = Field(
        (),
        description="several stores to train on, each with a `weight`: folders, or {store, "
        "weight}; the first stands for `store`, and split, fold and cases mean each",
    )
    split: str = Field(
        "kfold",
        description="name of a split stored in the manifest; all: every case trains, for a stage "
        "whose successor is scored on another store",
    )
    fold: Annotated[int, Field(ge=0)] | Literal["all"] = Field(
        0,
        description="fold of that split; all: every fold, each a run, and one score over all cases",
    )
    patch: tuple[Positive, ...] | None = Field(
        None, description="patch size in voxels, (z, y, x) or (y, x); none: the plan's"
    )
    batch: Positive = Field(
        2, description="patches of one optimizer step, over all ranks and accumulation steps"
    )
    foreground: Share = Field(
        1 / 3,
        description="share of every batch whose patch is centred on a foreground voxel; exact per "
        "batch",
    )
    augment: Augment | None = Field(Augment(), description="augmentation; null switches it off")
    cases: Positive | None = Field(
        None,
        description="train on so many cases of the fold: the first of a fixed order, so that fewer "
        "are among more; none: all",
    )
    mask: Mask = Field(Mask(), description="what `task: reconstruct` hides")
    workers: Annotated[int, Field(ge=0)] | Literal["auto"] = Field(
        "auto",
        description="loader processes per rank, never changes the samples; auto: what the cores of "
        "a rank allow, up to 14 for a GPU and 2 for a CPU",
    )


class Model(Section):
    name: str = Field(description="a registered network: `segfleet models`")
    options: dict[str, Any] = Field(default_factory=dict, description="options of that network")
    weights: str | None = Field(
        None,
        description="file of trained weights to start from: safetensors, or PyTorch's format "
        "without code in it; its sha256 is part of the run's identity",
    )
    weights_sha256: str | None = Field(
        None, description="of that file; filled in when the recipe is read, checked if given"
    )
    mapping: str = Field(
        "auto",
        description="how names in that file become ours: auto, order (one by one), or a JSON file "
        "{theirs: ours}",
    )
    strict: Literal["all", "encoder"] = Field(
        "all",
        description="all: every tensor must come from the file; encoder: the encoder's, and what "
        "its authors start from them",
    )
    head: Literal["auto", "softmax", "sigmoid"] = Field(
        "auto", description="softmax over classes or one sigmoid per region"
    )


class Loss(Section):
    name: str = Field(
        "auto",
        description="a file of pipeline/losses; auto: dice_ce for a softmax head, bce_dice for a "
        "sigmoid head",
    )
    options: dict[str, Any] = Field(default_factory=dict, description="options of that loss")
    deep_supervision: Literal["nnunet"] | tuple[float, ...] = Field(
        "nnunet",
        description="weights of the outputs, finest first; nnunet: halving, the coarsest dropped",
    )


class Optimizer(Section):
    name: Literal["adamw", "adam", "sgd"] = Field("adamw", description="update rule")
    weight_decay: Annotated[float, Field(ge=0)] = Field(
        1e-2, description="pulls the parameters that `decay` names towards zero"
    )
    decay: Literal["weights", "all"] = Field(
        "weights",
        description="weights: not biases, norms and parameters marked no-decay (a scan's A and D); "
        "all: every parameter, as most authors do",
    )
    betas: tuple[Decay, Decay] = Field((0.9, 0.999), description="Adam's decay rates")
    momentum: Share = Field(0.99, description="SGD's momentum")
    nesterov: bool = Field(True, description="SGD with Nesterov's momentum")
    clip: Annotated[float, Field(ge=0)] = Field(
        12.0, description="largest norm of the gradient; 0: no clipping"
    )


class Engine(Section):
    """How a step is computed. Workers, logging and launcher are not here: they never change the
    result."""

    name: str = Field("ddp", description="a file of pipeline/engines")
    precision: Literal["fp32", "bf16", "fp16"] = Field(
        "fp32", description="autocast type; weights and optimizer stay fp32"
    )
    accumulate: Positive = Field(1, description="micro-batches per step")
    channels_last: bool | Literal["auto"] = Field(
        True,
        description="memory format of weights and images; auto: but for 2D on CPUs, where it costs "
        "a third. It changes the rounding of convolutions",
    )
    compile: bool | Literal["auto", "reduce-overhead"] = Field(
        "auto",
        description="torch.compile; auto: with engine ddp on GPUs, where a network is traced as "
        "one graph, but not with deterministic or checkpoint_activations. Never on CPUs. "
        "reduce-overhead: on GPUs its kernels are replayed as CUDA graphs, too, for small networks "
        "whose launches take longer than their work; the same result as true, for more memory",
    )
    tf32: Literal["none", "convolutions", "all"] = Field(
        "convolutions",
        description="what GPUs compute in TensorFloat-32, ten bits of mantissa, where the "
        "precision is fp32: convolutions, as PyTorch's default and nnU-Net have it; all, matrix "
        "products, too",
    )
    deterministic: bool = Field(
        False,
        description="on GPUs: only operations that add in a fixed order, slower; a CPU does so "
        "anyway. An operation that cannot is refused by name",
    )
    checkpoint_activations: bool = Field(
        False, description="recompute activations in backward: less memory, more time"
    )
    ema: Decay = Field(
        0.0,
        description="decay of an exponential moving average of the weights; 0: none. At update t "
        "it is at most (1 + t) / (10 + t)",
    )
    options: dict[str, Any] = Field(default_factory=dict, description="options of that engine")


class Evaluation(Section):
    every: Annotated[int, Field(ge=0)] = Field(
        0, description="validate every so many epochs while training; 0: only at the end"
    )
    cases: Positive | None = Field(
        None,
        description="validate while training on so many cases at most; the final score always "
        "uses all",
    )
    overlap: Annotated[float, Field(ge=0, lt=1)] = Field(
        0.5, description="overlap of neighbouring tiles"
    )
    mirror: Axes = Field((), description="axes mirrored at test time (0 z, 1 y, 2 x)")
    batch: Positive = Field(
        1, description="tiles per forward pass; 1 on a GPU: as many as its memory holds and as pay"
    )
    average: Literal["probabilities", "logits"] = Field(
        "probabilities",
        description="what overlapping tiles and mirrored copies average; logits: as nnU-Net does",
    )
    weights: Literal["last", "best"] = Field(
        "last", description="checkpoint that is scored; best is chosen on the validation cases"
    )
    select: Literal["dice", "iou_pooled", "loss"] = Field(
        "dice",
        description="what the best checkpoint has: the highest mean Dice of cases, the highest IoU "
        "of all voxels pooled at the stored size, or the lowest loss",
    )
    tolerance: Tolerance | dict[str, Tolerance] = Field(
        2.0,
        description="mm within which two surfaces agree, for the normalised surface Dice: one for "
        "all structures, or {liver: 7, tumour: 5}, 2 for those not named",
    )
