"""Order is a function: the same global batches for every number of ranks and loader processes."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from segfleet.core.errors import InputError
from segfleet.pipeline.data import loader, randomness
from segfleet.pipeline.data.sampler import PatchSampler
from segfleet.pipeline.sections import Augment
from segfleet.preprocess.stores.base import open_store

EVERYTHING = Augment(
    rotation=1,
    scale=1,
    elastic=1,
    gamma=1,
    contrast=1,
    brightness=1,
    noise=1,
    blur=1,
    low_resolution=1,
)


def sampler_of(store, batch=4, foreground=0.5):
    manifest = store.manifest
    return PatchSampler(
        cases=manifest.cases, patch=manifest.plan.patch, batch=batch, foreground=foreground, seed=3
    )


def global_batches(
    store, ranks, workers, steps=3, epochs=2, accumulate=1, begin=0, augment=EVERYTHING
):
    """Every step's samples, micro-batch by micro-batch and within one rank by rank: images, labels,
    cases."""
    sampler = sampler_of(store)
    shares = []
    for rank in range(ranks):
        schedule = loader.Schedule(begin, epochs, steps, sampler.batch, accumulate, rank, ranks)
        patches = loader.Patches(store, sampler, 0, steps, augment, pinned=False)
        micro = list(loader.batches(patches, schedule, workers))
        shares.append([micro[k : k + accumulate] for k in range(0, len(micro), accumulate)])
    steps_of = [
        [batch for part in zip(*step, strict=True) for batch in part]
        for step in zip(*shares, strict=True)
    ]
    return [
        (
            torch.cat([batch.image for batch in made]),
            torch.cat([batch.label for batch in made]),
            [case for batch in made for case in batch.cases],
        )
        for made in steps_of
    ]


def assert_same(first, second):
    assert len(first) == len(second)
    for (image, label, cases), (image2, label2, cases2) in zip(first, second, strict=True):
        assert cases == cases2
        assert torch.equal(image, image2) and torch.equal(label, label2)


@pytest.mark.parametrize("dims", [2, 3])
def test_batches_do_not_depend_on_ranks_accumulation_or_threads(tiny_store, dims):
    store = open_store(tiny_store(dims=dims))
    alone = global_batches(store, ranks=1, workers=0)
    assert_same(alone, global_batches(store, ranks=2, workers=0))
    assert_same(alone, global_batches(store, ranks=2, workers=0, accumulate=2))
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1 if threads > 1 else 2)
        assert_same(alone, global_batches(store, ranks=4, workers=0))
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize(("batch", "accumulate"), [(8, 1), (8, 2), (12, 3), (8, 4)])
def test_a_micro_batch_holds_the_same_samples_for_every_number_of_ranks(batch, accumulate):
    def micro_batches(ranks):
        schedules = [
            list(loader.Schedule(3, 3, 2, batch, accumulate, rank, ranks)) for rank in range(ranks)
        ]
        return [sum(parts, []) for parts in zip(*schedules, strict=True)]

    alone, micro = micro_batches(1), batch // accumulate
    # by hand: step 1 of epoch 1 is the second batch of that epoch, cut from its front
    assert alone[:accumulate] == [
        [(1, batch + part * micro + k) for k in range(micro)] for part in range(accumulate)
    ]
    for ranks in (2, 4):
        if micro % ranks == 0:
            assert micro_batches(ranks) == alone


@pytest.mark.slow
@pytest.mark.parametrize("workers", [1, 2])
def test_batches_do_not_depend_on_loader_processes(tiny_store, workers):
    store = open_store(tiny_store(dims=3))
    assert_same(
        global_batches(store, ranks=1, workers=0), global_batches(store, ranks=1, workers=workers)
    )


def test_resume_in_the_middle_gives_the_rest(tiny_store):
    store = open_store(tiny_store(dims=3))
    whole = global_batches(store, ranks=1, workers=0)
    rest = global_batches(store, ranks=2, workers=0, begin=3 + 1)
    assert_same(whole[4:], rest)


def test_every_case_is_seen_before_any_is_seen_again(tiny_store):
    sampler = sampler_of(open_store(tiny_store(cases=6)), batch=3, foreground=0)
    seen = [sampler.draw(0, 0, index, 4).case.id for index in range(12)]
    assert sorted(seen[:6]) == sorted(seen[6:]) == sorted(case.id for case in sampler.cases)
    assert seen[:6] != seen[6:]


def test_foreground_quota_is_exact(tiny_store):
    store = open_store(tiny_store(dims=3))
    sampler = sampler_of(store, batch=4, foreground=0.5)
    for index in range(40):
        draw = sampler.draw(0, 1, index, 10)
        label = store.label(
            draw.case,
            tuple(slice(s, s + p) for s, p in zip(draw.start, sampler.patch, strict=True)),
        )
        if index % 4 >= 2:
            assert label.any()


def test_a_centred_patch_has_its_voxel_in_the_middle_or_touches_the_border(tiny_store):
    """Drawn from the label itself: the middle of every patch is a labelled voxel, moved only as far
    as the case's border asks, and every label is met."""
    store = open_store(tiny_store(dims=3))
    sampler = sampler_of(store, batch=2, foreground=0.5)
    patch, allowed = np.array(sampler.patch), {}
    for case in sampler.cases:
        label = store.label(case)
        allowed[case.id] = {
            value: {
                tuple(start)
                for start in np.clip(
                    np.argwhere(label == value) - patch // 2, 0, np.array(case.shape) - patch
                )
            }
            for value in np.unique(label[label > 0])
        }
    met = set()
    for index in range(1, 120, 2):
        draw = sampler.draw(0, 0, index, 60)
        values = [value for value, starts in allowed[draw.case.id].items() if draw.start in starts]
        assert values
        met.update(values)
    assert met == {1, 2}


def test_a_patch_anywhere_takes_every_place_that_fits_and_no_other(tiny_store):
    case = open_store(tiny_store(dims=3)).manifest.cases[0]
    z, y, x = case.shape
    sampler = PatchSampler(cases=(case,), patch=(z - 2, y, x + 5), batch=1, foreground=0.0, seed=1)
    starts = {sampler.draw(0, 0, index, 40).start for index in range(40)}
    assert starts == {(k, 0, -2) for k in range(3)}


def test_stages_epochs_and_seeds_differ(tiny_store):
    sampler = sampler_of(open_store(tiny_store(dims=3)), foreground=0)
    starts = {
        key: [sampler.draw(*key, index, 8).start for index in range(16)]
        for key in ((0, 0), (0, 1), (1, 0))
    }
    assert len({tuple(value) for value in starts.values()}) == 3


def test_cases_smaller_than_the_patch_are_centred_and_padded(tiny_store):
    store = open_store(tiny_store(dims=3))
    manifest = store.manifest
    sampler = PatchSampler(
        cases=manifest.cases[:1], patch=(40, 40, 40), batch=1, foreground=1, seed=0
    )
    draw = sampler.draw(0, 0, 0, 1)
    shape = manifest.cases[0].shape
    assert draw.start == tuple(-((40 - s) // 2) for s in shape)
    image = store.image(draw.case, tuple(slice(s, s + 40) for s in draw.start))
    assert image.shape == (1, 40, 40, 40) and not image[:, 0].any() and image[:, 20].any()


def test_no_training_case_and_uneven_shares_are_refused():
    with pytest.raises(InputError, match="no training case"):
        PatchSampler(cases=(), patch=(1, 8, 8), batch=1, foreground=0, seed=0)
    with pytest.raises(
        InputError, match="found 5.*2 rank.*expected a multiple of 2, for example 6"
    ):
        loader.check_shares(5, 2, 1)


def test_a_place_in_the_run_is_a_key_and_a_counter():
    """Written out: other numbers would train every run to other weights."""
    assert (randomness.CASES, randomness.PATCH, randomness.AUGMENT) == (0, 1, 2)
    assert (randomness.INIT, randomness.DROPOUT, randomness.MASK) == (3, 4, 5)
    found = randomness.generator(7, 2, stage=1, epoch=3, index=5)
    philox = np.random.Philox(key=[7, 2], counter=[0, 5, 3, 1])
    assert found.bit_generator.random_raw(3).tolist() == philox.random_raw(3).tolist()
    plain = np.random.Philox(key=[7, 0], counter=[0, 0, 0, 0])
    assert randomness.generator(7, 0).bit_generator.random_raw() == plain.random_raw()
    order = np.random.Generator(np.random.Philox(key=[7, 0], counter=[0, 1, 4, 2])).permutation(9)
    assert np.array_equal(randomness.permutation(7, 2, 1, 4, 9), order)


def test_the_last_samples_of_a_batch_are_centred_and_each_stream_visits_every_case(tiny_store):
    """Of three cases one has no foreground: of batches of four the first two walk through all
    three, the last two through the two that have some."""
    store = open_store(tiny_store(dims=3))
    cases = store.manifest.cases[:3]
    empty = cases[1].model_copy(update={"foreground": {}})
    sampler = PatchSampler(
        cases=(cases[0], empty, cases[2]), patch=(16, 16, 16), batch=4, foreground=0.5, seed=3
    )
    ids = [sampler.draw(0, 0, index, 6).case.id for index in range(24)]
    anywhere = [name for k, name in enumerate(ids) if k % 4 < 2]
    centred = [name for k, name in enumerate(ids) if k % 4 >= 2]
    every = [case.id for case in cases]
    assert all(sorted(anywhere[k : k + 3]) == every for k in range(0, 12, 3))
    assert all(sorted(centred[k : k + 2]) == every[::2] for k in range(0, 12, 2))


def test_one_case_with_foreground_is_enough_for_the_quota(tiny_store):
    cases = open_store(tiny_store(dims=3)).manifest.cases[:3]
    cases = [
        case.model_copy(update={"foreground": {}}) if n else case for n, case in enumerate(cases)
    ]
    sampler = PatchSampler(cases=tuple(cases), patch=(8, 8, 8), batch=4, foreground=0.5, seed=3)
    drawn = [sampler.draw(0, 0, index, 6) for index in range(24)]
    assert {draw.case.id for k, draw in enumerate(drawn) if k % 4 >= 2} == {cases[0].id}
    assert {draw.case.id for k, draw in enumerate(drawn) if k % 4 < 2} == {c.id for c in cases}


def test_the_order_in_which_labels_were_counted_changes_no_draw(tiny_store):
    case = open_store(tiny_store(dims=3)).manifest.cases[0]
    found = dict(case.foreground)
    assert list(found) == [1, 2]
    turned = case.model_copy(update={"foreground": {label: found[label] for label in (2, 1)}})
    starts = [
        [
            PatchSampler(cases=(one,), patch=(8, 8, 8), batch=1, foreground=1, seed=3)
            .draw(0, 0, index, 20)
            .start
            for index in range(20)
        ]
        for one in (case, turned)
    ]
    assert starts[0] == starts[1]


def test_batches_for_a_loop_of_ones_own_are_those_of_training(tiny_store):
    store = open_store(tiny_store(dims=3))
    facts = {
        "batch": 4,
        "steps": 3,
        "epochs": 2,
        "foreground": 0.5,
        "augment": EVERYTHING,
        "seed": 3,
    }
    made = [
        (batch.image, batch.label, list(batch.cases))
        for batch in loader.training_batches(store, **facts)
    ]
    assert_same(made, global_batches(store, ranks=2, workers=0))
    chosen = [store.manifest.cases[2].id]
    few = loader.training_batches(store, batch=1, steps=2, patch=(8, 12, 16), cases=chosen)
    assert [(tuple(b.image.shape), b.cases) for b in few] == [
        ((1, 1, 8, 12, 16), tuple(chosen))
    ] * 2
    with pytest.raises(InputError, match="nobody"):
        loader.training_batches(store, batch=1, steps=1, cases=["nobody"])


def test_a_store_that_goes_before_a_loader_process_opens_it_is_named(tiny_store, tmp_path, capfd):
    import shutil

    root = tmp_path / "copy"
    shutil.copytree(tiny_store(dims=2), root)
    made = loader.training_batches(open_store(root), batch=2, steps=2, workers=1)
    root.rename(tmp_path / "away")
    words = "^loading: store: .*/copy/cases-.*safetensors is not what it was .*No such file"
    with pytest.raises(InputError, match=words):
        next(made)
    made.close()
    assert "Traceback" not in capfd.readouterr().err


def test_a_damaged_case_is_named_with_its_phase(tiny_store, tmp_path):
    import shutil

    root = tmp_path / "copy"
    shutil.copytree(tiny_store(dims=3), root)
    shard = max(
        (path for path in root.rglob("*") if path.is_file()), key=lambda path: path.stat().st_size
    )
    raw = bytearray(shard.read_bytes())
    raw[: len(raw) // 2] = bytes(len(raw) // 2)
    shard.write_bytes(raw)
    with pytest.raises(InputError, match="loading case case0"):
        global_batches(open_store(root), ranks=1, workers=0)


def test_draws_are_spread_over_the_case(tiny_store):
    sampler = sampler_of(open_store(tiny_store(dims=2, size=40)), foreground=0)
    starts = np.array(
        [sampler.draw(0, epoch, index, 4).start for epoch in range(4) for index in range(16)]
    )
    assert starts[:, 0].max() == 0 and np.ptp(starts[:, 1]) > 5 and np.ptp(starts[:, 2]) > 5


@pytest.mark.parametrize("count", [200, 800])
def test_a_draw_does_not_walk_through_the_cases(tiny_store, count):
    """Whatever the number of cases, their foreground is looked at once, and again once in a loader
    process."""
    looks = 0

    class Counted(dict):
        def values(self):
            nonlocal looks
            looks += 1
            return super().values()

    first = open_store(tiny_store(3)).manifest.cases[0]
    cases = tuple(
        first.model_copy(update={"foreground": Counted(first.foreground)}) for _ in range(count)
    )
    sampler = PatchSampler(cases=cases, patch=(8, 8, 8), batch=4, foreground=0.5, seed=0)
    for index in range(40):
        sampler.draw(0, 0, index, 10)
    assert looks == count
