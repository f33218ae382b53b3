"""A thread beside its caller: what it does, and that it ends."""

import threading
import time
from typing import Any

import pytest
import torch

from lib.progressive.beside import Beside


def wait_for(done: list[Any], count: int) -> None:
    while len(done) < count:
        time.sleep(0.001)


def test_it_repeats_until_the_block_ends() -> None:
    beside, done = Beside(), []

    def step() -> None:
        time.sleep(0.001)
        done.append(threading.get_ident())

    for _ in range(3):
        before = len(done)
        with beside.repeat(step, 10**9):
            wait_for(done, before + 3)
        count = len(done)
        time.sleep(0.01)
        assert len(done) == count
    assert threading.get_ident() not in done


def test_it_repeats_so_many_times() -> None:
    beside, done = Beside(), []
    with beside.repeat(lambda: done.append(1), 5):
        wait_for(done, 5)
        time.sleep(0.01)
    assert len(done) == 5
    with beside.repeat(lambda: done.append(1), 0):
        pass
    assert len(done) == 5


def test_it_computes_as_its_caller() -> None:
    beside, modes = Beside(), []

    def look() -> None:
        modes.append((torch.is_grad_enabled(), torch.is_inference_mode_enabled()))

    for inference in (False, True):
        with torch.inference_mode(inference), beside.repeat(look, 1):
            wait_for(modes, inference + 1)
    assert modes == [(False, False), (False, True)]


def test_errors_are_the_callers_and_its_own_come_first() -> None:
    beside, failed = Beside(), []

    def fail() -> None:
        failed.append(1)
        raise OSError("in the thread")

    with pytest.raises(OSError, match="in the thread"), beside.repeat(fail, 5):
        wait_for(failed, 1)
    with pytest.raises(ValueError, match="of the caller"), beside.repeat(fail, 5):
        wait_for(failed, 2)
        raise ValueError("of the caller")
    assert len(failed) == 2


def test_a_thread_that_never_began_is_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    beside, done = Beside(), []

    def interrupted(thread: threading.Thread) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(threading.Thread, "start", interrupted)
        with pytest.raises(KeyboardInterrupt), beside.repeat(lambda: done.append(1), 5):
            pass
    for _ in range(2):
        beside.end()
    assert not done


def test_a_block_ends_what_it_has_begun_and_not_what_another_thread_has() -> None:
    beside = Beside()
    mine: list[None] = []
    other: list[None] = []
    entered, over = threading.Event(), threading.Event()

    def add(done: list[None]) -> None:
        time.sleep(0.001)
        done.append(None)

    def use() -> None:
        with beside.repeat(lambda: add(other), 10**9):
            entered.set()
            over.wait()

    thread = threading.Thread(target=use)
    with beside.repeat(lambda: add(mine), 10**9):
        beside._job = None  # as where both begin at the same moment
        thread.start()
        entered.wait()
        wait_for(mine, 1)
    count, begun = len(mine), len(other)
    time.sleep(0.2)
    over.set()
    thread.join()
    assert len(mine) == count and len(other) > begun
    count = len(other)
    time.sleep(0.01)
    assert len(other) == count
