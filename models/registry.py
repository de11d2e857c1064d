"""Networks by name. A network is one file `models/<name>.py` whose builders carry `@register`."""

from __future__ import annotations

import importlib
import inspect
import pkgutil
import traceback
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn


class ModelError(ValueError):
    """A network's name, options or input are wrong. The message is all the user sees."""

    exit_code = 2


@dataclass(frozen=True, kw_only=True)
class ModelSpec:
    """What the rest of segfleet must know of a registered network.

    build(in_channels, num_classes, **options) -> nn.Module that maps (B, C, [Z,] Y, X) to logits
    (B, K, [Z,] Y, X) or, with deep supervision in train mode, to a list of logits, finest first,
    each at its own resolution or the full one.
    """

    name: str
    build: Callable[..., nn.Module]
    dims: tuple[int, ...]  # (2,), (3,) or (2, 3)
    in_channels: int  # of the published set-up; the build takes others
    num_classes: int
    paper_input: tuple[int, ...]  # spatial size at which GMAC are quoted
    parameters: int  # exact, at in_channels/num_classes/default options
    divisor: int | tuple[int, ...] = 1  # the input's spatial sizes must be multiples of it
    deep_supervision: bool = False
    fixed_patch: bool = False  # the weights depend on the input size (options must carry `patch`)
    # parameters of each stage, as in the specification
    stages: Mapping[str, int] = field(default_factory=dict)
    stage_of: Callable[[str], str] | None = (
        None  # parameter name -> stage name; default: the part before the first dot
    )
    reduced: Mapping[str, Any] = field(default_factory=dict)  # options of a small twin for tests
    # spatial size the small twin is tested at; default: see `small_input`
    reduced_input: tuple[int, ...] = ()
    encoder: tuple[str, ...] = (  # how names of the encoder's parameters begin
        "enc",
        "stem",
        "embed",
        "down",
    )
    # how names of the head's begin: all whose shape depends on the number of classes
    head: tuple[str, ...] = ("head", "outc")
    source: str = ""  # paper or specification
    about: str = ""

    @property
    def small_input(self) -> tuple[int, ...]:
        """Spatial size for tests: `reduced_input`, else the small twin's `patch`, else the smallest
        legal size >= 32 (2D) or 16 (3D)."""
        if self.reduced_input or "patch" in self.reduced:
            return tuple(self.reduced_input or self.reduced["patch"])
        rank = len(self.paper_input)
        divisors = (self.divisor,) * rank if isinstance(self.divisor, int) else self.divisor
        return tuple(d * -(-(32 if rank == 2 else 16) // d) for d in divisors)


ROLES = ("all", "encoder", "decoder", "head", "backbone")


def belongs(name: str, part: str, spec: ModelSpec) -> bool:
    """Whether a parameter has a role in its network (the decoder is what is neither encoder nor
    head, the backbone all but the head), or else a name that begins with `part`."""
    encoder, head = name.startswith(spec.encoder), name.startswith(spec.head)
    roles = {
        "all": True,
        "encoder": encoder,
        "head": head,
        "backbone": not head,
        "decoder": not encoder and not head,
    }
    return roles[part] if part in roles else name.startswith(part)


def layers(names: Iterable[str], spec: ModelSpec) -> dict[str, int]:
    """Name -> how many layers (stages of the network, in order) lie behind it; 0 for the head."""
    stage_of = spec.stage_of or (lambda parameter: parameter.split(".", 1)[0])
    stages = {n: "" if belongs(n, "head", spec) else stage_of(n) for n in names}
    order = {
        stage: number for number, stage in enumerate(dict.fromkeys(filter(None, stages.values())))
    }
    return {name: len(order) - order[stage] if stage else 0 for name, stage in stages.items()}


_SPECS: dict[str, ModelSpec] = {}
_BROKEN: dict[str, str] = {}  # file of `models/` that cannot be imported -> why
_LOADED = False


def register(**fields: Any) -> Callable[[Callable[..., nn.Module]], Callable[..., nn.Module]]:
    """Register a builder under `name`; the other keywords are the fields of `ModelSpec`."""

    def wrap(build: Callable[..., nn.Module]) -> Callable[..., nn.Module]:
        spec = ModelSpec(build=build, **fields)
        assert spec.name not in _SPECS, f"two networks are called {spec.name}"
        _SPECS[spec.name] = spec
        return build

    return wrap


def specs() -> dict[str, ModelSpec]:
    """All registered networks, by name in alphabetical order; those of a file that cannot be
    imported are left out, see `broken`."""
    global _LOADED
    if not _LOADED:
        import segfleet.models as room

        for module in sorted(m.name for m in pkgutil.iter_modules(room.__path__)):
            before = dict(_SPECS)
            try:
                importlib.import_module(f"segfleet.models.{module}")
            except Exception as error:  # it is being edited; the other networks are whole
                _SPECS.clear()
                _SPECS.update(before)
                _BROKEN[module] = _reason(error)
        _LOADED = True
    return dict(sorted(_SPECS.items()))


def broken() -> list[str]:
    """A sentence on every file of `models/` that cannot be imported."""
    specs()
    return [f"models/{name} cannot be used: {reason}" for name, reason in sorted(_BROKEN.items())]


def _reason(error: Exception) -> str:
    """What went wrong and where, in one line."""
    place = (getattr(error, "filename", None), getattr(error, "lineno", None))
    if not isinstance(error, SyntaxError):
        last = traceback.extract_tb(error.__traceback__)[-1]
        place = (last.filename, last.lineno)
    text = " ".join((getattr(error, "msg", None) or str(error)).split())
    return f"{type(error).__name__}: {text} ({place[0]}, line {place[1]})"


def spec(name: str) -> ModelSpec:
    """The spec of `name`. Raises ModelError with the legal names, and with the files that cannot
    be imported, for it may stand in one of them."""
    by_name = specs()
    if name not in by_name:
        faults = "".join(f"; {sentence}" for sentence in broken())
        raise ModelError(
            f"model.name: found '{name}', expected one of: {', '.join(by_name)}; one of your own "
            f"is named by --plugin FOLDER{faults}"
        )
    return by_name[name]


def legal_options(chosen: ModelSpec) -> list[str]:
    """Names of the options that the builder takes."""
    return [
        p.name
        for p in inspect.signature(chosen.build).parameters.values()
        if p.name not in ("in_channels", "num_classes")
    ]


def build_model(
    name: str, *, in_channels: int, num_classes: int, options: Mapping[str, Any] | None = None
) -> nn.Module:
    """Build a registered network. Raises ModelError for an unknown name or option."""
    chosen, options = spec(name), dict(options or {})
    legal = legal_options(chosen)
    for key in options:
        if key not in legal:
            raise ModelError(
                f"model.options: '{key}' is no option of {name}; expected one of: "
                f"{', '.join(legal) or 'none'}"
            )
    try:
        return chosen.build(in_channels=in_channels, num_classes=num_classes, **options)
    except ModelError:
        raise
    except (TypeError, ValueError) as error:
        # a TypeError is the network's own fault where every option is of the type it should be
        if not options or (isinstance(error, TypeError) and not mistyped(chosen, options)):
            raise
        raise ModelError(f"model.options: {name} cannot be built of {options}: {error}") from error


def mistyped(chosen: ModelSpec, options: Mapping[str, Any]) -> list[str]:
    """Options that are missing, or of another type than their default."""
    wrong = []
    for name in legal_options(chosen):
        default = inspect.signature(chosen.build).parameters[name].default
        if name not in options:
            wrong += [name] if default is inspect.Parameter.empty else []
        elif not _alike(options[name], default):
            wrong.append(name)
    return wrong


def _alike(value: Any, default: Any) -> bool:
    """Whether a value may replace a default: a number another, a list a tuple of its likes; None,
    "as planned", stands for numbers and lists of them."""
    if default is None and isinstance(value, list | tuple):
        return all(_alike(v, None) for v in value)
    if default is None or type(default) in (int, float):
        planned = value is None and default is None
        return planned or isinstance(value, int | float) and not isinstance(value, bool)
    if isinstance(default, bool | str):
        return isinstance(value, type(default))
    if isinstance(default, list | tuple) and default:
        return isinstance(value, list | tuple) and all(_alike(v, default[0]) for v in value)
    return True


def check_input(
    x: Tensor, *, name: str, dims: int, in_channels: int, divisor: int | tuple[int, ...] = 1
) -> None:
    """Refuse an input of the wrong shape with a sentence that names the rule. Call it first in
    `forward`."""
    if torch.compiler.is_compiling():
        return
    axes = "BCYX" if dims == 2 else "BCZYX"
    if x.ndim != dims + 2:
        raise ModelError(
            f"{name} takes a {dims + 2}-dimensional input ({', '.join(axes)}), found shape "
            f"{tuple(x.shape)}"
        )
    if x.shape[1] != in_channels:
        raise ModelError(
            f"{name} was built for {in_channels} input channel(s), found {x.shape[1]} in shape "
            f"{tuple(x.shape)}"
        )
    divisors = (divisor,) * dims if isinstance(divisor, int) else divisor
    for axis, size, d in zip(axes[2:], x.shape[2:], divisors, strict=True):
        if size % d or size == 0:
            raise ModelError(
                f"{name} needs an input whose {axis} size is a multiple of {d}, found {size} in "
                f"shape {tuple(x.shape)}"
            )


def count_parameters(model: nn.Module) -> int:
    """Exact number of parameters (buffers not counted)."""
    return sum(p.numel() for p in model.parameters())


def stage_table(model: nn.Module, chosen: ModelSpec) -> dict[str, int]:
    """Parameters per stage, in order of construction."""
    stage_of = chosen.stage_of or (lambda parameter: parameter.split(".", 1)[0])
    table: dict[str, int] = {}
    for parameter, value in model.named_parameters():
        table[stage_of(parameter)] = table.get(stage_of(parameter), 0) + value.numel()
    return table
