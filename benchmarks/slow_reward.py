"""The reward function of benchmarks/slow_verdicts.py: some of its verdicts take long, as those of a busy service do."""

import asyncio
import os
from hashlib import blake2b

from millrace.rewards.verifiers.text import position_match

SHARE, SECONDS = "SLOW_SHARE", "SLOW_S"  # of the environment, which every process of a run inherits


def is_slow(text: str, prompt: str, share: float) -> bool:
    """Whether this response's verdict takes long: a function of the rollout alone.

    >>> is_slow("1 2 3", "3 2 1", 0.0), is_slow("1 2 3", "3 2 1", 1.0)
    (False, True)
    """
    digest = blake2b(f"{prompt}\n{text}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") / 2**64 < share


async def slow_position_match(text: str, answer: str, prompt: str) -> float:
    """The share of characters that are right; a share of the verdicts sleeps first."""
    if is_slow(text, prompt, float(os.environ[SHARE])):
        await asyncio.sleep(float(os.environ[SECONDS]))
    return position_match(text, answer)
