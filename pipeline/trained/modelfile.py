"""A model one can hand over: `model.segfleet`, a zip, or the same files in a folder.

    README.md                     model card: data set, labels, scores, intended use, licence
    config.json                   recipes, plans, labels, sizes and sha256 of the weights
    model.safetensors             weights; of an ensemble model-<uid>.safetensors for each network

It needs no store and holds no path and no pickle. A folder is what Hugging Face's hub expects.
Whatever comes from such a file is checked before it is used: names, sizes, hashes, shapes.
"""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from pydantic import ValidationError
from torch import Tensor

from segfleet.core.errors import InputError
from segfleet.core.files import digest_of, file_facts, parse_json, replacing, write_json
from segfleet.core.making import making
from segfleet.pipeline.recipe import Recipe, parse
from segfleet.pipeline.trained.model import Model, Trained
from segfleet.preprocess.stores.manifest import Manifest

CONFIG, CARD, VERSION = "config.json", "README.md", 1
LIBRARY = "segfleet"
WEIGHTS = re.compile(r"model(-[0-9a-zA-Z_-]{1,64})?\.safetensors")
MOST_CONFIG = 2**26  # bytes of config.json
DENSEST = 200  # times that a packed file may grow


def is_modelfile(path: Path) -> bool:
    """Whether a path looks like a model: a zip with a config.json, or a folder with one of ours."""
    path = Path(path)
    if path.is_dir():
        return (path / CONFIG).is_file() and any(path.glob("model*.safetensors"))
    return path.suffix in (".segfleet", ".zip") and path.is_file()


# writing


def write_model(
    model: Model, out: Path, card: str, extra: Callable[[Path], None] = lambda folder: None
) -> Path:
    """Write `model` to `out`: one zip if that ends in .segfleet or .zip, else a folder. `card`: the
    text of README.md. `extra(folder)` may add files, such as exported graphs. Raises InputError if
    `out` exists."""
    out = Path(os.path.abspath(out))
    packed = out.suffix in (".segfleet", ".zip")
    with making(out.with_name(f"{out.name}.folder") if packed else out) as folder:
        _fill(model, folder, card)
        extra(folder)
        if packed:
            if out.exists():
                raise InputError(f"to: {out} exists. Choose a new name.")
            with replacing(out) as temporary:
                _pack(folder, temporary)
            for path in folder.iterdir():  # the zip is all that is wanted
                if path.is_file() and not path.name.startswith("."):
                    path.unlink()
    return out


def _fill(model: Model, folder: Path, card: str) -> None:
    from safetensors.torch import save_file

    networks = []
    for trained in model.networks:
        alone = len(model.networks) == 1
        name = "model.safetensors" if alone else f"model-{trained.uid}.safetensors"
        needed = set(model.network(trained).state_dict())
        tensors = {
            key: value.contiguous() for key, value in trained.read().items() if key in needed
        }
        save_file(tensors, folder / name, metadata={"format": "pt"})
        networks.append(
            {
                "uid": trained.uid,
                "checkpoint": trained.checkpoint,
                "weights": name,
                **file_facts(folder / name),
                "recipe": portable(trained.recipe),
                "data": trained.manifest.outline(),
            }
        )
    document = {
        "library_name": LIBRARY,
        "version": VERSION,
        "networks": networks,
        "postprocessing": model.postprocessing,
    }
    write_json(folder / CONFIG, document)
    (folder / CARD).write_text(card, encoding="utf-8")


def portable(recipe: Recipe) -> dict[str, Any]:
    """A recipe without a place on any machine."""
    document = recipe.model_dump(mode="json")
    for part in (document, *document["stages"]):  # a stage may have its own
        data = part.get("data") or {}
        if "store" in data:
            data["store"] = ""
        if "stores" in data:  # which of them is part of what was trained, not where they lay
            data["stores"] = []
        model = part.get("model") or {}
        if model.get("weights") is not None:  # known by their hash
            model["weights"] = Path(model["weights"]).name
        if model.get("mapping", "auto") != "auto":
            model["mapping"] = Path(model["mapping"]).name
    return document


def _pack(folder: Path, out: Path) -> None:
    """All files of a folder as one zip, not packed: weights do not get smaller. Same files, same
    bytes."""
    with zipfile.ZipFile(out, "w", zipfile.ZIP_STORED) as whole:
        for path in sorted(folder.iterdir()):
            if not path.name.startswith("."):
                with (
                    open(path, "rb") as source,
                    whole.open(zipfile.ZipInfo(path.name), "w", force_zip64=True) as target,
                ):
                    shutil.copyfileobj(source, target, 2**20)


# reading


def read_model(path: Path) -> tuple[list[Trained], dict[str, Any] | None]:
    """The networks of a model file or folder, and what its post-processing was decided to be.
    Raises InputError, one message, for whatever cannot be trusted; weights are read when they are
    used."""
    path = Path(path).resolve()
    document = _config(path)
    try:
        networks = [_network(path, entry) for entry in document["networks"]]
        if not networks:
            raise ValueError("it holds no network")
        decision = document.get("postprocessing")
        if decision is not None and not isinstance(decision.get("rules"), dict):
            raise ValueError("postprocessing has no rules")
    except (KeyError, TypeError, AttributeError, ValidationError, ValueError) as error:
        if isinstance(error, InputError):
            raise InputError(f"model: {path}: {CONFIG}: {error}") from None
        raise _damaged(path, f"{CONFIG}: {str(error).splitlines()[0]}") from None
    return networks, decision


def _damaged(path: Path, what: str) -> InputError:
    return InputError(
        f"model: {path} cannot be used: {what}. Get the file again, or export it again."
    )


def _config(path: Path) -> dict[str, Any]:
    with _opened(path, CONFIG) as file:
        raw = file.read(MOST_CONFIG + 1)
    if len(raw) > MOST_CONFIG:
        raise _damaged(path, f"{CONFIG} is larger than {MOST_CONFIG} bytes")
    try:
        document = parse_json(raw)
        digest = document.pop("sha256")
        if document.get("library_name") != LIBRARY:
            raise _damaged(path, f"{CONFIG} is none of segfleet's")
        if document.get("version") != VERSION:
            raise InputError(
                f"model: {path} has version {document.get('version')}, expected {VERSION}: it was "
                "written by another version of segfleet; use that one, or export the run again"
            )
        if digest != digest_of(document):
            raise _damaged(path, f"{CONFIG} does not match its sha256")
    except InputError:
        raise
    except (ValueError, KeyError, AttributeError, TypeError, RecursionError):
        raise _damaged(path, f"{CONFIG} is no document of a model") from None
    return document


def _network(path: Path, entry: dict[str, Any]) -> Trained:
    name, size = entry["weights"], entry["bytes"]
    if not (isinstance(name, str) and WEIGHTS.fullmatch(name)):
        raise ValueError(
            f"weights: found {name!r}, expected model.safetensors or model-UID.safetensors"
        )
    if not re.fullmatch(r"[0-9A-Za-z_-]{1,64}", str(entry["uid"])):
        raise ValueError(f"uid: found {entry['uid']!r}")
    _check_size(path, name, size)
    return Trained(
        uid=entry["uid"],
        checkpoint=str(entry["checkpoint"]),
        recipe=parse(entry["recipe"], "recipe"),
        manifest=Manifest.model_validate(entry["data"]),
        size=size,
        check=lambda: _tensors(path, name, size, str(entry["sha256"])),
        read=lambda: _tensors(path, name, size, str(entry["sha256"])),
    )


def _tensors(path: Path, name: str, size: int, sha256: str) -> dict[str, Tensor]:
    from safetensors import SafetensorError
    from safetensors.torch import load

    with _opened(path, name) as file:
        content = file.read(size + 1)
    if len(content) != size or hashlib.sha256(content).hexdigest() != sha256:
        raise _damaged(path, f"{name} does not match its sha256")
    try:
        return load(content)
    except SafetensorError as error:
        raise _damaged(path, f"{name}: {error}") from None


def _check_size(path: Path, name: str, size: Any) -> None:
    """The weights are there and as long as config.json says, before anything of them is read."""
    if not isinstance(size, int) or size < 0:
        raise ValueError(f"bytes of {name}: found {size!r}")
    with _opened(path, name) as file:
        actual = file.seek(0, os.SEEK_END) if path.is_dir() else _entry(path, name).file_size
    if actual != size:
        raise _damaged(path, f"{name} has {actual} bytes, expected {size}")


def _entry(path: Path, name: str) -> zipfile.ZipInfo:
    with zipfile.ZipFile(path) as whole:
        return whole.getinfo(name)


@contextmanager
def _opened(path: Path, name: str) -> Iterator[IO[bytes]]:
    """A file of a model, to read. Nothing is ever unpacked to disk, so no name can lead anywhere;
    what grows too much is a bomb."""
    try:
        if path.is_dir():
            with open(path / name, "rb") as file:
                yield file
            return
        with zipfile.ZipFile(path) as whole:
            for entry in whole.infolist():
                outside = entry.filename.startswith(("/", "\\")) or ".." in re.split(
                    r"[/\\]", entry.filename
                )
                if outside or ":" in entry.filename:
                    raise _damaged(path, f"its entry {entry.filename!r} leads out of it")
                if entry.file_size > DENSEST * max(entry.compress_size, 1024):
                    raise _damaged(
                        path,
                        f"its entry {entry.filename!r} would grow from {entry.compress_size} to "
                        f"{entry.file_size} bytes",
                    )
            names = whole.namelist()
            if names.count(name) != 1:
                raise _damaged(path, f"{name} is there {names.count(name)} times, expected once")
            with whole.open(name) as file:
                yield file
    except FileNotFoundError:
        raise _damaged(path, f"{name} is missing") from None
    except (zipfile.BadZipFile, NotImplementedError, EOFError, RuntimeError) as error:
        raise _damaged(path, f"it is no whole zip ({error})") from None
