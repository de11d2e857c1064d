"""What `run_sweep` makes of the sessions of Ray it watches; the sessions themselves are tested in
test_sweep_command.py."""

from __future__ import annotations

import json
import os
import queue
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

from segfleet.core.errors import InputError
from segfleet.core.process import alive
from segfleet.pipeline.launch.local import RankFailed
from segfleet.pipeline.stop import Interrupted
from segfleet.slurm import snapshot
from segfleet.sweeps import run
from segfleet.sweeps.ray import controller, keeper
from segfleet.sweeps.results.ledger import STOP
from segfleet.sweeps.space.plan import make_plan, prepare_folder
from tests.states import until


class Ends(run.Session):
    """A session that is over: what it said, and how often there was one."""

    error, count = None, 0

    def __init__(self, plan, resources, seconds):
        type(self).count += 1
        self.process, self.closing, self.watching, self.parts = (
            run.subprocess.Popen(["true"], stdout=run.subprocess.PIPE),
            True,
            False,
            {},
        )


def test_ctrl_c_asks_first_and_then_insists(tmp_path):
    (tmp_path / STOP).touch()  # somebody else asked already: the first Ctrl-C is still the first
    with run.listening(tmp_path, detaches=False):
        (tmp_path / STOP).unlink()
        signal.raise_signal(signal.SIGINT)
        assert (tmp_path / STOP).exists()
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / STOP).touch()
    with run.listening(tmp_path / "other", detaches=False):
        signal.raise_signal(signal.SIGTERM)
    (tmp_path / "third").mkdir()
    with run.listening(tmp_path / "third", detaches=False):
        signal.raise_signal(signal.SIGUSR1)  # SLURM's warning to the job a sweep runs in
        signal.raise_signal(signal.SIGTERM)
    assert (tmp_path / "third" / STOP).exists()


def test_slots_are_gpus_where_there_are_some_cores_elsewhere_and_jobs_on_slurm(monkeypatch):
    monkeypatch.delenv("SEGFLEET_DEVICE", raising=False)
    monkeypatch.setattr(run, "cpus", lambda: 6)

    def slots(gpus, **given):
        monkeypatch.setattr("torch.cuda.device_count", lambda: gpus)
        return run.Resources(**given).at_once

    assert [slots(0), slots(0, ranks=4), slots(0, ranks=8)] == [6, 1, 1]
    assert [slots(4), slots(4, ranks=2), slots(4, ranks=3), slots(1, ranks=2)] == [4, 2, 1, 1]
    assert [slots(4, slots=9), slots(4, on="slurm")] == [9, run.JOBS]
    monkeypatch.setenv("SEGFLEET_DEVICE", "cpu")
    assert slots(4) == 6


def test_the_process_that_drives_ray_is_told_the_slots(search, tmp_path, monkeypatch):
    monkeypatch.setattr(run, "gpus", lambda: 3)
    interpreter = sys.executable
    told = tmp_path / "order.json"
    monkeypatch.setattr(sys, "executable", str(tmp_path / "python"))
    (tmp_path / "python").write_text(
        f'#!/bin/sh\ncat > {told}\nprintf %s "$PYTHONPATH" > {told}.path\n'
    )
    (tmp_path / "python").chmod(0o755)
    plan = make_plan(search(), tmp_path / "runs", build=False)
    plan.folder.mkdir(parents=True)
    assert run.Session(plan, run.Resources(), None).follow(print) is None
    assert json.loads(told.read_text())["resources"]["slots"] == 3
    prepare_folder(plan, run.settle_code(plan, False))
    assert run.Session(plan, run.Resources(), None).follow(print) is None
    first = Path(f"{told}.path").read_text().split(":")[0]
    assert first == str(plan.runs / ".code" / snapshot.digest())
    found = [interpreter, "-P", "-c", "import segfleet.sweeps.run as run; print(run.__file__)"]
    out = subprocess.run(found, env={**os.environ, "PYTHONPATH": first}, capture_output=True)
    assert out.stdout.decode().strip() == f"{first}/segfleet/sweeps/run.py"


def test_a_sweep_keeps_to_the_code_it_began_with(search, tmp_path, monkeypatch):
    plan = make_plan(search(), tmp_path / "runs", build=False)
    prepare_folder(plan, run.settle_code(plan, False))
    began = run.codes_of(plan)
    assert [code["hash"] for code in began] == [snapshot.digest()]
    assert run.settle_code(plan, False) == began and run.frozen_elsewhere(plan) is None

    newer = plan.runs / ".code" / "newer"
    newer.mkdir()
    monkeypatch.setattr(snapshot, "digest", lambda source=None: "newer")
    monkeypatch.setattr(snapshot, "freeze_code", lambda root: newer)
    with pytest.raises(InputError, match=f"began with the code {began[0]['hash']}.*--code frozen"):
        run.run_sweep(plan, run.Resources(slots=1))
    assert run.frozen_elsewhere(plan) == plan.runs / ".code" / began[0]["hash"]
    codes = run.settle_code(plan, True)
    assert [code["hash"] for code in codes] == [began[0]["hash"], "newer"]
    prepare_folder(plan, codes)
    assert run.frozen_elsewhere(plan) is None


@pytest.mark.parametrize("kind", ["pbt", "optuna"])
def test_a_search_that_is_stopped_before_its_end_says_so(search, tmp_path, monkeypatch, kind):
    changes = (
        {"scheduler": "pbt"} if kind == "pbt" else {"search": "optuna", "budget": {"trials": 3}}
    )
    stages = [{"epochs": 2, "steps": 1, "lr": {"loguniform": [1e-4, 1e-2]}}]
    plan = make_plan(search(axes={}, stages=stages, **changes), tmp_path, build=False)
    monkeypatch.setattr(
        run, "_run_sessions", lambda plan, resources, progress: (plan.folder / STOP).touch()
    )
    with pytest.raises(Interrupted, match="Run the same command again"):
        run.run_sweep(plan, run.Resources(slots=1))


def test_a_session_that_fails_is_started_again_and_at_last_its_words_are_shown(
    search, tmp_path, monkeypatch, capsys
):
    monkeypatch.setattr(Ends, "error", {"error": "the raylet went away", "code": 1})
    monkeypatch.setattr(run, "Session", Ends)
    plan = make_plan(search(), tmp_path, build=False)
    with pytest.raises(RankFailed, match="the raylet went away, 3 times without a stage done"):
        run.run_sweep(plan, run.Resources(slots=1))
    assert (
        Ends.count == run.FRUITLESS
        and capsys.readouterr().err.count("started again") == run.FRUITLESS - 1
    )


def test_ray_goes_where_the_user_says(monkeypatch):
    import tempfile

    from segfleet.sweeps.ray import controller

    with tempfile.TemporaryDirectory(prefix="r") as short:
        monkeypatch.setenv("TMPDIR", short)
        monkeypatch.delenv("RAY_TMPDIR", raising=False)
        assert controller.short_folder() == short
        monkeypatch.setenv("RAY_TMPDIR", f"{short}/{'long' * 20}")
        assert controller.short_folder() == short, "too long for a socket"


def test_a_cluster_that_is_none_is_one_sentence_soon(search, tmp_path, monkeypatch):
    """Nothing listens; something listens that is no Ray; no address at all."""
    plan = make_plan(search(), tmp_path / "runs", build=False)
    plan.folder.mkdir(parents=True)
    monkeypatch.setattr(run, "JOINING", 20.0)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        port = silent.getsockname()[1]
        for address, words in (
            (f"127.0.0.1:{port}", "no Ray cluster of this version and token let us in|refused"),
            ("nowhere", "found 'nowhere', expected host:port or auto"),
        ):
            with pytest.raises(InputError, match=words):
                run.Session(plan, run.Resources(address=address), None).follow(print)
    with pytest.raises(InputError, match=f"nothing answers at 127.0.0.1:{port}"):
        run.Session(plan, run.Resources(address=f"127.0.0.1:{port}"), None).follow(print)


def test_a_cluster_that_dies_in_the_middle_is_said(monkeypatch):
    monkeypatch.setattr(controller, "PAUSE", 0.05)
    said: queue.SimpleQueue = queue.SimpleQueue()
    with socket.create_server(("127.0.0.1", 0)) as head:
        port = head.getsockname()[1]
        controller.watch(
            f"127.0.0.1:{port}", lambda **facts: said.put(facts), lambda code: said.put(code)
        )
        time.sleep(1)
        assert said.empty(), "it lives"
    found = {"error": f"the Ray cluster at 127.0.0.1:{port} answers no more", "code": 1}
    assert [said.get(timeout=20), said.get(timeout=20)] == [found, 1]


def test_what_tune_keeps_lies_where_all_nodes_of_a_cluster_see_it(tmp_path, monkeypatch):
    """Trials run on other nodes, which share the folder of runs and no /tmp."""
    monkeypatch.setitem(sys.modules, "ray", SimpleNamespace(shutdown=lambda: None))
    joined = []
    monkeypatch.setattr(controller, "join", joined.append)
    with controller.ray_session(run.Resources(address="head:6379"), tmp_path) as storage:
        assert storage == tmp_path / "tune" and joined == ["head:6379"]


@pytest.mark.parametrize(
    ("nodes", "given", "expected"),
    [
        ([{"CPU": 8.0}, {"CPU": 4.0}], {"ranks": 2}, 6),
        ([{"CPU": 8.0, "GPU": 4.0}, {"CPU": 8.0, "GPU": 2.0}], {}, 6),
        ([{"CPU": 64.0, "GPU": 4.0}, {"CPU": 64.0}], {"ranks": 3}, 1),
        ([{"CPU": 8.0}], {"slots": 3}, 3),
        ([{"CPU": 8.0}, {"CPU": 4.0}], {"ranks": 9}, "no node of the cluster has more than 8 CPUs"),
        ([{"CPU": 64.0, "GPU": 4.0}], {"ranks": 8}, "no node of the cluster has more than 4 GPUs"),
    ],
)
def test_slots_of_a_cluster_are_what_its_nodes_have_room_for(monkeypatch, nodes, given, expected):
    alive = [{"Alive": True, "Resources": node} for node in nodes]
    gone = {"Alive": False, "Resources": {"CPU": 99.0, "GPU": 99.0}}
    monkeypatch.setitem(sys.modules, "ray", SimpleNamespace(nodes=lambda: [*alive, gone]))
    asked = run.Resources(address="head:6379", **given)
    if isinstance(expected, int):
        assert controller.fit(asked).slots == expected
    else:
        with pytest.raises(InputError, match=expected):
            controller.fit(asked)


def test_every_ray_that_may_be_installed_has_tokens():
    """Ray listens on all interfaces; before 2.52 whoever reached it could run code."""
    setup = (Path(__file__).parents[2] / "setup.py").read_text()
    (lowest,) = re.findall(r'"ray\[tune\]>=(\d+)\.(\d+),<3"', setup)
    assert tuple(map(int, lowest)) >= (2, 52)


def all_gone(session: Path, processes: list[int], seconds: float = 20.0) -> bool:
    """Whether the folder of a session and its processes go within some seconds."""
    end = time.monotonic() + seconds
    while (left := any(map(alive, processes)) or session.exists()) and time.monotonic() < end:
        time.sleep(0.1)
    return not left


KEPT = """
import os, pathlib, subprocess, sys
from segfleet.sweeps.ray import keeper

session = pathlib.Path(sys.argv[1])
with keeper.guarding(session, "mine"):
    orphan = ["bash", "-c", "exec -a ray::Agent sleep 60 >/dev/null & echo $!"]
    with open(session / "log", "w") as log:
        agent = subprocess.run(orphan, stdout=subprocess.PIPE, stderr=log)
    print(agent.stdout.decode(), flush=True)
    if sys.argv[2] == "killed":
        os.kill(os.getpid(), 9)
"""


@pytest.mark.parametrize("end", ["killed", ""])
def test_what_a_session_started_goes_with_it(tmp_path, end):
    """An orphan of one of its processes, as Ray's agents are."""
    session = tmp_path / "sf-x"
    session.mkdir()
    (session / keeper.OWNER).write_text("mine")
    (session / "log").touch()
    words = [sys.executable, "-P", "-c", KEPT, str(session), end]
    with subprocess.Popen(words, stdout=subprocess.PIPE) as process:
        agent = int(process.stdout.readline())
        process.wait(60)
    assert all_gone(session, [agent])


ALONE = """
import json, os, pathlib, sys
import psutil
from segfleet.sweeps.ray.controller import ray_session
from segfleet.sweeps.run import Resources

folder = pathlib.Path(sys.argv[1])
with ray_session(Resources(slots=1), folder):
    import ray

    ray.get(ray.remote(lambda: 1).remote())  # a worker is there, too
    ours = [psutil.Process(), *psutil.Process().children(recursive=True)]
    found = [one for process in ours for one in process.net_connections("inet")]
    temporary = pathlib.Path(json.loads((folder / "ray.json").read_text())["temporary"])
    facts = {
        "listens": sorted({one.laddr.ip for one in found if one.status == psutil.CONN_LISTEN}),
        "mode": oct(temporary.stat().st_mode & 0o777),
        "sessions": len(list(temporary.rglob("session_*/sockets"))),
        "temporary": str(temporary),
        "processes": [process.pid for process in ours[1:]],
    }
    print(json.dumps(facts), flush=True)
    if sys.argv[2] == "killed":
        os.kill(os.getpid(), 9)
"""


@pytest.mark.parametrize(
    ("home", "end"), [("home", "killed"), ("home/of/nobody", "")], ids=["own", "unwritable"]
)
def test_a_local_ray_is_for_its_user_alone(tmp_path, home, end):
    """No other machine reaches it, no other user reads its files, and it leaves no token in the
    user's home. One that cannot be made, for a file lies in its way, is no obstacle. Nothing is
    left of it, however its process ends."""
    (tmp_path / "sweep").mkdir()
    if home == "home":
        (tmp_path / "home").mkdir()
    else:
        (tmp_path / "home").touch()
    done = subprocess.run(
        [sys.executable, "-P", "-c", ALONE, str(tmp_path / "sweep"), end],
        env={**os.environ, "HOME": str(tmp_path / home)},
        capture_output=True,
        text=True,
        timeout=400,
    )
    assert done.stdout, done.stderr
    facts = json.loads(done.stdout)
    assert facts["listens"] and {*facts["listens"]} <= {"127.0.0.1", "::1", "::ffff:127.0.0.1"}
    assert facts["mode"] == "0o700" and facts["sessions"] > 0 and len(facts["processes"]) > 3
    assert all_gone(Path(facts["temporary"]), facts["processes"])
    assert not list((tmp_path / "home").rglob("*token*"))


SLICES = """
import collections, os, pathlib, sys
from segfleet.sweeps.ray.controller import ray_session
from segfleet.sweeps.ray.slots import share
from segfleet.sweeps.run import Resources

default, four = Resources(), Resources(slots=4)
with ray_session(four, pathlib.Path(sys.argv[1])):
    import ray

    each = share(four)
    stage = ray.remote(num_cpus=each["cpu"], num_gpus=each["gpu"])(
        type("Stage", (), {"sees": lambda self: os.environ["CUDA_VISIBLE_DEVICES"]})
    )
    stages = [stage.remote() for _ in range(4)]
    seen = collections.Counter(ray.get([one.sees.remote() for one in stages]))
    print(default.at_once, share(default)["gpu"], each["gpu"], sorted(seen.items()))
"""


def test_stages_share_a_gpu_and_mig_slices_are_gpus(tmp_path):
    """Two slices: two stages at a time, or four that share them."""
    (tmp_path / "sweep").mkdir()
    done = subprocess.run(
        [sys.executable, "-P", "-c", SLICES, str(tmp_path / "sweep")],
        env={**os.environ, "CUDA_VISIBLE_DEVICES": "MIG-a,MIG-b", "SEGFLEET_DEVICE": "cuda"},
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.stdout == "2 1 0.5 [('MIG-a', 2), ('MIG-b', 2)]\n", done.stderr


@pytest.fixture
def session(tmp_path):
    """`session(name)`: what a killed session of the sweep `tmp_path/sweep` left, its own process
    and all."""
    from segfleet.sweeps.ray import controller

    sweep, started = tmp_path / "sweep", []
    sweep.mkdir()

    def made(name: str = "sf-x", owner: Path = sweep) -> tuple[Path, subprocess.Popen]:
        folder = tmp_path / name
        folder.mkdir()
        (folder / controller.OWNER).write_text(str(owner.resolve()))
        (sweep / "ray.json").write_text(json.dumps({"temporary": str(folder), "process": 1}))
        code = "print(flush=True); import time; time.sleep(60)"
        process = subprocess.Popen(
            [sys.executable, "-S", "-c", code, f"{folder}/log"], stdout=subprocess.PIPE
        )
        process.stdout.readline()
        started.append(process)
        return folder, process

    yield made
    for process in started:
        process.kill()
        process.wait()
        process.stdout.close()


def test_what_a_killed_session_left_is_swept_away(session, tmp_path):
    from segfleet.sweeps.ray.controller import sweep_away

    (other, lives), (folder, process) = session("sf-y"), session("sf-x")
    sweep_away(tmp_path / "sweep")
    assert not folder.exists() and process.wait(10) is not None
    assert other.exists() and lives.poll() is None
    sweep_away(tmp_path / "sweep")  # nothing is left, nothing is done


def test_whoever_is_killed_while_sweeping_leaves_it_to_the_next_one(session, tmp_path):
    from segfleet.sweeps.ray.controller import sweep_away

    folder, process = session()
    (folder / "r").mkdir()
    (folder / "r" / "log").touch()
    process.kill()
    process.wait()
    for after in range(3):
        if (child := os.fork()) == 0:
            for name in ("unlink", "rmdir"):
                setattr(os, name, until(getattr(os, name), [after]))
            try:
                sweep_away(tmp_path / "sweep")
            finally:
                os._exit(0)
        os.waitpid(child, 0)
    sweep_away(tmp_path / "sweep")
    assert not folder.exists()


@pytest.mark.parametrize("whose", ["another sweep", "nobody", "a link", "another user"])
def test_what_a_file_merely_names_is_not_swept_away(session, tmp_path, whose):
    """`ray.json` may say anything."""
    from segfleet.sweeps.ray import controller

    folder, process = session(
        owner=tmp_path / "other" if whose == "another sweep" else tmp_path / "sweep"
    )
    if whose == "nobody":
        (folder / controller.OWNER).unlink()
    elif whose == "a link":
        folder.rename(tmp_path / "precious")
        folder.symlink_to(tmp_path / "precious")
    elif whose == "another user":
        if os.getuid():
            pytest.skip("only root can give a folder away")
        os.chown(folder, 65534, 65534)
    controller.sweep_away(tmp_path / "sweep")
    assert folder.exists() and process.poll() is None
    for said in ({"temporary": ["x"]}, {"temporary": ""}, {"temporary": "\0"}, []):
        (tmp_path / "sweep" / "ray.json").write_text(json.dumps(said))
        controller.sweep_away(tmp_path / "sweep")
    assert folder.exists() and tmp_path.exists()


def test_a_second_command_is_refused_and_changes_nothing(search, tmp_path):
    plan = make_plan(search(), tmp_path / "runs", build=False)
    prepare_folder(plan, run.settle_code(plan, False))
    before = (plan.folder / "space.json").read_bytes()
    lock = run.lock_stage(plan.folder)
    try:
        larger = make_plan(search(budget={"trials": 1}), tmp_path / "runs", build=False)
        with pytest.raises(InputError, match="is in use by"):
            run.run_sweep(larger, run.Resources(slots=1))
    finally:
        lock.release()
    assert (plan.folder / "space.json").read_bytes() == before


def test_a_stage_of_somebody_else_is_no_progress_of_this_sweep(search, tmp_path, monkeypatch):
    """Sessions that die while other runs of the folder finish are given up all the same."""

    class Finishes(Ends):
        def __init__(self, plan, resources, seconds):
            super().__init__(plan, resources, seconds)
            other = plan.runs / f"other{type(self).count}"
            other.mkdir()
            (other / "done.json").write_text("{}")

    monkeypatch.setattr(Finishes, "error", {"error": "the raylet went away", "code": 1})
    monkeypatch.setattr(Finishes, "count", 0)
    monkeypatch.setattr(run, "Session", Finishes)
    plan = make_plan(search(), tmp_path / "runs", build=False)
    with pytest.raises(RankFailed, match="3 times without a stage done"):
        run.run_sweep(plan, run.Resources(slots=1))
