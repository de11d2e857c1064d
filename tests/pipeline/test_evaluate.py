"""Evaluation of whole cases: against hand-made truth, for any number of ranks, and its pictures."""

from __future__ import annotations

import io
import json
import threading

import numpy as np
import pytest
import torch
from PIL import Image

from segfleet.core.errors import InputError
from segfleet.pipeline.inference.sliding_window import Window
from segfleet.pipeline.ranks import Ranks
from segfleet.pipeline.reports.overlays import (
    busiest_slice,
    chosen_cases,
    colour,
    draw_overlay,
    save_overlays,
)
from segfleet.pipeline.scoring.evaluate import CaseJournal, Measures, evaluate_cases, truth_of
from segfleet.pipeline.task import make_task
from segfleet.preprocess.building.build import build
from segfleet.preprocess.building.request import BuildRequest
from segfleet.preprocess.phantoms.phantom import (
    write_dsb_phantom,
    write_msd_phantom,
    write_nnunet_phantom,
)
from segfleet.preprocess.readers.base import open_reader
from segfleet.preprocess.stores.base import open_store


@pytest.fixture(scope="module")
def stores(tmp_path_factory):
    root = tmp_path_factory.mktemp("stores")
    write_msd_phantom(root / "raw_msd", cases=5, size=(10, 24, 24))
    write_nnunet_phantom(root / "raw_nnunet", cases=4, size=(8, 24, 24))
    write_dsb_phantom(root / "raw_dsb2018", images=4, size=32)
    opened = {}
    for name in ("msd", "nnunet", "dsb2018"):
        build(BuildRequest(name, root / f"raw_{name}", root / name, workers=1))
        opened[name] = (open_store(root / name), open_reader(name, root / f"raw_{name}"))
    return opened


class Oracle:
    """A 'network' that knows the answer of one case after the other: the stored label as
    probabilities, cut out at the tile's content."""

    def __init__(self, store, task):
        self.task = task
        self.known = [
            (torch.from_numpy(store.image(c)), torch.from_numpy(store.label(c)))
            for c in store.manifest.cases
        ]

    def __call__(self, x):
        flat = x.ndim == 4
        tiles = x[:, :, None] if flat else x
        found = []
        for tile in tiles:
            image, label = next(
                (i, l) for i, l in self.known if i.shape == tile.shape and torch.equal(i, tile)
            )
            if self.task.head == "softmax":
                found.append(torch.stack([label == value for value in self.task.values]).float())
            else:
                found.append(
                    torch.stack(
                        [torch.isin(label, torch.tensor(group)) for group in self.task.members]
                    ).float()
                )
        found = torch.stack(found)
        return found[:, :, 0] if flat else found


def threshold(channels):
    """A crude network without parameters: channel k likes voxels k standard deviations above the
    tile's mean."""

    def forward(x):
        middle = x.mean(1, keepdim=True)
        axes = tuple(range(1, x.ndim))
        z = (middle - middle.mean(axes, keepdim=True)) / middle.std(axes, keepdim=True).clamp_min(
            1e-6
        )
        return torch.cat([torch.exp(-((z - k) ** 2)) for k in range(channels)], 1)

    return forward


@pytest.mark.parametrize("name", ["msd", "nnunet", "dsb2018"])
def test_a_perfect_network_scores_nearly_one_on_the_raw_grid(stores, name):
    store, _ = stores[name]
    task = make_task(store.manifest.dataset)
    for case in store.manifest.cases:
        document = evaluate_cases(
            Oracle(store, task), store, [case.id], task, Window(patch=case.shape, overlap=0.0)
        )
        for structure in task.names:
            scores = document["cases"][0]["scores"][structure]
            assert scores["dice"] > (0.999 if name == "dsb2018" else 0.9), (
                case.id,
                structure,
                scores,
            )
            assert scores["hd95"] <= max(case.raw_spacing)


@pytest.mark.parametrize("name", ["msd", "nnunet", "dsb2018"])
def test_the_truth_is_the_raw_label(stores, name):
    store, reader = stores[name]
    for ref in reader.refs():
        np.testing.assert_array_equal(
            truth_of(store, store.manifest.case(ref.id)), reader.read(ref).label_ZYX
        )


def test_a_store_without_truth_is_refused(stores):
    store, _ = stores["msd"]
    case = store.manifest.cases[0].model_copy(update={"has_truth": False})
    with pytest.raises(InputError, match="no label on its raw grid"):
        truth_of(store, case)


def window(store):
    return Window(patch=store.manifest.plan.patch, overlap=0.5, mirror_axes=(1, 2), batch=2)


@pytest.mark.parametrize("name", ["msd", "nnunet", "dsb2018"])
def test_the_document_is_strict_json_with_every_case_in_order(stores, name):
    store, _ = stores[name]
    task = make_task(store.manifest.dataset)
    ids = [case.id for case in store.manifest.cases][::-1]
    ticks = []
    document = evaluate_cases(
        threshold(task.channels),
        store,
        ids,
        task,
        window(store),
        progress=lambda done, total: ticks.append((done, total)),
    )
    again = json.loads(json.dumps(document, allow_nan=False))
    assert [case["id"] for case in again["cases"]] == ids
    assert ticks == [(n, len(ids)) for n in range(1, len(ids) + 1)]
    assert list(again["summary"]["structures"]) == list(task.names)
    assert again["summary"]["patients"] == len(
        {case.group or case.id for case in store.manifest.cases}
    )
    assert set(again["cases"][0]["scores"][task.names[0]]) >= {
        "dice",
        "iou",
        "hd95",
        "sensitivity",
        "precision",
        "volume_error",
    }
    assert evaluate_cases(threshold(task.channels), store, ids, task, window(store)) == document, (
        "same bits again"
    )


class ThreadRanks(Ranks):
    """Ranks in threads of one process: the same promises, no sockets."""

    def __init__(self, rank, size, board, barrier):
        self.rank, self.size, self.board, self.gate = rank, size, board, barrier

    def gather(self, thing):
        self.board[self.rank] = thing
        self.gate.wait(60)
        return [self.board[rank] for rank in range(self.size)]


def on_ranks(size, work):
    board, gate, results = {}, threading.Barrier(size), [None] * size

    def run(rank):
        try:
            results[rank] = work(ThreadRanks(rank, size, board, gate))
        except Exception as error:
            results[rank] = error

    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return results


@pytest.mark.parametrize("size", [2, 3, 7])
def test_the_result_does_not_depend_on_the_number_of_ranks(stores, size):
    store, _ = stores["msd"]
    task = make_task(store.manifest.dataset)
    ids = [case.id for case in store.manifest.cases]
    alone = evaluate_cases(threshold(task.channels), store, ids, task, window(store))
    for document in on_ranks(
        size,
        lambda ranks: evaluate_cases(
            threshold(task.channels), store, ids, task, window(store), ranks=ranks
        ),
    ):
        assert document == alone


def test_an_error_on_one_rank_is_raised_on_all(stores):
    store, _ = stores["msd"]
    task = make_task(store.manifest.dataset)
    ids = [store.manifest.cases[0].id, "nobody"]
    errors = on_ranks(
        2,
        lambda ranks: evaluate_cases(
            threshold(task.channels), store, ids, task, window(store), ranks=ranks
        ),
    )
    assert all(isinstance(error, InputError) and "nobody" in str(error) for error in errors)


def test_a_diverged_network_names_the_case(stores):
    store, _ = stores["msd"]
    task, case = make_task(store.manifest.dataset), store.manifest.cases[1]
    with pytest.raises(FloatingPointError, match=case.id):
        evaluate_cases(
            lambda x: x.expand(-1, 3, -1, -1, -1) * float("nan"),
            store,
            [case.id],
            task,
            window(store),
        )


def test_a_case_asked_for_twice_is_refused(stores):
    store, _ = stores["msd"]
    one = store.manifest.cases[0].id
    with pytest.raises(InputError, match="twice"):
        evaluate_cases(
            threshold(3), store, [one, one], make_task(store.manifest.dataset), window(store)
        )


def test_without_distances_hd95_is_missing_and_dice_the_same(stores):
    store, _ = stores["dsb2018"]
    task = make_task(store.manifest.dataset)
    ids = [case.id for case in store.manifest.cases]
    full, quick = (
        evaluate_cases(
            threshold(task.channels), store, ids, task, window(store), Measures(distances=distances)
        )
        for distances in (True, False)
    )
    assert quick["summary"]["mean_foreground_dice"] == full["summary"]["mean_foreground_dice"]
    assert quick["cases"][0]["scores"]["nucleus"]["hd95"] is None


@pytest.mark.parametrize("name", ["msd", "nnunet", "dsb2018"])
def test_overlays_show_best_median_and_worst(stores, name, tmp_path):
    store, _ = stores[name]
    task = make_task(store.manifest.dataset)
    forward, ids = threshold(task.channels), [case.id for case in store.manifest.cases]
    kept = CaseJournal(tmp_path / "kept", {}, 0)
    document = evaluate_cases(forward, store, ids, task, window(store), journal=kept)
    index = save_overlays(
        tmp_path,
        document,
        store,
        task,
        kept.slices,
    )
    assert json.loads((tmp_path / "overlays" / "index.json").read_text()) == index
    assert [entry["role"] for entry in index] == ["best", "median", "worst"]
    dice = [entry["mean_dice"] for entry in index]
    assert dice == sorted(dice, reverse=True) and dice[0] == max(
        case["mean_dice"] for case in document["cases"]
    )
    for entry in index:
        with Image.open(tmp_path / "overlays" / entry["file"]) as picture:
            assert max(picture.size) == 480
    one = {**document, "cases": document["cases"][:1]}
    save_overlays(
        tmp_path,
        one,
        store,
        task,
        kept.slices,
    )
    assert sorted(p.name for p in (tmp_path / "overlays").iterdir()) == [
        "best.png",
        "index.json",
    ], "old pictures are gone"


def test_chosen_cases_leave_out_those_without_a_score():
    cases = [{"id": str(i), "mean_dice": d} for i, d in enumerate([0.5, None, 0.9])]
    assert {role: case["id"] for role, case in chosen_cases({"cases": cases}).items()} == {
        "best": "2",
        "worst": "0",
    }
    assert chosen_cases({"cases": [{"id": "a", "mean_dice": None}]}) == {}


def test_an_overlay_has_the_proportions_of_the_patient_and_both_outlines():
    image = np.linspace(0, 1, 2 * 20 * 30, dtype=np.float32).reshape(1, 2, 20, 30)
    truth, prediction = np.zeros((2, 20, 30), np.uint8), np.zeros((2, 20, 30), np.uint8)
    truth[1, 4:16, 4:16] = 1
    prediction[1, 4:16, 8:24] = 2
    assert busiest_slice(truth, prediction) == 1
    assert busiest_slice(np.zeros_like(truth), prediction) == 1
    assert busiest_slice(np.zeros((5, 2, 2)), np.zeros((5, 2, 2))) == 2
    png = draw_overlay(image[:, 1], truth[1], prediction[1], spacing=(5, 2, 1))
    with Image.open(io.BytesIO(png)) as picture:
        pixels = np.asarray(picture)
    assert pixels.shape[:2] == (480, 360)  # 40 mm x 30 mm
    lines = (pixels == colour(2)).all(-1)
    assert lines.any() and not (pixels == colour(1)).all(-1).any(), "the truth is an area"
    # the prediction's outline begins at x = 8 of 30; left of it the truth shines through
    assert np.flatnonzero(lines.any(axis=0))[0] == 8 * 12
    left, outside = pixels[200, 6 * 12].astype(int), pixels[200, 2 * 12].astype(int)
    assert left[0] - left[2] > 50 and (outside == outside[0]).all()
