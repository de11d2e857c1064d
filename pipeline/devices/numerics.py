"""How PyTorch computes on a GPU: said by the recipe, never left to defaults. On a CPU nothing of
this is set, and the same recipe on the same number of ranks gives the same bits anyway."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from segfleet.core.errors import InputError
from segfleet.pipeline import sections
from segfleet.pipeline.recipe import Recipe

# cuBLAS adds in a fixed order with these alone; read when the first product is computed
WORKSPACE, WORKSPACES = "CUBLAS_WORKSPACE_CONFIG", (":4096:8", ":16:8")
WITHOUT_ORDER = re.compile(r"(.+?) does not have a deterministic implementation")


def arrange(options: sections.Engine, device: torch.device) -> None:
    """Settings of this process for the stage that begins, or the network that is scored, whatever
    the one before had."""
    if device.type == "cpu":
        return
    ordered = options.deterministic
    if ordered and os.environ.get(WORKSPACE) not in WORKSPACES:
        os.environ[WORKSPACE] = WORKSPACES[0]
    # it writes all memory twice to hide reads of what was never written
    torch.utils.deterministic.fill_uninitialized_memory = False
    torch.backends.cudnn.deterministic = ordered
    torch.backends.cudnn.benchmark = not ordered  # patches have one size: the fastest is kept
    torch.backends.cudnn.allow_tf32 = options.tf32 != "none"
    torch.set_float32_matmul_precision("high" if options.tf32 == "all" else "highest")


@contextmanager
def step_of(recipe: Recipe, device: torch.device) -> Iterator[None]:
    """Inside, a training step takes operations with a fixed order alone, if the recipe asks for it.
    Scoring does not, so that a network scores the same while it trains and later.

    PyTorch's refusal of an operation that has no such form becomes an InputError that names it and
    the network.
    """
    required = recipe.engine.deterministic and device.type != "cpu"
    if required:
        torch.use_deterministic_algorithms(True)
    try:
        yield
    except RuntimeError as error:
        if not (operation := WITHOUT_ORDER.search(str(error))):
            raise
        raise InputError(
            f"engine.deterministic: found true, but {recipe.model.name} or its loss computes "
            f"'{operation[1].strip()}', which has no deterministic form in PyTorch; expected "
            "false, or a network without it"
        ) from None
    finally:
        if required:
            torch.use_deterministic_algorithms(False)
