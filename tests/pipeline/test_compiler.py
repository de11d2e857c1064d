"""PyTorch's compiler is loaded by a rank that compiles and by no other: it takes as long as
PyTorch."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest
import torch
from torch import nn

from segfleet.pipeline.devices import compiler
from segfleet.pipeline.engines.base import Setup, build_engine
from segfleet.pipeline.launch.job import Train
from segfleet.pipeline.ranks import Ranks
from segfleet.pipeline.recipe import parse
from segfleet.pipeline.sections import Engine

TRAINED = """
import json, sys, torch
from segfleet.pipeline import jobs, ranks, stop
from segfleet.pipeline.launch.job import parse_job
job = parse_job(json.loads(sys.argv[1]))
jobs.run_job(job, ranks.Ranks(torch.device("cpu")), stop.StopRequest())
print("torch._dynamo.eval_frame" in sys.modules)
"""
STEPS = """
import json, sys, torch, torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel
from segfleet.pipeline.devices import compiler

def loaded():
    return "torch._dynamo.eval_frame" in sys.modules

compiler.load_later()
dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
image = torch.randn(2, 3, 8, 8)
network = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3), torch.nn.BatchNorm2d(8))
ranks = DistributedDataParallel(network)
for kind in (torch.optim.SGD, torch.optim.Adam, torch.optim.AdamW):
    optimizer = kind(ranks.parameters(), lr=1e-3)
    ranks(image).square().mean().backward()
    optimizer.step()
    optimizer.zero_grad()
    optimizer.load_state_dict(optimizer.state_dict())
dist.destroy_process_group()
before = loaded()
if sys.argv[1] == "now":
    compiler.load_now()
seen = []

def backend(graph, examples):
    seen.append(len(graph.graph.nodes))
    return graph

compiled = torch.compile(network.eval(), backend=backend)
same = torch.equal(compiled(image), network(image))
optimizer.step()
told = hasattr(torch.optim.Optimizer.zero_grad.__wrapped__, "__dynamo_disable")
optimizer.zero_grad()
again = vars(torch.optim.Optimizer.zero_grad.__wrapped__)["__dynamo_disable"]
print(json.dumps([before, loaded(), same, len(seen), told, again.__module__]), flush=True)
"""


def said(code: str, *words: str) -> str:
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-P", "-c", code, *words], capture_output=True, text=True, env=environment
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()[-1]


def test_a_run_that_compiles_nothing_loads_no_compiler(tiny_store, tmp_path, cold):
    document = {
        "name": "tiny",
        "data": {"store": str(tiny_store(dims=2)), "batch": 2, "patch": [16, 16], "workers": 0},
        "model": {"name": "unet_lite_standard", "options": {"width": 4}},
        "stages": [{"epochs": 1, "steps": 2, "lr": 1e-2}],
        "evaluation": {"every": 1},
    }
    recipe = parse(document, "tiny").model_dump(mode="json")
    job = Train(recipe=recipe, root=tmp_path)
    assert said(TRAINED, job.model_dump_json()) == "False"
    assert list(tmp_path.rglob("evaluation.json"))


@pytest.mark.parametrize("when", ["now", "when it is asked"])
def test_who_compiles_later_gets_the_compiler_itself(when, cold):
    """It is told again what it is not to compile, by those who told its stand-in."""
    before, after, same, graphs, told, module = json.loads(said(STEPS, when))
    assert not before and after and same and graphs == 1
    assert not told, "the stand-in's answer is forgotten"
    assert module.startswith("torch._dynamo"), "and asked for again"


@pytest.fixture
def gpu(monkeypatch):
    """A machine whose GPU kernels can be compiled for; what it has can be taken away."""
    has = {"triton": True, "compiler": True, "capability": (9, 0)}
    monkeypatch.setattr(compiler.importlib.util, "find_spec", lambda name: has["triton"] or None)
    monkeypatch.setattr(compiler.shutil, "which", lambda name: has["compiler"] or None)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: has["capability"])
    return has


def wanted(device: str, **options) -> bool:
    return compiler.wanted(Engine(**options), torch.device(device))


def test_auto_compiles_on_gpus_that_can_be_compiled_for(gpu):
    assert wanted("cuda") and not wanted("cpu")
    assert wanted("cpu", compile=True) and not wanted("cuda", compile=False)
    assert wanted("cuda", compile="reduce-overhead")
    for other in ({"deterministic": True}, {"checkpoint_activations": True}, {"name": "deepspeed"}):
        assert not wanted("cuda", **other) and wanted("cuda", compile=True, **other)


@pytest.mark.parametrize(
    ("key", "value"), [("triton", None), ("compiler", None), ("capability", (6, 1))]
)
def test_auto_leaves_a_gpu_that_nothing_can_be_compiled_for(gpu, key, value):
    gpu[key] = value
    assert not wanted("cuda")


class Broken(nn.Module):
    """A network whose graph breaks in the middle, after a normalisation that counts."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.BatchNorm2d(3), nn.Conv2d(3, 2, 3)

    def forward(self, x):
        x = self.first(x)
        torch._dynamo.graph_break()
        return self.second(x)


def test_what_does_not_trace_whole_runs_as_it_is_and_says_so_once(caplog):
    model, image = Broken(), torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    whole = compiler.Whole(model, backend="eager")
    assert {id(p) for p in whole.parameters()} == {id(p) for p in model.parameters()}
    for count in (1, 2):
        found = whole(image)
        assert model.first.num_batches_tracked == count, "nothing is computed twice"
    assert len([r for r in caplog.records if "is not compiled" in r.message]) == 1
    model.first.eval()
    assert found.shape == (2, 2, 6, 6) and torch.equal(whole(image), model(image))


@pytest.mark.parametrize("fails", [False, True], ids=["compiled", "the compiler fails"])
def test_what_traces_whole_runs_as_one_graph(caplog, fails):
    graphs = []

    def backend(graph, examples):
        if fails:
            raise RuntimeError("no compiler for this card")
        graphs.append(graph)
        return graph

    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 2, 3))
    image = torch.randn(1, 3, 8, 8)
    whole = compiler.Whole(model, backend)
    whole(image).sum().backward()
    assert all(p.grad is not None for p in model.parameters())
    assert torch.equal(whole(image), model(image))
    assert len(graphs) == (not fails)
    assert ("no compiler for this card" in caplog.text) == fails


def test_reduce_overhead_replays_one_graph_on_gpus_alone(monkeypatch):
    asked = []

    def compile(model, **options):
        asked.append(options["mode"])
        return model

    monkeypatch.setattr(torch, "compile", compile)
    steps = []
    monkeypatch.setattr(torch.compiler, "cudagraph_mark_step_begin", lambda: steps.append(1))
    for device in ("cuda", "cpu"):
        options = Engine(compile="reduce-overhead")
        whole = compiler.compiled(nn.Conv2d(3, 4, 3), options, torch.device(device))
        whole(torch.randn(1, 3, 8, 8))
    assert asked == ["reduce-overhead", None] and steps == [1]


class Overwritten(torch.autograd.Function):
    """A gradient that lies where the next one is written, as a CUDA graph's."""

    place = torch.zeros(1)

    @staticmethod
    def forward(ctx, weight, x):
        ctx.save_for_backward(x)
        return weight * x

    @staticmethod
    def backward(ctx, gradient):
        (x,) = ctx.saved_tensors
        Overwritten.place.copy_((gradient * x).sum())
        return Overwritten.place.detach(), None


class Scale(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(1))

    def forward(self, x):
        return Overwritten.apply(self.weight, x)


@pytest.mark.parametrize("replayed", [True, False])
def test_micro_batches_add_up_although_a_replay_writes_their_gradients_again(replayed):
    recipe = parse(
        {
            "name": "sums",
            "model": {"name": "unet_lite_standard"},
            "data": {"batch": 3},
            "optimizer": {"name": "sgd", "momentum": 0, "weight_decay": 0, "clip": 0},
            "stages": [{"epochs": 1, "lr": 1}],
            "engine": {"accumulate": 3, "compile": False},
        }
    )
    setup = Setup(
        model=Scale(),
        loss=lambda output, label: output.sum(),
        recipe=recipe,
        stage=recipe.stages[0],
        ranks=Ranks(torch.device("cpu")),
    )
    engine = build_engine(setup)
    engine.replayed = replayed
    batches = [(torch.full((1,), value), None) for value in (1.0, 2.0, 6.0)]
    engine.step(iter(batches), 1.0)
    # 1 minus the mean of 1, 2 and 6; without copies the last one counts more than once
    assert (float(engine.model.weight.detach()) == pytest.approx(-2)) == replayed
