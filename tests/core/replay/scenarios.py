"""Small worlds that together reach every rule."""

from collections.abc import Callable

from millrace.core.replay.config import QueueConfig
from tests.core.replay.cast import Budget
from tests.core.replay.world import World

_BASE = {
    "groups_per_step": 1,
    "group_size": 1,
    "steps": 2,
    "max_lag": 1,
    "start_s": 10,
    "lease_s": 10,
    "lease_cap_s": 15,
    "judge_lease_s": 10,
    "judge_cap_s": 20,
    "keep_commits": 1,
}


def config(**changes: object) -> QueueConfig:
    return QueueConfig.model_validate({**_BASE, **changes})


def scene(
    queue: QueueConfig,
    *,
    forgetful: bool = False,
    frugal: bool = False,
    engines: int = 1,
    judges: int = 1,
    **faults: int,
) -> Callable[[], World]:
    behaviour = {"forgetful": forgetful, "frugal": frugal}
    return lambda: World(queue, engines=engines, judges=judges, budget=Budget(**faults), **behaviour)


SCENES = {
    "plain": scene(config(), work=1),
    "synchronous": scene(config(groups_per_step=2, max_lag=0), filter=1),
    "synchronous, restarts": scene(config(max_lag=0), learner_crash=2, filter=1),
    "synchronous, forgetful filter": scene(
        config(groups_per_step=2, max_lag=0, steps=1), forgetful=True, learner_crash=1, filter=2
    ),
    "restart": scene(config(), learner_crash=1),
    "engine faults": scene(config(max_lag=0), crash=1, tick=2, late=1, work=1),
    "wedged engine": scene(config(max_lag=0, steps=1), tick=3, work=2, beat=1, late=1),
    "two engines": scene(config(max_lag=0, groups_per_step=2, steps=1), engines=2, crash=1, late=1),
    "leaving": scene(config(max_lag=0, steps=1), engines=2, leave=1, crash=1, late=1, work=1),
    "judges": scene(
        config(group_size=3, max_lag=0, steps=1, judge_expiries=1), judges=2, judge_fail=2, tick=2, judge_crash=1
    ),
    "dying draws": scene(config(attempts=1, max_lag=0), fail=2, tick=1),
    "lost workers": scene(config(max_lag=0, crashes=2), fence=2, judge_fence=2, late=1, work=1),
    "failing engine": scene(config(max_lag=0, groups_per_step=2, steps=1, attempts=2), fail=3, crash=1, late=1),
    "suspects": scene(config(groups_per_step=2, max_lag=0, steps=1), engines=2, fence=3, late=1),
    "suspects of one engine": scene(config(groups_per_step=2, max_lag=0, steps=2), fence=4),
    "poison answers": scene(config(max_lag=0, steps=1, crashes=2), judges=2, judge_fence=3),
    "suspects of judges": scene(config(groups_per_step=2, max_lag=0, steps=1), judges=2, judge_fence=5, judge_fail=1),
    "lag 2": scene(config(steps=3, max_lag=2), work=1),
    "drop": scene(config(steps=3, stale="drop")),
    "requeue": scene(config(steps=3, stale="requeue", requeues=1)),
    "mask": scene(config(steps=3, stale="mask")),
    "train": scene(config(steps=3, stale="train")),
    "two checkpoints": scene(config(steps=3, keep_commits=2), learner_crash=1, revert=1),
    "queue dies": scene(config(), queue_crash=1, learner_crash=1),
    "queue dies, synchronous": scene(config(groups_per_step=2, max_lag=0), queue_crash=1, filter=1, fail=1),
    "queue dies, faults": scene(config(max_lag=0, steps=1), queue_crash=2, fence=1, judge_fence=1, late=1, tick=1),
    "queue dies, two engines": scene(
        config(max_lag=0, groups_per_step=2, steps=1), engines=2, queue_crash=1, fence=1, late=1, work=1
    ),
    "queue dies, reuse": scene(config(steps=3, max_lag=2, reuse=2, keep_commits=2), queue_crash=1, filter=1),
    "revert": scene(config(keep_commits=2), revert=1, learner_crash=1),
    "reuse": scene(config(steps=4, max_lag=3, reuse=2), frugal=True),
    "reuse, pairs": scene(config(groups_per_step=2, steps=3, reuse=2)),
    "reuse, restarts": scene(config(steps=3, max_lag=2, reuse=2), learner_crash=2, filter=1),
    "reuse, forgetful filter": scene(config(reuse=2), forgetful=True, learner_crash=1, filter=1),
    "reuse, revert": scene(config(steps=3, max_lag=2, reuse=2, keep_commits=2), revert=1, filter=1),
    "reuse, lost payloads": scene(config(steps=3, max_lag=2, reuse=2), lose=2),
    "reuse, mask": scene(config(steps=4, stale="mask", max_lag=2, reuse=3), filter=1),
}

_FAULTS = {
    "crash": 2,
    "judge_crash": 2,
    "learner_crash": 2,
    "tick": 6,
    "late": 4,
    "judge_fail": 3,
    "filter": 3,
    "work": 8,
}
_FAULTS |= {"beat": 3, "leave": 2, "revert": 1, "lose": 1, "fence": 4, "judge_fence": 3, "fail": 3, "queue_crash": 3}

_LONGER = {"steps": 4}

# Larger, for random walks: too many states to visit all.
LARGE = {
    f"{stale}, lag {lag}" + (f", reuse {more['reuse']}" if "reuse" in more else ""): scene(
        config(
            groups_per_step=size, group_size=2, max_lag=lag, stale=stale, requeues=stale == "requeue", **_LONGER | more
        ),
        engines=3,
        judges=2,
        forgetful=forget,
        **_FAULTS,
    )
    for stale, lag, size, forget, more in [
        ("wait", 0, 3, False, {}),
        ("wait", 1, 2, True, {"selector": "freshest"}),
        ("wait", 2, 2, False, {"keep_commits": 2}),
        ("wait", 3, 1, True, {"attempts": 1}),
        ("drop", 1, 2, True, {"min_groups": 3}),
        ("requeue", 1, 2, False, {"stale_then": "mask"}),
        ("mask", 0, 2, True, {}),
        ("train", 2, 2, False, {"selector": "deadline"}),
        ("wait", 3, 2, False, {"steps": 6, "reuse": 2}),
        ("wait", 4, 2, True, {"steps": 6, "reuse": 3, "keep_commits": 2}),
        ("drop", 2, 2, False, {"reuse": 2, "keep_commits": 2}),
        ("mask", 3, 2, True, {"reuse": 2}),
    ]
}
LARGE["poison, lag 0"] = scene(
    config(groups_per_step=4, max_lag=0, steps=3, attempts=5),
    engines=2,
    judges=2,
    **_FAULTS | {"fence": 12, "judge_fence": 9},
)
# Share of the steps of a walk in which nothing rare happens, where it is another than usual.
CALM = {"poison, lag 0": 0.6}
