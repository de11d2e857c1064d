"""How often SLURM is asked: counted by a squeue that writes down each question."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time

import pytest

from segfleet.core.errors import InputError
from segfleet.pipeline.launch.job import Preprocess, Train
from segfleet.preprocess.building.request import BuildRequest
from segfleet.slurm import cluster, poll, submission
from segfleet.slurm.job import SlurmJob, cancel, look_at_all, refuse_if_active
from segfleet.slurm.jobspec import JobSpec


@pytest.fixture
def squeue(tmp_path, monkeypatch):
    """A squeue that takes a moment; `squeue()` counts its questions, `squeue("text")` says what it
    tells from now on."""
    tools, told, asked = tmp_path / "bin", tmp_path / "told", tmp_path / "asked"
    tools.mkdir()
    told.write_text("")
    (tools / "squeue").write_text(
        f'#!/bin/sh\necho x >> "{asked}"; sleep 0.2; cat "{told}"; [ -s "{told}" ]\n'
    )
    (tools / "squeue").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tools}:/usr/bin:/bin")
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    monkeypatch.delenv("SEGFLEET_QUEUE_SECONDS", raising=False)

    def control(text: str | None = None) -> int:
        if text is not None:
            told.write_text(text)
        return asked.read_text().count("x") if asked.exists() else 0

    control("7|RUNNING|None|n1||fit\n")
    return control


def test_commands_share_one_answer(squeue, tmp_path):
    """Threads and another process, all at once: one question; a look that must be fresh asks."""
    threads = [threading.Thread(target=cluster.queue, kwargs={"age": 30}) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    code = "from segfleet.slurm import cluster; print(cluster.queue(age=30)['7']['name'])"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, env=os.environ
    )
    assert done.stdout == "fit\n" and squeue() == 1
    squeue("7|COMPLETED|None|n1||a|b\n")
    assert cluster.queue(age=30)["7"]["state"] == "RUNNING" and squeue() == 1
    assert cluster.queue()["7"] == {
        "name": "a|b", "state": "COMPLETED", "reason": None, "node": "n1"
    }  # fmt: skip
    assert squeue() == 2
    assert cluster.queue(age=30)["7"]["state"] == "COMPLETED" and squeue() == 2
    poll.forget()
    assert cluster.queue(age=30) and squeue() == 3
    folder = tmp_path / f"segfleet-queue-{os.getuid()}"
    assert folder.stat().st_mode & 0o777 == 0o700


def test_silence_is_an_answer_too(squeue):
    squeue("")
    for _ in range(3):
        with pytest.raises(InputError, match="squeue says"):
            cluster.queue(age=30)
    assert squeue() == 1


def test_a_folder_others_may_write_to_is_not_believed(squeue, tmp_path):
    folder = tmp_path / f"segfleet-queue-{os.getuid()}"
    folder.mkdir(mode=0o777)
    folder.chmod(0o777)
    for _ in range(2):
        assert cluster.queue(age=30)
    assert squeue() == 2 and not list(folder.iterdir())


def test_a_job_is_never_judged_by_an_answer_from_before_it(squeue, tmp_path):
    squeue("6|RUNNING|None|n1||other\n")
    cluster.queue(age=30)
    job = submitted(tmp_path / "run", 7)
    squeue("7|PENDING|Priority|||fit\n")
    ((_, found),) = look_at_all([job], 30)
    assert found.state == "queued" and squeue() == 2


def submitted(run, number: int, **options) -> SlurmJob:
    facts = {"launcher": "slurm", "code": None, "commit": None, "name": "fit"}
    facts["spec"] = JobSpec(**options)
    folder = submission.write_job(run, Train(recipe={}, root=run.parent), JobSpec())
    return SlurmJob(run, submission.record(folder, id=str(number), logs=folder, **facts))


def test_an_action_asks_once(squeue, tmp_path):
    """Whatever the number of runs that an array is about."""
    runs = [tmp_path / f"run{number}" for number in range(20)]
    for number, run in enumerate(runs):
        submitted(run, number)
    squeue("".join(f"{number}|COMPLETED|None|n1||fit\n" for number in range(20)))
    refuse_if_active(*runs)
    refuse_if_active(*runs[:3])
    assert squeue() == 1
    squeue("7|RUNNING|None|n1||fit\n")
    with pytest.raises(InputError, match="run7 is running already as job 7"):
        time.sleep(poll.AT_ONCE)
        refuse_if_active(*runs)


def test_accounting_is_asked_as_rarely(squeue, tmp_path, monkeypatch):
    """Of jobs that the queue has forgotten; a look that must be fresh asks again."""
    asked = tmp_path / "sacct-asked"
    (tmp_path / "bin" / "sacct").write_text(
        f'#!/bin/sh\necho x >> "{asked}"; echo "7|TIMEOUT|None|n1|0:0|fit"\n'
    )
    (tmp_path / "bin" / "sacct").chmod(0o755)
    squeue("6|RUNNING|None|n1||other\n")
    job = submitted(tmp_path / "run", 7)
    for age, times in ((30, 1), (30, 1), (0, 2), (30, 2)):
        [(_, found)] = look_at_all([job], age)
        assert found.queue == "TIMEOUT" and asked.read_text().count("x") == times
    poll.forget()
    look_at_all([job], 30)
    assert asked.read_text().count("x") == 3


def test_nobody_is_lost_by_an_old_answer(squeue, tmp_path):
    """Submitted a moment ago on a machine whose clock is an hour late or early."""
    for number, late in enumerate((3600, -3600), 7):
        squeue("6|RUNNING|None|n1||other\n")
        cluster.queue()
        with pytest.MonkeyPatch.context() as patch:
            there = time.time() - late
            patch.setattr(time, "time", lambda there=there: there)
            job = submitted(tmp_path / f"run{number}", number)
        squeue(f"{number}|PENDING|Priority|||fit\n")
        ((_, found),) = look_at_all([job], 30)
        assert found.state == "queued"


def test_old_answers_are_removed(squeue, tmp_path):
    cluster.queue(frozenset({"ann"}))
    [before] = (tmp_path / f"segfleet-queue-{os.getuid()}").glob("*.json")
    os.utime(before, (0, 0))
    cluster.queue(frozenset({"ben"}))
    assert not before.exists()


def test_whoever_follows_looks_less_and_less_often(monkeypatch):
    now = [0.0]
    monkeypatch.delenv("SEGFLEET_QUEUE_SECONDS", raising=False)
    monkeypatch.setattr(poll.time, "monotonic", lambda: now[0])
    pace, looks = poll.Pace(), []
    for second in range(3600):
        now[0] = float(second)
        if pace.is_due():
            looks.append(second)
            pace.looked("running" if second > 1000 else "queued")
    steps = [b - a for a, b in zip(looks, looks[1:], strict=False)]
    # by hand: 30 s after a change, then twice as long, 5 minutes at most
    assert steps[:6] == [30, 60, 120, 240, 300, 300] and max(steps) == 300
    change = next(at for at in looks if at > 1000)
    assert [b - change for b in looks if b > change][:2] == [30, 90]
    assert len(looks) < 20  # an hour; it was 3,600
    pace.hurry()
    now[0] += poll.ENDING
    assert pace.is_due()


def test_logs_asks_rarely_and_ends_soon_after_the_ranks_say_so(squeue, tmp_path):
    """`logs -f` for four seconds: one question; the ranks' own word brings the next at once."""
    facts = {"launcher": "slurm", "spec": JobSpec(), "code": None, "commit": None, "name": "fit"}
    run = tmp_path / "out.jobs"
    folder = submission.write_job(
        run, Preprocess(store=BuildRequest("msd", tmp_path, tmp_path / "out")), JobSpec()
    )
    made = submission.record(folder, id="7", logs=folder, **facts)
    made.log(0).write_text("one\n")
    life = folder / "life-7.0"
    life.mkdir()
    (tmp_path / "out").mkdir()
    command = [sys.executable, "-m", "segfleet.cli.main", "logs", str(tmp_path / "out"), "-f"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout.readline() == "one\n"
        time.sleep(4)
        assert squeue() == 1
        squeue("7|COMPLETED|None|n1||fit\n")
        (life / "ended.json").write_text("{}")
        made.log(0).write_text("one\ntwo\n")
        assert process.stdout.read() == "two\n" and process.wait(60) == 0
    assert squeue() == 2


@pytest.mark.parametrize("place", ["plain", "with a blank"])
def test_sbatch_is_asked_whatever_the_folder_for_temporary_files_is_called(
    place, tmp_path, monkeypatch
):
    (tmp_path / "sbatch").write_text('#!/bin/sh\n[ "$1" = --test-only ] && cat "$2" && exit 0\n')
    (tmp_path / "sbatch").chmod(0o755)
    (tmp_path / place).mkdir()
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / place))
    monkeypatch.setattr(cluster, "there_is_one", lambda: True)
    assert cluster.ask("#!/bin/sh\ntrue\n") == ["#!/bin/sh", "true"]


def test_jobs_of_two_clusters_with_one_number(squeue, tmp_path):
    """Each is asked of its own cluster, once; both are cancelled there."""
    said = tmp_path / "said"
    for program in ("squeue", "scancel"):
        (tmp_path / "bin" / program).write_text(
            f'#!/bin/sh\necho "{program} $*" >> "{said}"\n'
            'case "$*" in *"-M beta"*) echo "CLUSTER: beta"; echo "7|PENDING|Priority|||fit";;\n'
            '*) echo "7|RUNNING|None|n1||fit";; esac\n'
        )
        (tmp_path / "bin" / program).chmod(0o755)
    jobs = [submitted(tmp_path / str(n), 7, clusters=of) for n, of in enumerate((None, "beta"))]
    found = look_at_all([*jobs, jobs[1]])
    assert [seen.queue for _, seen in found] == ["RUNNING", "PENDING", "PENDING"]
    assert cancel(found[:2]) == ["7", "7"]
    assert [line.split(" -a ")[0] for line in said.read_text().splitlines()] == [
        "squeue", "squeue -M beta", "scancel 7", "scancel -M beta 7"
    ]  # fmt: skip
