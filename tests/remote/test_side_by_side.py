"""Requests from several threads, without a network: errors, signals, and those that are late."""

import threading

import pytest

from statedict_io.remote import side_by_side
from statedict_io.remote.side_by_side import perform


class Wanted:
    """``act(interrupt, how often it was sent before)`` is what sending does."""

    nbytes = counted_nbytes = 10

    def __init__(self, act=lambda interrupt, number: None):
        self.act = act
        self.num_sent = self.num_finished = 0

    def send(self, interrupt):
        number, self.num_sent = self.num_sent, self.num_sent + 1
        self.act(interrupt, number)

    def finish(self):
        self.num_finished += 1


def threads():
    return [thread for thread in threading.enumerate() if thread.name == "statedict_io request"]


@pytest.fixture(autouse=True)
def nothing_is_left():
    yield
    for thread in threads():
        thread.join(10)
    assert threads() == []


@pytest.mark.parametrize("count", [0, 1, 2, 50])
def test_each_is_sent_and_finished_once(count):
    requests = [Wanted() for _ in range(count)]
    ticks = []
    perform(requests, 4, ticks.append)
    assert all((request.num_sent, request.num_finished) == (1, 1) for request in requests)
    assert ticks == sorted(ticks) and ticks[-1] == 10 * count


def test_so_many_at_a_time():
    now, most, lock = 0, 0, threading.Lock()
    full = threading.Event()

    def act(interrupt, number):
        nonlocal now, most
        with lock:
            now += 1
            most = max(most, now)
            if now == 3:
                full.set()
        full.wait(10)
        with lock:
            now -= 1

    perform([Wanted(act) for _ in range(9)], 3)
    assert most == 3


def test_the_first_error_ends_the_others():
    def fail(interrupt, number):
        raise OSError("the first")

    waiting = Wanted(lambda interrupt, number: interrupt.wait(30))
    unsent = [Wanted() for _ in range(5)]
    with pytest.raises(OSError, match="the first"):
        perform([waiting, Wanted(fail), *unsent], 2)
    assert waiting.num_finished == 0 and sum(request.num_sent for request in unsent) <= 1


@pytest.mark.parametrize("error", [KeyboardInterrupt, ZeroDivisionError])
def test_a_signal_or_an_error_of_the_progress_ends_all(error):
    waiting = [Wanted(lambda interrupt, number: interrupt.wait(30)) for _ in range(3)]

    def tick(done):
        raise error

    with pytest.raises(error):
        perform(waiting, 3, tick)
    assert [request.num_finished for request in waiting] == [0, 0, 0]


def late_first(interrupt, number):
    if number == 0 and not interrupt.wait(30):
        raise AssertionError("nobody has ended it")


@pytest.fixture
def impatient(monkeypatch):
    monkeypatch.setattr(side_by_side, "_LATE_SECONDS", 0.05)


def test_one_that_is_late_is_sent_again_and_the_first_is_ended(impatient):
    late = Wanted(late_first)
    perform([late, *(Wanted() for _ in range(8))], 3)
    assert (late.num_sent, late.num_finished) == (2, 1)


def test_the_error_of_the_second_is_none_while_the_first_goes_on(impatient):
    second = threading.Event()

    def act(interrupt, number):
        if number == 1:
            second.set()
            raise OSError("the second")
        assert second.wait(30)

    late = Wanted(act)
    perform([late, *(Wanted() for _ in range(8))], 3)
    assert late.num_sent >= 2 and late.num_finished == 1


def test_where_all_are_slow_none_is_late(impatient):
    requests = [Wanted(lambda interrupt, number: interrupt.wait(0.2)) for _ in range(8)]
    perform(requests, 4)
    assert [request.num_sent for request in requests] == [1] * 8


def test_others_of_another_size_say_nothing(impatient):
    large = Wanted(lambda interrupt, number: interrupt.wait(0.5))
    large.nbytes = 1000
    perform([large, *(Wanted() for _ in range(8))], 3)
    assert large.num_sent == 1


def test_memory_is_not_written_to_after_the_end(impatient):
    """The one that was too slow has ended before the other's answer counts."""
    log = []

    def act(interrupt, number):
        if number == 0:
            assert interrupt.begin_writing()
            assert interrupt.wait(30)
            log.append("the first has ended")

    late = Wanted(act)
    late.finish = lambda: log.append("finished")
    perform([late, *(Wanted() for _ in range(8))], 3)
    assert log == ["the first has ended", "finished"]


def test_without_threads_the_caller_sends(monkeypatch):
    def no_more(self):
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(threading.Thread, "start", no_more)
    requests = [Wanted() for _ in range(3)]
    perform(requests, 4)
    assert [request.num_finished for request in requests] == [1] * 3
