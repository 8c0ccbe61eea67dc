"""Two-phase rewards: shapers in order, filters, their memory, and what a mistake in one's own says."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from millrace.core.errors import RewardError
from millrace.core.recipe import Rewards
from millrace.core.types import Floats
from millrace.rewards.shaping import Shaping

MINE = """
import numpy as np
from dataclasses import dataclass, field

def twice(reward_G): return reward_G * 2
def one_less(reward_G, length_G): return reward_G - 1
def in_place(reward_G):
    reward_G += 5
    return reward_G
def in_place_short(reward_G): return in_place(reward_G)[1:]
def as_list(reward_G): return [1] * len(reward_G)
def scalar(reward_G): return 1.0
def column(reward_G): return reward_G[:, None]
def short(reward_G): return reward_G[1:]
def nan(reward_G): return reward_G * float("nan")
def huge(reward_G): return reward_G.astype(np.float64) + 1e300
def nothing(reward_G): pass
def words(reward_G): return ["high"] * len(reward_G)
def raises(reward_G): return {}["x"]
async def later(reward_G): return reward_G
def asks(reward_G, advantage_N): return reward_G
def yes(reward_G): return True
def numpy_no(reward_G): return reward_G.mean() > 100
def number(reward_G): return 1
def array(reward_G): return reward_G > 0
async def later_too(reward_G): return True

@dataclass
class seen:
    most: int = 2
    groups: int = field(init=False, default=0)
    def __call__(self, reward_G):
        self.groups += 1
        return self.groups <= self.most

@dataclass
class unsaveable:
    last: object = field(init=False, default=None)
    def __call__(self, reward_G):
        self.last = reward_G
        return reward_G
"""


@pytest.fixture
def mine(tmp_path: Path) -> Any:
    path = tmp_path / "mine.py"
    path.write_text(MINE)
    return lambda name: f"{path}:{name}"


def group(*rewards: float) -> dict[str, Any]:
    reward_G = np.array(rewards, np.float32)
    return {"reward_G": reward_G, "score_G": reward_G, "length_G": np.arange(len(rewards))}


def shaping(shapers: Any = (), filters: Any = ()) -> Shaping:
    return Shaping.of(Rewards(shapers=shapers, filters=filters))


def test_nothing_asked_for_changes_nothing() -> None:
    nothing, have = shaping(), group(1, 0)
    assert nothing.shape(have).tolist() == [1, 0] and nothing.keep(have) == ""
    assert nothing.words == frozenset() and nothing.memory() == {}


def test_shapers_apply_in_order_each_to_what_the_one_before_returned(mine: Any) -> None:
    have = group(1, 3)
    assert shaping([mine("twice"), mine("one_less")]).shape(have).tolist() == [1, 5]
    assert shaping([mine("one_less"), mine("twice")]).shape(have).tolist() == [0, 4]


def test_the_group_s_own_rewards_are_never_written_to(mine: Any) -> None:
    have = group(1, 0)
    assert shaping([mine("in_place"), mine("in_place")]).shape(have).tolist() == [11, 10]
    assert have["reward_G"].tolist() == [1, 0]


def test_what_is_returned_is_float32(mine: Any) -> None:
    shaped = shaping([mine("as_list")]).shape(group(0, 0))
    assert shaped.dtype == np.float32 and shaped.tolist() == [1, 1]


def test_its_words_are_those_of_all_methods(mine: Any) -> None:
    both = shaping(["overlong", {"name": "scheduled", "shaper": "kl", "steps": 5}], ["truncation", "mastered"])
    assert both.words == {
        "reward_G", "length_G", "max_tokens", "step", "proximal_logprob_N", "reference_logprob_N", "sequences",
        "truncated_G", "prompt",
    }  # fmt: skip


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("scalar", r"returned 1.0, of shape \[\]"),
        ("column", r"of shape \[2, 1\]"),
        ("short", r"of shape \[1\]"),
        ("in_place_short", r"of shape \[1\]"),
        ("nan", r"returned \[nan nan\], not all of it finite"),
        ("huge", "not all of it finite"),
        ("nothing", "returned None"),
        ("words", "a list, which is no array of numbers"),
        ("raises", "raised KeyError: 'x'"),
    ],
)
def test_a_shaper_s_mistake_names_it_what_it_got_and_what_it_returned(mine: Any, name: str, message: str) -> None:
    with pytest.raises(RewardError, match=message) as caught:
        shaping([mine(name)]).shape(group(1, 0))
    assert f"mine.py:{name}" in str(caught.value)
    if name != "raises":
        assert "got the rewards [1. 0.]" in str(caught.value)


@pytest.mark.parametrize("name", ["number", "array", "nothing", "raises"])
def test_a_filter_returns_a_bool(mine: Any, name: str) -> None:
    with pytest.raises(RewardError, match=f"filter .*mine.py:{name}"):
        shaping(filters=[mine(name)]).keep(group(1, 0))


def test_the_first_filter_that_rejects_is_named(mine: Any) -> None:
    both = shaping(filters=[mine("yes"), "zero_variance", mine("numpy_no")])
    assert both.keep(group(1, 1)) == "filters.zero_variance"
    assert both.keep(group(1, 0)).endswith("mine.py:numpy_no")
    assert shaping(filters=[mine("yes"), "zero_variance"]).keep(group(1, 0)) == ""


@pytest.mark.parametrize(("key", "name"), [("shapers", "later"), ("filters", "later_too")])
def test_async_methods_are_refused(mine: Any, key: str, name: str) -> None:
    with pytest.raises(RewardError, match="is async"):
        shaping(**{key: [mine(name)]})
    with pytest.raises(RewardError, match="is async"):
        shaping([{"name": "scheduled", "shaper": mine("later"), "steps": 1}])


def test_mistakes_in_the_recipe_are_reward_errors_and_help(mine: Any) -> None:
    with pytest.raises(RewardError, match="unknown shaper 'overlogn'; did you mean 'overlong'"):
        shaping(["overlogn"])
    with pytest.raises(RewardError, match="unknown filter"):
        shaping(filters=["overlong"])
    with pytest.raises(RewardError, match="advantage_N"):
        shaping([mine("asks")])
    with pytest.raises(RewardError, match="buffer_share = 2.0"):
        shaping([{"name": "overlong", "buffer_share": 2.0}])
    with pytest.raises(RewardError, match="unknown shaper 'nope'"):
        shaping([{"name": "scheduled", "shaper": "nope", "steps": 1}])


def test_a_group_without_a_valid_verdict_passes_untouched(mine: Any) -> None:
    empty = shaping([mine("raises")], [mine("raises")])
    assert empty.shape(group()).shape == (0,) and empty.keep(group()) == ""


def test_memory_goes_through_json_and_comes_back(mine: Any) -> None:
    spec = (["affine", "running_scale", {"name": "scheduled", "shaper": "moving_baseline", "steps": 4}], [mine("seen")])
    groups = [group(*rewards) | {"step": i} for i, rewards in enumerate([(1, 0), (3, 1), (0, 2), (5, 5)])]

    def play(one: Shaping, some: list[dict[str, Any]]) -> list[tuple[list[float], str]]:
        return [(one.shape(have).tolist(), one.keep(have)) for have in some]

    whole = play(shaping(*spec), groups)
    first = shaping(*spec)
    before = play(first, groups[:2])
    saved = json.loads(json.dumps(first.memory()))
    assert set(saved) == {"shapers.1", "shapers.2", "filters.0"}
    resumed = shaping(*spec)
    resumed.restore(saved)
    assert before + play(resumed, groups[2:]) == whole
    assert play(shaping(*spec), groups[2:]) != whole[2:]  # without its memory it goes on differently


def test_another_recipe_s_memory_is_refused(mine: Any) -> None:
    saved = shaping(["running_scale"]).memory()
    for other in (shaping(["affine"]), shaping(["affine", "running_scale"]), shaping(), shaping(["moving_baseline"])):
        with pytest.raises(RewardError, match="resume with the recipe"):
            other.restore(saved)


def test_memory_that_no_checkpoint_can_hold_names_the_method(mine: Any) -> None:
    one = shaping([mine("unsaveable")])
    one.shape(group(1, 0))
    with pytest.raises(RewardError, match=r"shapers.0 .*mine.py:unsaveable remembers what no checkpoint can hold"):
        one.memory()


def test_a_shaper_of_one_s_own_sees_a_copy_of_its_words(mine: Any) -> None:
    have = group(1, 0)
    kept: Floats = have["reward_G"]
    shaping([mine("in_place")]).shape(have)
    assert have["reward_G"] is kept
