"""Names of tensors in other people's weight files, and what they are called here.

The networks of a family share one file `models/foreign/<family>.py` with `TABLE`: one table, one
for each network by name, or, where names depend on a network's options, a function of its name and
the network. A table is total in both directions: every tensor of the file has a place or is ignored
by name, and every tensor of the network gets exactly one.
"""

from __future__ import annotations

import importlib
import json
import pkgutil
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor, nn

from segfleet.models.registry import ModelError, ModelSpec

WRAPPERS = ("module.", "_orig_mod.", "model.", "net.", "network.")  # around all names of a file
# what profilers leave behind in a network that is then saved
LEFTOVERS = r"(?:.*\.)?total_(?:ops|params)"
COUNTER = "num_batches_tracked"  # of batch norms: some files leave it out
LEAF = f"(?:weight|bias|running_mean|running_var|{COUNTER})"  # what a layer's tensors are called
SHOWN = 6
Rules = Sequence[tuple[str, str | Callable[[re.Match[str]], str | None]]]


@dataclass(frozen=True, kw_only=True)
class Table:
    """`rules`: (pattern, replacement) tried in order against the whole of their name; `ignored`:
    patterns of their tensors that are copies of others or of no use here. `turned`: patterns of
    their matrices that are the transposed of ours. `prefixes`: more wrappers that a file of this
    family may have around all of its names. `mirrored`: (our name, another of ours) for tensors
    outside the encoder that the authors start from a pre-trained encoder's."""

    rules: Rules
    ignored: Sequence[str] = ()
    turned: Sequence[str] = ()
    prefixes: Sequence[str] = ()
    mirrored: Rules = ()

    def rename(self, foreign: str) -> str | None:
        """Our name, "" for what is to be ignored, None for what no rule knows."""
        if any(re.fullmatch(pattern, foreign) for pattern in self.ignored):
            return ""
        return _first(self.rules, foreign)


def _first(rules: Rules, name: str) -> str | None:
    for pattern, replacement in rules:
        if match := re.fullmatch(pattern, name):
            return replacement(match) if callable(replacement) else match.expand(replacement)
    return None


def families() -> list[str]:
    return sorted(module.name for module in pkgutil.iter_modules(__path__))


def table_of(network: str, model: nn.Module) -> Table | None:
    """The table of a network, from the file that lists it."""
    for family in families():
        module = importlib.import_module(f"segfleet.models.foreign.{family}")
        if network in module.NETWORKS:
            table = module.TABLE(network, model) if callable(module.TABLE) else module.TABLE
            return table if isinstance(table, Table) else table[network]
    return None


def translated(
    tensors: Mapping[str, Tensor],
    model: nn.Module,
    chosen: ModelSpec,
    *,
    mapping: str = "auto",
    strict: str = "all",
    where: str = "",
) -> dict[str, Tensor]:
    """Our name -> tensor, for all of the network's tensors or (strict "encoder") for its encoder's
    and what the authors start from them. An encoder of one channel serves any number: its first
    layer is repeated, divided by their number.

    mapping "auto": their names are ours, or the family's table knows them. "order": both have the
    same shapes in the same order. Else a JSON file {theirs: ours}. Raises ModelError that names
    what is missing, left over or of another shape; nothing is loaded here.
    """
    own = model.state_dict()
    table = table_of(chosen.name, model)
    wanted = [name for name in own if strict == "all" or name.startswith(chosen.encoder)]
    named, unmatched = _named(tensors, own, table, mapping, where)
    missing = [name for name in wanted if name not in named and not name.endswith(COUNTER)]
    if strict == "encoder":
        named, unmatched = _encoder(named, own, wanted, table.mirrored if table else ()), []
    extra = [*unmatched, *(name for name in named if name not in own)]
    shapes = [
        f"{name} {tuple(value.shape)} instead of {tuple(own[name].shape)}"
        for name, value in named.items()
        if name in own and value.shape != own[name].shape
    ]
    if missing or extra or shapes:
        parts = [_some("missing", missing), _some("left over", extra), _some("other shape", shapes)]
        raise ModelError(
            f"weights: {where} does not fit {chosen.name}: {'; '.join(p for p in parts if p)}. "
            "Choose the network and the options it was trained with, or give the names by "
            "--mapping FILE (model.mapping), a JSON object {theirs: ours}"
        )
    return {name: named[name] for name in own if name in named}


def _encoder(
    named: Mapping[str, Tensor], own: Mapping[str, Tensor], wanted: Sequence[str], mirrored: Rules
) -> dict[str, Tensor]:
    """The tensors of an encoder, fitted to the image channels, and what else starts from them."""
    encoder = {name: named[name] for name in wanted if name in named}
    for name, value in encoder.items():
        into = own[name].shape
        if value.ndim > 2 and value.shape == (into[0], 1, *into[2:]) != into:
            encoder[name] = (value / into[1]).expand(into)
    copies = {_first(mirrored, name): value for name, value in encoder.items()}
    copies = {name: value for name, value in copies.items() if name in own}
    # a file that has these itself is a trained network, no pre-trained encoder
    return encoder if named.keys() & copies.keys() else encoder | copies


def _named(
    tensors: Mapping[str, Tensor],
    own: Mapping[str, Tensor],
    table: Table | None,
    mapping: str,
    where: str,
) -> tuple[dict[str, Tensor], list[str]]:
    """(our name -> tensor, the foreign names that no rule knows)."""
    if mapping == "order":
        return _in_order(tensors, own, where), []
    if mapping != "auto":
        pairs = _read_mapping(mapping)
        return (
            {pairs[name]: value for name, value in tensors.items() if pairs.get(name)},
            [name for name in tensors if name not in pairs],
        )
    tensors = {k: v for k, v in tensors.items() if not re.fullmatch(LEFTOVERS, k)}
    tensors = _unwrapped(tensors, (*WRAPPERS, *(table.prefixes if table else ())))
    if table is None or _overlap(tensors, own) > 0.5:
        return dict(tensors), []
    named: dict[str, Tensor] = {}
    unmatched: list[str] = []
    for foreign, value in tensors.items():
        native = table.rename(foreign)
        if native is None:
            unmatched.append(foreign)
        elif native:
            if native in named:
                raise ModelError(f"weights: {where}: two tensors become {native}, one is {foreign}")
            turned = any(re.fullmatch(pattern, foreign) for pattern in table.turned)
            named[native] = value.mT if turned else value
    return named, unmatched


def _overlap(tensors: Mapping[str, Tensor], own: Mapping[str, Tensor]) -> float:
    return len(tensors.keys() & own.keys()) / max(1, len(tensors))


def _unwrapped(tensors: Mapping[str, Tensor], prefixes: Sequence[str]) -> dict[str, Tensor]:
    """Without what stands before every name."""
    unwrapped, again = dict(tensors), True
    while again and unwrapped:
        again = False
        for prefix in prefixes:
            if all(name.startswith(prefix) for name in unwrapped):
                unwrapped, again = {k[len(prefix) :]: v for k, v in unwrapped.items()}, True
    return unwrapped


def _in_order(
    tensors: Mapping[str, Tensor], own: Mapping[str, Tensor], where: str
) -> dict[str, Tensor]:
    foreign = [(name, value) for name, value in tensors.items() if not name.endswith(COUNTER)]
    native = [(name, value) for name, value in own.items() if not name.endswith(COUNTER)]
    for place, ((a, x), (b, y)) in enumerate(zip(foreign, native, strict=False)):
        if x.shape != y.shape:
            raise ModelError(
                f"weights: {where}: tensor {place} is {a} {tuple(x.shape)} there and {b} "
                f"{tuple(y.shape)} here, so the order is not the same; give --mapping FILE"
            )
    if len(foreign) != len(native):
        raise ModelError(
            f"weights: {where} holds {len(foreign)} tensors, the network {len(native)}, so the "
            "order is not the same; give --mapping FILE"
        )
    return {b: x for (_, x), (b, _) in zip(foreign, native, strict=True)}


def _read_mapping(path: str) -> dict[str, str]:
    try:
        pairs = json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ModelError(f"model.mapping: {path} cannot be read: {error}") from None
    if not isinstance(pairs, dict) or not all(isinstance(v, str) for v in pairs.values()):
        raise ModelError(
            f'model.mapping: {path} is no JSON object of names: {{"theirs": "ours"}}, "" for what '
            "is to be ignored"
        )
    twice = sorted({v for v in pairs.values() if v and list(pairs.values()).count(v) > 1})
    if twice:
        raise ModelError(f"model.mapping: {path}: two tensors become {twice[0]}")
    return pairs


def _some(what: str, names: Sequence[str]) -> str:
    rest = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return f"{what}: {', '.join(names[:SHOWN])}{rest}" if names else ""
