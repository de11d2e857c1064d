"""A GPU whose memory is full, said once: what was asked of it and what to lower."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress

import torch

from segfleet.core.errors import InputError
from segfleet.pipeline.recipe import Recipe

GIB = 2**30
# what CUDA's libraries say instead of torch.OutOfMemoryError
SIGNS = (
    "CUDA error: out of memory",
    "CUDNN_STATUS_ALLOC_FAILED",
    "CUBLAS_STATUS_ALLOC_FAILED",
)


class OutOfMemory(InputError):
    """The recipe asks for more memory than the GPU has: another start would end the same way."""


@contextmanager
def named(device: torch.device | str, words: str) -> Iterator[None]:
    """Within it a full GPU is one message: the card, then `words`, what was asked of it and what to
    lower."""
    try:
        yield
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        raise OutOfMemory(f"out of memory on {card(torch.device(device))} {words}") from error


def is_out_of_memory(error: BaseException) -> bool:
    return isinstance(error, torch.OutOfMemoryError) or (
        isinstance(error, RuntimeError) and any(sign in str(error) for sign in SIGNS)
    )


def card(device: torch.device) -> str:
    """Name and memory of a device, as far as it still answers."""
    text = str(device)
    with suppress(Exception):
        free, total = torch.cuda.mem_get_info(device)
        own = torch.cuda.memory_reserved(device)
        text += f" ({torch.cuda.get_device_name(device)}, {total / GIB:.1f} GiB: "
        text += f"{own / GIB:.1f} held here, {max(total - free - own, 0) / GIB:.1f} by others)"
    return text


def training_words(recipe: Recipe, patch: Sequence[int], ranks: int) -> str:
    """`recipe` as it is resolved for its stage."""
    engine, batch = recipe.engine, recipe.data.batch
    at_once = max(1, batch // (engine.accumulate * ranks))
    advice = []
    if at_once > 1:
        advice.append(f"raise engine.accumulate ({engine.accumulate}), which keeps the batch")
    if not engine.checkpoint_activations:
        advice.append("set engine.checkpoint_activations=true, which keeps the result")
    if engine.precision == "fp32":
        advice.append("set engine.precision=bf16")
    if batch > 1:
        advice.append("lower data.batch")
    advice.append("lower data.patch")
    return (
        f"while training {recipe.model.name} in {engine.precision}: {at_once} patch(es) of "
        f"{size(patch)} at once on each of {ranks} GPU(s), data.batch {batch}. "
        f"{sentence(advice)}"
    )


def scoring_words(recipe: Recipe, patch: Sequence[int]) -> str:
    options = recipe.evaluation
    advice = []
    if options.batch > 1:
        advice.append("lower evaluation.batch")
    if recipe.engine.precision == "fp32":
        advice.append("train with engine.precision=bf16")
    advice.append("free the GPU of other processes")
    advice.append("score on the CPU (SEGFLEET_DEVICE=cpu)")
    return (
        f"while scoring {recipe.model.name} in {recipe.engine.precision}: tiles of {size(patch)}, "
        f"evaluation.batch {options.batch}, halved down to 1. {sentence(advice)}"
    )


def predicting_words(name: str, patch: Sequence[int], batch: int) -> str:
    advice = ("free the GPU of other processes", "predict on the CPU (--device cpu)")
    return f"with {name}, tiles of {size(patch)}, {batch} at once. {sentence(advice)}"


def size(patch: Sequence[int]) -> str:
    return "x".join(map(str, patch))


def sentence(advice: Sequence[str]) -> str:
    text = "; or ".join(advice) + "."
    return text[0].upper() + text[1:]
