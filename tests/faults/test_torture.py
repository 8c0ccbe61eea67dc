"""Hundreds of real kills of a real queue: no draw lost, none trained twice, every redone step the same."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.faults.torture_plan import FAILPOINTS
from tests.faults.torture_plants import PLANTS

ROOT = Path(__file__).parents[2]


def tortured(directory: Path, *, kills: int, seed: int, plant: str = "", at: str = "") -> dict[str, Any]:
    """In a process of its own, which has nothing heavy imported: its forks cost milliseconds."""
    call = [sys.executable, "-m", "tests.faults.torture", "--directory", str(directory)]
    call += ["--kills", str(kills), "--seed", str(seed), "--plant", plant]
    call += ["--at", at] if at else []
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    ran = subprocess.run(call, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=280)
    assert ran.returncode in (0, 1), ran.stderr
    facts: dict[str, Any] = json.loads(ran.stdout.splitlines()[-1])
    print({key: value for key, value in facts.items() if key != "found"})
    if not plant:
        assert ran.returncode == 0, ran.stdout
    return facts


def test_a_queue_that_is_killed_forty_times_loses_nothing(tmp_path: Path) -> None:
    facts = tortured(tmp_path, kills=40, seed=0)
    assert facts["kills"] >= 40 and facts["redone"] > 0
    assert all(facts["by"][name] for name in FAILPOINTS)


@pytest.mark.faults
@pytest.mark.parametrize("seed", [1])
def test_a_queue_that_is_killed_five_hundred_times_loses_nothing(tmp_path: Path, seed: int) -> None:
    facts = tortured(tmp_path, kills=500, seed=seed)
    assert facts["kills"] >= 500 and facts["runs"] >= 20
    assert facts["redone"] > 100 and facts["crashes"] > 30 and facts["spoilt"] > 3
    assert all(facts["by"][name] >= 10 for name in FAILPOINTS), facts["by"]
    assert facts["by"]["some time"] >= 50


AT = {  # where a kill shows it soonest, and what is said; "" for whatever it trips over first
    "commits_before_the_rename": ("learner.commit.before", "it is not there"),
    "answers_before_the_flush": ("answer.put", ""),
    "redoes_in_another_order": (
        "learner.step.after",
        "the learner's chain is not the ledger's|redone with another result",
    ),
    "accepts_a_put_twice": ("answer.put", "was accepted twice"),
    "moves_the_pointer_alone": ("learner.commit.after", ""),
    "compacts_in_two_transactions": ("journal.compact", ""),
    "rows_before_their_payload": ("journal.store.after", ""),
    "forgets_what_a_filter_did": ("learner.step.after", ""),
    "numbers_packs_anew": ("journal.flush.after", ""),  # refused by the table, or another group's row read before that
    "repeats_are_answered_no": ("answer.put", "was refused and is trained"),
}


@pytest.mark.faults
@pytest.mark.parametrize("plant", PLANTS)
def test_planted_bugs_are_found(tmp_path: Path, plant: str) -> None:
    at, said = AT[plant]
    facts = tortured(tmp_path, kills=100, seed=1, plant=plant, at=at)
    assert facts["found"], f"{plant} was not found by {facts['kills']} kills"
    assert re.search(said, facts["found"]), facts["found"]
