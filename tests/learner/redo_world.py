"""A real queue, a generator and a judge in process, and learners that are killed and followed by others."""

import asyncio
from collections import Counter
from collections.abc import Mapping
from contextlib import suppress
from typing import Any

import numpy as np

from millrace.core import schema
from millrace.core.failpoint import arm
from millrace.core.protocols import Role
from millrace.core.recipe import Updates
from millrace.core.replay.config import QueueConfig
from millrace.core.replay.queue import ReplayQueue
from millrace.core.types import Group, GroupVerdict, Lease, Prompt, Rollout, Verdict, VerdictKind, VersionRun
from millrace.core.weight_store import FileWeightStore
from millrace.learner.config import LearnerConfig
from millrace.learner.judged import Unshaped
from millrace.learner.learner import Learner


class Killed(BaseException):
    """The learner's process is gone."""


class Prompts:
    """Three prompts in turn."""

    def draw(self, index: int) -> Prompt:
        place = index % 3
        return Prompt(id=f"row:{place}", text=str(place), tokens_P=np.array([1 + place, 3], np.int32))


class Remembers(Unshaped):
    """Puts rewards on the scale of those before, adds noise, and filters what its memory says."""

    words = frozenset({"prompt", "reference_logprob_N"})

    def __init__(self) -> None:
        self.seen = 0
        self.scale = 1.0
        self.visits: dict[str, int] = {}

    def shape(self, have):
        self.seen += 1
        self.visits[have["prompt"]] = self.visits.pop(have["prompt"], 0) + 1
        drift = np.mean(have["reference_logprob_N"], dtype=np.float64)
        noise_G = np.random.normal(0, 0.1, len(have["reward_G"])).astype(np.float32)
        # Of NumPy's type until a checkpoint is read: against float32 arrays it computes in another precision.
        shift = 1e5 * self.scale
        reward_G = (have["reward_G"] + shift) - shift + noise_G
        self.scale = np.float64(0.9) * self.scale + 0.1 * np.mean(have["reward_G"]) + 0.01 * drift
        return reward_G

    def keep(self, have):
        return "often" if sum(self.visits.values()) % 5 == 0 and next(reversed(self.visits)) == have["prompt"] else ""

    def memory(self):
        return {"seen": self.seen, "scale": self.scale, "visits": dict(self.visits)}

    def restore(self, saved):
        self.seen, self.scale, self.visits = saved["seen"], saved["scale"], dict(saved["visits"])


class World:
    """One run: the queue and the store outlive the learners.

    Args:
        kills: the learner is killed when it reaches these, one after the other: name of a failpoint or of a call of
            the queue, and how often the incarnation reaches it before. "trained" dies when it was answered.
        fetches: after this step somebody has got the reports of all steps so far.
    """

    def __init__(
        self,
        root,
        model: str,
        *,
        queue: Mapping[str, Any] = {},
        config: Mapping[str, Any] = {},
        steps: int = 6,
        vocabulary: int = 6,
        poison: frozenset[int] = frozenset(),
        kills: tuple[tuple[str, int], ...] = (),
        fetches: int = 0,
        **learner: Any,
    ) -> None:
        self.root, self.model, self.vocabulary, self.poison = root, model, vocabulary, poison
        sizes = {"groups_per_step": 3, "group_size": 4, "steps": steps, "max_lag": 0, **queue}
        self.queue = ReplayQueue(QueueConfig.parse(sizes, source="test"), Prompts(), seed=0)
        self.store = FileWeightStore(str(root / "weights"), keep=2)
        values = {"learning_rate": 0.05, "checkpoint_every": 2, "token_budget": 40, "threads": 1, "device": "cpu"}
        self.config = LearnerConfig.parse({**values, "queue_deadline_s": 5.0, **config}, source="test")
        if fetches:

            async def fetched(report: Any) -> None:
                if report.step == fetches:
                    await self.learners[-1].reports(after=fetches)

            learner["on_step"] = fetched
        self.arguments = {"objective": {"advantage": "grpo", "surrogate": "clip"}, "steps": steps, **learner}
        self.kills = list(kills)
        self.made: list[tuple[int, int, str]] = []  # epoch, step, digest of the weights after it
        self.batches: list[tuple[int, int, list]] = []  # epoch, step, ids of the groups as they were taken
        self.learners: list[Learner] = []
        self.events: list[Mapping[str, Any]] = []

    # -- what the learner calls

    def __getattr__(self, name: str) -> Any:
        method = getattr(self.queue, name)

        async def call(**kwargs: Any) -> Any:
            answer = await method(**kwargs)
            self.reached(f"queue.{name}")
            if name == "take" and answer is not None:
                ids = [group.id for group in schema.decode(answer.pack)]
                self.batches.append((kwargs["epoch"], kwargs["step"], ids))
            return answer

        return call

    async def pour(self, packing: Any) -> Any:
        manifest = await self.store.pour(packing)
        self.made.append((manifest.epoch, manifest.step, manifest.digest))
        return manifest

    def reached(self, name: str) -> None:
        self._reached[name] += 1
        if self.kills and self.kills[0] == (name, self._reached[name]):
            self.kills.pop(0)
            raise Killed(name)

    # -- the run

    def run(self) -> "World":
        asyncio.run(self._run())
        return self

    async def _run(self) -> None:
        feeder = asyncio.create_task(self._feed())
        arm(self.reached)
        try:
            while True:
                self._reached: Counter[str] = Counter()
                learner = Learner(
                    self.config,
                    model=self.model,
                    queue=self,
                    store=self,
                    directory=str(self.root / "checkpoints"),
                    max_tokens=3,
                    **self.arguments,
                )
                self.learners.append(learner)
                try:
                    await learner.run()
                    return
                except Killed:
                    pass
                finally:
                    self.events += await learner.events(after=0)
        finally:
            arm(None)
            feeder.cancel()
            with suppress(asyncio.CancelledError):
                await feeder

    async def _feed(self) -> None:
        """Generate and judge what the queue hands out. What is sampled depends on the draw alone."""
        queue = self.queue
        g = await queue.join("g", role=Role.GENERATION, slots=8)
        r = await queue.join("r", role=Role.REWARD, slots=8)
        version, request = -1, 0
        while True:
            request += 1
            grant = await queue.lease_draws("g", epoch=g, version=version, want=2, request=f"{request}", wait_s=0.0)
            version = max(version, grant.newest_version)
            if grant.leases:
                pack = schema.encode([self._group(lease, version) for lease in grant.leases])
                await queue.put_groups("g", epoch=g, pack=pack, request=f"{request}")
            pack = await queue.lease_groups("r", epoch=r, want=8, request=f"{request}", wait_s=0.0)
            if pack:
                verdicts = [self._judge(group) for group in schema.decode(pack)]
                await queue.put_verdicts("r", epoch=r, verdicts=verdicts, request=f"{request}")
            await asyncio.sleep(0 if grant.leases else 0.001)

    def _group(self, lease: Lease, version: int) -> Group:
        rng = np.random.default_rng(lease.id.draw)
        rollouts = []
        for seed in lease.seeds:
            length = int(rng.integers(1, 4))
            logprob_T = -rng.random(length, dtype=np.float32)
            if lease.id.draw in self.poison:
                logprob_T[0] = np.nan
            rollouts.append(
                Rollout(
                    tokens_T=rng.integers(0, self.vocabulary, length, dtype=np.int32),
                    sampled_T=np.ones(length, np.bool_),
                    behaviour_logprob_T=logprob_T,
                    versions=(VersionRun(version, 0, length),),
                    finish_reason="length",
                    seed=seed,
                )
            )
        return Group(id=lease.id, prompt=lease.prompt, rollouts=tuple(rollouts), lease_epoch=lease.epoch)

    def _judge(self, group: Group) -> GroupVerdict:
        scores = [float((rollout.tokens_T % 3 == 0).mean()) for rollout in group.rollouts]
        return GroupVerdict(
            id=group.id, verdicts=tuple(Verdict(kind=VerdictKind.SCORED, score=score) for score in scores)
        )

    def digests(self) -> dict[int, set[str]]:
        """Step -> digests of the weights after it, over all incarnations."""
        found: dict[int, set[str]] = {}
        for _, step, digest in self.made:
            found.setdefault(step, set()).add(digest)
        return found

    def surviving(self) -> dict[int, str]:
        """Step -> digest, of the last incarnation that made it."""
        return {step: digest for _, step, digest in self.made}


MEMORY = {"shaping": Remembers, "updates": Updates(epochs=2, minibatches=2)}
