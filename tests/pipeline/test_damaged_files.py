"""One damaged file of a run is named and left out or healed; it never stops what does not need
it."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import Mock

import pytest

from segfleet.cli.best import best_points
from segfleet.core.errors import InputError
from segfleet.core.files import digest_of, read_json, write_json
from segfleet.models.registry import ModelError, build_model
from segfleet.pipeline import checkpoint, events
from segfleet.pipeline.recipe import load_recipe
from segfleet.pipeline.reports import status
from segfleet.pipeline.reports.status import score
from segfleet.pipeline.run import DONE, StageFolder, find_run, open_run, stage_folders
from segfleet.pipeline.scoring import scored
from segfleet.pipeline.scoring.evaluate import CaseJournal
from segfleet.pipeline.scoring.score import Scorer
from segfleet.preprocess.files.names import write_names
from segfleet.slurm.submission import read_job, submissions
from segfleet.sweeps.space.plan import POINTS, Plan, read_points

DAMAGE = {
    "empty": lambda data: b"",
    "cut": lambda data: data[: len(data) // 2],
    "zeros": lambda data: bytes(len(data)),
    "binary": lambda data: data[:3] + b"\xff\xfe" + data[5:],
    "list": lambda data: b"[1, 2]",
    "deep": lambda data: b"[" * 100_000,
}


@pytest.mark.parametrize("how", DAMAGE)
def test_a_damaged_document_is_named_and_counts_as_none(tmp_path, capsys, how):
    path = tmp_path / "done.json"
    assert read_json(path) is None and capsys.readouterr().err == ""
    path.write_text('{"checkpoint": "step-00000004"}')
    assert read_json(path) == {"checkpoint": "step-00000004"}
    path.write_bytes(DAMAGE[how](path.read_bytes()))
    assert read_json(path) is None
    assert capsys.readouterr().err == f"segfleet: {path} is damaged and is left out\n"


@pytest.mark.parametrize("how", DAMAGE)
def test_damage_is_one_sentence_wherever_a_document_cannot_be_missed(tmp_path, how):
    state = tmp_path / "state.json"
    state.write_text('{"step": 4, "recipe": {}}')
    assert checkpoint.read(tmp_path).step == 4
    job = tmp_path / "job.json"
    job.write_text('{"do": "score", "run": "a"}')
    for path, read in ((state, checkpoint.read), (job, read_job)):
        path.write_bytes(DAMAGE[how](path.read_bytes()))
        with pytest.raises(InputError, match=path.name):
            read(tmp_path)
        path.unlink()
        with pytest.raises(InputError, match=path.name):
            read(tmp_path)


@pytest.mark.parametrize("state", [{"step": 4}, {"step": 4, "recipe": []}, {"recipe": {}}])
def test_a_checkpoint_that_does_not_say_what_it_is_of_is_one_sentence(tmp_path, state):
    recipe = load_recipe("phantom2d", ["evaluation.weights=best"])
    folder = SimpleNamespace(checkpoints=tmp_path, done=lambda: {"best": {"dice": {"step": 4}}})
    (tmp_path / "step").mkdir()
    (tmp_path / "step" / "state.json").write_text(json.dumps(state))
    scorer = Scorer(recipe=recipe, store=None, ranks=None, stop=None)
    with pytest.raises(InputError, match="state.json"):
        scorer._selected(folder, "step")


@pytest.mark.parametrize("how", DAMAGE)
def test_names_of_labels_are_written_anew(tmp_path, how):
    write_names(tmp_path, {"background": 0, "spleen": 1})
    right = {path: path.read_bytes() for path in tmp_path.iterdir()}
    for path, data in right.items():
        path.write_bytes(DAMAGE[how](data))
    write_names(tmp_path, {"background": 0, "spleen": 1})
    assert {path: path.read_bytes() for path in tmp_path.iterdir()} == right


def test_damaged_points_of_a_sweep_are_left_out(tmp_path, capsys):
    path, axes = tmp_path / POINTS, {"lr"}
    assert read_points(tmp_path, axes) == []
    good = [{"lr": 0.1}, {"lr": 0.2}, {"point": {"lr": 3}, "misfit": "why"}]
    lines = [json.dumps(point) for point in good]
    path.write_text("\n".join(lines) + "\n" + '{"lr": 0.')  # as one that is killed leaves it
    assert read_points(tmp_path, axes) == good and capsys.readouterr().err == ""
    with open(path, "a") as file:  # as the next one goes on
        file.write("\n" + lines[0] + "\n")
    assert read_points(tmp_path, axes) == [*good, good[0]]
    assert capsys.readouterr().err == f"segfleet: {path}, line 4 is damaged and is left out\n"
    for how, wrong in DAMAGE.items():
        path.write_bytes(wrong(lines[1].encode()) + b"\n" + lines[0].encode() + b"\n")
        assert read_points(tmp_path, axes) == good[:1], how
    path.write_text('{"lt": 0.1}\n')
    assert read_points(tmp_path, axes) == []
    refuses = Mock(side_effect=InputError("why"))
    plan = SimpleNamespace(folder=tmp_path, trials_at=refuses, misfits=[], suggested=0)
    path.write_text('{"lr": 0.')
    Plan.grow(plan, {"lr": 3})
    assert read_points(tmp_path, axes) == [{"point": {"lr": 3}, "misfit": "why"}]


def test_a_changed_digit_of_a_score_is_never_shown(tmp_path):
    document = {"summary": {"mean_foreground_dice": 0.8731}, "scored": {"step": 12}}
    scored.write_evaluation(tmp_path, document)
    assert scored.evaluation_of(tmp_path) == document
    path = tmp_path / scored.EVALUATION
    path.write_text(path.read_text().replace("0.8731", "0.9731"))
    assert scored.read_evaluation(tmp_path) is None
    with pytest.raises(InputError, match="damaged; `segfleet evaluate` scores the run again"):
        scored.evaluation_of(tmp_path)


def test_a_damaged_done_file_is_no_end(tmp_path):
    stage = StageFolder(path=tmp_path, index=0)
    stage.finish("step-00000004", steps=4, best={"dice": 0.5, "step": 4}, skipped=0)
    assert stage.done()["checkpoint"] == "step-00000004"
    text = (tmp_path / DONE).read_text()
    for wrong in (
        text.replace("00000004", "00000005"),
        json.dumps({"checkpoint": "../../other"}),
        json.dumps({"checkpoint": "step-00000004", "best": 3}),
        json.dumps({}),
    ):
        (tmp_path / DONE).write_text(wrong)
        assert stage.done() is None


def test_damaged_events_are_left_out(tmp_path):
    good = {
        "event": "step",
        "time": 1.0,
        "step": 4,
        "loss": 0.5,
        "lr": 1.0,
        "samples_per_second": 2,
    }
    lines = [
        json.dumps(good).encode(),
        b"\xff\xfe\x00",
        b'{"event": "step", "step": 5}',
        json.dumps({**good, "step": "8"}).encode(),
        b"[1]",
        b"7",
        json.dumps({**good, "step": 9}).encode(),
        json.dumps(good).encode()[:20],
    ]
    (tmp_path / "events.jsonl").write_bytes(b"\n".join(lines))
    assert [event["step"] for event in events.read_events(tmp_path)] == [4, 9]
    events.EventLog(tmp_path, 4, lambda event: None).close()
    assert [event["step"] for event in events.read_events(tmp_path)] == [4]


def test_a_damaged_recipe_of_one_run_does_not_hide_the_others(tmp_path, capsys):
    for name, text in (("aaa", '{"name": "one"}'), ("bbb", "{"), ("ccc", '["x"]')):
        (tmp_path / name).mkdir()
        (tmp_path / name / "recipe.json").write_text(text)
    assert find_run("one", tmp_path) == (tmp_path / "aaa").resolve()
    assert capsys.readouterr().err.count("is damaged and is left out") == 2
    with pytest.raises(InputError, match="bbb/recipe.json is damaged"):
        open_run(tmp_path / "bbb")


def test_a_changed_score_of_a_case_is_scored_again(tmp_path):
    kept = CaseJournal(tmp_path / "scored", {"store": "a"}, 0)
    kept.keep({"id": "one", "mean_dice": 0.25})
    kept.keep({"id": "two", "mean_dice": 0.75})
    path: Path = kept.file
    path.write_bytes(path.read_bytes().replace(b"0.75", b"0.95") + b"\xff[1, 2]\n3\n")
    assert kept.entries(["one", "two"]) == {"one": {"id": "one", "mean_dice": 0.25}}


def test_a_digest_is_of_what_is_said_not_of_how(tmp_path):
    assert digest_of({"a": 1, "b": [0.1]}) == digest_of({"b": [0.1], "a": 1}) != digest_of({"a": 1})


def test_a_document_of_another_run_counts_as_none(tmp_path, capsys):
    """As good as it is: another run's score under this run's name would be believed."""
    ours, theirs = tmp_path / "0123456789ab", tmp_path / "ba9876543210"
    for folder, dice in ((ours, 0.5), (theirs, 0.9)):
        folder.mkdir()
        scored.write_evaluation(folder, {"summary": {"mean_foreground_dice": dice}})
    (ours / scored.EVALUATION).write_bytes((theirs / scored.EVALUATION).read_bytes())
    assert score(ours) is None and score(theirs) == 0.9
    assert f"was written for {theirs.name} and is left out" in capsys.readouterr().err
    elsewhere = tmp_path / "my model"  # a run may be called what its owner likes
    theirs.rename(elsewhere)
    assert score(elsewhere) == 0.9


@pytest.mark.parametrize("wrong", ['{"run": 3}', "[]", "{", ""])
def test_a_damaged_note_of_a_submission_is_left_out(tmp_path, capsys, wrong):
    folder = tmp_path / "slurm" / "0001"
    folder.mkdir(parents=True)
    (folder / "submission.json").write_text(wrong)
    assert submissions(tmp_path) == []
    assert "submission.json is damaged" in capsys.readouterr().err or wrong == ""


def test_events_of_another_stage_are_left_out(tmp_path, capsys):
    ours, theirs = tmp_path / "0123456789ab", tmp_path / "ba9876543210"
    for folder in (ours, theirs):
        folder.mkdir()
        log = events.EventLog(folder, 0, None)
        log.write("stage_start", step=0, stage=0, steps=4, of=folder.name)
        log.close()
    assert len(list(events.read_events(ours))) == 1
    (ours / "events.jsonl").write_bytes((theirs / "events.jsonl").read_bytes())
    for read, nothing in ((events.read_events, []), (events.recent_events, [None, 0, []])):
        assert list(read(ours)) == nothing
        assert "was written for ba9876543210" in capsys.readouterr().err


def test_a_stamped_recipe_is_a_recipe(tmp_path):
    document = {"name": "mine", "data": {"batch": 2, "patch": [16, 16]}}
    document |= {"model": {"name": "unext"}, "stages": [{"epochs": 1, "lr": 1e-3}]}
    write_json(tmp_path / "recipe.json", document)
    assert load_recipe(str(tmp_path / "recipe.json")).name == "mine"


def test_a_folder_of_runs_whose_name_is_no_text_is_refused_before_training(tmp_path):
    with pytest.raises(InputError, match="is no UTF-8"):
        stage_folders(tmp_path / "x\udcff", None, None)


def test_an_option_of_another_type_is_one_sentence():
    with pytest.raises(ModelError, match="model.options: unet_lite_standard cannot be built of"):
        build_model("unet_lite_standard", in_channels=1, num_classes=2, options={"width": [1]})


@pytest.mark.parametrize(
    "steps, last, said",
    [
        ([10, 20, 24], 24, (24, 0.5)),
        ([10, 20], 24, (24, None)),  # its end was lost
        ([10], 24, (24, None)),
        ([30_000], 30_010, (30_010, 0.5)),  # of a long stage not every step comes to the file
        ([10, 20], "x", (20, 0.5)),
        ([10, 20], None, (20, 0.5)),  # at work
    ],
)
def test_half_a_list_of_events_is_not_shown_as_a_finished_runs_end(
    tmp_path, capsys, steps, last, said
):
    stage = StageFolder(path=tmp_path, index=0)
    lines = [
        {"event": "step", "time": 1.0, "step": step, "loss": 0.5, "samples_per_second": 2.0}
        for step in steps
    ]
    (tmp_path / "events.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    if last is not None:
        stage.finish("step-00000024", steps=last, best={}, skipped=0)
    found = status._progress(stage)
    assert (found["step"], found["loss"]) == said
    assert ("lacks its end" in capsys.readouterr().err) == (said[1] is None)


def stage_lines(*events: dict) -> str:
    return "".join(json.dumps({**event, "time": 1.0}) + "\n" for event in events)


@pytest.fixture
def run_folder(tmp_path) -> Path:
    """Of a run of one stage."""
    recipe = load_recipe("phantom2d", ['stages=[{"epochs": 1, "lr": 0.1}]'])
    write_json(tmp_path / "recipe.json", recipe.model_dump(mode="json"))
    return tmp_path


BEGUN = {"event": "stage_start", "step": 0, "stage": 0, "steps": 8}
LAST = {"event": "step", "step": 8, "loss": 0.5, "samples_per_second": 2.0}


@pytest.mark.parametrize(
    "lines, named",
    [
        ([BEGUN, LAST], ""),  # stopped
        ([BEGUN, LAST, {"event": "finished", "at_step": 8}], "done.json is missing"),
        # trained to its end once, then further, as the end had been lost
        ([BEGUN, LAST, {"event": "finished", "at_step": 8}, {"event": "resumed"}, LAST], ""),
    ],
)
def test_a_stage_that_lost_the_note_of_its_end_is_named(run_folder, capsys, lines, named):
    (run_folder / "events.jsonl").write_text(stage_lines(*lines))
    row = status.run_status(run_folder)
    assert (row.state, row.step) == ("stopped", 8)
    said = capsys.readouterr().err
    assert (named in said) if named else not said


@pytest.mark.parametrize("lost", [None, b"", bytes(300), stage_lines(BEGUN).encode()])
def test_lost_events_are_named(run_folder, capsys, lost):
    """A checkpoint comes after the events of its step."""
    path = run_folder / "events.jsonl"
    if lost is not None:
        path.write_bytes(lost)
    assert status.run_status(run_folder).state == "waiting" and not capsys.readouterr().err
    checkpoints = run_folder / "checkpoints"
    (checkpoints / "step-00000000").mkdir(parents=True)  # imported
    assert status.run_status(run_folder).step == 0 and not capsys.readouterr().err
    (checkpoints / "step-00000008").mkdir()
    row = status.run_status(run_folder)
    assert (row.state, row.step, row.loss) == ("stopped", 8, None)
    assert capsys.readouterr().err.startswith(f"segfleet: {path} is missing or lacks its end")


def test_a_damaged_outcome_of_a_sweep_is_one_sentence(tmp_path):
    path = tmp_path / "outcome.json"
    run = {"fold": 0, "seed": 1, "run": "runs/a"}
    path.write_text(json.dumps({"ranking": [{"runs": [run]}]}))
    assert best_points(path, 4) == [[Path("runs/a")]]
    for wrong in (7, [7], [{}], [{"runs": 7}], [{"runs": [{**run, "run": 7}]}], [{"runs": [{}]}]):
        path.write_text(json.dumps({"ranking": wrong}))
        with pytest.raises(InputError, match="outcome.json is damaged"):
            best_points(path, 4)
