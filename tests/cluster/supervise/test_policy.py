"""When a component counts as lost, and how often it is started again."""

import os
import signal
import subprocess
import sys
import time

import pytest

from millrace.cluster.supervise.config import SuperviseConfig
from millrace.cluster.supervise.nurse import vital
from millrace.cluster.supervise.policy import Budget, Vital, Watch
from millrace.core.errors import ConfigError

CONFIG = SuperviseConfig(hang_s=8, busy_s=60, start_s=300, restarts=3, window_s=100, backoff_s=1, backoff_most_s=3)


def silent(watch: Watch, since: float, until: float, *, stopped: bool, share: float) -> float | None:
    """The time at which a component that fell silent is found to be lost, looked at every second."""
    now = since
    while now < until:
        now += 1.0
        if now - since > 2:
            watch.look(now, Vital(stopped, 5.0 + share * (now - since)))
        if watch.verdict(now):
            return now - since
    return None


def answered(at: float = 10.0) -> Watch:
    watch = Watch(CONFIG, began=0.0)
    watch.answered(at)
    return watch


def test_one_that_is_stopped_is_lost_within_ten_seconds():
    assert 8 < silent(answered(), 10.0, 100.0, stopped=True, share=0.0) <= 10


def test_one_that_is_blocked_is_lost_within_ten_seconds():
    assert 8 < silent(answered(), 10.0, 100.0, stopped=False, share=0.0) <= 10


def test_one_that_computes_is_given_more_time():
    assert 60 < silent(answered(), 10.0, 100.0, stopped=False, share=0.5) <= 62


def test_a_starved_process_that_still_computes_a_little_is_not_lost():
    assert silent(answered(), 10.0, 40.0, stopped=False, share=0.05) is None


def test_an_answer_forgets_the_silence_before_it():
    watch = answered()
    assert silent(watch, 10.0, 17.0, stopped=True, share=0.0) is None
    watch.answered(17.5)
    assert silent(watch, 17.5, 24.0, stopped=True, share=0.0) is None


def test_one_that_never_answered_may_take_its_time_to_start():
    watch = Watch(CONFIG, began=0.0)
    watch.look(250.0, Vital(True, 0.0))
    assert not watch.verdict(299.0)
    assert "supervise.start_s = 300" in watch.verdict(301.0)


def test_restarts_back_off_and_end_with_the_budget():
    budget = Budget(CONFIG)
    assert [budget.spend(float(t)) for t in (0, 1, 2, 3)] == [1, 2, 3, None]


def test_old_losses_are_forgotten():
    budget = Budget(CONFIG)
    assert [budget.spend(t) for t in (0.0, 50.0, 99.0)] == [1, 2, 3]
    assert budget.spend(99.9) is None
    assert budget.spend(101.0) is not None


def test_an_error_of_its_own_counts_more_and_what_a_prompt_did_counts_nothing():
    budget = Budget(CONFIG)
    assert budget.spend(0.0, count=2) is not None
    assert budget.spend(1.0, count=2) is None
    budget.refund(1)
    assert budget.spend(2.0, count=2) is not None
    budget.refund(5)
    assert budget.spent == 0


def test_busy_is_not_shorter_than_hang():
    with pytest.raises(ConfigError, match="busy_s = 1 is less than hang_s = 8"):
        SuperviseConfig.parse({"busy_s": 1}, source="x")


def test_what_the_system_says_of_a_process():
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    try:
        assert not vital(child.pid).stopped
        os.kill(child.pid, signal.SIGSTOP)
        while not vital(child.pid).stopped:
            time.sleep(0.01)
    finally:
        child.kill()
    while vital(child.pid) is not None:  # a zombie until it is waited for
        time.sleep(0.01)
    child.wait()
    assert vital(child.pid) is None
