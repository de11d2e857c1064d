"""Settings: one reader of YAML, one way to set a key, one sentence for every fault.

Documents are YAML 1.2 (core schema) with merge keys: `off` and `12:30` are text, `010` is 10 and
`1e-3` a number. A key whose field holds text keeps it as written: `name: 1e5` is "1e5".
"""

from __future__ import annotations

import difflib
import io
import json
import re
from collections.abc import Callable, Collection, Mapping, Sequence
from copy import deepcopy
from pathlib import Path
from types import UnionType
from typing import Any, TypeVar, Union, cast, get_args, get_origin

from pydantic import BaseModel, ValidationError

from segfleet.core.errors import InputError

Model = TypeVar("Model", bound=BaseModel)

MOST_VALUES = 100_000  # of a document with its aliases written out: a recipe has about a hundred
DEEPEST = 50
YAML_TAG = "tag:yaml.org,2002:"
IMPLICIT = tuple(
    YAML_TAG + kind for kind in ["null", "bool", "int", "float", "timestamp", "value", "merge"]
)
SCALARS: tuple[tuple[re.Pattern, Callable[[str], Any]], ...] = (
    (re.compile(r"~|null|Null|NULL|"), lambda text: None),
    (re.compile(r"true|True|TRUE|false|False|FALSE"), lambda text: text.lower() == "true"),
    (re.compile(r"[-+]?[0-9]+"), int),
    (re.compile(r"0o[0-7]+"), lambda text: int(text[2:], 8)),
    (re.compile(r"0x[0-9a-fA-F]+"), lambda text: int(text[2:], 16)),
    (re.compile(r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?"), float),
    (
        re.compile(r"[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)"),
        lambda text: float(text.replace(".", "")),
    ),
)


def check_regular(source: str, what: str) -> None:
    """Raises InputError where `source` is there, but as a folder, a pipe or a device: "found no
    file" would puzzle."""
    path = Path(source)
    if path.exists() and not path.is_file():
        kind = "a folder" if path.is_dir() else "a pipe or a device"
        raise InputError(f"{what}: {source} is {kind}, expected a regular file")


def read(path: Path, where: str, texts: Collection[str] = ()) -> Any:
    """The document in a file, made of what JSON knows. Raises InputError that begins with
    `where`.

    `texts`: keys whose values are text, however they look (`text_keys` of a model).
    """
    try:
        return loads(path.read_text(encoding="utf-8"), texts)
    except (ValueError, OSError) as error:
        raise InputError(f"{where}: {path} is no YAML document: {_one_line(error)}") from None


def loads(text: str, texts: Collection[str] = (), as_text: bool = False) -> Any:
    """The value of a YAML text; `as_text` leaves its numbers as written. Raises ValueError that
    says what is wrong and in which line."""
    from ruamel.yaml import YAML
    from ruamel.yaml.error import YAMLError

    try:
        node = YAML(typ="safe", pure=True).compose(io.StringIO(text))
        return None if node is None else _Builder(frozenset(texts)).value(node, as_text)
    except YAMLError as error:
        raise ValueError(_one_line(error)) from None
    except RecursionError:
        raise ValueError(f"nested more than {DEEPEST} deep") from None


class _Builder:
    """Plain values from YAML's nodes, with limits, so that a few lines of aliases cannot fill the
    memory."""

    def __init__(self, texts: frozenset[str]):
        self.texts, self.values = texts, 0
        self.path: list[Any] = []

    def value(self, node: Any, as_text: bool = False) -> Any:
        self.values += 1
        line = f"line {node.start_mark.line + 1}"
        if id(node) in self.path:
            raise ValueError(f"{line}: an alias of itself")
        if self.values > MOST_VALUES or len(self.path) > DEEPEST:
            raise ValueError(
                f"{line}: more than {MOST_VALUES:,} values or nested more than {DEEPEST} deep, "
                "aliases written out"
            )
        kind = type(node).__name__
        if kind == "ScalarNode":
            return self._scalar(node, as_text, line)
        expected = YAML_TAG + ("seq" if kind == "SequenceNode" else "map")
        if node.tag != expected:
            raise ValueError(f"{line}: found the tag {node.tag}, expected none")
        self.path.append(id(node))
        try:
            if kind == "SequenceNode":
                return [self.value(inner, as_text) for inner in node.value]
            return self._mapping(node, line)
        finally:
            self.path.pop()

    def _scalar(self, node: Any, as_text: bool, line: str) -> Any:
        if node.tag not in (*IMPLICIT, YAML_TAG + "str"):
            raise ValueError(f"{line}: found the tag {node.tag}, expected none")
        plain = not node.style and node.tag != YAML_TAG + "str"
        for pattern, convert in SCALARS if plain else ():
            if pattern.fullmatch(node.value):
                number = convert in (int, float)
                return node.value if number and as_text else convert(node.value)
        return node.value

    def _mapping(self, node: Any, line: str) -> dict[str, Any]:
        own: dict[str, Any] = {}
        merged: dict[str, Any] = {}
        for key_node, value_node in node.value:
            key = self.value(key_node, as_text=True)
            if not isinstance(key, str):
                raise ValueError(f"{line}: the key {json.dumps(key)} is no text")
            value = self.value(value_node, as_text=key.rpartition(".")[2] in self.texts)
            if key == "<<" and not key_node.style:
                for part in value if isinstance(value, list) else [value]:
                    if not isinstance(part, dict):
                        raise ValueError(f"{line}: << takes a mapping, found {part!r}")
                    merged = {**part, **merged}
            elif key in own:
                raise ValueError(f"line {key_node.start_mark.line + 1}: the key '{key}' twice")
            else:
                own[key] = value
        return {**merged, **own}


def dumps(document: Any) -> str:
    """The YAML of a plain document; `loads` of it is the document again."""
    from ruamel.yaml import YAML

    writer: Any = YAML(typ="safe", pure=True)
    out = io.StringIO()
    writer.default_flow_style, writer.sort_base_mapping_type_on_output = False, False
    writer.width = 100
    writer.dump(document, out)
    return out.getvalue()


def override(
    document: dict[str, Any],
    changes: Collection[str],
    texts: Collection[str] = (),
    where: str = "override",
    named: Collection[str] = (),
) -> dict[str, Any]:
    """A copy with every change `key.path=value` applied; values are YAML, items of a list go by
    their index (`stages.0.lr=1e-3`). `named`: see `put`. Raises InputError."""
    document = deepcopy(document)
    for change in changes:
        key, equals, text = change.partition("=")
        if not equals or not key:
            raise InputError(
                f"{where}: found '{change}', expected key.path=value, for example stages.0.lr=1e-3"
            )
        try:
            value = _value_of(key, text, texts)
        except ValueError as error:
            raise InputError(
                f"{where}: the value of '{change}' is no YAML: {_one_line(error)}"
            ) from None
        put(document, key, value, f"{where}: '{change}'", named)
    return document


def _value_of(key: str, text: str, texts: Collection[str]) -> Any:
    as_text = key.rpartition(".")[2] in texts
    if as_text and text not in ("", "~", "null") and not text.startswith(("'", '"', "[", "{")):
        return text
    return loads(text, texts, as_text)


def put(
    document: dict[str, Any], key: str, value: Any, where: str, named: Collection[str] = ()
) -> None:
    """Set a key path of a document in place; sections on the way that are not there are made.
    `named`: keys whose own keys are names, in which a point is a point (`named_keys` of a model).
    Raises InputError that begins with `where`."""
    *parents, last = path_of(key, named)
    node: Any = document
    for place, part in enumerate(parents, 1):
        if isinstance(node, list):
            node = node[_index(node, part, where)]
        else:
            if not isinstance(node.get(part), dict | list):
                node[part] = {}
            node = node[part]
        if not isinstance(node, dict | list):
            raise InputError(
                f"{where}: {'.'.join(parents[:place])} is {json.dumps(node)}, which has no keys "
                "below it"
            )
    node[_index(node, last, where) if isinstance(node, list) else last] = value


def path_of(key: str, named: Collection[str] = ()) -> list[str]:
    """The parts of a key path: `stages.1.rates.encoder.stem` has four where `rates` is `named`."""
    parts = key.split(".")
    place = next((k for k, part in enumerate(parts) if part in named), len(parts))
    if "options" in parts[:place]:  # whose keys are nobody's here
        return parts
    return [*parts[: place + 1], *filter(None, [".".join(parts[place + 1 :])])]


def _index(node: list, part: str, where: str) -> int:
    if not (part.isascii() and part.isdecimal() and len(part) < 9 and int(part) < len(node)):
        raise InputError(
            f"{where}: '{part}' is no index of a list of {len(node)}; expected 0 to {len(node) - 1}"
        )
    return int(part)


def validate(model: type[Model], document: Any, where: str) -> Model:
    """The document as a model. Raises InputError with one sentence for every fault: the key, what
    was found and what was expected."""
    try:
        return model.model_validate(document)
    except ValidationError as error:
        faults = error.errors()
        reported = [fault for fault in faults if fault["type"] != "too_short" or len(faults) == 1]
        merged = _one_for_each_field(reported, model)
        sentences = "\n".join(f"  {sentence(fault, model)}" for fault in merged)
        raise InputError(f"{where} is not valid:\n{sentences}") from None


def _one_for_each_field(
    faults: Sequence[Mapping[str, Any]], model: type[BaseModel]
) -> list[dict[str, Any]]:
    """Of a field that takes this or that, pydantic reports what is wrong with each: one fault for
    both."""
    merged: dict[tuple, dict[str, Any]] = {}
    for number, fault in enumerate(faults):
        location = _field_of(model, tuple(fault["loc"]))
        alternative = location != tuple(fault["loc"])
        first = merged.setdefault((location, None if alternative else number), dict(fault))
        if first["msg"] != fault["msg"]:
            more = fault["msg"].removeprefix("Input should ")
            first["msg"] += f", or {more}"
        first["loc"] = location
    return list(merged.values())


def _field_of(model: type[BaseModel] | None, location: tuple[str | int, ...]) -> tuple:
    """The location without what pydantic calls the alternatives of a field."""
    for place, part in enumerate(location):
        if model is not None and part in model.model_fields:
            kind = model.model_fields[part].annotation
            alternatives = [choice for choice in get_args(kind) if choice is not type(None)]
            model = section_of(kind)
            if get_origin(kind) in (Union, UnionType) and len(alternatives) > 1:
                return location[: place + 1]
    return location


def sentence(fault: Mapping[str, Any], model: type[BaseModel]) -> str:
    """What pydantic found, in the words of a user."""
    location = tuple(fault["loc"])
    where = ".".join(map(str, location)) or "document"
    if fault["type"] == "extra_forbidden":
        keys = legal_keys(model, location[:-1])
        close = difflib.get_close_matches(str(location[-1]), keys, 1)
        guess = f"; did you mean '{close[0]}'?" if close else ""
        return f"{where}: unknown key; expected one of: {', '.join(keys)}{guess}"
    about = description_of(model, location)
    if fault["type"] == "missing":
        return f"{where}: missing" + (f" ({about})" if about else "")
    message = fault["msg"].removeprefix("Value error, ").replace("a valid tuple", "a list")
    if not location:  # keys that do not fit together, which the sentence names
        return message
    return f"{where}: found {fault['input']!r}. {message}" + (f" ({about})" if about else "")


def section_of(annotation: Any) -> type[BaseModel] | None:
    """The model inside an annotation such as `tuple[Stage, ...]` or `Augment | None`."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    return next((found for inner in get_args(annotation) if (found := section_of(inner))), None)


def legal_keys(model: type[BaseModel], location: tuple[str | int, ...] = ()) -> list[str]:
    """The keys of the section at `location` of a document of `model`."""
    for part in location:
        if part in model.model_fields:
            model = section_of(model.model_fields[part].annotation) or model
    return list(model.model_fields)


def description_of(model: type[BaseModel], location: tuple[str | int, ...]) -> str | None:
    """What the last field on the way to `location` is for."""
    description, section = None, cast("type[BaseModel] | None", model)
    for part in location:
        if section is not None and part in section.model_fields:
            description = section.model_fields[part].description
            section = section_of(section.model_fields[part].annotation)
    return description


def text_keys(model: type[BaseModel]) -> frozenset[str]:
    """Names of the fields of a model and its sections that hold text and nothing that looks like a
    number."""
    found: set[str] = set()
    for name, field in model.model_fields.items():
        inner = section_of(field.annotation)
        if inner is not None:
            found |= text_keys(inner)
        elif str in (kinds := _kinds(field.annotation)) and not kinds & {int, float, dict}:
            found.add(name)
    return frozenset(found)


def named_keys(model: type[BaseModel]) -> frozenset[str]:
    """Names of the fields of a model and its sections that map names to one value each."""
    found: set[str] = set()
    for name, field in model.model_fields.items():
        inner = section_of(field.annotation)
        if inner is not None:
            found |= named_keys(inner)
        elif maps_names(field.annotation):
            found.add(name)
    return frozenset(found)


def maps_names(annotation: Any) -> bool:
    """Whether a mapping of names to one value each may be a value of this type."""
    if get_origin(annotation) is dict:
        return get_args(annotation)[1] is not Any
    return any(maps_names(inner) for inner in get_args(annotation))


def takes_list(annotation: Any) -> bool:
    """Whether a list may be a value of this type."""
    return bool(_kinds(annotation) & {list, tuple})


def _kinds(annotation: Any) -> set[Any]:
    """The plain types an annotation is made of."""
    return {get_origin(annotation) or annotation}.union(*map(_kinds, get_args(annotation)))


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split()).replace('in "<file>", ', "at ")
