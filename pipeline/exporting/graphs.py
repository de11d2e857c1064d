"""A network as a graph that runs without segfleet: torch.export's .pt2, and ONNX.

Both take one batch of patches (B, C, *patch), float32 as preprocessing makes them, with any B, and
give logits (B, K, *patch). Tiling, resampling and normalisation are not in them: config.json says
how they are done.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor, nn

from segfleet.core.errors import InputError
from segfleet.pipeline.parts import patch_of
from segfleet.pipeline.trained.model import Model, Trained


class Logits(nn.Module):
    """A network's finest output."""

    def __init__(self, network: nn.Module):
        super().__init__()
        self.network = network

    def forward(self, image: Tensor) -> Tensor:
        output = self.network(image)
        return output[0] if isinstance(output, (list, tuple)) else output


def example(trained: Trained) -> Tensor:
    """(2, C, *patch) of the size the network takes."""
    patch = patch_of(trained.recipe, trained.manifest)
    channels = len(trained.manifest.dataset.channels)
    size = patch[1:] if patch[0] == 1 else patch
    return torch.randn(2, channels, *size, generator=torch.Generator().manual_seed(0))


def exported(network: nn.Module, image: Tensor, name: str) -> torch.export.ExportedProgram:
    """A network on the CPU in eval mode as torch.export has it, with a free batch size. `image`: a
    batch of two or more patches. Raises InputError, by `name`, if it has parts that cannot be
    exported."""
    free = {"image": {0: torch.export.Dim("batch", min=1, max=4096)}}
    try:
        with warnings.catch_warnings(), torch.no_grad():
            warnings.simplefilter("ignore")
            return torch.export.export(Logits(network), (image,), dynamic_shapes=free)
    except Exception as error:
        raise InputError(
            f"export: {name} cannot be written as a graph: {_first(error)}. Leave out --pt2 and "
            "--onnx: the model itself needs neither"
        ) from error


def as_onnx(
    program: torch.export.ExportedProgram, image: Tensor, name: str
) -> torch.onnx.ONNXProgram:
    """The same as ONNX. Raises InputError for parts that ONNX does not know."""
    try:
        with warnings.catch_warnings(), _quiet():
            warnings.simplefilter("ignore")
            onnx_program = torch.onnx.export(
                program,
                (image,),
                input_names=["image"],
                output_names=["logits"],
                dynamo=True,
                verbose=False,
            )
            assert onnx_program is not None
            return onnx_program
    except Exception as error:
        raise InputError(
            f"export: {name} cannot be written as ONNX: {_first(error)}. --pt2 may do"
        ) from error


@contextmanager
def _quiet() -> Iterator[None]:
    """Without the exporter's lines on operations of packages that are not installed."""
    logger = logging.getLogger("torch.onnx")
    before = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(before)


def _first(error: Exception) -> str:
    """The first line of what an exporter says."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def _program(model: Model, trained: Trained) -> torch.export.ExportedProgram:
    network = model.network(trained).to("cpu").eval()
    return exported(network, example(trained), trained.recipe.model.name)


def write_pt2(model: Model, trained: Trained, path: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.export.save(_program(model, trained), path)


def check_onnx() -> None:
    """Raises InputError if the packages that write ONNX are not there."""
    try:
        import onnx  # noqa: F401
        import onnxscript  # noqa: F401
    except ImportError as error:
        raise InputError(
            f"export: --onnx needs {error.name}, which is not installed: pip install "
            "'segfleet[onnx]'"
        ) from None


def write_onnx(model: Model, trained: Trained, path: Path) -> None:
    """One file, weights inside. Raises InputError without the packages, or for a network with parts
    that ONNX does not know."""
    check_onnx()
    program = as_onnx(_program(model, trained), example(trained), trained.recipe.model.name)
    program.save(path, external_data=False)
