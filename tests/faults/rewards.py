"""Rewards that fail in every way there is. Rows are `a=b` with the answer b and the level a."""

import asyncio
import ctypes
import os
import re
import signal
import time
from pathlib import Path
from typing import Any

POISON = "3=4"
PACE_S = 0.3
BAD = [float("nan"), float("inf"), float("-inf"), "1.0", None, 1e30, 1 + 0j, 10**400]


async def slow(text: str, answer: str, level: int) -> float:
    """An eighth of them take a hundred times as long."""
    if level == 3:
        await asyncio.sleep(0.3)
    return float(text == answer)


def hangs_on_one(text: str, answer: str, prompt: str) -> float:
    if prompt == POISON:
        time.sleep(20)
    return float(text == answer)


def raises_on_one(text: str, answer: str, prompt: str) -> float:
    if prompt == POISON:
        raise ValueError("this row has no answer")
    return float(text == answer)


def raises_on_half(text: str, answer: str, level: int) -> float:
    if level % 2:
        raise ValueError("odd levels have no answer")
    return float(text == answer)


def bad_values(text: str, answer: str, level: int) -> Any:
    """What is no number, for responses that begin with a 7."""
    if text.startswith("7"):
        return BAD[level]
    return 0.5


async def never(text: str) -> float:
    await asyncio.Event().wait()
    return 1.0


def half(text: str) -> float:
    return 0.5


async def paced(text: str, answer: str, *, gate: str, pace_s: float = PACE_S) -> float:
    """Slow enough that a run lasts as long as its test, until the gate is open."""
    if not Path(gate).exists():
        await asyncio.sleep(pace_s)
    return float(text == answer)


async def hungry(text: str, answer: str, *, gate: str, meal: str) -> float:
    """As `paced`; and it takes much memory for a moment, where the file of the meal says so."""
    if Path(meal).exists():
        assert sum(bytearray(b"1") * (64 * 2**20)) > 0
    return await paced(text, answer, gate=gate)


def kills_its_process(text: str, answer: str, prompt: str) -> float:
    if prompt == POISON:
        os.kill(os.getpid(), signal.SIGKILL)
    return float(text == answer)


def segfaults(text: str, answer: str, prompt: str) -> float:
    if prompt == POISON:
        ctypes.string_at(0)
    return float(text == answer)


def holds_the_interpreter(text: str, answer: str, prompt: str) -> float:
    """A match of hours: no other thread of the process runs meanwhile."""
    if prompt == POISON:
        re.match("(a+)+b", "a" * 60)
    return float(text == answer)


def named(function: Any) -> str:
    """As a run's configuration names it."""
    return f"{Path(__file__).resolve()}:{function.__name__}"
