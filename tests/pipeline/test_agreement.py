"""Ranks agree on a stop and on a save by the clock at the same step, whoever asks, without a
collective in every step."""

from __future__ import annotations

import time
from types import SimpleNamespace

from segfleet.pipeline.ranks import Ranks
from segfleet.pipeline.run import StageFolder
from segfleet.pipeline.training import agreement, saves
from segfleet.pipeline.training.progress import Progress
from segfleet.pipeline.training.saves import Saves


def ask(ranks: Ranks, asks: int, rank: int, seconds: float, steps: int, pause: float = 0.0) -> dict:
    """`rank` asks the first question from step `asks` on. -> steps with a yes; questions sent."""
    agreement.SECONDS = seconds
    now, sent = 0, []
    plain = ranks.start_max

    def counted(values):
        sent.append(now)
        return plain(values)

    ranks.start_max = counted
    decided = agreement.Agreement(ranks, lambda: ranks.rank == rank and now >= asks, lambda: False)
    yes = []
    for now in range(steps):
        stop, other = decided.answers()
        time.sleep(pause)  # the step
        assert not other
        if stop:
            yes.append(now)
    decided.close()
    return {"yes": yes, "sent": len(sent)}


def test_what_one_rank_asks_all_hear_at_the_same_step(run_in_ranks):
    told = run_in_ranks("test_agreement.py:ask", 3, asks=5, rank=2, seconds=0.0, steps=12)
    assert told[0]["yes"] == told[1]["yes"] == told[2]["yes"]
    assert 5 < told[0]["yes"][0] <= 8


def test_the_pause_is_counted_in_steps_as_long_as_they_are(run_in_ranks):
    """Also from the beginning, before a step has been timed."""
    told = run_in_ranks(
        "test_agreement.py:ask", 2, asks=10, rank=1, seconds=0.1, steps=80, pause=0.01
    )
    assert told[0]["yes"] == told[1]["yes"]
    assert 10 < told[0]["yes"][0] <= 10 + 15, "a tenth of a second are ten steps"


def test_steps_shorter_than_the_pause_send_few_questions(run_in_ranks):
    told = run_in_ranks("test_agreement.py:ask", 2, asks=10**9, rank=0, seconds=3600.0, steps=1500)
    assert told[0] == told[1] == {"yes": [], "sent": 3}  # at once, for the pace, after LONGEST


def test_a_single_rank_answers_at_once():
    asked = iter([False, True])
    decided = agreement.Agreement(Ranks(), lambda: next(asked))
    assert [decided.answers(), decided.answers()] == [[False], [True]]


def test_rank_0_has_the_clock_of_saves(monkeypatch, tmp_path):
    now = [100.0]
    monkeypatch.setattr(saves, "time", SimpleNamespace(monotonic=lambda: now[0]))
    folder = StageFolder(path=tmp_path, index=0)
    recipe = SimpleNamespace(save_minutes=10.0, model_dump=lambda mode: {})
    first, second = (Saves(folder, recipe, SimpleNamespace(rank=rank), step=0) for rank in (0, 1))
    now[0] += 599
    assert not first.due()
    now[0] += 1
    assert first.due() and not second.due()
    first.save(SimpleNamespace(tensors=dict), Progress(step=1))
    assert not first.due()
    first.saver.wait()
