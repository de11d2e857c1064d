"""How many loader processes a rank has, and what is said when they are too few."""

from __future__ import annotations

import pytest

from segfleet.core.machine import cpus_of_a_rank
from segfleet.pipeline.data.loader import worker_count
from segfleet.pipeline.training.window import Hunger


@pytest.mark.parametrize(
    ("device", "cores", "wanted"),
    [
        *(("cpu", cores, count) for cores, count in ((1, 0), (3, 0), (4, 1), (8, 2), (64, 2))),
        *(
            ("cuda", cores, count)
            for cores, count in ((1, 0), (2, 1), (4, 2), (8, 6), (16, 14), (64, 14))
        ),
    ],
)
def test_auto_is_what_the_cores_allow(device, cores, wanted):
    assert worker_count("auto", device, cores) == wanted
    assert worker_count(5, device, cores) == 5


def test_ranks_of_a_machine_share_its_cores_and_tasks_of_slurm_have_their_own(tmp_path):
    everything = cpus_of_a_rank({}, tmp_path)
    assert cpus_of_a_rank({"LOCAL_WORLD_SIZE": str(everything)}, tmp_path) == 1
    assert cpus_of_a_rank({"LOCAL_WORLD_SIZE": "1000"}, tmp_path) == 1
    alone = {"SLURM_CPUS_PER_TASK": "1", "LOCAL_WORLD_SIZE": "8"}
    assert cpus_of_a_rank(alone, tmp_path) == 1


def test_waiting_is_said_once_and_only_when_it_is_a_fifth_of_a_minute():
    said: list[str] = []
    hunger = Hunger(3, said.append)
    hunger.note(1.0, 50.0)
    hunger.note(1.0, 50.0)
    assert not said
    for _ in range(4):
        hunger.note(15.0, 30.0)
    (sentence,) = said
    assert "50%" in sentence and "data.workers=3" in sentence and "--cpus" in sentence
