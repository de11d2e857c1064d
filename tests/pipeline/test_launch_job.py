"""Jobs travel as plain JSON and come back as what they were, or are refused in a sentence."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from segfleet.core.errors import ExitCode, InputError
from segfleet.pipeline.launch import local
from segfleet.pipeline.launch.job import Command, Predict, Score, ScoreOn, Train, parse_job
from segfleet.preprocess.building.request import BuildRequest, Preprocess, Survey, Write
from segfleet.preprocess.planning.plan import Overrides
from segfleet.preprocess.readers.base import Layout

WISH = Overrides(spacing=(2.5, 1.0, 1.0), patch=(16, 64, 64), masks="nearest", slices=True)
STORE = BuildRequest("msd", "raw", "out", options={"regions": "a"}, overrides=WISH, workers=2)
JOBS = [
    Train(recipe={"name": "a", "seed": None}, root="runs", run="runs/a", pause_at=3, waits=True),
    Score(recipe={}, root="runs", again=True),
    ScoreOn(recipe={}, run="runs/a", store="stores/b", split="kfold", fold=2),
    Predict(models=["a", "b"], images=["x.png"], out="p", layout=Layout("msd", {"regions": "a"})),
    Command(words=("sweep", "s.yaml"), ray=True),
    Preprocess(store=STORE, verify=True),
    Survey(store=STORE, share=(0, 3)),
    Write(store=STORE, share=(2, 3)),
]


@pytest.mark.parametrize("job", JOBS, ids=lambda job: job.do)
def test_a_job_comes_back_as_it_was_sent(job):
    back = parse_job(json.loads(json.dumps(job.document())))
    assert back == job and type(back) is type(job)


def test_what_comes_back_has_the_types_that_were_sent():
    store = parse_job(json.loads(json.dumps(JOBS[-1].document()))).store
    assert store.overrides == WISH and store.overrides.spacing == (2.5, 1.0, 1.0)
    assert store.raw == Path("raw") and store.partial == Path("out.partial")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"do": "nothing"}, "found 'nothing', expected one of: train, score, score on, predict"),
        ({"stage_too": "/x"}, "stage_too: .*another version wrote it"),
        ({"root": None}, "root: .*another version wrote it"),
        ({"max_seconds": "soon"}, "max_seconds: .*another version wrote it"),
    ],
)
def test_a_job_of_another_version_is_refused_by_name(change, words):
    with pytest.raises(InputError, match=f"job: {words}"):
        parse_job({**JOBS[0].document(), **change})


def test_a_second_ctrl_c_ends_a_rank_at_once_wherever_it_is(tmp_path):
    """In the middle of anything, also where an exception would be printed and passed over."""
    os.mkfifo(tmp_path / "job.json")  # its orders do not come
    words = [sys.executable, "-P", "-m", "segfleet.pipeline.launch.worker", str(tmp_path)]
    with subprocess.Popen(words, stderr=subprocess.PIPE, text=True) as process:
        status, usr1 = Path(f"/proc/{process.pid}/status"), 1 << (signal.SIGUSR1 - 1)
        while not int(status.read_text().partition("SigCgt:")[2].split()[0], 16) & usr1:
            time.sleep(0.05)
        process.send_signal(signal.SIGINT)
        time.sleep(0.5)
        assert process.poll() is None  # the first one asks
        process.send_signal(signal.SIGINT)
        assert process.wait(60) == ExitCode.INTERRUPTED and process.stderr.read() == ""
    message, code = local._reason(tmp_path, [75])
    assert code == ExitCode.INTERRUPTED and message.startswith("interrupted. Run the same command")
