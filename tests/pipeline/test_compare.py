"""Comparisons: p-values against scipy, numbers by hand, refusals, files."""

from __future__ import annotations

import copy
import csv
import io
import json
import re

import numpy as np
import pytest
from scipy import stats

from segfleet.core.errors import InputError
from segfleet.pipeline.reports.comparison import as_csv, as_latex, as_markdown, write_comparison
from segfleet.pipeline.scoring.compare import MOST, compare
from segfleet.pipeline.scoring.metrics import score_case
from segfleet.pipeline.scoring.summary import summarise
from segfleet.pipeline.task import Task

TASK = Task(head="softmax", names=("a_1", "<b>"), members=((1,), (2,)), values=(0, 1, 2))


def evaluation(seed, cases=12, worse=0):
    """Squares of 8 x 8 pixels, of which a run misses a few rows; two cases per patient."""
    generator, entries = np.random.default_rng(seed), []
    for index in range(cases):
        truth, prediction = np.zeros((1, 24, 24), np.uint8), np.zeros((1, 24, 24), np.uint8)
        for value, left in ((1, 2), (2, 13)):
            truth[0, 4:12, left : left + 8] = value
            missed = int(generator.integers(0, 3)) + worse
            prediction[0, 4 + missed : 12, left : left + 8] = value
        scores = score_case(prediction, truth, spacing=(1, 1, 1), task=TASK)
        entries.append(
            {
                "id": f"case{index}",
                "group": f"p{index // 2}",
                "source": f"hash{index}",
                "mean_dice": float(np.mean([s["dice"] for s in scores.values()])),
                "scores": scores,
            }
        )
    return {
        "structures": list(TASK.names),
        "cases": entries,
        "summary": summarise(entries, TASK.names),
        "unit": "mm",
        "settings": {"tolerance": {"a_1": 2.0, "<b>": 2.0}},
    }


@pytest.fixture(scope="module")
def three():
    return [("good", evaluation(0)), ("bad", evaluation(1, worse=2)), ("same", evaluation(0))]


def row_of(document, metric="dice", structure="a_1", second="bad"):
    (found,) = [
        row
        for row in document["differences"]
        if (row["metric"], row["structure"], row["second"]) == (metric, structure, second)
        and row["first"] == "good"
    ]
    return found


def patient_means(three, structure="a_1", metric="dice"):
    values = [
        [case["scores"][structure][metric] for case in document["cases"]]
        for _, document in three[:2]
    ]
    return (np.array(values[1]) - np.array(values[0])).reshape(6, 2).mean(axis=1)


def test_differences_and_p_values_are_scipy_s(three):
    row, means = row_of(compare(three)), patient_means(three)
    assert row["difference"] == pytest.approx(means.mean()) and row["difference"] < 0
    assert row["p_wilcoxon"] == pytest.approx(stats.wilcoxon(np.round(means, 12)).pvalue)
    # all six patients are worse: 2 of the 64 sign flips are as extreme
    assert (means < 0).all() and row["p"] == pytest.approx(2 / 64)
    low, high = row["ci95"]
    assert low < row["difference"] < high < 0 and row["better"] == "good"
    assert (row["cases"], row["patients"], row["one_missing"]) == (12, 6, 0)


def test_equal_runs_differ_in_nothing(three):
    row = row_of(compare(three), second="same")
    assert (row["difference"], row["p"], row["p_wilcoxon"], row["better"]) == (0, 1, 1, None)


def test_holm_is_over_the_rows_of_one_metric(three):
    document = compare(three)
    family = [row for row in document["differences"] if row["metric"] == "dice"]
    assert len(family) == 3 * 3, "three pairs of runs; two structures and their mean"
    p = sorted(row["p"] for row in family)
    corrected = sorted(row["p_holm"] for row in family)
    expected = np.minimum(1, np.maximum.accumulate(np.array(p) * np.arange(9, 0, -1)))
    assert corrected == pytest.approx(expected.tolist())


def test_smaller_distances_are_better_and_ranks_count_them_so(three):
    document = compare(three)
    assert row_of(document, "hd95")["difference"] > 0
    assert row_of(document, "hd95")["better"] == "good"
    for metric in ("dice", "nsd", "hd95"):
        ranks = document["ranks"][metric]
        assert ranks["good"] == ranks["same"] < ranks["bad"]
        assert sum(ranks.values()) == pytest.approx(6)


def test_cases_pair_by_the_hash_of_their_files_in_whatever_order(three):
    other = copy.deepcopy(three[1][1])
    for case in other["cases"]:
        case["id"] = f"renamed {case['id']}"
    other["cases"].reverse()
    assert row_of(compare([three[0], ("bad", other)])) == row_of(compare(three[:2]))


def test_what_cannot_be_compared_is_one_message(three):
    other = copy.deepcopy(three[1][1])
    other["structures"], other["unit"] = ["a_1", "c"], "pixels"
    other["settings"]["tolerance"] = {"a_1": 1.0, "c": 1.0}
    with pytest.raises(InputError) as caught:
        compare([three[0], ("other", other)])
    text = str(caught.value)
    assert "structures a_1, <b>; 'other' scores a_1, c" in text
    assert "in mm, 'other' in pixels" in text and "tolerances" in text
    with pytest.raises(InputError, match="did you mean 'dice'|'dice'"):
        compare(three, ["dics"])
    with pytest.raises(InputError, match="expected two or more"):
        compare(three[:1])


def test_other_cases_are_refused_unless_the_common_ones_are_wanted(three):
    fewer = copy.deepcopy(three[1][1])
    fewer["cases"] = fewer["cases"][:8]
    runs = [three[0], ("bad", fewer)]
    with pytest.raises(InputError, match="'good' 12, 'bad' 8, of which 8 .*--common"):
        compare(runs)
    assert compare(runs, common=True)["cases"] == 8
    for case in fewer["cases"]:
        case["source"] += " of others"
    with pytest.raises(InputError, match="of which 0 are in all"):
        compare(runs, common=True)


def test_another_truth_is_noticed(three):
    other = copy.deepcopy(three[1][1])
    other["cases"][3]["scores"]["a_1"]["truth_voxels"] += 1
    with pytest.raises(InputError, match="the truth of 'case3' differs: a_1 has 64"):
        compare([three[0], ("other", other)])


def test_a_value_that_one_run_lacks_is_counted(three):
    other = copy.deepcopy(three[1][1])
    other["cases"][0]["scores"]["a_1"]["hd95"] = None
    row = row_of(compare([three[0], ("bad", other)]), "hd95")
    assert (row["cases"], row["one_missing"]) == (11, 1)


def test_few_patients_have_no_interval(three):
    runs = [(name, {**d, "cases": d["cases"][:4]}) for name, d in three[:2]]
    document = compare(runs)
    assert row_of(document)["ci95"] is None and row_of(document)["p"] == 0.5
    assert "too few patients" in as_markdown(document)


def test_the_files_say_the_same_and_are_well_formed(three, tmp_path):
    document = compare(three)
    paths = {path.suffix: path.read_text() for path in write_comparison(tmp_path, document)}
    assert json.loads(paths[".json"]) == document
    rows = list(csv.DictReader(io.StringIO(as_csv(document))))
    assert len(rows) == 3 * 9 and float(rows[0]["difference"]) == pytest.approx(
        document["differences"][0]["difference"]
    )
    lines = as_markdown(document).splitlines()
    assert all(line.count("|") == lines[2].count("|") for line in lines[2:5])
    latex = as_latex(document)
    for word in (r"\toprule", r"\midrule", r"\bottomrule", r"a\_1", r"95 \%"):
        assert word in latex
    assert latex.count("{") == latex.count("}")
    negative = [row for row in document["differences"] if row["difference"] < -0.001]
    assert negative and "$-$0." in latex and not re.search(r"[ (]-\d", latex)
    assert "bad - good" in latex  # names keep their hyphens
    assert "&lt;b&gt;" in paths[".html"] and ": <b>" not in paths[".html"]
    assert paths[".html"].count("<svg") == 2
    assert len(document["differ_most"]) == MOST
    apart = [case["apart"] for case in document["differ_most"]]
    assert apart == sorted(apart, reverse=True)
