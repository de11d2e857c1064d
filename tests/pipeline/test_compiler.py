"""PyTorch's compiler is loaded by a rank that compiles and by no other: it takes as long as
PyTorch."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

from segfleet.pipeline.launch.job import Train
from segfleet.pipeline.recipe import parse

TRAINED = """
import json, sys, torch
from segfleet.pipeline import jobs, ranks, stop
from segfleet.pipeline.launch.job import parse_job
jobs.run_job(parse_job(json.loads(sys.argv[1])), ranks.Ranks(torch.device("cpu")), stop.StopRequest())
print("torch._dynamo.eval_frame" in sys.modules)
"""
STEPS = """
import json, sys, torch, torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel
from segfleet.pipeline import compiler

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
