"""A trained network in other hands: ensembles, model files, graphs, Python; and what is wrong with
them, one message each."""

from __future__ import annotations

import dataclasses
import json
import logging
import os
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

from segfleet.cli import main
from segfleet.core.errors import InputError
from segfleet.core.files import unstamped
from segfleet.pipeline import load_run
from segfleet.pipeline.launch.job import Train
from segfleet.pipeline.run import run_folders
from segfleet.pipeline.trained.model import Model
from segfleet.preprocess.stores.base import open_store
from segfleet.preprocess.stores.manifest import load_manifest, save_manifest


def segfleet(*words):
    return CliRunner().invoke(main.app, [str(word) for word in words])


def runs_of(folder):
    """Folders of both folds."""
    found = {json.loads((run / "recipe.json").read_text())["data"]["fold"]: run
             for run in run_folders(folder / "runs")}  # fmt: skip
    return found[0], found[1]


def predict(folder, *words, out, **more):
    done = segfleet("predict", *words, "--out", out, "--runs", folder / "runs", "--json")
    return done, json.loads(done.stdout) if done.exit_code == 0 else None


def labels(out):
    return {path.stem: np.asarray(Image.open(path)) for path in sorted(out.glob("*.png"))}


@pytest.fixture(scope="module")
def ensemble(two_folds, tmp_path_factory):
    """Predictions of both runs together, with probabilities."""
    out = tmp_path_factory.mktemp("ensemble") / "out"
    words = ("tiny", two_folds / "images", "--fold", "all", "--probabilities")
    done, document = predict(two_folds, *words, out=out)
    assert done.exit_code == 0, (done.output, done.exception)
    assert len(document["done"]) == 2 and "an ensemble of 2 networks" in done.stderr
    return out


@pytest.fixture(scope="module")
def model(two_folds, tmp_path_factory):
    """Both runs as one file, away from everything else."""
    path = tmp_path_factory.mktemp("model") / "both.segfleet"
    done = segfleet(
        "export", "model", "tiny", "--fold", "all", "--to", path, "--runs", two_folds / "runs",
        "--use", "Blobs in noise.", "--licence", "cc-by-4.0", "--json",
    )  # fmt: skip
    assert done.exit_code == 0, (done.output, done.exception)
    assert json.loads(done.stdout)["written"] == str(path)
    assert [p.name for p in path.parent.iterdir()] == ["both.segfleet"]
    return path


def test_an_ensemble_is_the_mean_of_its_runs(two_folds, ensemble, tmp_path):
    first, second = runs_of(two_folds)
    for run in (first, second):
        predict(two_folds, run, two_folds / "images", "--probabilities", out=tmp_path / run.name)
    for name in ("one", "two"):
        mean = sum(
            np.load(tmp_path / run.name / f"{name}.npz")["probabilities"].astype(float)
            for run in (first, second)
        )
        found = np.load(ensemble / f"{name}.npz")["probabilities"].astype(float)
        np.testing.assert_allclose(found, mean / 2, atol=2e-3)
        assert found.shape[1:] == (1, *labels(ensemble)[name].shape)
    # the same runs in another order, by uid and by folder: nothing to do
    again = (second.name[:8], first, two_folds / "images")
    assert len(predict(two_folds, *again, out=ensemble)[1]["kept"]) == 2
    alone, _ = predict(two_folds, first, two_folds / "images", out=ensemble)
    assert "holds predictions made by" in str(alone.exception)


def test_ranks_share_the_images(two_folds, ensemble, tmp_path):
    words = (*runs_of(two_folds), two_folds / "images", "--ranks", 2)
    done, document = predict(two_folds, *words, out=tmp_path / "out")
    assert done.exit_code == 0 and [one["id"] for one in document["done"]] == ["one", "two"]
    assert all(np.array_equal(labels(tmp_path / "out")[k], v) for k, v in labels(ensemble).items())


def test_a_store_is_predicted_on_the_device_that_is_named(two_folds, tmp_path):
    run, store = runs_of(two_folds)[0], two_folds / "store"
    done, document = predict(two_folds, run, store, "--device", "cpu", out=tmp_path / "out")
    assert done.exit_code == 0, (done.output, done.exception)
    cases = [case.id for case in open_store(store).manifest.cases]
    assert [one["id"] for one in document["done"]] == cases
    for device, said in (("gpu", "found 'gpu', expected cpu, cuda"), ("cuda:9", "sees .* GPU")):
        wrong, _ = predict(two_folds, run, store, "--device", device, out=tmp_path / device)
        assert re.search(said, str(wrong.exception)) and not (tmp_path / device).exists()
    ranks = ("--device", "cpu", "--ranks", 2)
    _, document = predict(two_folds, run, two_folds / "images", *ranks, out=tmp_path / "ranks")
    assert len(document["done"]) == 2


def test_a_store_that_was_made_otherwise_is_refused(two_folds, tmp_path):
    run = runs_of(two_folds)[0]
    shutil.copytree(two_folds / "store", tmp_path / "store")
    manifest = load_manifest(tmp_path / "store")
    other = manifest.plan.model_copy(update={"target_spacing": (1.0, 2.0, 2.0)})
    save_manifest(tmp_path / "store", manifest.model_copy(update={"plan": other}))
    done, _ = predict(two_folds, run, tmp_path / "store", out=tmp_path / "out")
    assert "was preprocessed in another way" in str(done.exception)
    assert "target_spacing (1.0, 2.0, 2.0), of the run (1.0, 1.0, 1.0)" in str(done.exception)
    done, _ = predict(two_folds, run, tmp_path, out=tmp_path / "out")
    assert "Of a raw data set name the layout" in str(done.exception)
    assert not (tmp_path / "out").exists()


def test_auto_keeps_what_helped_on_cases_not_trained_on(two_folds, tmp_path):
    words = ("tiny", two_folds / "images", "--fold", "all", "--postprocess", "auto")
    done, _ = predict(two_folds, *words, out=tmp_path / "auto")
    assert done.exit_code == 0, (done.output, done.exception)
    (path,) = (two_folds / "runs" / "folds").glob("*/postprocessing.json")
    decision = json.loads(path.read_text())
    assert all(found["cases"] == 6 for found in decision["structures"].values())
    for name, found in decision["structures"].items():
        helped = found["difference"] > 0 and found["ci95"] and found["ci95"][0] >= 0
        assert (decision["rules"].get(name) == "largest") == bool(helped)
    assert "deciding on cases not trained on: 6/6" in done.stderr
    before = path.stat().st_mtime_ns
    assert predict(two_folds, *words, out=tmp_path / "auto")[1]["kept"]
    assert path.stat().st_mtime_ns == before, "decided once"
    told = segfleet("predict", *words, "--out", tmp_path / "auto", "--runs", two_folds / "runs")
    said = "; ".join(
        f"{name}: {decision['rules'].get(name) or 'nothing, none helped'}"
        for name in ("blob1", "blob2")
    )
    assert f"post-processing by cases not trained on: {said}" in " ".join(told.output.split())
    largest = ("tiny", two_folds / "images", "--fold", "all", "--postprocess", "largest")
    predict(two_folds, *largest, out=tmp_path / "largest")
    from scipy import ndimage

    for label in labels(tmp_path / "largest").values():
        for value in (1, 2):
            assert ndimage.label(label == value, np.ones((3, 3)))[1] <= 1
    wrong, _ = predict(two_folds, *largest[:-1], "smooth", out=tmp_path / "wrong")
    assert "postprocess: found 'smooth'" in str(wrong.exception)
    assert not (tmp_path / "wrong").exists()


def test_a_model_file_predicts_where_there_is_nothing_else(two_folds, ensemble, model, tmp_path):
    """Another process, an empty folder, and neither runs nor store."""
    away = tmp_path / "away"
    shutil.copytree(two_folds / "images", away / "images")
    command = [sys.executable, "-m", "segfleet.cli.main", "predict", str(model), "images"]
    environment = {**os.environ, "SEGFLEET_DEVICE": "cpu"}
    code = f"import os; os.rename({str(two_folds / 'store')!r}, {str(two_folds / 'gone')!r})"
    exec(code)
    try:
        done = subprocess.run(
            [*command, "--out", "out"], cwd=away, env=environment, capture_output=True, text=True
        )
    finally:
        (two_folds / "gone").rename(two_folds / "store")
    assert done.returncode == 0, done.stderr
    found = labels(away / "out")
    assert found.keys() == {"one", "two"}
    assert all(np.array_equal(found[name], label) for name, label in labels(ensemble).items())
    # the same networks, so the same predictions: nothing to do
    assert len(predict(two_folds, model, two_folds / "images", out=ensemble)[1]["kept"]) == 2


def test_nothing_of_this_machine_is_in_a_model(two_folds, model):
    with zipfile.ZipFile(model) as whole:
        names = whole.namelist()
        assert names == sorted(names) and "README.md" in names and "config.json" in names
        assert all(name.endswith((".md", ".json", ".safetensors")) for name in names)
        content = b"".join(whole.read(name) for name in names)
        card = whole.read("README.md").decode()
    for place in (two_folds, Path.home(), Path.cwd()):
        assert str(place).encode() not in content or str(place) == "/"
    assert "Blobs in noise." in card and 'license: "cc-by-4.0"' in card and "blob1" in card
    scores = json.loads((runs_of(two_folds)[0] / "evaluation.json").read_text())
    assert f"{scores['summary']['structures']['blob1']['dice']['mean']:.4f}" in card
    assert open_store(two_folds / "store").manifest.id in card


def test_python_says_what_the_command_says(two_folds, ensemble, model, tmp_path):
    for opened in (load_run("tiny", runs=two_folds / "runs", fold="all"), load_run(model)):
        for name, label in labels(ensemble).items():
            array = np.asarray(Image.open(two_folds / "images" / f"{name}.png"), np.float32)
            found, probabilities = opened.predict(
                array[None, None], (1.0, 1.0, 1.0), probabilities=True
            )
            assert np.array_equal(found[0], label) and found.dtype == np.uint8
            kept = np.load(ensemble / f"{name}.npz")["probabilities"]
            assert np.array_equal(probabilities, kept)
        answer = opened.predict_files([two_folds / "images"], tmp_path / "out")
        assert len(answer["done"] + answer["kept"]) == 2
    for array, spacing, words in (
        (np.zeros((4, 4)), (1, 1, 1), r"shape \(4, 4\), expected \(channels, z, y, x\)"),
        (np.zeros((1, 1, 4, 4)), (1, 1), "expected three numbers of mm"),
        (np.zeros((1, 1, 4, 4)), (1, 1, 0), "expected three numbers of mm"),
        (np.zeros((2, 1, 4, 4)), (1, 1, 1), "channels: found 2, expected 1"),
        (np.full((1, 1, 4, 4), np.nan), (1, 1, 1), "nan or infinite"),
    ):
        with pytest.raises(InputError, match=words):
            opened.predict(array, spacing)


def test_few_networks_stay_and_many_take_turns(two_folds, ensemble, monkeypatch):
    opened = load_run("tiny", runs=two_folds / "runs", fold="all")
    monkeypatch.setattr(opened, "_stays", False)
    array = np.asarray(Image.open(two_folds / "images" / "one.png"), np.float32)[None, None]
    assert np.array_equal(opened.predict(array, (1, 1, 1))[0], labels(ensemble)["one"])
    assert len(opened._loaded) == 1


def test_networks_that_are_built_alike_take_turns_in_the_same_memory(
    two_folds, ensemble, monkeypatch
):
    """Bit by bit what networks of their own say; one that differs is built anew."""
    array = np.asarray(Image.open(two_folds / "images" / "one.png"), np.float32)[None, None]
    opened = load_run("tiny", runs=two_folds / "runs", fold="all")
    expected = opened.predict(array, (1, 1, 1), probabilities=True)
    turns = load_run("tiny", runs=two_folds / "runs", fold="all")
    monkeypatch.setattr(turns, "_stays", False)
    built = []
    monkeypatch.setattr(
        turns, "network", lambda one: built.append(one.uid) or Model.network(turns, one)
    )
    found = turns.predict(array, (1, 1, 1), probabilities=True)
    assert all(map(np.array_equal, found, expected)) and len(built) == 1
    second = turns.networks[1]
    other = second.recipe.model_copy(
        update={"engine": second.recipe.engine.model_copy(update={"precision": "bf16"})}
    )
    turns.networks[1] = dataclasses.replace(second, recipe=other)
    turns.predict(array, (1, 1, 1))
    assert len(built) > 1


def test_few_networks_are_little_beside_one_image(two_folds):
    """What stays loaded of an ensemble may not double what one network takes."""
    opened = load_run("tiny", runs=two_folds / "runs", fold="all")
    large = [dataclasses.replace(one, size=2**24) for one in opened.networks]
    assert opened._stays and not Model(large)._stays


# torch 2.11 warns of its own reading of a .pt2 file
@pytest.mark.filterwarnings("ignore:The given buffer is not writable:UserWarning")
@pytest.mark.parametrize("kind", ["pt2", "onnx"])
def test_graphs_say_what_the_network_says(two_folds, tmp_path, kind):
    first, _ = runs_of(two_folds)
    out, said = tmp_path / "model", []
    listener = logging.Handler(logging.WARNING)
    listener.emit = lambda record: said.append(record.getMessage())
    registry = logging.getLogger("torch.onnx._internal.exporter._registration")
    registry.addHandler(listener)
    try:
        done = segfleet("export", "model", first, "--to", out, f"--{kind}")
    finally:
        registry.removeHandler(listener)
    assert not said, "of packages that are not installed"
    if kind == "onnx":
        pytest.importorskip("onnx")
        pytest.importorskip("onnxscript")
        onnxruntime = pytest.importorskip("onnxruntime")
    assert done.exit_code == 0, (done.output, done.exception)
    opened = load_run(first)
    network, batch = opened.network(opened.networks[0]), torch.randn(3, 1, 16, 16)
    with torch.no_grad():
        expected = network(batch)
    expected = expected[0] if isinstance(expected, list | tuple) else expected
    if kind == "pt2":
        found = torch.export.load(out / "model.pt2").module()(batch)
    else:
        session = onnxruntime.InferenceSession(
            str(out / "model.onnx"), providers=["CPUExecutionProvider"]
        )
        found = torch.from_numpy(session.run(None, {"image": batch.numpy()})[0])
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    assert load_run(out).made_by == opened.made_by


def repacked(model, to, change):
    """A copy of a model file with entries changed: {name: bytes} -> {name: bytes}."""
    with zipfile.ZipFile(model) as whole:
        content = change({name: whole.read(name) for name in whole.namelist()})
    with zipfile.ZipFile(to, "w", zipfile.ZIP_DEFLATED) as whole:
        for name, data in content.items():
            whole.writestr(name, data)
    return to


def weights_of(content):
    return next(name for name in content if name.endswith(".safetensors"))


def config_with(content, change):
    from segfleet.core.files import digest_of

    document = json.loads(content["config.json"])
    document.pop("sha256")
    change(document)
    document["sha256"] = digest_of(document)
    return {**content, "config.json": json.dumps(document).encode()}


def first_network(**facts):
    return lambda content: config_with(content, lambda d: d["networks"][0].update(facts))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda c: {**c, "../evil": b"x"}, r"entry '\.\./evil' leads out of it"),
        (lambda c: {**c, "/etc/evil": b"x"}, "leads out of it"),
        (lambda c: {**c, "a\\..\\evil": b"x"}, "leads out of it"),
        (lambda c: {**c, "bomb": bytes(10**7)}, "would grow from"),
        (lambda c: {**c, weights_of(c): c[weights_of(c)][:-1] + b"\0"},
         "does not match its sha256"),
        (lambda c: {**c, weights_of(c): c[weights_of(c)] + b"\0"}, r"bytes, expected \d+"),
        (lambda c: {k: v for k, v in c.items() if k != weights_of(c)}, "is there 0 times"),
        (lambda c: {k: v for k, v in c.items() if k != "config.json"}, "config.json is there 0"),
        (lambda c: {**c, "config.json": b"{}"}, "config.json is no document of a model"),
        (lambda c: {**c, "config.json": b"[1"}, "config.json is no document of a model"),
        (lambda c: {**c, "config.json": c["config.json"].replace(b"tiny", b"tina")}, "sha256"),
        (first_network(weights="../../etc/passwd"), "weights: found '../../etc/passwd'"),
        (first_network(uid="../x"), "uid: found"),
        (first_network(recipe={"name": 1}), "is not valid"),
        (first_network(data={"version": 2}), "config.json"),
        (lambda c: config_with(c, lambda d: d.update(version=9)), "has version 9, expected 1"),
        (lambda c: config_with(c, lambda d: d.update(networks=[])), "it holds no network"),
        (lambda c: config_with(c, lambda d: d.update(postprocessing=[1])), "config.json"),
        (
            lambda c: config_with(
                c, lambda d: d["networks"][0]["recipe"]["model"]["options"].update(width=6)
            ),
            "does not fit this network",
        ),
    ],
)  # fmt: skip
def test_a_model_that_cannot_be_trusted(model, two_folds, tmp_path, change, words):
    bad = repacked(model, tmp_path / "bad.segfleet", change)
    out = tmp_path / "out"
    done, _ = predict(two_folds, bad, two_folds / "images", out=out)
    if isinstance(done.exception, SystemExit):  # weights that do not fit show at the first image
        assert done.exit_code == 2
        assert words in done.stdout
        assert not list(out.glob("*.png"))
    else:
        assert isinstance(done.exception, InputError), done.exception
        assert __import__("re").search(words, str(done.exception)), done.exception
    assert not (tmp_path / "evil").exists()


def test_what_is_no_zip(two_folds, tmp_path):
    (tmp_path / "x.segfleet").write_bytes(b"PK\x03\x04 and then nothing")
    done, _ = predict(
        two_folds, tmp_path / "x.segfleet", two_folds / "images", out=tmp_path / "out"
    )
    assert "is no whole zip" in str(done.exception)


def test_runs_that_do_not_go_together(two_folds, tmp_path):
    first, second = runs_of(two_folds)
    other = tmp_path / second.name
    shutil.copytree(second, other)
    data = unstamped(json.loads((other / "data.json").read_text()))
    for change, words in (
        ({"labels": {"background": 0, "blob1": 1, "lesion": 2}}, "ensemble: labels: "),
        ({"channels": ["t1", "t2"]}, "ensemble: channels: "),
    ):
        changed = {**data, "dataset": {**data["dataset"], **change}}
        (other / "data.json").write_text(json.dumps(changed))
        done, _ = predict(two_folds, first, other, two_folds / "images", out=tmp_path / "out")
        assert words in str(done.exception) and isinstance(done.exception, InputError)
        assert not (tmp_path / "out").exists()


def test_words_that_cannot_be_meant(two_folds, model, tmp_path):
    first, _ = runs_of(two_folds)
    runs = ("--runs", two_folds / "runs")
    for words, message in (
        (("predict", first, "--out", tmp_path / "o"), "predict: found no image or folder among"),
        (("predict", "tiny", two_folds / "images", "--fold", "x", "--out", tmp_path / "o"),
         "--fold"),
        (("predict", "tiny", two_folds / "images", "--out", tmp_path / "o"), "fits 2 runs"),
        (("predict", "nobody", two_folds / "images", "--fold", "all", "--out", tmp_path / "o"),
         "found no run 'nobody'"),
        (("export", "modle", first, "--to", tmp_path / "m"), "Did you mean 'model'?"),
        (("export", "model", first), "--to is missing"),
        (("export", "model", first, "--to", model), "exists"),
        (("export", "hub", first, "--to", tmp_path / "h"), "--licence is missing"),
        (("export", "hub", first, "--to", tmp_path / "h.segfleet", "--licence", "mit"),
         "new folder"),
        (("export", "monai", first, "--to", tmp_path / "m.zip"), "expected a new folder"),
        (("export", "monai", first, "--to", tmp_path / "m", "--onnx"), "takes no --pt2 and no"),
        (("export", "ome-zarr", two_folds / "store"), "expected STORE CASE"),
        (("export", "ome-zarr", two_folds / "store", "nobody", "--to", tmp_path / "z"), "'nobody'"),
    ):  # fmt: skip
        done = segfleet(*words, *runs)
        assert isinstance(done.exception, InputError), (words, done.exception, done.output)
        assert message in str(done.exception)
    assert not list(tmp_path.iterdir())


def test_an_unfinished_run_is_no_model(two_folds, tmp_path):
    first, _ = runs_of(two_folds)
    run = tmp_path / "runs" / first.name
    shutil.copytree(first, run)
    (run / "done.json").unlink()
    done = segfleet("export", "model", run, "--to", tmp_path / "m.segfleet")
    assert "is not finished; train it first" in str(done.exception)
    assert not (tmp_path / "m.segfleet").exists()


def test_the_hub_gets_a_card_and_safetensors(two_folds, tmp_path):
    first, _ = runs_of(two_folds)
    done = segfleet("export", "hub", first, "--to", tmp_path / "hub", "--licence", "apache-2.0")
    assert done.exit_code == 0, done.exception
    assert sorted(path.name for path in (tmp_path / "hub").iterdir()) == [
        "README.md", "config.json", "model.safetensors"
    ]  # fmt: skip
    import yaml

    front = yaml.safe_load((tmp_path / "hub" / "README.md").read_text().split("---")[1])
    assert front["license"] == "apache-2.0" and front["library_name"] == "segfleet"
    assert (
        len(
            predict(two_folds, tmp_path / "hub", two_folds / "images", out=tmp_path / "o")[1][
                "done"
            ]
        )
        == 2
    )


@pytest.fixture(scope="module")
def bundle(two_folds, tmp_path_factory):
    path = tmp_path_factory.mktemp("bundle") / "blobs"
    done = segfleet(
        "export", "monai", "tiny", "--fold", "all", "--to", path, "--runs", two_folds / "runs",
        "--use", "Blobs in noise.",
    )  # fmt: skip
    assert done.exit_code == 0, (done.output, done.exception)
    return path


def test_the_card_says_whose_data_and_weights_are_in_it(two_folds, tiny_store):
    """A licence counts wherever it came in: of the stores of earlier stages, and of weights that
    somebody else trained. No path of them is said."""
    from segfleet.pipeline.exporting.card import model_card
    from segfleet.pipeline.recipe import parse

    one = load_run("tiny", runs=two_folds / "runs", fold=0).networks[0]
    other, gone = tiny_store(dims=2, classes=1), "/secret/gone"
    document = one.recipe.model_dump(mode="json")
    stages = [
        {"name": "first", "data": {"stores": [str(other), gone]},
         "model": {"weights": "/secret/w.pt", "weights_sha256": "ab12"}},
        {"name": "second"},
        {"name": "third"},
    ]  # fmt: skip
    document["stages"] = [{"epochs": 1, "lr": 1e-3, **stage} for stage in stages]
    card = model_card(Model([dataclasses.replace(one, recipe=parse(document))]))
    store = load_manifest(other)
    assert f"Earlier stage `first`: Data set: {store.dataset.name}" in card and store.id in card
    assert "Earlier stage `first`: a data set whose store is not there any more" in card
    assert "Began with the weights of `w.pt`, sha256 `ab12`" in card
    assert "`second`" not in card and "secret" not in card and str(other.parent) not in card


def test_a_bundle_of_monai_says_what_goes_in_and_out(two_folds, bundle):
    """Without MONAI: its files are all there, hold no path, and describe what the network does."""
    names = sorted(str(p.relative_to(bundle)) for p in bundle.rglob("*") if p.is_file())
    assert names == [
        "configs/inference.json", "configs/metadata.json", "docs/README.md",
        "models/model.segfleet",
    ]  # fmt: skip
    meta = json.loads((bundle / "configs/metadata.json").read_text())
    image, found = meta["network_data_format"]["inputs"]["image"], load_run(bundle / names[-1])
    output = found.network(found.networks[0])(
        torch.zeros(2, image["num_channels"], *image["spatial_shape"])
    )
    pred = meta["network_data_format"]["outputs"]["pred"]
    assert output.shape == (2, pred["num_channels"], *pred["spatial_shape"])
    assert pred["channel_def"] == {"0": "background", "1": "blob1", "2": "blob2"}
    assert meta["intended_use"] == "Blobs in noise." and "2 network(s)" in meta["description"]
    configs = (bundle / "configs/inference.json").read_text()
    assert str(bundle.parent) not in configs and str(two_folds) not in configs


# MONAI warns of every configuration, since it is code
@pytest.mark.filterwarnings("ignore:parsing config_file:UserWarning")
def test_monai_verifies_and_runs_its_bundle(two_folds, bundle, ensemble, tmp_path):
    """MONAI's own checks and `run`: the predictions are those of `segfleet predict`."""
    bundles = pytest.importorskip("monai.bundle")
    root, configs = str(bundle), bundle / "configs"
    meta = bundles.ConfigParser.load_config_file(configs / "metadata.json")
    needed = "version monai_version pytorch_version numpy_version required_packages_version task"
    assert {*needed.split(), "schema", "description", "authors", "copyright"} <= {*meta}
    bundles.verify_net_in_out(
        "network_def", str(configs / "metadata.json"), str(configs / "inference.json"),
        device="cpu", bundle_root=root,
    )  # fmt: skip
    bundles.run(
        run_id="run", meta_file=str(configs / "metadata.json"),
        config_file=str(configs / "inference.json"), bundle_root=root,
        images=[str(two_folds / "images")], output_dir=str(tmp_path / "out"), device="cpu",
    )  # fmt: skip
    found = labels(tmp_path / "out")
    assert found.keys() == {"one", "two"}
    assert all(np.array_equal(found[name], label) for name, label in labels(ensemble).items())


def test_predictions_are_described_for_nnunet(two_folds, ensemble):
    own = json.loads((ensemble / "dataset.json").read_text())
    assert own["labels"] == {"background": 0, "blob1": 1, "blob2": 2}
    assert own["file_ending"] == ".png" and own["channel_names"] == {"0": "a"}
    (ensemble / "dataset.json").unlink()
    done = segfleet("export", "nnunet", runs_of(two_folds)[0], ensemble)
    assert done.exit_code == 0, done.exception
    assert json.loads((ensemble / "dataset.json").read_text()) == {**own, "numTraining": 2}


@pytest.mark.parametrize("dims", [2, 3])
def test_a_case_as_ome_zarr(tiny_store, tmp_path, dims):
    """Read back by the models of the published schema."""
    ome_zarr_models = pytest.importorskip("ome_zarr_models")
    import zarr
    from ome_zarr_models.v05 import Image as OmeImage

    assert ome_zarr_models.__version__
    store = tiny_store(dims=dims)
    out = tmp_path / "case.zarr"
    done = segfleet("export", "ome-zarr", store, "case01", "--to", out)
    assert done.exit_code == 0, (done.output, done.exception)
    group = zarr.open_group(out, mode="r")
    image = OmeImage.from_zarr(group)
    (scales,) = [one.datasets for one in image.ome_attributes.multiscales]
    assert [axis.unit for axis in image.ome_attributes.multiscales[0].axes] == [
        None, *["millimeter"] * 3
    ]  # fmt: skip
    assert scales[0].coordinateTransformations[0].scale == [1.0, 1.0, 1.0, 1.0]
    opened = open_store(store)
    case = opened.manifest.case("case01")
    assert np.array_equal(group["0"][...], opened.image(case))
    label = group["labels/segmentation"]
    assert np.array_equal(label["0"][...], opened.label(case))
    assert label.attrs["ome"]["image-label"]["properties"][0] == {"label-value": 1, "name": "blob1"}
    OmeImage.from_zarr(label)


def test_the_best_recipe_or_pair(two_folds, tmp_path, monkeypatch):
    """Two recipes, one of them the ensemble of the other with itself turned: by hand, the pair's
    entries are the scores of the mean of both networks' probabilities."""
    from segfleet.pipeline.jobs import run_job
    from segfleet.pipeline.ranks import Ranks
    from segfleet.pipeline.recipe import load_recipe
    from segfleet.pipeline.scoring.evaluate import truth_of
    from segfleet.pipeline.scoring.folds import every_fold
    from segfleet.pipeline.trained import best
    from segfleet.preprocess.stores.manifest import load_manifest

    shutil.copytree(two_folds / "runs", tmp_path / "runs")
    recipe = load_recipe(str(two_folds / "tiny.yaml"), ["name=other", "seed=5"])
    for one in every_fold(recipe, load_manifest(two_folds / "store")):
        job = Train(recipe=one.model_dump(mode="json"), root=tmp_path / "runs")
        run_job(
            job,
            Ranks(torch.device("cpu")),
            __import__("types").SimpleNamespace(
                asked=lambda: False, obeyed=lambda: None, watch=None, deadline=None
            ),
        )
    words = ("best", "tiny", "other", "--runs", tmp_path / "runs")
    plain = segfleet(*words, "--device", "cpu")
    assert "\\n" not in plain.output and "\n6 cases, each by networks" in plain.output
    nowhere = segfleet(*words, "--device", "cuda:99")
    assert "device: found 'cuda:99'" in str(nowhere.exception)
    done = segfleet(*words, "--json")
    assert done.exit_code == 0, (done.output, done.exception)
    document = json.loads(done.stdout)
    assert document["cases"] == 6 and "optimistic" in document["warning"]
    scores = [row["mean_foreground_dice"] for row in document["candidates"]]
    assert scores == sorted(scores, reverse=True) and len(scores) == 3
    singles = {
        row["recipes"][0]: row["mean_foreground_dice"]
        for row in document["candidates"]
        if len(row["recipes"]) == 1
    }
    for path in (tmp_path / "runs" / "folds").glob("*/evaluation.json"):
        name = json.loads((path.parent / "recipe.json").read_text())["name"]
        together = json.loads(path.read_text())["summary"]["mean_foreground_dice"]
        assert singles[name] == pytest.approx(together)
    # one case of the pair by hand
    (kept,) = (tmp_path / "runs" / "folds").glob("*/ensemble.json")
    case, store = "case01", open_store(two_folds / "store")
    own = [
        run
        for run in run_folders(tmp_path / "runs")
        if case in {c["id"] for c in json.loads((run / "evaluation.json").read_text())["cases"]}
    ]
    assert len(own) == 2
    entry, model = store.manifest.case(case), load_run(own)
    maps = best.predictions(
        model,
        [c for c in best.cases_of(model.networks) if c.id == case],
        lambda one, label, truth: {"label": label},
        Ranks(),
    )
    truth = truth_of(store, entry)
    for value, name in ((1, "blob1"), (2, "blob2")):
        a, b = maps[0]["label"] == value, truth == value
        expected = 2 * (a & b).sum() / (a.sum() + b.sum())
        found = json.loads(kept.read_text())["cases"][case]["scores"][name]["dice"]
        assert found == pytest.approx(expected)
    monkeypatch.setattr(best, "predictions", None)  # what is known is not predicted again
    assert json.loads(segfleet(*words, "--json").stdout) == document
    alone = segfleet("best", "tiny", "tiny", "--runs", tmp_path / "runs")
    assert "expected two or more to choose from" in str(alone.exception)
    # the same as a sweep's outcome: two points, then one of them only
    recipes = {
        run: json.loads((run / "recipe.json").read_text()) for run in run_folders(tmp_path / "runs")
    }
    points = [
        {"runs": [{"run": str(run), "seed": found["seed"], "fold": found["data"]["fold"]}
                  for run, found in recipes.items() if found["name"] == name]}
        for name in ("tiny", "other")
    ]  # fmt: skip
    outcome = tmp_path / "runs" / "sweeps" / "both" / "outcome.json"
    outcome.parent.mkdir(parents=True)
    outcome.write_text(json.dumps({"ranking": points}))
    for sweep in ("both", outcome.parent, outcome):
        told = segfleet("best", sweep, "--runs", tmp_path / "runs", "--json")
        assert json.loads(told.stdout) == document, (told.output, told.exception)
    few = segfleet("best", "both", "--top", 1, "--runs", tmp_path / "runs")
    assert "expected two or more to choose from" in str(few.exception)
    outcome.write_text(json.dumps({"ranking": []}))
    none = segfleet("best", "both", "--runs", tmp_path / "runs")
    assert "ranks no point" in str(none.exception)


def test_no_stage_of_a_model_file_says_where_it_was_trained():
    from segfleet.pipeline.recipe import parse
    from segfleet.pipeline.trained.modelfile import portable

    stages = [
        {"epochs": 1, "lr": 1e-3, "data": {"store": "/secret/first"},
         "model": {"weights": "/secret/w.pt"}},
        {"epochs": 1, "lr": 1e-3,
         "data": {"stores": ["/secret/third", {"store": "/secret/fourth", "weight": 2}]}},
        {"epochs": 1, "lr": 1e-3},
    ]  # fmt: skip
    recipe = parse(
        {
            "name": "r",
            "data": {"store": "/secret/second"},
            "model": {"name": "unext"},
            "stages": stages,
        }
    )
    document = portable(recipe)
    assert "secret" not in json.dumps(document)
    parse(document)  # it can be read
