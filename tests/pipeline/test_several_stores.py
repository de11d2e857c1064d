"""One stage that draws from several stores."""

from __future__ import annotations

import collections
import json
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch

from segfleet.core.errors import InputError
from segfleet.pipeline import identity, stage_data
from segfleet.pipeline.data.sampler import MixedSampler, PatchSampler
from segfleet.pipeline.jobs import Stores
from segfleet.pipeline.parts import check_recipe
from segfleet.pipeline.recipe import override, parse, resolve, with_absolute_store
from segfleet.pipeline.scoring.scored import seen_in_training
from segfleet.preprocess.stores.base import open_store
from segfleet.preprocess.stores.manifest import load_manifest


def sampler(path, **facts) -> PatchSampler:
    cases = open_store(path).manifest.cases
    return PatchSampler(
        cases=cases, patch=(1, 32, 32), batch=4, seed=3, **{"foreground": 0.5, **facts}
    )


@pytest.fixture
def pair(tiny_store):
    return tiny_store(dims=2, cases=3), tiny_store(dims=2, cases=5)


@pytest.mark.parametrize("weights", [(1, 3), (3, 5), (10, 10)])
def test_every_cycle_has_the_weights_and_visits_every_case_of_a_store_alike(pair, weights):
    mixed = MixedSampler(parts=tuple(map(sampler, pair)), weights=weights)
    draws = [mixed.draw(0, epoch, i, 30) for epoch in range(2) for i in range(120)]
    for slots in ((0, 1), (2, 3)):  # anywhere, and on foreground
        stream = [d for n, d in enumerate(draws) if n % 4 in slots]
        counts = collections.Counter(d.store for d in stream)
        cycle = sum(weights) // (10 if weights == (10, 10) else 1)
        whole = len(stream) // cycle * cycle
        counts = collections.Counter(d.store for d in stream[:whole])
        assert counts[0] * weights[1] == counts[1] * weights[0]
        for store, path in enumerate(pair):
            ids = [d.case.id for d in stream if d.store == store]
            many = len(open_store(path).manifest.cases)
            for at in range(0, len(ids) - many + 1, many):
                assert len(set(ids[at : at + many])) == many


def test_a_draw_depends_on_its_place_alone(pair):
    one, two = (MixedSampler(parts=tuple(map(sampler, pair)), weights=(1, 2)) for _ in range(2))
    forward = [one.draw(1, e, i, 7) for e in range(2) for i in range(28)]
    backward = [two.draw(1, e, i, 7) for e in (1, 0) for i in reversed(range(28))]
    assert forward == backward[::-1]
    assert forward != [one.draw(2, e, i, 7) for e in range(2) for i in range(28)]


def test_the_stores_of_a_cycle_are_shuffled_by_a_stream_of_their_own(pair):
    """Written out: another order would train every such run to other weights. The streams are 0
    and 1 for the cases of a store, 2 and 3 for the stores."""
    mixed = MixedSampler(parts=tuple(map(sampler, pair)), weights=(2, 3))
    batch, seed = mixed.parts[0].batch, mixed.seed
    kept = batch - round(batch * mixed.parts[0].foreground)  # of a batch, drawn from anywhere
    drawn = {
        0: [index for index in range(20 * batch) if index % batch < kept],
        1: [index for index in range(20 * batch) if index % batch >= kept],
    }
    for stream, places in drawn.items():
        expected = []
        for cycle in range(4):
            philox = np.random.Philox(key=[seed, 0], counter=[0, 2 + stream, cycle, 7])
            order = np.random.Generator(philox).permutation(5)
            expected += np.array([0, 0, 1, 1, 1])[order].tolist()
        found = [mixed.draw(7, 0, index, 20).store for index in places[:20]]
        assert found == expected[: len(found)] and len(found) >= 10


def test_weights_count_by_their_ratio(pair):
    one, ten = (
        MixedSampler(parts=tuple(map(sampler, pair)), weights=w) for w in ((2, 3), (20, 30))
    )
    assert [one.draw(0, 0, i, 9) for i in range(36)] == [ten.draw(0, 0, i, 9) for i in range(36)]


def test_stores_without_any_foreground_are_drawn_from_anywhere(pair):
    bare = [
        PatchSampler(
            cases=tuple(case.model_copy(update={"foreground": {}}) for case in one.cases),
            patch=one.patch, batch=4, seed=3, foreground=0.5,
        )
        for one in map(sampler, pair)
    ]  # fmt: skip
    mixed = MixedSampler(parts=tuple(bare), weights=(1, 1))
    stores = [mixed.draw(0, 0, index, 9).store for index in range(36)]
    assert all(sorted(stores[k : k + 2]) == [0, 1] for k in range(0, 36, 2))


def test_a_loader_process_gets_all_of_a_sampler_but_what_it_makes_itself(pair):
    mixed = MixedSampler(parts=tuple(map(sampler, pair)), weights=(1, 2))
    before = [mixed.draw(0, 1, index, 5) for index in range(10)]
    other = pickle.loads(pickle.dumps(mixed))
    assert set(vars(other)) == {"parts", "weights"}
    assert set(vars(other.parts[0])) == {"cases", "patch", "batch", "foreground", "seed"}
    assert [other.draw(0, 1, index, 5) for index in range(10)] == before


def test_foreground_comes_from_stores_that_have_some(pair):
    labelled, other = map(sampler, pair)
    bare = PatchSampler(
        cases=tuple(case.model_copy(update={"foreground": {}}) for case in other.cases),
        patch=(1, 32, 32), batch=4, seed=3, foreground=0.5,
    )  # fmt: skip
    mixed = MixedSampler(parts=(bare, labelled), weights=(1, 1))
    stores = [{mixed.draw(0, 0, i, 50).store for i in range(n, 200, 4)} for n in range(4)]
    assert stores == [{0, 1}, {0, 1}, {1}, {1}]
    assert len({mixed.draw(0, 0, i, 50).case.id for i in range(200) if i % 4 > 1}) == 3


def recipe_of(document, *changes):
    return with_absolute_store(parse(override(document, list(changes))))


def test_a_stage_of_several_stores_is_trained_shared_and_told_apart(two_stages, pair, tmp_path, go):
    document = two_stages({"data": {"stores": [{"store": str(p)} for p in pair]}}, {})
    assert resolve(recipe_of(document), 0).data.store == str(pair[0])
    assert resolve(recipe_of(document), 1).data.stores == ()
    recipe = recipe_of(document)
    again = parse(json.loads(json.dumps(recipe.model_dump(mode="json"))))
    assert again == recipe
    uids = identity.stage_uids(recipe, Stores().manifest)
    assert identity.stage_uids(resolve(recipe, 0), Stores().manifest) == uids
    stores = f"stages.0.data.stores=[{pair[0]}, {pair[1]}]"
    assert identity.stage_uids(recipe_of(document, stores), Stores().manifest) == uids
    other = f"stages.0.data.stores=[{{store: {pair[0]}, weight: 9}}, {pair[1]}]"
    alone = f"stages.0.data.stores=[{pair[0]}]"
    assert len({identity.stage_uids(recipe_of(document, c), Stores().manifest)[0] for c in
                (stores, other, alone)}) == 3  # fmt: skip
    steps = stage_data.stage_steps(recipe_of(document, "stages.0.steps=null"), Stores().manifest)
    ids = [len(load_manifest(Path(p)).fold("kfold", 0)["train"]) for p in pair]
    assert steps[0] == -(-sum(ids) // 2)
    whole = go(document, tmp_path / "a")
    for stop in (1, 2):
        go(document, tmp_path / str(stop), stop_after=stop)
        parts = go(document, tmp_path / str(stop))
        one, two = (f[-1].final().tensors("weights") for f in (whole, parts))
        assert all(torch.equal(one[n], two[n]) for n in one)
    target = load_manifest(pair[1])
    seen = seen_in_training(
        [c.id for c in target.cases], recipe_of(document, f"data.store={pair[1]}"), target
    )
    assert seen["cases"] >= ids[1]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"store": "a", "stores": ["b"]}, "the first of data.stores is .*b"),
        ({"stores": [{"weight": 1}]}, "stores.*store"),
        ({"stores": [{"store": "a", "weight": 0}]}, "weight"),
    ],
)
def test_stores_that_cannot_be_meant_are_refused(two_stages, change, words):
    with pytest.raises(InputError, match=f"(?s){words}"):
        parse(two_stages({"data": change}, {}))


def test_stores_that_cannot_share_a_batch_are_one_message(two_stages, tiny_store, tmp_path):
    flat, classes = tiny_store(dims=2), tiny_store(dims=2, classes=1)
    recipe = recipe_of(two_stages({"data": {"stores": [str(flat), str(classes)]}}, {}))
    with pytest.raises(InputError, match=r"stages.0 \(first\): data.stores: .* has classes"):
        check_recipe(recipe, Stores().manifest)
    with pytest.raises(InputError, match=r"stages.0 \(first\): .*none"):
        missing = recipe_of(
            two_stages({"data": {"stores": [str(flat), str(tmp_path / "none")]}}, {})
        )
        check_recipe(missing, Stores().manifest)
