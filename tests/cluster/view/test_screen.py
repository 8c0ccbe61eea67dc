"""One picture gives one text, in any size, and with whatever is missing."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import pytest
from rich.console import Console

from millrace.cluster.snapshot import Status
from millrace.cluster.view.charts import ASCII, BLOCKS, Glyphs
from millrace.cluster.view.screen import BY_IMPORTANCE, render

Rows = list[Mapping[str, Any]]
IDLE = (
    "64 rollout slots stay idle: at step 40, version 40 (lag 0) max_lag = 4 admits no more; max_lag = 8 would fill them"
)

RUNNING = Status(
    id="/runs/sorting",
    state="running",
    name="sorting",
    pid=12,
    host="node-a",
    started_s=1000.0,
    time_s=1600.0,
    step=40,
    steps=200,
    committed_step=20,
    version=40,
    reward=0.4,
    held_out={"step": 40, "mean": 0.45},
    lag={"mean": 1.25, "max": 4},
    draws={"waiting": 0, "leased": 48, "judging": 8, "in_step": 16, "trained": 100, "committed": 300, "filtered": 7},
    tokens={"generated": 10_000, "trained": 9_000, "masked": 0, "filtered:zero_variance": 960, "in_flight": 40},
    rates={"generated_tokens_per_s": 3600.0, "trained_tokens_per_s": 1800.0, "samples_per_s": 14.25},
    learner={"phase": "computing", "phase_s": 0.3, "wait_share": 0.125},
    waits={"generation-0": IDLE, "reward-0": "no generated group", "reward-1": "no generated group"},
    eta_s=2400.0,
)
EMPTY = Status(id="/runs/sorting", state="starting", name="sorting", started_s=1000.0, time_s=1001.0, steps=200)


def step(number: int) -> dict[str, Any]:
    return {
        "step": number,
        "reward/mean": number / 100,
        "time/wait_s": 1.0,
        "time/compute_s": 7.0,
        "lag_0/tokens": 100,
        "lag_2/tokens": 300,
    }


def evaluation(number: int, mean: float | None) -> dict[str, Any]:
    return {"step": number, "held_out/mean": mean, "held_out": {"step": number, "mean": mean}}


ROWS: Rows = [evaluation(0, 0.05), evaluation(20, 0.25), evaluation(40, 0.45), *map(step, range(1, 41))]
EVENTS: Rows = [
    {"time_s": 1000.5, "kind": "started", "step": 0},
    {"time_s": 1100.0, "kind": "evaluated", "step": 0},
    {"time_s": 1150.0, "kind": "tracker failed", "tracker": "wandb", "cause": "ConnectionError:\n no route"},
]


def shown(
    status: Status,
    rows: Rows = ROWS,
    events: Rows = EVENTS,
    *,
    width: int = 80,
    height: int = 24,
    glyphs: Glyphs = BLOCKS,
    **more: Any,
) -> list[str]:
    console = Console(width=width, height=500, color_system=None, legacy_windows=False)
    with console.capture() as captured:
        console.print(render(status, rows, events, width, height, glyphs=glyphs, **more))
    return captured.get().removesuffix("\n").split("\n")


@pytest.mark.parametrize("width", [60, 80, 120, 200])
@pytest.mark.parametrize("height", [3, 10, 24, 30, 50])
@pytest.mark.parametrize("glyphs", [BLOCKS, ASCII])
def test_it_stays_within_any_terminal(width: int, height: int, glyphs: Glyphs) -> None:
    for status, rows in ((RUNNING, ROWS), (EMPTY, []), (RUNNING, [])):
        lines = shown(status, rows, width=width, height=height, glyphs=glyphs)
        assert len(lines) <= height
        assert max(map(len, lines)) <= width
        assert shown(status, rows, width=width, height=height, glyphs=glyphs) == lines
        if glyphs is ASCII and (width < 100 or height < 30):  # the boxes of panels are the console's
            assert "".join(lines).isascii()


@pytest.mark.parametrize("width", [60, 80, 120, 200])
def test_what_a_person_asks_for_is_there(width: int) -> None:
    text = "\n".join(shown(RUNNING, width=width, height=50, recipe="grpo"))
    for said in ("sorting · grpo", "running  10:00", "step 40/200", "20%  eta 40:00", "0.400", "0.450", "1.25"):
        assert said in text
    assert "@40" in text
    assert "3.6k tok/s" in text
    assert "1.8k tok/s" in text
    assert "25%" in text and "75%" in text, "shares of the tokens at lag 0 and 2"
    assert "generating" in text and "48" in text and "in step" in text
    assert "10.0k" in text and "90%" in text and "filtered:zero" in text and "<1%" in text
    assert "waits 12% of its time; computing for 0.3 s" in " ".join(text.split())
    assert "generation-0" in text and "64 rollout slots stay idle" in text
    assert "reward x2     no generated group" in text, "who waits for the same shares a line"
    assert "2:30  tracker failed  tracker wandb, Connectio" in text
    assert "evaluated" not in text, "the held-out curve says it"


def test_a_whole_small_screen() -> None:
    assert shown(RUNNING, width=70, height=11, recipe="grpo") == [
        "sorting · grpo · version 40 · committed 20 · node-a 12  running  10:00",
        "step 40/200 ━━━━━━━━──────────────────────────────────  20%  eta 40:00",
        "",
        "reward     0.400  ▁▁▁▂▂▂▃▃▃▃▄▄▄▄▅▅▅▆▆▆▆▇▇▇▇██  0.010–0.400  steps 1–40",
        "held out   0.450 @40  ▁▅█  0.050 @0  0.250 @20",
        "lag       1.25 of 4  ▃ █  0: 25% · 2: 75%",
        "rates     generate 3.6k tok/s · learn 1.8k tok/s · 14.2 samples/s",
        "waits     learner waits 12% · generation-0: 64 rollout slots stay … +1",
        "draws     generating 48 · judging 8 · in step 16 · trained 400 · …",
        "tokens    10.0k generated · trained 90% · …",
        "events       2:30  tracker failed  tracker wandb, ConnectionError: no…",
    ]


def test_the_least_important_leaves_first() -> None:
    wanted = [section for section in BY_IMPORTANCE if section.title != "health"]
    for many in range(len(wanted) + 1):
        lines = shown(RUNNING, height=3 + many)
        there = {line[:9].strip() for line in lines[3:]}
        assert there == {section.title for section in wanted[:many]}


def test_panels_are_as_wide_as_the_terminal() -> None:
    lines = shown(RUNNING, width=141, height=40)
    boxes = [line for line in lines if line.startswith(("╭", "│", "╰"))]
    assert len(boxes) > 20
    assert {len(line) for line in boxes} == {141}
    assert sum(line.count("─ lag ─") + line.count("─ tokens ─") for line in lines) == 2


def test_before_the_first_step_it_says_that_there_is_nothing_yet() -> None:
    text = "\n".join(shown(EMPTY, []))
    for said in ("starting  0:01", "step 0/200", "0%  eta -", "no step yet", "not evaluated yet", "none generated yet"):
        assert said in text
    for size in ((60, 10), (120, 40), (200, 60)):
        assert shown(EMPTY, [], [], width=size[0], height=size[1])


def test_values_that_are_missing_are_gaps() -> None:
    rows: Rows = [
        {"step": 1, "reward/mean": 0.5},
        {"step": 2, "reward/mean": None},
        {"step": 3, "reward/mean": 1.0},
        evaluation(0, None),
    ]
    lines = shown(RUNNING, rows, height=11)
    chart = next(line for line in lines if line.startswith("reward")).split("  ")
    assert "1.000" in chart[0] + chart[1] + chart[2] + chart[3]
    assert "no score" not in lines[3]
    assert any(line.startswith("held out       -") and "@0" in line for line in lines)
    only_none: Rows = [{"step": 1, "reward/mean": None}]
    assert any("no judged rollout yet" in line for line in shown(RUNNING, only_none))


@pytest.mark.parametrize(("width", "height"), [(60, 6), (80, 24), (200, 60)])
def test_an_error_is_shown_in_full_whatever_the_size(width: int, height: int) -> None:
    message = f"reward mine.py:score raised ValueError: {' '.join(map(str, range(150)))}\n  File 'mine.py', line 5\nend"
    failed = replace(RUNNING, state="failed", error={"kind": "RewardError", "message": message})
    lines = shown(failed, width=width, height=height)
    inside = " ".join(line.strip("│╭╰╮╯─ ") for line in lines)
    assert "RewardError: reward mine.py:score" in inside
    assert all(f" {number} " in inside for number in range(150))
    assert "File 'mine.py', line 5" in inside and " end " in inside
    assert max(map(len, lines)) <= width


def test_a_run_that_ended_counts_no_further_and_has_no_eta() -> None:
    finished = replace(RUNNING, state="finished", step=200, eta_s=None)
    text = "\n".join(shown(finished, now_s=99_999.0))
    assert "finished  10:00" in text
    assert "100%" in text
    assert "eta" not in text
    assert "no word" not in text


def test_an_event_is_a_line_whatever_it_says() -> None:
    event = {"time_s": 1160.0, "kind": "lost", "component": "a\nb", "holds": ["draw 1", "draw 2"], "pid": 4}
    lines = shown(RUNNING, events=[event], width=100, height=28)
    assert any("lost  component a b, draw 1, draw 2, pid 4" in line for line in lines)


def test_a_run_that_says_nothing_is_noticed() -> None:
    assert "no word for 1:40  running  11:40" in shown(RUNNING, now_s=1700.0)[0]
    assert "no word" not in shown(RUNNING, now_s=1610.0)[0]


def test_a_supervised_run_shows_its_loss() -> None:
    rows: Rows = [{"step": number, "train/loss": 3 / number} for number in range(1, 30)]
    lines = shown(RUNNING, rows, height=8)
    assert any(line.startswith("loss       0.103") for line in lines)
    assert not any(line.startswith(("reward", "held out", "lag", "draws")) for line in lines)


def part(state: str = "serving", restarts: int = 0) -> Any:
    return {"state": state, "pid": 4, "node": "a", "restarts": restarts, "since_s": 1.0}


PARTS = {"queue": part(), "learner": part(restarts=1), "generation-0": part("restarting", 2), "held-out": part("left")}
LOST = "generation-0 was lost: its process ended by signal 9"
HURT = replace(RUNNING, components=PARTS, incidents=3, incident=LOST)
STALL = {
    "time_s": 1500.0,
    "kind": "stalled",
    "silent_s": 60.0,
    "why": "nothing was committed for 60 s\nstep 41 waits for draw 77 (prompt train:12)\nlook at generation-0",
}


@pytest.mark.parametrize(("width", "height"), [(80, 24), (100, 24), (100, 28), (130, 40), (60, 10)])
def test_once_something_was_lost_there_is_a_line_of_components(width: int, height: int) -> None:
    well = "\n".join(shown(replace(RUNNING, components={name: part() for name in PARTS}), width=width, height=height))
    assert "health" not in well and "serving" not in well
    lines = shown(HURT, width=width, height=height)
    text = "\n".join(lines)
    assert "health" in text and "generation-0 restarting" in text and "3 restarts" in text
    assert len(lines) <= height and max(map(len, lines)) <= width
    if height >= 24:
        assert "1 serving" not in well and "2 serving" in text
        assert "3 incidents, the last: generation-0 was lost: its process" in text


def test_quarantined_prompts_are_told_with_the_last_one() -> None:
    event = {"time_s": 1170.0, "kind": "quarantined", "prompt": "train:17", "cause": "crashed", "traceback": "a\nb"}
    hurt = replace(HURT, quarantined=2)
    text = "\n".join(shown(hurt, events=[*EVENTS, event], width=130, height=40))
    assert "2 prompts quarantined, the last: train:17 (crashed)" in text
    assert "traceback" not in text, "it is as long as it is"
    assert "2 prompts quarantined" in "\n".join(shown(hurt, width=80, height=10))
    assert "quarantined" not in "\n".join(shown(HURT, width=130, height=40))


@pytest.mark.parametrize(("width", "height"), [(80, 24), (100, 24), (130, 40), (60, 9), (60, 3)])
def test_a_run_that_stands_still_says_why(width: int, height: int) -> None:
    lines = shown(RUNNING, events=[*EVENTS, STALL], width=width, height=height)
    inside = " ".join(" ".join(lines).split())
    assert "nothing was committed for 60 s" in inside
    assert len(lines) <= height and max(map(len, lines)) <= width
    assert ("look at generation-0" in inside) == (height >= 9)


def test_a_stall_that_is_over_is_an_event_like_others() -> None:
    rows: Rows = [*ROWS, {**step(41), "time_s": 1501.0}]
    for status, seen in ((RUNNING, rows), (replace(RUNNING, state="finished"), ROWS)):
        assert "╭─ stalled" not in "\n".join(shown(status, seen, [STALL], width=80, height=24))
    assert "╭─ stalled" in "\n".join(shown(RUNNING, [{**step(41), "time_s": 1499.0}], [STALL], width=80, height=24))


CAUSES = {"idle/data_s": 1.2, "idle/judge_s": 0.8, "idle/weights_s": 0.3, "idle/scheduler_s": 0.2}


def test_the_learner_waits_for_something() -> None:
    rows: Rows = [{**step(number), **CAUSES, "time/wait_s": 2.5, "time/step_s": 10.0} for number in range(1, 41)]
    half = replace(RUNNING, learner={"phase": "computing", "phase_s": 0.3, "wait_share": 0.5})
    text = " ".join("\n".join(shown(half, rows, width=110, height=24)).split())
    assert "waits 50% (data 24%, judge 16%, weights 6%, scheduler 4%); computing for 0.3 s" in text
    assert "learner waits 50%, mostly for data" in "\n".join(shown(half, rows, width=80, height=11))
    panels = "\n".join(shown(half, rows, width=130, height=40))
    assert "time     computing 70% · data 12% · judge 8% · other 5%" in panels
    bars = "\n".join(shown(half, rows, width=130, height=60))
    assert "time of the learner" in bars and "wait: data       12%" in bars and "wait: scheduler   2%" in bars


@pytest.mark.parametrize(("width", "height"), [(80, 24), (100, 24), (130, 40)])
def test_the_books_always_have_their_last_row(width: int, height: int) -> None:
    books = {**RUNNING.tokens, "failed:crashed": 33, "unaccounted": 0}
    assert "unaccounted" in "\n".join(shown(replace(RUNNING, tokens=books), width=width, height=height))


def test_tokens_that_are_not_accounted_for_stand_out() -> None:
    short = replace(RUNNING, tokens={"generated": 100, "trained": 90, "unaccounted": 10})
    console = Console(width=80, force_terminal=True, color_system="standard")
    with console.capture() as captured:
        console.print(render(short, ROWS, EVENTS, 80, 24))
    assert "\x1b[1;31munaccounted 10%" in captured.get()
