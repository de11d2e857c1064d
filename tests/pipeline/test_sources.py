"""A stage's identity takes in the code that computes it."""

from __future__ import annotations

import copy
import json
import runpy
import shutil
import sys

import pytest

from segfleet.pipeline import identity, run, sources
from segfleet.pipeline import recipe as recipes
from segfleet.pipeline.reports import status
from segfleet.preprocess.stores.manifest import load_manifest

MINE = '''"""My network."""
from segfleet.models.norm import norm  # a comment


def build(width):
    """A docstring."""
    return norm(width, f"{width:>3}", -1.5)
'''


@pytest.fixture(scope="module")
def table():
    """What is shipped is what is here, in this module."""
    return sources.table()


@pytest.fixture
def code(table, tmp_path, monkeypatch):
    """A copy of the package whose files may be edited: `code(file, old, new)`; the file alone:
    write `new`."""
    for folder in (sources.NETWORKS, "pipeline"):
        shutil.copytree(sources.HOME / folder, tmp_path / folder)
    table = copy.deepcopy(table)
    monkeypatch.setattr(sources, "shipped", lambda: table)
    monkeypatch.setattr(sources, "HOME", tmp_path)

    def edit(file, old, new):
        path = tmp_path / file
        text = path.read_text() if path.exists() else ""
        assert old in text
        path.write_text(text.replace(old, new, 1))
        sources.changed_sources.cache_clear()

    sources.changed_sources.cache_clear()
    yield edit
    sources.changed_sources.cache_clear()


def test_the_table_is_of_this_code_and_of_its_numerics(table):
    known = sources.shipped()
    changed = [
        name
        for name in {**known["files"], **table["files"]}
        if known["files"].get(name) != table["files"].get(name)
    ]
    assert (changed, known["numerics"], known["networks"]) == (
        [],
        table["numerics"],
        table["networks"],
    ), (
        "code that computes results has changed: raise NUMERICS in pipeline/sources.py if any "
        "recipe now computes something else, and run `make sources`; `make sources SAME=1` if "
        "none does"
    )


def test_what_is_shipped_counts_by_its_version_alone(code):
    for network in ("unext", "vm_unet", "e2mi_seg_acdc"):
        assert sources.changed_sources(network, "auto") == {}


@pytest.mark.parametrize(
    ("file", "old", "new", "counts"),
    [
        ("models/unext.py", "from __future__", "# comment\nfrom __future__", False),
        ("models/unext.py", "import torch\n", "import torch\n\n\n\n", False),
        ("models/unext.py", "import torch\n", "import torch\nx = 1\n", True),
        ("models/norm.py", "from __future__", "x = 1\nfrom __future__", True),
        ("models/vm_unet.py", "import torch\n", "import torch\nx = 1\n", False),
        ("pipeline/losses/dice_ce.py", "import torch\n", "import torch\nx = 1\n", True),
        ("pipeline/losses/soft_dice.py", "import torch\n", "import torch\nx = 1\n", True),
        ("pipeline/losses/ss.py", "import torch\n", "import torch\nx = 1\n", False),
        ("pipeline/data/augment.py", "from __future__", "x = 1\nfrom __future__", True),
        ("pipeline/data/intensity.py", "from __future__", "x = 1\nfrom __future__", True),
        ("pipeline/data/kernels.cpp", "// ", "// so ", False),
        ("pipeline/data/kernels.cpp", "return ", "return 0 + ", True),
        ("pipeline/reports/report.py", "import base64\n", "import base64\nx = 1\n", False),
    ],
)
def test_an_edited_file_counts_where_it_computes(code, file, old, new, counts):
    code("models/unext.py", "import torch\n", "import torch\nfrom segfleet.models import norm\n")
    sources.shipped()["files"]["models/unext.py"] = sources.source_hash(
        sources.HOME / "models/unext.py"
    )
    code(file, old, new)
    assert sources.changed_sources("unext", "dice_ce") == (
        {file: sources.source_hash(sources.HOME / file)} if counts else {}
    )


def test_only_what_is_imported_of_ours_counts(tmp_path):
    file = tmp_path / "x.py"
    file.write_text("import other.core.files\nimport torch.nn\nimport segfleet.core.lock\n")
    assert sources.imports(file) == ["core/lock.py"]


def test_make_sources_refuses_what_may_compute_something_else(tmp_path, monkeypatch, capsys):
    """A changed file is named, and taken over only by whoever says that results are the same."""
    right, name = sources.TABLE.read_text(), "pipeline/data/sampler.py"
    document = json.loads(right)
    document["files"][name] = "0" * 16
    table = tmp_path / "sources.json"
    table.write_text(json.dumps(document))
    made = sources.table()
    monkeypatch.setattr(sources, "table", lambda: made)
    monkeypatch.setattr(sources, "TABLE", table)
    monkeypatch.setattr(sources, "shipped", sources.shipped.__wrapped__)
    monkeypatch.setattr(sys, "argv", ["sources"])
    assert sources.main() == 1 and json.loads(table.read_text()) == document
    said = capsys.readouterr().err
    assert name in said and "pipeline/data/randomness.py" not in said
    monkeypatch.setattr(sys, "argv", ["sources", "--same-results"])
    assert sources.main() == 0 and table.read_text() == right
    table.write_text(json.dumps({**document, "numerics": sources.NUMERICS - 1}))
    monkeypatch.setattr(sys, "argv", ["sources"])
    assert sources.main() == 0 and table.read_text() == right, "another version says so itself"


def test_make_sources_writes_the_table(monkeypatch):
    """The file as a command."""
    written = {}
    monkeypatch.setattr("segfleet.core.files.write_atomically", written.__setitem__)
    monkeypatch.setattr(sys, "argv", ["sources"])
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(sources.__file__, run_name="__main__")
    assert not ended.value.code and written == {sources.TABLE: sources.TABLE.read_text()}


def test_a_network_of_the_user_counts_by_its_source(code):
    """Found by its name; one whose name is put together, by all files that are not shipped."""
    code("models/mine.py", "", MINE + "NAME = 'my_net'\n")
    first = sources.changed_sources("my_net", "auto")
    assert list(first) == ["models/mine.py"]
    code("models/other.py", "", "NAME = 'other_net'\n")
    assert sources.changed_sources("my_net", "auto") == first
    assert list(sources.changed_sources("put_together", "auto")) == [
        "models/mine.py",
        "models/other.py",
    ]
    code("models/mine.py", "  # a comment", "")
    code("models/mine.py", "A docstring", "Another one")
    code("models/mine.py", "width, f", "width,\n        f")
    assert sources.changed_sources("my_net", "auto") == first
    code("models/mine.py", "-1.5", "-1.25")
    assert sources.changed_sources("my_net", "auto") != first


def test_why_a_run_is_new_is_said(code, tiny_store, tmp_path):
    def make(lr=1e-3, name="mine", patch=(16, 16), stages=1):
        document = {
            "name": name,
            "data": {"store": str(tiny_store(dims=2)), "patch": list(patch)},
            "model": {"name": "unext"},
            "stages": [{"epochs": 1, "lr": lr}, {"epochs": 2, "lr": 1.0}][:stages],
        }
        return recipes.parse(document)

    manifest = load_manifest(tiny_store(dims=2))

    def standing(recipe, root="runs"):
        return status.standing(
            recipe, manifest, run.stage_folders(tmp_path / root, recipe, manifest)
        )

    recipe = make()
    assert standing(recipe) == "a new run, beginning with stage 1 of 1"
    (folder,) = run.stage_folders(tmp_path / "runs", recipe, manifest)
    folder.path.mkdir(parents=True)
    identity.note_identity(folder.path, recipe, manifest, folder.index)
    assert standing(recipe) == "going on with stage 1 of 1"
    # it goes on from what was saved, however far it had come
    steps = "".join(json.dumps({"event": "step", "step": step}) + "\n" for step in (10, 20))
    (folder.path / "events.jsonl").write_text(steps)
    assert standing(recipe) == "going on with stage 1 of 1"
    (folder.checkpoints / "step-00000010").mkdir(parents=True)
    assert standing(recipe) == "going on with stage 1 of 1 after step 10"
    uid = folder.path.name
    assert standing(make(lr=2e-3)) == (
        f"stage 1 of 1 is new: it differs from {uid} in stages.0.lr (0.002, there 0.001)"
    )
    assert standing(make(lr=2e-3, name="other")).startswith("a new run")
    code("models/unext.py", "import torch\n", "import torch\nx = 1\n")
    assert standing(recipe) == (
        f"stage 1 of 1 is new: it differs from {uid} in the code of models/unext.py"
    )
    code("models/unext.py", "import torch\nx = 1\n", "import torch\n")
    folder.finish("step-00000001")
    assert standing(recipe).startswith("training was finished on 20")
    assert standing(make(stages=2)) == "beginning stage 2 of 2"
