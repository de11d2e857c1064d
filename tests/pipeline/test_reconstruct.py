"""A first stage that needs no labels: a masked autoencoder."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch

from segfleet.core.errors import InputError
from segfleet.models import registry
from segfleet.models.skips import skip
from segfleet.pipeline import identity, run, stage_data
from segfleet.pipeline.data import loader, randomness
from segfleet.pipeline.data.masking import check_mask, hidden
from segfleet.pipeline.data.sampler import PatchSampler
from segfleet.pipeline.jobs import Stores, run_job
from segfleet.pipeline.launch.job import Train
from segfleet.pipeline.losses.hidden_error import hidden_error
from segfleet.pipeline.parts import build_network, task_of
from segfleet.pipeline.ranks import Ranks
from segfleet.pipeline.recipe import override, parse, resolve, with_absolute_store
from segfleet.pipeline.scoring.scored import is_scored
from segfleet.pipeline.sections import Mask
from segfleet.pipeline.stop import StopRequest
from segfleet.preprocess.stores.base import open_store


@pytest.fixture
def document(two_stages):
    first = {"name": "pretrain", "epochs": 2, "steps": 4, "task": "reconstruct"}
    return two_stages(first, {"name": "finetune"}, evaluation={"every": 1}, save_every=1)


def recipe_of(document, *changes):
    return with_absolute_store(parse(override(document, list(changes))))


def go(recipe, root, **more):
    job = Train(recipe=recipe.model_dump(mode="json"), root=root, **more)
    run_job(job, Ranks(torch.device("cpu")), StopRequest())
    return run.stage_folders(root, recipe, Stores().manifest)


def events(folder, kind):
    lines = (folder.path / "events.jsonl").read_text().splitlines()
    return [event for event in map(json.loads, lines) if event["event"] == kind]


@pytest.mark.parametrize(
    ("patch", "block"), [((1, 32, 48), 8), ((16, 16, 24), 8), ((1, 20, 20), 8)]
)
def test_the_share_of_hidden_blocks_is_exact(patch, block):
    rng = np.random.default_rng(0)
    mask = hidden(Mask(ratio=0.5, block=block), patch, rng)
    assert mask.shape == patch
    corners = mask[tuple(slice(None, None, block) for _ in patch)]
    assert corners.sum() == round(0.5 * corners.size)
    whole = corners
    for axis in range(3):
        whole = whole.repeat(1 if patch[axis] == 1 else block, axis)
    assert np.array_equal(whole[tuple(map(slice, patch))], mask)


@pytest.mark.parametrize(
    ("mask", "patch", "words"),
    [
        (
            Mask(block=33),
            (1, 64, 32),
            r"data.mask.block: found 33 voxels, but the patch is \[64, 32\]",
        ),
        (Mask(block=32), (1, 32, 32), "hides all or nothing"),
        (Mask(block=16, ratio=0.05), (1, 32, 32), "hides all or nothing"),
    ],
)
def test_masks_that_do_not_fit_the_patch_are_refused(mask, patch, words):
    with pytest.raises(InputError, match=words):
        check_mask(mask, patch)


def test_a_mask_larger_than_the_patch_is_one_message_before_anything_runs(document, tmp_path):
    with pytest.raises(InputError, match=r"stages.0 \(pretrain\): data.mask.block: found 64"):
        go(recipe_of(document, "stages.0.data.mask.block=64"), tmp_path)
    assert not list(tmp_path.rglob("checkpoints"))


def test_the_loss_is_the_mean_square_of_what_is_hidden():
    rng = torch.Generator().manual_seed(0)
    output, image = (torch.randn(2, 3, 4, 4, generator=rng) for _ in range(2))
    mask = (torch.rand(2, 1, 4, 4, generator=rng) < 0.5).float()
    by_hand = [float(((output[b] - image[b]) ** 2)[:, mask[b, 0] > 0].mean()) for b in range(2)]
    found = hidden_error(output, torch.cat([image, mask], 1))
    assert float(found) == pytest.approx(sum(by_hand) / 2)
    changed = output + 100 * (1 - mask)  # what can be seen does not count
    assert float(hidden_error(changed, torch.cat([image, mask], 1))) == pytest.approx(float(found))


def test_a_patch_is_what_it_is_without_a_mask_and_depends_on_its_place_alone(document):
    store = open_store(document["data"]["store"])
    sampler = PatchSampler(
        cases=store.manifest.cases, patch=(1, 32, 32), batch=2, foreground=0.5, seed=3
    )
    parts = (store, sampler, 0, 4, None, False)
    plain, masked = loader.Patches(*parts), loader.MaskedPatches(*parts, mask=Mask(block=8))
    one, two = plain.__getitems__([(0, 1), (1, 6)]), masked.__getitems__([(0, 1), (1, 6)])
    mask = two.label[:, -1:]
    assert torch.equal(two.label[:, :-1], one.image)
    assert torch.equal(two.image, one.image * (1 - mask))
    alone = masked.__getitems__([(1, 6)])
    assert torch.equal(alone.image[0], two.image[1])
    rng = randomness.generator(3, randomness.MASK, 0, 1, 6)
    assert np.array_equal(mask[1, 0].bool().numpy(), hidden(Mask(block=8), (1, 32, 32), rng)[0])


@pytest.mark.parametrize("name", list(registry.specs()))
def test_every_network_can_do_without_its_skip_connections(name):
    """Its output then depends on the encoder's maps through the deepest alone: it does not change
    when what is handed over does."""
    spec = registry.spec(name)
    torch.manual_seed(0)
    model = registry.build_model(
        name, in_channels=spec.in_channels, num_classes=spec.num_classes, options=spec.reduced
    ).eval()
    image = torch.randn(1, spec.in_channels, *spec.small_input)
    with torch.no_grad():
        for parameter in model.parameters():  # off gates that begin at zero
            parameter.add_(0.05 * torch.randn_like(parameter))
        with_skips = model(image)
        model.without_skips = True
        without = model(image)
    assert without.shape == with_skips.shape and torch.isfinite(without).all()
    # a vision transformer has none
    assert torch.equal(with_skips, without) == name.startswith("primus")
    assert torch.equal(skip(model, image), torch.zeros_like(image))


def test_pretraining_learns_is_not_validated_and_hands_over_its_backbone(document, tmp_path):
    document["stages"][0] |= {"epochs": 15, "lr": 3e-3}
    document["data"]["mask"] = {"block": 4, "ratio": 0.5}
    folders = go(recipe_of(document), tmp_path)
    recipe, store = recipe_of(document), open_store(document["data"]["store"])
    own = resolve(recipe, 0)
    task = task_of(own, store.manifest)
    sampler = PatchSampler(
        cases=store.manifest.cases, patch=(1, 32, 32), batch=8, foreground=1, seed=9
    )
    batch = loader.MaskedPatches(store, sampler, 0, 1, None, False, mask=own.data.mask)
    batch = batch.__getitems__([(0, index) for index in range(8)])
    errors = []
    for weights in (None, folders[0].final().tensors("weights")):
        model = build_network(own, store.manifest, task)
        assert model.without_skips
        if weights:
            model.load_state_dict(weights)
            model.eval()
        with torch.no_grad():
            errors.append(float(hidden_error(model(batch.image), batch.label)))
    assert errors[1] < 0.85 * errors[0]
    assert not events(folders[0], "validation") and events(folders[1], "validation")
    note = json.loads((folders[1].path / "transfer.json").read_text())
    assert note["new"] == ["outc.bias", "outc.weight"] and not note["changed"]
    assert (folders[1].path / "evaluation.json").exists()


def test_a_run_that_ends_with_it_is_finished_without_a_score(document, tmp_path):
    document["stages"] = document["stages"][:1]
    recipe = recipe_of(document)
    folders = go(recipe, tmp_path)
    assert folders[0].done() and not (folders[0].path / "evaluation.json").exists()
    assert is_scored(folders[0].path, recipe, Stores().manifest(recipe))


def test_what_it_does_not_use_is_no_part_of_its_identity(document):
    def uid(*changes):
        return identity.stage_uids(recipe_of(document, *changes), Stores().manifest)

    plain = uid()
    assert uid("stages.0.loss.name=dice_ce")[0] == plain[0]
    assert uid("stages.0.data.mask.ratio=0.5")[0] != plain[0]
    assert uid("stages.1.data.mask.ratio=0.5")[1] == plain[1]


def test_patience_is_refused(document):
    with pytest.raises(InputError, match="stages.0.patience: a reconstruction is not validated"):
        recipe_of(document, "stages.0.patience=1")


def test_fewer_cases_are_among_more(document):
    manifest = Stores().manifest(recipe_of(document))
    ids = manifest.fold("kfold", 0)["train"]
    chosen = [
        set(stage_data.training_ids(recipe_of(document, f"data.cases={count}"), manifest))
        for count in range(1, len(ids) + 1)
    ]
    assert [len(found) for found in chosen] == list(range(1, len(ids) + 1))
    assert all(fewer < more for fewer, more in zip(chosen, chosen[1:], strict=False))
    everything = identity.stage_uids(recipe_of(document, f"data.cases={len(ids)}"), manifest)
    assert everything == identity.stage_uids(recipe_of(document), manifest)
    with pytest.raises(InputError, match=f"data.cases: found 99, but the fold has {len(ids)}"):
        identity.stage_uids(recipe_of(document, "data.cases=99"), manifest)
