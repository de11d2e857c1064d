"""Words that a shell, a date or a hand made into something else: one message, never a traceback."""

from __future__ import annotations

import signal
import subprocess
import sys

import pytest
import yaml

from segfleet.cli import main
from segfleet.pipeline.launch import local, worker
from segfleet.pipeline.stop import StopRequest

STAGES = [{"name": "base", "epochs": 1, "steps": 1, "lr": 0.01}]
LONG, DEEP = "x" * 300, "d/" * 1200
TRAIN = [
    ["model.options.width=abc"],
    ["model.options.width=[1, 2]"],
    ["model.options.width={a: 1}"],
    ["model.options.width=-1"],
    ["model.options.width=1e400"],
    ["model.options=7"],
    ["model.name=2026-11-29"],
    ["stages.².lr=1"],
    ["stages.٣.lr=1"],
    [f"stages.{'9' * 5000}.lr=1"],
    ["stages.0.lr=2026-11-29"],
    ["stages.0.epochs=" + "9" * 5000],
    ["data.patch=2026-11-29"],
    ["data.store=a\nb"],
    [f"data.store={LONG}"],
    ["seed=" + "9" * 400],
    ["--runs", LONG],
    ["--runs", "x\udcff"],
    ["--runs", DEEP],
    [f"data.store={DEEP}"],
    ["--ranks", "²"],
]


@pytest.fixture
def refused(tiny_recipe, monkeypatch, capsys):
    """`refused("train", ...)`: the one message, of a command whose rank is this process."""
    folder = tiny_recipe(STAGES, 2)
    monkeypatch.chdir(folder)

    def alone(job, ranks, *_, **__):
        code, _ = worker.work(folder, job.document, StopRequest())
        if code:
            raise local.RankFailed(*local._reason(folder, [code]))

    monkeypatch.setattr(local, "run_ranks", alone)

    def run(*words: str) -> str:
        monkeypatch.setattr(sys, "argv", ["segfleet", *words])
        with pytest.raises(SystemExit) as end:
            main.main()
        said = capsys.readouterr().err
        assert end.value.code == 2 and said.strip(), (words, end.value.code, said)
        assert "Traceback" not in said
        return said

    before = {number: signal.getsignal(number) for number in local.STOP_SIGNALS}
    limit = sys.getrecursionlimit()
    sys.setrecursionlimit(1000)  # Python's own: compilers that ran in this process may raise it
    yield run
    sys.setrecursionlimit(limit)
    for number, handler in before.items():  # the rank in this process took them
        signal.signal(number, handler)
    subprocess.run(["rm", "-rf", "d"], cwd=folder, check=True)  # folders inside one another


@pytest.mark.parametrize("words", TRAIN, ids=lambda words: ascii(words[-1][:40]))
def test_train(refused, words):
    refused("train", "tiny.yaml", *words)


@pytest.mark.parametrize(
    "axes",
    ["stages.0.lr: [2026-11-29, 2026-11-30]", "stages.².lr: [1, 2]", "stages.0.lr: [a, b]",
     "model.options.width: [4, 2026-11-29]", "'': [1, 2]", "stages.0: [1, 2]"],
)  # fmt: skip
def test_the_axes_of_a_sweep(refused, axes, tmp_path):
    base = yaml.safe_load(open("tiny.yaml"))
    text = yaml.safe_dump({"name": "space", "base": base}) + f"axes:\n  {axes}\n"
    (tmp_path / "space.yaml").write_text(text)
    refused("sweep", str(tmp_path / "space.yaml"), "--slots", "1", "--dry-run")


@pytest.mark.parametrize(
    "words",
    [["--runs", "a\n#SBATCH --uid=0"], ["--partition", "a\n#SBATCH --uid=0"],
     ["--account", "a b\n"],
     ["--sbatch", "--licenses=x\n#SBATCH --uid=0"], ["--mail", "a\nb"], ["--time", "²"],
     ["--nodes", "²"], ["--gpus", "a100:²"], ["--array", "data.fold=0..²"], ["--memory", "²G"]],
    ids=ascii,
)  # fmt: skip
def test_lines_of_a_script_stay_where_they_are(refused, words):
    refused("submit", "tiny.yaml", "--dry-run", "--no-check", *words)
