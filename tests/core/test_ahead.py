"""The next item is prepared while the present one is worked on: one, in order, with its errors."""

from __future__ import annotations

import gc
import signal
import subprocess
import sys
import threading
import time
import weakref
from contextlib import closing

import pytest

from segfleet.core.ahead import ahead


class Thing:
    def __init__(self, number):
        self.number = number


@pytest.mark.parametrize("count", [3, 40])
@pytest.mark.parametrize("background, held", [(False, 1), (True, 2)])
def test_so_many_are_there_at_once_however_long_the_list(count, background, held):
    alive, most, order = weakref.WeakSet(), [], []

    def prepare(number):
        made = Thing(number)
        alive.add(made)
        gc.collect()
        most.append(len(alive))
        return made

    for number, ready in ahead(prepare, range(count), background=background):
        thing = ready()
        assert thing.number == number
        time.sleep(0.005)  # whoever prepared more would do it now
        most.append(len(alive))
        order.append(number)
        del thing, ready
    assert order == list(range(count))
    assert max(most) == held


def test_the_next_is_prepared_in_another_thread_while_this_one_is_worked_on():
    begun = [threading.Event() for _ in range(3)]

    def prepare(number):
        begun[number].set()
        return threading.current_thread()

    for number, ready in ahead(prepare, range(3), background=True):
        assert ready() is not threading.main_thread()
        if number < 2:
            assert begun[number + 1].wait(10)
    for _, ready in ahead(prepare, range(3), background=False):
        assert ready() is threading.main_thread()


def test_an_error_comes_up_with_its_own_item_and_the_rest_is_done():
    def prepare(number):
        if number == 1:
            raise ValueError("one is bad")
        return number

    done, failed = [], []
    for number, ready in ahead(prepare, range(4), background=True):
        try:
            done.append(ready())
        except ValueError as error:
            failed.append((number, str(error)))
    assert done == [0, 2, 3] and failed == [(1, "one is bad")]


def test_nothing_is_prepared_beside_what_leaves_no_room():
    begun = []

    def prepare(number):
        begun.append(number)
        return number

    for number, ready in ahead(prepare, range(3), background=True, roomy=lambda value: False):
        ready()
        time.sleep(0.02)
        assert begun == list(range(number + 1))


def test_who_leaves_early_waits_for_what_is_under_way_and_for_no_more():
    begun = []

    def prepare(number):
        begun.append(number)
        time.sleep(0.05)
        return number

    with closing(ahead(prepare, range(9), background=True)) as things:
        next(things)[1]()
    assert begun == [0, 1]
    assert not [thread for thread in threading.enumerate() if thread.name == "ahead"]


STUCK = """
import time
from contextlib import closing
from segfleet.core import ahead
ahead.PATIENCE = 0.1
def prepare(number):
    time.sleep(number * 1000)
    return number
with closing(ahead.ahead(prepare, [0, 1], background=True)) as things:
    for _, ready in things:
        ready()
        print("ready", flush=True)
"""


def test_ctrl_c_ends_it_though_a_preparation_hangs():
    process = subprocess.Popen(
        [sys.executable, "-c", STUCK], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert process.stdout.readline() == "ready\n"
    time.sleep(0.2)  # it waits for the second
    process.send_signal(signal.SIGINT)
    _, said = process.communicate(timeout=20)
    assert process.returncode == -signal.SIGINT and "KeyboardInterrupt" in said
