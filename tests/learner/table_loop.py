"""A learner on a table, and the queue in process that feeds it."""

import asyncio
from dataclasses import replace
from pathlib import Path

import numpy as np

from millrace.core import schema
from millrace.core.protocols import Feedback, QueueStatus, Resumption, Taken
from millrace.core.types import Group, GroupId, GroupVerdict, Prompt, Rollout, Verdict, VerdictKind, VersionRun
from millrace.core.weight_store import FileWeightStore
from millrace.core.weights import views
from millrace.learner.config import LearnerConfig
from millrace.learner.learner import Learner
from millrace.learner.report import StepReport

VOCABULARY, LENGTH = 6, 3
GRPO = {"advantage": "grpo", "surrogate": "clip", "corrections": ["truncated_importance"]}


class TableQueue:
    """Samples its batches from the published table: the reward is the share of tokens equal to 5."""

    def __init__(self, store: FileWeightStore, *, groups: int = 4, members: int = 8) -> None:
        self.store, self.groups, self.members = store, groups, members
        self.calls: list[str] = []
        self.resumption = Resumption(epoch=1, step=0, version=0)
        self.batches: dict[int, Taken] = {}
        self.feedback: list[Feedback] = []
        self.announced: list[int] = []
        self.commits: list[tuple[int, str, str]] = []
        self.versions = 0
        self.lag = 0
        self.poison: set[int] = set()
        self.hold = asyncio.Event()
        self.hold.set()

    async def join_learner(self) -> Resumption:
        self.calls.append("join")
        return self.resumption

    async def take(self, *, step: int, epoch: int, wait_s: float) -> Taken | None:
        self.calls.append(f"take {step}")
        await self.hold.wait()
        if self.calls.count(f"take {step}") == 1 and step == 0:
            return None  # a wait that ends empty-handed
        if step not in self.batches:
            self.batches[step] = await self.make(step)
        return self.batches[step]

    async def make(self, step: int) -> Taken:
        handle = await self.store.fetch(self.announced[-1])
        table = views(handle)["table"]
        version = handle.manifest.version
        rng = np.random.default_rng(step)
        groups = [self.group(step * self.groups + g, table, version, rng) for g in range(self.groups)]
        return Taken(
            step=step,
            pack=schema.encode(groups),
            verdicts=[self.judge(group) for group in groups],
            lag=[[self.lag] * self.members for _ in groups],
        )

    def group(self, draw: int, table: np.ndarray, version: int, rng: np.random.Generator) -> Group:
        prompt = np.array([1 + draw % 3], np.int32)
        rollouts = []
        for member in range(self.members):
            tokens, logprobs, last = [], [], int(prompt[-1])
            for place in range(LENGTH):
                z = table[last, min(place, table.shape[1] - 1)].astype(np.float64)
                p = np.exp(z - z.max())
                p /= p.sum()
                last = int(rng.choice(VOCABULARY, p=p))
                tokens.append(last)
                logprobs.append(np.log(p[last]))
            logprob_T = np.array(logprobs, np.float32)
            if draw in self.poison:
                logprob_T[0] = np.nan
            rollouts.append(
                Rollout(
                    tokens_T=np.array(tokens, np.int32),
                    sampled_T=np.ones(LENGTH, np.bool_),
                    behaviour_logprob_T=logprob_T,
                    versions=(VersionRun(version, 0, LENGTH),),
                    finish_reason="length",
                    seed=member,
                )
            )
        return Group(
            id=GroupId(draw, 0),
            prompt=Prompt(id=f"row:{draw % 3}", text="", tokens_P=prompt),
            rollouts=tuple(rollouts),
            lease_epoch=1,
        )

    def judge(self, group: Group) -> GroupVerdict:
        scores = [float((rollout.tokens_T == 5).mean()) for rollout in group.rollouts]
        return GroupVerdict(
            id=group.id, verdicts=tuple(Verdict(kind=VerdictKind.SCORED, score=score) for score in scores)
        )

    async def filtered(self, *, step: int, epoch: int, groups: dict[GroupId, str]) -> None:
        self.calls.append(f"filtered {step} " + ",".join(sorted(set(groups.values()))))
        kept = [g for g in schema.decode(self.batches[step].pack) if g.id not in groups]
        handle = await self.store.fetch(self.announced[-1])
        rng = np.random.default_rng(99)
        fresh = [
            self.group(1000 * len(self.calls) + i, views(handle)["table"], handle.manifest.version, rng)
            for i in range(self.groups - len(kept))
        ]
        every = [*kept, *fresh]
        self.batches[step] = replace(
            self.batches[step], pack=schema.encode(every), verdicts=[self.judge(g) for g in every]
        )

    async def trained(self, *, step: int, epoch: int, feedback: Feedback) -> int:
        self.calls.append(f"trained {step}")
        self.feedback.append(feedback)
        self.versions += 1
        return self.resumption.version + self.versions

    async def announce(self, *, version: int, epoch: int) -> None:
        self.calls.append(f"announce {version}")
        assert (await self.store.fetch(version)).manifest.version == version, "announced before it was published"
        self.announced.append(version)

    async def commit(self, *, step: int, directory: str, digest: str, epoch: int) -> None:
        self.calls.append(f"commit {step}")
        assert Path(directory).is_dir()
        self.commits.append((step, directory, digest))

    async def status(self) -> QueueStatus:
        """The ledger can fall back to its last commit alone."""
        return QueueStatus(
            step=0,
            committed_step=0,
            newest_version=0,
            states={},
            tokens={},
            lag_histogram={},
            idle={},
            calls={},
            commits=[step for step, _, _ in self.commits[-1:]],
        )


CONFIG = LearnerConfig(
    learning_rate=0.3,
    checkpoint_every=5,
    checkpoint_keep=1,
    token_budget=60,
    threads=1,
    device="cpu",
    probe_every=3,
    queue_deadline_s=2.0,
)


def make(tmp_path, table_dir, *, store=None, queue=None, config=CONFIG, max_filtered=100, **kwargs):
    config = config.model_copy(update={"max_filtered": max_filtered})
    store = store or FileWeightStore(str(tmp_path / "weights"))
    queue = queue or TableQueue(store)
    reports: list[StepReport] = []

    async def on_step(report: StepReport) -> None:
        reports.append(report)

    arguments = {"model": table_dir, "objective": GRPO, "steps": 6, "on_step": on_step, **kwargs}
    learner = Learner(config, queue=queue, store=store, directory=str(tmp_path / "checkpoints"), **arguments)
    return learner, queue, reports
