"""What a stage takes over from the stage before it: planned whole, tensor by tensor, before
anything is loaded.

Of equal names and shapes the values. A head of other classes gets the rows of the labels that both
have; a first layer of other channels is filled from the channels there were; a 3D network takes a
2D network's convolutions, as deep as they are wide and scaled to answer a constant volume as they
answered a constant slice (Carreira and Zisserman 2017, inflation). Both at once is one filling.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping, Sequence, Set
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from segfleet.core.errors import InputError, did_you_mean
from segfleet.core.files import write_atomically
from segfleet.models.registry import ROLES, ModelSpec, belongs
from segfleet.pipeline.stage import Inherit
from segfleet.pipeline.task import Task

TAKEN = "taken"
TRANSFER = "transfer.json"  # in the folder of a stage: what of the stage before it is in it
SHOWN = 4
TRANSPOSED = (nn.ConvTranspose2d, nn.ConvTranspose3d)


@dataclass(frozen=True, kw_only=True)
class Side:
    """A stage's network seen from the other: outputs and inputs by name."""

    rows: tuple[str, ...]  # what every output channel is called
    channels: tuple[str, ...]
    name: str  # of the network
    rebuilds: bool = False  # the image, so that its outputs are no classes


@dataclass(kw_only=True)
class Transfer:
    """`tensors`: our name -> value. `how`: the same names -> in words. `new` start as the network
    was initialised, `left` are the parent's that were not taken."""

    tensors: dict[str, Tensor] = field(default_factory=dict)
    how: dict[str, str] = field(default_factory=dict)
    new: list[str] = field(default_factory=list)
    left: list[str] = field(default_factory=list)

    @property
    def taken(self) -> set[str]:
        """Tensors that are as they were; moments of the optimizer fit these alone."""
        return {name for name, how in self.how.items() if how == TAKEN}

    def document(self) -> dict[str, Any]:
        changed = {name: how for name, how in self.how.items() if how != TAKEN}
        return {
            "taken": sorted(self.taken),
            "changed": changed,
            "new": sorted(self.new),
            "left": sorted(self.left),
        }

    def sentence(self, index: int) -> str:
        """One line for people."""
        parts = [f"{len(self.taken)} tensors taken over as they are"]
        parts += [
            f"{len(names)} {what} ({_some(names)})"
            for what, names in (
                ("changed", [f"{name}: {how}" for name, how in self.how.items() if how != TAKEN]),
                ("new", self.new),
                ("left behind", self.left),
            )
            if names
        ]
        return f"stage {index + 1} starts from stage {index}: {', '.join(parts)}"


@torch.no_grad()
def load(model: nn.Module, transfer: Transfer) -> None:
    own = model.state_dict()
    for name, value in transfer.tensors.items():
        own[name].copy_(value)


def write_transfer(folder: Path, transfer: Transfer) -> None:
    write_atomically(folder / TRANSFER, json.dumps(transfer.document(), indent=1))


def rows_of(task: Task) -> tuple[str, ...]:
    return (("background",) if task.head == "softmax" else ()) + task.names


def plan_transfer(
    model: nn.Module,
    spec: ModelSpec,
    weights: Mapping[str, Tensor],
    inherit: Inherit,
    own_side: Side,
    parent: Side,
    inputs: Set[str] = frozenset(),
) -> Transfer:
    """What `model`, fresh, takes of the tensors `weights`. `inputs`: our tensors whose shape
    depends on the number of channels. Raises InputError that names every tensor that does not fit;
    nothing is changed here."""
    if own_side.rebuilds != parent.rebuilds and inherit.head == "keep":
        inherit = inherit.model_copy(update={"head": "new"})  # outputs of another kind
    own, transfer = model.state_dict(), Transfer()
    faults: dict[str, str] = {}
    wanted = chosen(own, spec, inherit.weights)
    for name, fresh in own.items():
        value, is_head = weights.get(name), name.startswith(spec.head)
        if name not in wanted or (is_head and inherit.head == "new"):
            transfer.new.append(name)
        elif (
            value is not None
            and value.shape == fresh.shape
            and not (
                is_head
                and inherit.head == "map"
                and _by_class(fresh, own_side)
                and own_side.rows != parent.rows
            )
        ):
            transfer.tensors[name], transfer.how[name] = value, TAKEN
            if is_head and _by_class(fresh, own_side) and own_side.rows != parent.rows:
                transfer.how[name] = f"as it was for {', '.join(parent.rows)}"
        elif is_head and inherit.head == "map":
            _map_rows(transfer, name, fresh, value, inherit, own_side, parent)
        elif name in inputs and inherit.channels == "new":
            transfer.new.append(name)
        elif value is not None and _fill(
            transfer, name, value, _module_of(model, name), fresh,
            (len(parent.channels), len(own_side.channels)) if name in inputs else None,
            inherit.channels,
        ):  # fmt: skip
            continue
        else:
            there = "missing there" if value is None else f"{tuple(value.shape)} there"
            faults[name] = f"{name} {tuple(fresh.shape)}, {there}"
    if faults:
        raise InputError(_refusal(faults, spec, inherit, own_side, parent, inputs))
    if inherit.head == "map" and (missing := _unmapped(inherit, own_side, parent)):
        raise InputError(missing)
    used = set(transfer.tensors)
    transfer.left = [name for name in weights if name not in used]
    return transfer


def chosen(own: Collection[str], spec: ModelSpec, weights: str | Sequence[str]) -> set[str]:
    """Names of a network that `inherit.weights`, `freeze` or the like mean: roles or prefixes.
    Raises InputError for one that no tensor has."""
    wanted: set[str] = set()
    for part in [weights] if isinstance(weights, str) else weights:
        names = {name for name in own if belongs(name, part, spec)}
        if not names:
            parts = dict.fromkeys((*ROLES, *sorted({name.split(".", 1)[0] for name in own})))
            raise InputError(
                f"no parameter name of {spec.name} begins with '{part}'; expected one of: "
                f"{', '.join(parts)}.{did_you_mean(part, parts)}"
            )
        wanted |= names
    return wanted


def _by_class(tensor: Tensor, side: Side) -> bool:
    return tensor.ndim > 0 and tensor.shape[0] == len(side.rows)


def _map_rows(
    transfer: Transfer,
    name: str,
    fresh: Tensor,
    value: Tensor | None,
    inherit: Inherit,
    own_side: Side,
    parent: Side,
) -> None:
    """Rows of labels that both know; the others stay as they are initialised."""
    if (
        value is None
        or not (_by_class(fresh, own_side) and _by_class(value, parent))
        or fresh.shape[1:] != value.shape[1:]
    ):
        transfer.new.append(name)
        return
    pairs = _pairs(inherit, own_side, parent)
    mapped = fresh.detach().clone()
    for mine, its in pairs:
        mapped[mine] = value[its]
    transfer.tensors[name] = mapped
    transfer.how[name] = f"rows of {', '.join(own_side.rows[mine] for mine, _ in pairs)}"


def _pairs(inherit: Inherit, own_side: Side, parent: Side) -> list[tuple[int, int]]:
    parent_rows = {name: number for number, name in enumerate(parent.rows)}
    wanted = ((mine, inherit.classes.get(name, name)) for mine, name in enumerate(own_side.rows))
    return [(mine, parent_rows[name]) for mine, name in wanted if name in parent_rows]


def _unmapped(inherit: Inherit, own_side: Side, parent: Side) -> str | None:
    """Why no row can be mapped, or a class that is named and not there."""
    for mine, its in inherit.classes.items():
        for name, rows in ((mine, own_side.rows), (its, parent.rows)):
            if name not in rows:
                return (
                    f"inherit.classes: found '{mine}: {its}', but '{name}' is none of the classes "
                    f"{', '.join(rows)}"
                )
    if not any(
        own_side.rows[mine] != "background" for mine, _ in _pairs(inherit, own_side, parent)
    ):
        return (
            f"inherit.head: found map, but no class of {', '.join(own_side.rows)} is among those "
            f"of the stage before ({', '.join(parent.rows)}); name pairs by inherit.classes, or "
            "set inherit.head=new"
        )
    return None


def _fill(
    transfer: Transfer,
    name: str,
    value: Tensor,
    module: nn.Module,
    fresh: Tensor,
    channels: tuple[int, int] | None,
    how: str,
) -> bool:
    """Note `value`, made to the shape of `fresh`: of a first layer for other `channels` (theirs,
    ours), of a 2D convolution for 3D, or both. Whether that could be done."""
    flat = fresh.ndim == value.ndim + 1
    wanted, said = _flat_of(fresh) if flat else tuple(fresh.shape), []
    if channels and wanted and (axis := _channel_axis(wanted, value.shape, channels)) is not None:
        value = _other_channels(value, axis, channels, how)
        said.append(f"{channels[0]} channels to {channels[1]} ({how})")
    if wanted != tuple(value.shape):
        return False
    if flat:
        said.append(f"inflated from {tuple(value.shape)}")
        value = _inflated(value, fresh, module)
    transfer.tensors[name], transfer.how[name] = value, ", ".join(said)
    return True


def _channel_axis(
    wanted: Sequence[int], there: Sequence[int], channels: tuple[int, int]
) -> int | None:
    """The axis along which alone two shapes differ, if it does by the number of channels."""
    if len(wanted) != len(there):
        return None
    axes = [d for d, pair in enumerate(zip(there, wanted, strict=True)) if pair[0] != pair[1]]
    if len(axes) != 1 or (there[axes[0]], wanted[axes[0]]) != channels:
        return None
    return axes[0]


def _other_channels(value: Tensor, axis: int, sizes: tuple[int, int], how: str) -> Tensor:
    """Along `axis` from sizes[0] to sizes[1] channels. Weights of inputs keep their sum, so that
    an image whose channels are alike is answered as before."""
    index = torch.arange(sizes[1]) % sizes[0]
    times = torch.bincount(index)[index].to(value.device)
    if how == "mean":
        value = value.mean(axis, keepdim=True).expand_as(value)
    repeated = value.index_select(axis, index.to(value.device))
    if axis == 0:  # a channel's own filter, of a depthwise convolution
        return repeated
    shape = [-1 if d == axis else 1 for d in range(value.ndim)]
    repeated = repeated / times.view(shape)
    lost = value.sum(axis, keepdim=True) - repeated.sum(axis, keepdim=True)
    return repeated + lost / sizes[1]


def _flat_of(tensor: Tensor) -> tuple[int, ...] | None:
    """The shape of a 3D convolution's weight (O, I, z, y, x) in 2D."""
    return (*tensor.shape[:2], *tensor.shape[3:]) if tensor.ndim == 5 else None


def _inflated(value: Tensor, fresh: Tensor, module: nn.Module) -> Tensor:
    """(O, I, y, x) -> (O, I, z, y, x): the same in every slice, divided by the slices that reach
    one output voxel."""
    depth = fresh.shape[2]
    reach = depth / module.stride[0] if isinstance(module, TRANSPOSED) else depth
    return value.unsqueeze(2).repeat(1, 1, depth, 1, 1) / reach


def _module_of(model: nn.Module, name: str) -> nn.Module:
    return model.get_submodule(name.rpartition(".")[0])


def _refusal(
    faults: Mapping[str, str],
    spec: ModelSpec,
    inherit: Inherit,
    own_side: Side,
    parent: Side,
    inputs: Set[str],
) -> str:
    hints = []
    if inputs and not inputs.isdisjoint(faults):
        hints.append(
            f"they cannot be filled from channels {', '.join(parent.channels)} for "
            f"{', '.join(own_side.channels)}: set inherit.channels=new"
        )
    if spec.fixed_patch:
        hints.append(f"{spec.name} is bound to its patch: its weights fit no other")
    if own_side.rows != parent.rows and inherit.head == "keep":
        hints.append("for other classes set inherit.head=new or map")
    if own_side.name != parent.name:
        hints.append(f"the stage before trained {parent.name}: inherit.weights names parts")
    hints.append("a network that is planned from its patch keeps its shape by model.options")
    return (
        f"inherit: {len(faults)} tensor(s) of {spec.name} do not fit the stage before: "
        f"{_some(list(faults.values()))}. {'; '.join(hints)}"
    )


def _some(names: Sequence[str]) -> str:
    rest = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return "; ".join(names[:SHOWN]) + rest
