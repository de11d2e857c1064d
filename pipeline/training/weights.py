"""Trained weights from a foreign file: read without running code in it, named anew,
loaded whole or not at all."""

from __future__ import annotations

import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from segfleet.core.errors import InputError
from segfleet.core.files import file_facts
from segfleet.models import registry
from segfleet.models.foreign import translated
from segfleet.pipeline import sections

# where the tensors may lie in a file that holds more
PLACES = ("network_weights", "state_dict", "model_state_dict", "model", "net", "weights")


def load_foreign(model: nn.Module, options: sections.Model) -> None:
    """Put the weights of `model.weights` into a fresh network. Raises InputError or ModelError, and
    then has changed nothing."""
    path = Path(str(options.weights))
    sha256 = file_facts(path)["sha256"] if path.is_file() else "no file"
    if sha256 != options.weights_sha256:
        raise InputError(
            f"model.weights: {path}: found {sha256}, expected sha256 {options.weights_sha256}; the "
            "file has gone or changed since the run was set up"
        )
    chosen = registry.spec(options.name)
    tensors = translated(
        read_tensors(path),
        model,
        chosen,
        mapping=options.mapping,
        strict=options.strict,
        where=str(path),
    )
    own = model.state_dict()
    with torch.no_grad():
        for name, value in tensors.items():
            own[name].copy_(value)


def read_tensors(path: Path) -> dict[str, Tensor]:
    """Name -> CPU tensor of a safetensors or PyTorch file. Raises InputError; code in a file is
    never run."""
    if path.suffix == ".safetensors":
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        try:
            return load_file(path)
        except (SafetensorError, OSError) as error:
            raise InputError(f"weights: {path} is no safetensors file: {error}") from None
    return named_tensors(read_torch(path), path)


def read_torch(path: Path) -> Any:
    """What a PyTorch file holds, of plain data, tensors and NumPy's numbers. Raises InputError."""
    try:
        with torch.serialization.safe_globals(_numbers()):
            return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        what = _forbidden(path)
        reason = f"holds objects that are no tensors ({what})" if what else "cannot be read"
        raise InputError(
            f"weights: {path} {reason}, and segfleet runs no code from files. Save the tensors "
            "alone, where the file was made: torch.save(model.state_dict(), FILE), or safetensors"
        ) from (None if what else error)
    except Exception as error:  # PyTorch's reader raises anything at all for what it cannot read
        line = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise InputError(f"weights: {path} is damaged or no PyTorch file: {line}") from None


def named_tensors(content: Any, path: Path) -> dict[str, Tensor]:
    """The state dict in what a file holds. Raises InputError that says what is there instead."""
    for _ in range(3):
        if isinstance(content, Mapping):
            if content and all(isinstance(value, Tensor) for value in content.values()):
                return {str(name): value for name, value in content.items()}
            place = next((key for key in PLACES if isinstance(content.get(key), Mapping)), None)
            if place is not None:
                content = content[place]
                continue
        break
    kind = (
        f"the keys {', '.join(map(str, content))}"
        if isinstance(content, Mapping)
        else type(content)
    )
    raise InputError(
        f"weights: {path}: found {kind}, expected names with tensors, alone or under one of: "
        f"{', '.join(PLACES)}"
    )


def _numbers() -> list[Any]:
    """NumPy's numbers, which logs inside checkpoints hold (nnU-Net's do): plain data, no code."""
    import numpy as np
    from numpy._core.multiarray import scalar

    kinds = {type(np.dtype(kind)) for kind in np.sctypeDict.values() if kind is not np.object_}
    plain = [scalar, (scalar, "numpy.core.multiarray.scalar"), np.dtype, *kinds]
    return sorted(plain, key=str)


def _forbidden(path: Path) -> str:
    """Names of what a file wants to have called, without calling it."""
    try:
        names = torch.serialization.get_unsafe_globals_in_checkpoint(path)
    except Exception:
        return ""
    allowed = {"numpy._core.multiarray.scalar", "numpy.core.multiarray.scalar", "numpy.dtype"}
    return ", ".join(sorted(set(names) - allowed)[:4])
