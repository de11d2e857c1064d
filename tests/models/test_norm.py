"""Instance normalisation whose successor works in place: PyTorch's bits, without its copies."""

from __future__ import annotations

import copy

import pytest
import torch
from functorch.compile import make_boxed_func
from torch import Tensor, nn
from torch._dynamo.backends.common import aot_autograd
from torch.utils._python_dispatch import TorchDispatchMode

from segfleet.models.norm import InstanceNorm2d, InstanceNorm3d

OWN = {2: InstanceNorm2d, 3: InstanceNorm3d}
PLAIN = {2: nn.InstanceNorm2d, 3: nn.InstanceNorm3d}
CONV = {2: nn.Conv2d, 3: nn.Conv3d}
LAST = {2: torch.channels_last, 3: torch.channels_last_3d}
COPIES = ("copy_", "clone", "new_zeros", "new_empty_strided")


def block(dims: int, norms: dict[int, type[nn.Module]], affine: bool = True) -> nn.Sequential:
    torch.manual_seed(0)
    made = nn.Sequential(
        CONV[dims](2, 4, 3, padding=1), norms[dims](4, affine=affine), nn.LeakyReLU(0.01, True)
    )
    for parameter in made[1].parameters():
        nn.init.normal_(parameter)
    return made


class Copies(TorchDispatchMode):
    """Copies of something as large as a map."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.size = size
        self.found: list[str] = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        made, name = function(*args, **(kwargs or {})), function.overloadpacket.__name__
        if name in COPIES and made.numel() == self.size:
            self.found.append(name)
        return made


def trained(model: nn.Module, image: Tensor, layout: torch.memory_format) -> tuple:
    """Output and gradients, and the copies of the backward pass."""
    image = image.clone().requires_grad_()
    output = model(image.contiguous(memory_format=layout))
    gradient = torch.randn(output.shape, generator=torch.Generator().manual_seed(1)).to(output)
    with Copies(output.numel()) as copies:
        output.backward(gradient)
    return [output.detach(), image.grad, *(p.grad for p in model.parameters())], copies.found


@pytest.mark.parametrize("bf16", [False, True])
@pytest.mark.parametrize("last", [False, True])
@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("dims", [2, 3])
def test_the_same_bits_and_no_copies(dims, affine, last, bf16):
    image = torch.randn(2, 2, *(6,) * dims, generator=torch.Generator().manual_seed(2))
    layout = LAST[dims] if last else torch.contiguous_format
    with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
        own, copies = trained(block(dims, OWN, affine), image, layout)
        plain, others = trained(block(dims, PLAIN, affine), image, layout)
    assert all(torch.equal(a, b) for a, b in zip(own, plain, strict=True))
    assert others, "PyTorch's own does not copy any more"
    assert not copies


@pytest.mark.parametrize("dims", [2, 3])
def test_elsewhere_it_is_pytorchs(dims):
    own, plain = block(dims, OWN), block(dims, PLAIN)
    image = torch.randn(2, 2, *(6,) * dims)
    assert own.state_dict().keys() == plain.state_dict().keys()
    assert torch.equal(copy.deepcopy(own).eval()(image), plain.eval()(image))
    with torch.no_grad():
        assert torch.equal(own(image), plain.train()(image))
    with pytest.raises(ValueError, match="more than 1 spatial element"):
        own(image[..., :1, :1] if dims == 2 else image[..., :1, :1, :1])


def test_traced_it_copies_nothing_either():
    nodes: list[str] = []

    def keep(graph, examples):
        nodes.extend(str(node.target) for node in graph.graph.nodes)
        return make_boxed_func(graph.forward)

    backend = aot_autograd(fw_compiler=keep, bw_compiler=keep)
    network = torch.compile(block(3, OWN), backend=backend, fullgraph=True)
    network(torch.randn(1, 2, 4, 4, 4)).sum().backward()
    assert any("leaky_relu_backward" in node for node in nodes)
    assert not [node for node in nodes if any(f".{name}." in node for name in COPIES)]
