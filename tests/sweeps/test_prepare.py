"""Stores as axes of a space: each is made once, before the plan, and is what its points train
on."""

from __future__ import annotations

import os
import signal
from types import SimpleNamespace

import pytest
import yaml

from segfleet.cli import submit_words
from segfleet.cli.sweep_prepare import prepare
from segfleet.core.errors import InputError
from segfleet.pipeline.stop import Interrupted
from segfleet.preprocess.building.build import build
from segfleet.preprocess.phantoms.phantom import write_msd_phantom
from segfleet.preprocess.stores.manifest import load_manifest
from segfleet.sweeps import slurm_backend
from segfleet.sweeps.space.checks import check_read
from segfleet.sweeps.space.load import parse_search
from segfleet.sweeps.space.plan import Stores, make_plan


@pytest.fixture
def prepared(space, tmp_path):
    """A search with two spacings and two normalisations of one data set."""
    write_msd_phantom(tmp_path / "raw", cases=5, size=(8, 16, 16))
    asked = {
        "name": "msd",
        "raw": str(tmp_path / "raw"),
        "out": str(tmp_path / "stores"),
        "spacing": [[4.0, 2.0, 2.0], None],
        "normalisation": ["zscore", "rescale_to_0_1"],
    }
    return parse_search({**space, "axes": {}, "prepare": asked})


NAMES = [
    f"spacing={spacing},normalisation={how}"
    for spacing in ("4x2x2", "planned")
    for how in ("zscore", "rescale_to_0_1")
]


def test_every_store_is_made_once_and_trained_on(prepared, tmp_path):
    assert len(prepared.points()) == 4 * 2 * 3
    prepare(prepared, "local", dry_run=False)
    stores = {name: load_manifest(tmp_path / "stores" / name) for name in NAMES}
    assert sorted(path.name for path in (tmp_path / "stores").iterdir()) == sorted(NAMES)
    assert stores[NAMES[0]].plan.target_spacing == (4.0, 2.0, 2.0)
    assert stores[NAMES[2]].plan.target_spacing != (4.0, 2.0, 2.0)
    assert set(stores[NAMES[1]].plan.normalisation) == {"rescale_to_0_1"}
    made = {path: path.stat().st_mtime_ns for path in (tmp_path / "stores").glob("*/manifest.json")}
    prepare(prepared, "local", dry_run=False)
    prepare(prepared, "slurm", dry_run=True)  # nothing is missing
    assert all(path.stat().st_mtime_ns == when for path, when in made.items())
    plan = make_plan(prepared, tmp_path / "runs", build=False)
    check_read(prepared, Stores())
    assert len(plan.tree.nodes) == 4 * (2 + 2 * 3), "stages are shared within a store"
    for trial in plan.trials:
        spacing = trial.point["prepare.spacing"]
        name = f"spacing={'4x2x2' if spacing else 'planned'},normalisation="
        assert trial.recipe.data.store.endswith(name + trial.point["prepare.normalisation"])


def test_a_value_that_is_not_legal_is_found_before_a_store_is_made(prepared, space, tmp_path):
    asked = prepared.space.prepare.model_dump() | {"normalisation": ["zscore", "imagenet"]}
    with pytest.raises(InputError, match="normalisation: found 'imagenet', which is for pictures"):
        prepare(parse_search({**space, "axes": {}, "prepare": asked}), "local", dry_run=False)
    assert not (tmp_path / "stores").exists()


def test_who_only_looks_is_told_how_the_stores_are_made(prepared, tmp_path):
    for on in ("local", "slurm"):
        with pytest.raises(InputError) as caught:
            prepare(prepared, on, dry_run=True)
        words = str(caught.value)
        assert "4 store(s) are missing" in words
        command = "segfleet submit --array 8 -- preprocess msd --raw"
        assert words.count(command) == 4 and words.count("--spacing 4x2x2") == 2
        assert words.count("--normalisation rescale_to_0_1") == 2
    assert not (tmp_path / "stores").exists()


class Queue:
    """A cluster that takes chains of arrays and makes the store when its last job is looked at for
    the second time; what it was sent."""

    def __init__(self, ends_well=True):
        self.sent, self.looks, self.ends_well = {}, {}, ends_well

    def send(self, launcher, steps, home, root, spec):
        store = steps[-1][1][0].store
        self.sent[home] = (steps, spec, store)

    def jobs_of(self, home):
        if home not in self.sent:
            raise InputError("never submitted")
        return [SimpleNamespace(id="7", home=home)]

    def look_at_all(self, jobs):
        return [(job, self.look(job, 0)) for job in jobs]

    def look(self, job, step=1):
        store = self.sent[job.home][2]
        self.looks[job.home] = self.looks.get(job.home, 0) + step
        ended = self.looks[job.home] > 1
        if ended and self.ends_well and not store.out.exists():
            build(store)
        state = ("done" if self.ends_well else "failed") if ended else "queued"
        return SimpleNamespace(state=state, open=not ended, reason="out of memory", job=job.id)

    def forget(self, job):
        pass


@pytest.fixture
def queue(monkeypatch):
    def made(**how):
        one = Queue(**how)
        monkeypatch.setattr(slurm_backend, "PAUSE", 0.01)
        monkeypatch.setattr(submit_words, "send", one.send)
        monkeypatch.setattr("segfleet.slurm.cluster.check", lambda spec: None)
        monkeypatch.setattr("segfleet.slurm.job.jobs_of", one.jobs_of)
        monkeypatch.setattr("segfleet.slurm.job.look_at_all", one.look_at_all)
        monkeypatch.setattr("segfleet.sweeps.slurm_backend.QUEUE", one)
        return one

    return made


def test_on_slurm_every_store_is_a_chain_of_arrays_that_is_waited_for(prepared, tmp_path, queue):
    asked = {"cluster": None, "spec": {"gpus_per_node": 4, "gpu_type": "a100", "partition": "big"}}
    one = queue()
    prepare(prepared, "slurm", False, asked, tmp_path / "runs")
    assert sorted(path.name for path in (tmp_path / "stores").iterdir()) == sorted(NAMES)
    assert len(one.sent) == 4
    for steps, spec, _ in one.sent.values():
        assert [len(jobs) for _, jobs in steps] == [5, 5, 1], "five cases"
        assert (spec.partition, spec.gpus_per_node, spec.gpu_type) == ("big", 0, None)
    one.sent.clear()
    prepare(prepared, "slurm", False, asked, tmp_path / "runs")
    assert not one.sent, "nothing is missing"


def test_jobs_of_a_store_that_are_there_are_waited_for_and_not_sent_again(
    prepared, tmp_path, queue, monkeypatch
):
    one = queue()
    with monkeypatch.context() as patched:
        patched.setattr(one, "look", lambda job, step=1: os.kill(os.getpid(), signal.SIGTERM) or
                        SimpleNamespace(state="queued", open=True))  # fmt: skip
        with pytest.raises(Interrupted, match="the jobs that make the stores stay"):
            prepare(prepared, "slurm", False, None, tmp_path / "runs")
    sent = dict(one.sent)
    monkeypatch.setattr(submit_words, "send", lambda *words: pytest.fail("sent again"))
    prepare(prepared, "slurm", False, None, tmp_path / "runs")
    assert one.sent == sent and len(list((tmp_path / "stores").glob("*/manifest.json"))) == 4


def test_jobs_that_end_without_their_store_are_one_message(prepared, tmp_path, queue):
    queue(ends_well=False)
    with pytest.raises(
        InputError, match="have ended without it; the last one, 7, is failed: out of"
    ):
        prepare(prepared, "slurm", False, None, tmp_path / "runs")


def test_a_sweep_whose_stores_are_not_there_is_submitted(prepared, space, tmp_path, monkeypatch):
    """Its job makes them; what is not legal is found before."""
    asked = prepared.space.prepare.model_dump()
    document = {**space, "axes": {}, "prepare": asked}

    def sweeping():
        (tmp_path / "space.yaml").write_text(yaml.safe_dump(document))
        words = [str(tmp_path / "space.yaml")]
        found = submit_words.parse("sweep", words, tmp_path / "runs")
        return submit_words.sweeping(found, ["sweep", *words], {})

    [(_, [job])], home, _ = sweeping()
    assert job.words[:2] == ("sweep", str(tmp_path / "space.yaml"))
    assert home == tmp_path / "runs" / "sweeps" / "tiny.jobs" and not (tmp_path / "stores").exists()
    asked["normalisation"] = ["zscore", "imagenet"]
    with pytest.raises(InputError, match="normalisation: found 'imagenet'"):
        sweeping()


def test_one_value_is_no_axis_and_a_list_of_numbers_is_one_value(space, tmp_path):
    asked = {"name": "msd", "raw": "raw", "out": str(tmp_path / "one"), "spacing": [1.0, 1.0, 1.0]}
    found = parse_search({**space, "axes": {}, "prepare": asked})
    assert [axis.label for axis in found.axes] == ["stages.0.lr", "stages.1.lr"]
    assert found.trials(found.points()[0])[0].recipe.data.store == str(tmp_path / "one")
    with pytest.raises(
        InputError, match=r"prepare.spacings: unknown key; expected one of: name, raw"
    ):
        parse_search({**space, "prepare": {**asked, "spacings": [[1, 1, 1]]}})
