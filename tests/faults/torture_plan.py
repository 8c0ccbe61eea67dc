"""What one tortured run is like, and what it remembers outside of the process that is killed."""

import hashlib
import mmap
import os
import pickle
import random
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import numpy as np

from millrace.core.replay.config import QueueConfig
from millrace.core.replay.journal import JournalConfig
from millrace.core.types import Group, Prompt

FAILPOINTS = (
    "journal.store.before",
    "journal.store.torn",
    "journal.store.after",
    "journal.flush.before",
    "journal.flush.after",
    "journal.compact",
    "journal.seal",
    "learner.step.before",
    "learner.step.after",
    "learner.checkpoint.write",
    "learner.commit.before",
    "learner.commit.after",
    "weights.publish.half",
    "generation.put.before",
    "reward.put.before",
    # Of the scripts: the call has been answered, and nobody has noted the answer.
    "answer.lease",
    "answer.put",
    "answer.verdicts",
    "answer.trained",
)
SOFT = ("generation.put.before", "learner.step.before", "learner.step.after", "learner.commit.before")
PROMPTS = 17
LONGEST = 6  # tokens of a rollout


def digest(*parts: object) -> str:
    return hashlib.sha256(repr(parts).encode()).hexdigest()


def chance(one_in: int, *parts: object) -> bool:
    """True for one in so many, by what is said alone."""
    return int(digest(*parts)[:8], 16) % one_in == 0


@dataclass(frozen=True, kw_only=True)
class Plan:
    """Drawn from a seed."""

    seed: int
    max_lag: int
    reuse: int = 1
    stale: str = "wait"
    filters: bool = False
    engines: int = 1
    judges: int = 1
    keep_commits: int = 2
    keep_rollouts: str = "all"
    sample_every: int = 3
    cache_bytes: int = 1 << 20
    checkpoint_every: int = 2
    ahead: bool = False  # the learner takes one step ahead now and then
    steps: int = 16
    behind: int = 40  # records before a compaction

    @classmethod
    def of(cls, seed: int) -> Self:
        rng = random.Random(seed)
        max_lag = (0, 2, 4)[seed % 3]
        return cls(
            seed=seed,
            max_lag=max_lag,
            reuse=rng.choice([1, 1, 2]) if max_lag else 1,
            stale=rng.choice(["wait", "mask", "train", "drop", "requeue"]) if max_lag else "wait",
            filters=rng.random() < 0.5,
            engines=rng.choice([1, 2]),
            judges=rng.choice([1, 2]),
            keep_commits=rng.choice([1, 2, 3]),
            keep_rollouts=rng.choice(["all", "needed", "sample"]),
            cache_bytes=rng.choice([0, 1 << 20]),
            checkpoint_every=rng.choice([1, 2, 3]),
            ahead=rng.random() < 0.3,
            behind=rng.choice([10, 40, 120]),
        )

    @property
    def queue(self) -> QueueConfig:
        values = {
            "groups_per_step": 3,
            "group_size": 2,
            "steps": self.steps,
            "max_lag": self.max_lag,
            "reuse": self.reuse,
            "stale": self.stale,
            "requeues": 1 if self.stale == "requeue" else 0,
            "keep_commits": self.keep_commits,
            "crashes": 10**6,
        }
        return QueueConfig.parse(values, source=f"seed {self.seed}")

    @property
    def journal(self) -> JournalConfig:
        values = {
            "keep_rollouts": self.keep_rollouts,
            "sample_every": self.sample_every,
            "segment_bytes": 1 << 12,
            "cache_bytes": self.cache_bytes,
            "fsync_s": 0.02,
        }
        return JournalConfig.parse(values, source=f"seed {self.seed}")

    @property
    def same_draws(self) -> bool:
        """Which draws are trained does not depend on time."""
        return self.reuse == 1 and self.stale not in ("drop", "requeue")


class Prompts:
    """Some prompts in turn."""

    def draw(self, index: int) -> Prompt:
        place = index % PROMPTS
        return Prompt(id=f"row:{place}", text=str(place), tokens_P=np.array([1 + place, 3], np.int32))


class Memory:
    """What a process beside the killed one remembers: in pages shared with the parent, whole at every moment."""

    SIZE = 1 << 18

    def __init__(self) -> None:
        self._pages = mmap.mmap(-1, 1 + 2 * self.SIZE)
        self.save({})

    def save(self, data: dict[str, Any]) -> None:
        text = pickle.dumps(data)
        assert len(text) < self.SIZE
        other = 1 - self._pages[0]
        start = 1 + other * self.SIZE
        self._pages[start : start + len(text)] = text
        self._pages[0] = other

    def load(self) -> dict[str, Any]:
        start = 1 + self._pages[0] * self.SIZE
        return dict(pickle.loads(self._pages[start : start + self.SIZE]))


def told(path: Path, *words: object) -> None:
    """One line more, which a kill does not take away."""
    fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o644)
    try:
        os.write(fd, (" ".join(map(str, words)) + "\n").encode())
    finally:
        os.close(fd)


def lines(path: Path) -> list[list[str]]:
    return [line.split() for line in path.read_text().splitlines()] if path.exists() else []


def payload(group: Group) -> str:
    """Of everything that an engine says of a group."""
    facts: list[object] = [tuple(group.id), group.lease_epoch, group.prompt.id]
    for each in group.rollouts:
        arrays = (each.tokens_T.tobytes(), each.sampled_T.tobytes(), each.behaviour_logprob_T.tobytes())
        facts.append((arrays, [tuple(run) for run in each.versions], each.finish_reason, each.seed))
    return digest(facts)


def sampled(group: Group) -> str:
    """Of what a synchronous run samples again after any crash."""
    rollouts = [(each.tokens_T.tobytes(), each.behaviour_logprob_T.tobytes(), each.seed) for each in group.rollouts]
    return digest(group.id.draw, group.prompt.id, rollouts)


def dull(plan: Plan, draw: int) -> bool:
    """A filter rejects it."""
    return plan.filters and chance(6, "dull", draw)
