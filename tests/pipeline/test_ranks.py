"""Ranks and their devices: what is refused before a collective library could fail on it."""

from __future__ import annotations

import threading

import pytest
import torch
import torch.distributed as dist

from segfleet.core.errors import InputError
from segfleet.pipeline import ranks
from segfleet.pipeline.launch import local
from segfleet.pipeline.launch.job import Train


def verdicts(places: list[list[str]]) -> list[str]:
    """What every rank hears; rank 0 comes last, as it may."""
    store, said = dist.HashStore(), [""] * len(places)

    def join(rank: int) -> None:
        try:
            place = [*places[rank], "A100"][:3]
            ranks.check_devices(rank, len(places), store, place)
        except InputError as error:
            said[rank] = str(error)

    threads = [threading.Thread(target=join, args=(rank,)) for rank in range(len(places))]
    for thread in reversed(threads):
        thread.start()
    for thread in threads:
        thread.join(60)
    return said


def test_ranks_with_a_gpu_each_or_on_the_cpu_are_let_through():
    assert verdicts([["a", "GPU-1"], ["a", "GPU-2"], ["b", "GPU-1"]]) == ["", "", ""]
    assert verdicts([["a", "cpu"]] * 3) == ["", "", ""]


def test_more_ranks_than_gpus_on_a_host_is_one_message_on_every_rank():
    said = verdicts([["a", "GPU-1"], ["b", "GPU-7"], ["b", "GPU-8"], ["b", "GPU-8"]])
    assert len(set(said)) == 1
    assert "found 3 on b, which has 2 GPU(s)" in said[0]
    assert "--ranks 2" in said[0] and "SEGFLEET_DEVICE=cpu" in said[0]


def test_gpus_of_several_models_are_said_once_and_let_through(capfd):
    places = [["a", "1", "A100"], ["b", "2", "A100"], ["b", "3", "A100"], ["c", "4", "H200"]]
    assert verdicts(places) == [""] * 4
    said = capfd.readouterr().err
    assert said.count("\n") == 1
    assert "2 models: 3 x A100 on a, b; 1 x H200 on c." in said
    assert verdicts(places[:3]) == [""] * 3 and capfd.readouterr().err == ""
    assert ranks.mixture([["a", "cpu", ""], ["b", "cpu", ""]]) == ""


def test_nodes_with_and_without_gpus_do_not_train_together():
    said = verdicts([["a", "GPU-1"], ["b", "cpu"]])
    assert said[0] == said[1] and "none on b" in said[0] and "SEGFLEET_DEVICE=cpu" in said[0]


def test_a_gpu_is_named_by_what_no_other_process_can_call_differently(monkeypatch):
    class Properties:
        uuid, name = "d9a1", "NVIDIA H200"

    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: Properties)
    assert ranks.place_of(torch.device("cuda", 0))[1:] == ["d9a1", "NVIDIA H200"]
    assert ranks.place_of(torch.device("cpu"))[1:] == ["cpu", ""]


def test_training_with_more_ranks_than_gpus_ends_before_nccl(tmp_path, monkeypatch):
    """Two real ranks that both hold the only GPU; NCCL is not there to be asked."""
    from segfleet.pipeline.launch.local import RankFailed, run_ranks

    (tmp_path / "sitecustomize.py").write_text(
        "import sys\n"
        "class Loaded:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        "        if name == 'segfleet.pipeline.jobs':\n"
        "            from segfleet.pipeline import ranks\n"
        "            ranks.place_of = lambda device: ['here', 'GPU-1', 'A100']\n"
        "sys.meta_path.insert(0, Loaded())\n"
    )
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    with pytest.raises(RankFailed, match=r"found 2 on here.*--ranks 1.*SEGFLEET_DEVICE=cpu") as end:
        run_ranks(Train(recipe={}, root=tmp_path), 2)
    assert end.value.exit_code == 2


@pytest.mark.parametrize("said", [None, "active"])
def test_threads_of_local_ranks_sleep_while_they_wait(said, monkeypatch, tmp_path):
    monkeypatch.delenv("OMP_WAIT_POLICY")
    if said:
        monkeypatch.setenv("OMP_WAIT_POLICY", said)
    given = {}
    monkeypatch.setattr(local.subprocess, "Popen", lambda command, env, **_: given.update(env))
    local._start(tmp_path, 0, 1, "2", None)
    assert given["OMP_WAIT_POLICY"] == (said or "passive") and given["OMP_NUM_THREADS"] == "2"
