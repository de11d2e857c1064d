"""Networks, losses and layouts of one's own, in a folder laid out as segfleet is."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import yaml
from PIL import Image

NETWORK = '''
"""A network of the lab."""
from torch import nn

from segfleet.models.registry import register


@register(
    name="my_net", dims=(2,), in_channels=3, num_classes=1, paper_input=(32, 32), parameters=28
)
def my_net(in_channels, num_classes):
    return nn.Conv2d(in_channels, num_classes, 3, padding=1)
'''
LOSS = """
import os

from segfleet.pipeline.losses.bce_dice import Loss as Ours


class Loss(Ours):
    def forward(self, logits, target, valid):
        os.write(1, b"what a library in C++ prints\\n")  # must not end in the JSON of the command
        return 2 * super().forward(logits, target, valid)
"""
LAYOUT = """
from segfleet.preprocess.readers import folder


class Reader(folder.Reader):
    about = "Pictures as our scanner leaves them."
"""


@pytest.fixture
def lab(tmp_path):
    """A plugin's folder with a network, a loss and a layout."""
    for place, text in (
        ("models/my_net.py", NETWORK),
        ("pipeline/losses/my_loss.py", LOSS),
        ("preprocess/readers/my_layout.py", LAYOUT),
    ):
        (tmp_path / "lab" / place).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "lab" / place).write_text(text)
    return tmp_path / "lab"


def segfleet(folder: Path, *words, code: int = 0) -> dict:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "SEGFLEET_DEVICE": "cpu"}
    environment.pop("SEGFLEET_PLUGINS", None)
    done = subprocess.run(
        [sys.executable, "-P", "-m", "segfleet.cli.main", *map(str, words), "--json"],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == code, done.stderr
    return json.loads(done.stdout)


def test_a_run_with_a_network_and_a_loss_of_the_lab(lab, tiny_store, tmp_path):
    recipe = {
        "name": "mine",
        "data": {"store": str(tiny_store(dims=2)), "batch": 2, "patch": [16, 16], "workers": 0},
        "model": {"name": "my_net", "head": "sigmoid"},
        "loss": {"name": "my_loss"},
        "stages": [{"epochs": 1, "steps": 2, "lr": 1e-2}],
    }
    (tmp_path / "mine.yaml").write_text(yaml.safe_dump(recipe))
    error = segfleet(tmp_path, "train", "mine.yaml", code=2)["error"]
    assert "found 'my_net'" in error and "--plugin FOLDER" in error
    first = segfleet(tmp_path, "train", "mine.yaml", "--plugin", lab)
    again = segfleet(tmp_path, f"--plugin={lab}", "train", "mine.yaml")
    assert again["run"] == first["run"]
    # what it says is part of the identity, comments are not
    source = lab / "models/my_net.py"
    source.write_text("# seen by our chief\n" + source.read_text())
    assert segfleet(tmp_path, "train", "mine.yaml", "--plugin", lab)["run"] == first["run"]
    loss = lab / "pipeline/losses/my_loss.py"
    loss.write_text(loss.read_text().replace("2 * super", "3 * super"))
    assert segfleet(tmp_path, "train", "mine.yaml", "--plugin", lab)["run"] != first["run"]


def test_a_layout_of_the_lab_is_read_by_several_processes(lab, tmp_path):
    draw = np.random.default_rng(0)
    for place in ("images", "masks"):
        (tmp_path / "raw" / place).mkdir(parents=True)
    for number in range(4):
        mask = np.zeros((40, 40), np.uint8)
        mask[10:20, 5 + number : 30] = 255
        picture = draw.integers(0, 99, (40, 40, 3)).astype(np.uint8) + mask[..., None] // 2
        Image.fromarray(picture).save(tmp_path / f"raw/images/{number}.png")
        Image.fromarray(mask).save(tmp_path / f"raw/masks/{number}.png")
    words = ("preprocess", "my_layout", "--raw", "raw", "--out", "store", "--workers", 2)
    made = segfleet(tmp_path, *words, "--plugin", lab)
    assert made["cases"] == 4
    named = segfleet(tmp_path, "datasets", "--plugin", lab)
    assert "Pictures as our scanner leaves them." in json.dumps(named)


def test_what_plugins_add_is_frozen_with_the_code_and_needs_them_no_more(lab, tmp_path):
    program = """
import sys
from pathlib import Path
from segfleet.core import plugins
from segfleet.slurm import snapshot
plain = snapshot.digest()
plugins.add(sys.argv[1])
folder = snapshot.freeze_code(Path(sys.argv[2]))
assert folder.name == snapshot.digest() != plain
print(folder)
"""
    words = [sys.executable, "-P", "-c", program, lab, tmp_path / "runs"]
    code = subprocess.run(words, capture_output=True, text=True, check=True).stdout.strip()
    look = """
import os, sys
from segfleet.models.registry import specs
from segfleet.pipeline.losses.base import losses
from segfleet.pipeline.sources import changed_sources
from segfleet.slurm import snapshot
assert specs()["my_net"].build(3, 1).weight.shape == (1, 3, 3, 3) and "my_loss" in losses()
print(sorted(changed_sources("my_net", "my_loss")), snapshot.digest())
"""
    said = []
    for more in ({}, {"SEGFLEET_PLUGINS": str(lab)}):
        done = subprocess.run(
            [sys.executable, "-P", "-c", look],
            env={**os.environ, "PYTHONPATH": code, **more},
            capture_output=True,
            text=True,
            check=True,
        )
        said.append(done.stdout)
    expected = ["models/my_net.py", "pipeline/losses/my_loss.py"]
    assert said == [f"{expected} {Path(code).name}\n"] * 2


@pytest.mark.parametrize(
    ("place", "message"),
    [
        ("nothing.txt", "holds no Python file in models, pipeline/losses, preprocess/readers"),
        ("models/unext.py", "unext.py is named as one of segfleet; rename it"),
    ],
)
def test_a_folder_that_cannot_be_used(tmp_path, place, message):
    (tmp_path / "lab" / place).parent.mkdir(parents=True)
    (tmp_path / "lab" / place).touch()
    assert message in segfleet(tmp_path, "models", "--plugin", tmp_path / "lab", code=2)["error"]


def test_a_broken_file_of_a_plugin_is_one_sentence(lab, tmp_path):
    (lab / "models/my_net.py").write_text("def half(:\n")
    error = segfleet(tmp_path, "models", "my_net", "--plugin", lab, code=2)["error"]
    assert "models/my_net cannot be used: SyntaxError" in error and "Traceback" not in error


def test_an_installed_package_offers_its_parts(lab, tmp_path):
    """By an entry point, as its metadata says after `pip install`."""
    (tmp_path / "site").mkdir()
    lab.rename(tmp_path / "site" / "our_lab")
    facts = tmp_path / "site" / "our_lab-1.0.dist-info"
    facts.mkdir()
    (facts / "METADATA").write_text("Metadata-Version: 2.1\nName: our-lab\nVersion: 1.0\n")
    (facts / "entry_points.txt").write_text("[segfleet.plugins]\nours = our_lab\n")
    done = subprocess.run(
        [sys.executable, "-P", "-m", "segfleet.cli.main", "models", "my_net", "--json"],
        env={**os.environ, "PYTHONPATH": str(tmp_path / "site")},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["parameters"] == 28
