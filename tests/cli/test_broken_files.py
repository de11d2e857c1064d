"""Somebody's half-written network, loss or layout: commands that do not need it work, the others
say so in one sentence."""

from __future__ import annotations

import subprocess
import sys

import pytest

BROKEN = {
    "syntax.py": "def broken(:\n",
    "imports.py": "import no_such_package\n",
    "twice.py": """
from segfleet.models.registry import spec, register
facts = dict(dims=(2,), in_channels=1, num_classes=2, paper_input=(32, 32), parameters=1)
@register(name="half_written", **facts)
def half(in_channels, num_classes): ...
@register(name="half_written", **facts)
def again(in_channels, num_classes): ...
""",
}


@pytest.fixture
def segfleet(tmp_path):
    """`segfleet(package, *words)`: the command line where files of `BROKEN` lie in that package.
    What the networks cost is not counted: it takes seconds, and others test it."""
    for name, text in BROKEN.items():
        (tmp_path / name).write_text(text)

    def run(package, *words):
        code = (
            "# A fork will do.\n"
            f"import sys, {package} as p; p.__path__.append({str(tmp_path)!r}); "
            "from types import SimpleNamespace as S; from segfleet.models import profile as c; "
            "c.profile = lambda spec, batch=1: S(macs=0, peak_bytes=0, stages={}); "
            f"from segfleet.cli import main; sys.argv = ['segfleet', *{words!r}]; main.main()"
        )
        return subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, timeout=100
        )

    return run


def test_other_networks_work_without_a_broken_file(segfleet):
    done = segfleet("segfleet.models", "models", "unext")
    assert done.returncode == 0 and done.stderr == ""
    done = segfleet("segfleet.models", "models")
    assert done.returncode == 0 and "unext" in done.stdout and "half_written" not in done.stdout
    first, second, third = done.stderr.splitlines()
    assert "models/imports cannot be used: ModuleNotFoundError: No module named" in first
    assert "models/syntax cannot be used: SyntaxError:" in second and "syntax.py, line 1)" in second
    assert "models/twice cannot be used: AssertionError: two networks are called" in third


def test_a_network_of_a_broken_file_is_missed_in_one_sentence(segfleet):
    done = segfleet("segfleet.models", "models", "half_written")
    assert done.returncode == 2 and done.stderr.count("\n") == 1
    assert "found 'half_written', expected one of: asc_seg" in done.stderr
    assert "; models/syntax cannot be used: SyntaxError" in done.stderr


def test_a_broken_layout_or_loss_is_named_when_it_is_asked_for(segfleet, tmp_path):
    done = segfleet("segfleet.preprocess.readers", "datasets")
    assert done.returncode == 0 and "dsb2018" in done.stdout and "'syntax'" in done.stderr
    done = segfleet("segfleet.preprocess.readers", "datasets", "syntax")
    assert done.returncode == 2 and "the layout 'syntax' cannot be used: Syntax" in done.stderr
    code = "from segfleet.pipeline.losses.base import build_loss as b; b('{}', head='softmax')"
    loss = "import sys, segfleet.pipeline.losses as p; p.__path__.append(sys.argv[1]); " + code
    loss = "# A fork will do.\n" + loss
    for name, words in (("imports", "ModuleNotFoundError"), ("syntax", "SyntaxError")):
        command = [sys.executable, "-c", loss.format(name), str(tmp_path)]
        done = subprocess.run(command, capture_output=True, text=True, timeout=100)
        assert f"InputError: the loss '{name}' cannot be used: {words}" in done.stderr
