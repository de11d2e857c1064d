"""Networks as graphs, torch.export's and ONNX, say what the networks say, for another batch size
than the one they were traced with. docs/models.md names those held here, and those that ONNX
refuses."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

from segfleet.core.errors import InputError
from segfleet.models.registry import build_model, spec
from segfleet.pipeline.exporting.graphs import Logits, as_onnx, exported

PAGE = (Path(__file__).resolve().parents[2] / "docs" / "models.md").read_text(encoding="utf-8")


def named(kind: str) -> list[str]:
    """Networks of a line in docs/models.md."""
    (sentence,) = re.findall(rf"^- {re.escape(kind)}.*?: (.*)$", PAGE, re.MULTILINE)
    return re.findall(r"`(\w+)`", sentence)


BOTH, PT2_ALONE = named("`.pt2` and ONNX"), named("`.pt2` alone")
QUICK = {"unext", "unet_lite_ultralight"}  # the others are long: minutes each on a busy machine


@pytest.fixture(scope="module")
def onnxruntime():
    pytest.importorskip("onnx")
    pytest.importorskip("onnxscript")
    return pytest.importorskip("onnxruntime")


# torch 2.11 warns of its own reading of a .pt2 file
@pytest.mark.filterwarnings("ignore:The given buffer is not writable:UserWarning")
@pytest.mark.parametrize(
    "name",
    [n if n in QUICK else pytest.param(n, marks=pytest.mark.long) for n in BOTH + PT2_ALONE],
)
def test_a_graph_says_what_the_network_says(name, tmp_path, onnxruntime):
    chosen, generator = spec(name), torch.Generator().manual_seed(0)
    torch.manual_seed(0)
    network = build_model(
        name, in_channels=chosen.in_channels, num_classes=chosen.num_classes + 1,
        options=chosen.reduced,
    ).eval()  # fmt: skip
    with torch.no_grad():  # off its initial values: a branch that starts at zero says nothing
        for parameter in network.parameters():
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator))
    three = torch.randn(3, chosen.in_channels, *chosen.small_input, generator=generator)
    with torch.no_grad():
        expected = Logits(network)(three)
    close = {"rtol": 1e-3, "atol": 1e-4 * float(expected.abs().max())}
    program = exported(network, three[:2], name)
    torch.export.save(program, tmp_path / "model.pt2")
    found = torch.export.load(tmp_path / "model.pt2").module()(three)
    torch.testing.assert_close(found, expected, **close)
    if name in PT2_ALONE:
        with pytest.raises(InputError, match=f"{name} cannot be written as ONNX"):
            as_onnx(program, three[:2], name)
        return
    as_onnx(program, three[:2], name).save(tmp_path / "model.onnx", external_data=False)
    session = onnxruntime.InferenceSession(
        str(tmp_path / "model.onnx"), providers=["CPUExecutionProvider"]
    )
    for batch in (three, three[:1]):
        (found,) = session.run(None, {"image": batch.numpy()})
        torch.testing.assert_close(torch.from_numpy(found), expected[: len(batch)], **close)
