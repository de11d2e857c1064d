"""On a GPU the next case is read while the present one runs: the same results, two cases at once,
errors with their own case. Here the background is asked for on the CPU."""

from __future__ import annotations

import threading
import weakref
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from segfleet.core.ahead import ahead
from segfleet.core.errors import InputError
from segfleet.pipeline.inference import predict as predicting
from segfleet.pipeline.inference.ensemble import Member
from segfleet.pipeline.inference.sliding_window import Window
from segfleet.pipeline.ranks import Ranks
from segfleet.pipeline.scoring import evaluate
from segfleet.pipeline.task import make_task
from segfleet.pipeline.trained import out_of_fold
from segfleet.preprocess.stores.base import open_store

SIZES = (3, 9)


@pytest.fixture
def background(monkeypatch):
    """As on a GPU."""

    def forced(*arguments, **options):
        return ahead(*arguments, **options | {"background": True})

    monkeypatch.setattr(predicting, "ahead", forced)
    monkeypatch.setattr(evaluate, "ahead", forced)
    monkeypatch.setattr(out_of_fold, "ahead", forced)


@pytest.fixture
def images(monkeypatch):
    """Counts the stored images that are alive, in all the life of a call; `there` is set once a
    second one is."""
    alive, most, threads, there = {}, [], set(), threading.Event()

    def pinned(image, device):
        key = object()
        alive[key] = weakref.finalize(image, alive.pop, key, None)
        most.append(len(alive))
        if len(alive) > 1:
            there.set()
        threads.add(threading.current_thread() is threading.main_thread())
        return image

    monkeypatch.setattr(predicting, "pinned", pinned)
    monkeypatch.setattr(evaluate, "pinned", pinned)
    monkeypatch.setattr(out_of_fold, "pinned", pinned)
    return most, threads, there


@pytest.fixture(scope="module", params=SIZES)
def store(request, tiny_store):
    return open_store(tiny_store(dims=3, cases=request.param))


def network(channels, until=None):
    """`until`: an event that the first call waits for, as a case takes longer than reading one."""

    def forward(x):
        assert until is None or until.wait(60), "no second case was read beside the first"
        return torch.cat([(x[:, :1] - k).square().neg() for k in range(channels)], 1).exp()

    return forward


def evaluated(store, until=None):
    task, ids = make_task(store.manifest.dataset), [case.id for case in store.manifest.cases]
    window = Window(patch=store.manifest.plan.patch)
    measures = evaluate.Measures(distances=False)
    return evaluate.evaluate_cases(
        network(task.channels, until), store, ids, task, window, measures
    )


def member(store, until=None):
    task, patch = make_task(store.manifest.dataset), store.manifest.plan.patch
    forward = network(task.channels, until)
    return Member(forward=lambda: forward, plan=store.manifest.plan, task=task, patch=patch)


def predicted(store, out, until=None):
    return predicting.predict_files(
        [member(store, until)], store.manifest.dataset, [store.root], out
    )


def asked_out_of_fold(store, until=None):
    """Label and truth of every case by two networks, the second of another store of equal
    images."""
    other = open_store(store.root)
    model = SimpleNamespace(device=torch.device("cpu"), member=lambda one: member(store, until))
    networks = (SimpleNamespace(uid="a"), SimpleNamespace(uid="b"))
    cases = [
        out_of_fold.Case(id=case.id, networks=networks, stores=(store, other))
        for case in store.manifest.cases
    ]

    def score(case, label, truth):
        return {"id": case.id, "label": label.tolist(), "truth": int(np.count_nonzero(truth))}

    return out_of_fold.predictions(model, cases, score, Ranks())


def test_a_score_holds_two_cases_and_is_the_same(store, images, background, monkeypatch):
    most, threads, there = images
    document = evaluated(store, there)
    assert max(most) == 2 and threads == {False}
    monkeypatch.setattr(evaluate, "ahead", ahead)
    most.clear()
    assert evaluated(store) == document
    assert max(most) == 1, "on the CPU one case at a time"


def test_a_prediction_holds_two_images_and_is_the_same(
    store, images, background, monkeypatch, tmp_path
):
    most, threads, there = images
    found = predicted(store, tmp_path / "ahead", there)
    assert max(most) == 2 and threads == {False} and found["exit_code"] == 0
    monkeypatch.setattr(predicting, "ahead", ahead)
    most.clear()
    plain = predicted(store, tmp_path / "plain")
    assert max(most) == 1
    for one, other in zip(found["done"], plain["done"], strict=True):
        assert one["id"] == other["id"]
        written = [(tmp_path / name / f"{one['id']}.nii.gz") for name in ("ahead", "plain")]
        assert written[0].read_bytes() == written[1].read_bytes()
    assert predicted(store, tmp_path / "plain")["kept"], "what is there is kept"


def test_what_is_asked_out_of_fold_holds_two_cases_and_is_the_same(
    store, images, background, monkeypatch
):
    most, threads, there = images
    rows = asked_out_of_fold(store, there)
    assert [row["id"] for row in rows] == [case.id for case in store.manifest.cases]
    assert max(most) == 2 and threads == {False}
    monkeypatch.setattr(out_of_fold, "ahead", ahead)
    most.clear()
    assert asked_out_of_fold(store) == rows
    assert max(most) == 1, "on the CPU one case at a time"


def test_what_cannot_be_read_is_named_and_the_rest_is_done(
    store, background, monkeypatch, tmp_path
):
    bad = sorted(case.id for case in store.manifest.cases)[1]
    read = type(store).stored_image

    def stored_image(self, case):
        if case.id == bad:
            raise InputError(f"{case.id}: cannot be read")
        return read(self, case)

    monkeypatch.setattr(type(store), "stored_image", stored_image)
    found = predicted(store, tmp_path)
    assert [one["id"] for one in found["failed"]] == [bad] and len(found["done"]) + 1 == len(
        store.manifest.cases
    )
    with pytest.raises(InputError, match=f"{bad}: cannot be read"):
        evaluated(store)
    with pytest.raises(InputError, match=f"{bad}: cannot be read"):
        asked_out_of_fold(store)
    assert not [thread for thread in threading.enumerate() if thread.name == "ahead"]


def test_memory_for_one_case_prepares_no_other_beside_it(store, images, background, monkeypatch):
    most, *_ = images
    monkeypatch.setattr("segfleet.pipeline.inference.room.memory_budget", lambda: 1000)
    evaluated(store)
    assert max(most) == 1


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_the_background_is_for_gpus(store, device, monkeypatch, tmp_path):
    asked = []

    def noted(prepare, items, *, background, roomy):
        asked.append(background)
        return ahead(prepare, [], background=False)

    monkeypatch.setattr(predicting, "ahead", noted)
    monkeypatch.setattr(evaluate, "ahead", noted)
    task, plan = make_task(store.manifest.dataset), store.manifest.plan
    member = Member(forward=lambda: None, plan=plan, task=task, patch=plan.patch)
    predicting.predict_files(
        [member], store.manifest.dataset, [store.root], tmp_path, device=device
    )
    with pytest.raises(KeyError):  # nothing was scored
        evaluate.evaluate_cases(
            network(1),
            store,
            [store.manifest.cases[0].id],
            task,
            Window(patch=plan.patch, device=device),
        )
    assert asked == [device == "cuda"] * 2
