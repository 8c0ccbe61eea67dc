"""One life of the tortured process: a queue on its disk, engines and judges by script, and a learner."""

import asyncio
import random
import threading
from collections import Counter
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any

import numpy as np

from millrace.core import schema
from millrace.core.failpoint import reach
from millrace.core.protocols import Role
from millrace.core.replay import queue as queue_module
from millrace.core.replay.disk import DiskJournal
from millrace.core.replay.queue import ReplayQueue
from millrace.core.types import Group, GroupVerdict, Lease, Rollout, Verdict, VerdictKind, VersionRun, WorkerId
from millrace.core.weight_files import VersionGoneError
from millrace.core.weight_store import FileWeightStore
from millrace.core.weights import mapped
from tests.faults.torture_learner import ChainLearner
from tests.faults.torture_plan import LONGEST, Memory, Plan, Prompts, chance, digest, payload, told

DEADLINE_S = 60.0
# Every record there ever was, in the transaction that writes it; compaction does not touch these.
HISTORY = """
create table if not exists history (number integer primary key autoincrement, record text not null);
create trigger if not exists recorded after insert on records when new.record not like '{"op":"image"%'
begin insert into history (record) values (new.record); end;
"""


class Crash(Exception):
    """One component ends; the queue lives."""


class Engine:
    """A generation worker: what it samples follows from seeds and weights."""

    def __init__(self, life: "Life", name: str, memory: Memory) -> None:
        self.life, self.queue, self.name, self.memory = life, life.queue, WorkerId(name), memory
        self.now: dict[str, Any] = memory.load()

    def _save(self, **facts: Any) -> None:
        self.now |= facts
        self.memory.save(self.now)

    async def run(self) -> None:
        if not self.now or self.now["leaves"]:  # a run that goes on needs engines again
            epoch = await self.queue.join(self.name, role=Role.GENERATION, slots=8, generated=0)
            first = {
                "epoch": epoch,
                "version": -1,
                "weights": "",
                "generated": 0,
                "calls": 0,
                "packs": [],
                "failed": {},
            }
            self._save(**first, leaves=False)
        while True:
            await self._put()
            # The request is known to it before the call, and repeated until it was answered.
            grant = await self.queue.lease_draws(
                self.name,
                epoch=self.now["epoch"],
                version=self.now["version"],
                want=self.life.rng.choice([1, 2, 4]),
                request=f"lease {self.now['calls']}",
                wait_s=0.05,
            )
            if grant.finished:
                break
            reach("answer.lease")
            await self._generate(list(grant.leases), grant.newest_version)
        self._save(leaves=True)
        await self.queue.leave(self.name, epoch=self.now["epoch"], generated=self.now["generated"], abandoned={})

    async def _generate(self, leases: list[Lease], newest: int) -> None:
        groups, failed, more = [], {}, 0
        for lease in leases:
            if chance(12, "engine", lease.seeds):
                failed[lease.id] = "Traceback: out of memory"
                continue
            group = await self._sample(lease)
            more += group.tokens
            groups.append(group)
        packs = [schema.encode([group]) for group in groups] if self.life.rng.random() < 0.5 else []
        packs = packs or ([schema.encode(groups)] if groups else [])
        self._save(generated=self.now["generated"] + more, calls=self.now["calls"] + 1, packs=packs, failed=failed)
        if newest > self.now["version"]:
            await self._load(newest)
        if self.life.rng.random() < 0.5:
            progress = {group.id: group.tokens for group in groups}
            await self._heartbeat(progress)

    async def _heartbeat(self, progress: dict[Any, int]) -> int:
        now = self.now
        orders = await self.queue.heartbeat(
            self.name, epoch=now["epoch"], progress=progress, generated=now["generated"]
        )
        return orders.newest_version

    async def _load(self, version: int) -> None:
        while True:
            handle = await self.life.store.fetch(version)
            try:
                weights = bytes(mapped(handle)).decode()
                break
            except VersionGoneError:  # newer ones came in between, as they may: a worker fetches those
                version = await self._heartbeat({})
        self._save(version=handle.manifest.version, weights=weights)

    async def _sample(self, lease: Lease) -> Group:
        """Where newer weights are there at half the way, the other half is theirs."""
        parts = [(self.now["version"], self.now["weights"])]
        await asyncio.sleep(0)
        if self.life.rng.random() < 0.3:
            newest = await self._heartbeat({})
            if newest > self.now["version"]:
                await self._load(newest)
                parts.append((self.now["version"], self.now["weights"]))
        return Group(
            id=lease.id,
            prompt=lease.prompt,
            rollouts=tuple(rollout(seed, parts) for seed in lease.seeds),
            lease_epoch=lease.epoch,
        )

    async def _put(self) -> None:
        now = self.now
        if now["failed"]:
            failed = now["failed"]
            await self.queue.fail_groups(self.name, epoch=now["epoch"], failures=failed, request=f"f{now['calls']}")
            self._save(failed={})
        while now["packs"]:
            reach("generation.put.before")
            pack, request = now["packs"][0], f"put {now['calls']} {len(now['packs'])}"
            ids = [header.id for header in schema.headers(pack)]
            for group in schema.decode(pack):  # what is sampled and not remembered is sampled anew, and never sent
                told(self.life.root / "payloads", group.id.draw, group.id.attempt, payload(group))
            receipts = await self.queue.put_groups(self.name, epoch=now["epoch"], pack=pack, request=request)
            assert [receipt.id for receipt in receipts] == ids
            assert all(receipt.accepted or receipt.reason.startswith("fenced") for receipt in receipts), receipts
            for receipt in receipts:
                told(self.life.root / "promises", "put" if receipt.accepted else "refused", *receipt.id)
            reach("answer.put")
            if self.life.rng.random() < 0.3:  # as if the answer were lost, by another request
                await self.queue.put_groups(self.name, epoch=now["epoch"], pack=pack, request=f"again {request}")
            self._save(packs=now["packs"][1:])


def rollout(seed: int, parts: list[tuple[int, str]]) -> Rollout:
    length = 2 + seed % (LONGEST - 1)
    half = length // 2 if len(parts) > 1 else length
    tokens_T = np.array([int(digest(seed, at, parts[at >= half][1])[:4], 16) for at in range(length)], np.int32)
    ends = [(0, half), (half, length)]
    return Rollout(
        tokens_T=tokens_T,
        sampled_T=np.ones(length, np.bool_),
        behaviour_logprob_T=-(tokens_T % 97).astype(np.float32) / 97,
        versions=tuple(VersionRun(version, *ends[at]) for at, (version, _) in enumerate(parts)),
        finish_reason="stop",
        seed=seed,
    )


class Judge:
    """A reward worker: its verdicts follow from the tokens, and it fails on some seeds."""

    def __init__(self, life: "Life", name: str, memory: Memory) -> None:
        self.life, self.queue, self.name, self.memory = life, life.queue, WorkerId(name), memory
        self.now: dict[str, Any] = memory.load()

    def _save(self, **facts: Any) -> None:
        self.now |= facts
        self.memory.save(self.now)

    async def run(self) -> None:
        if not self.now:
            self._save(epoch=await self.queue.join(self.name, role=Role.REWARD, slots=8), calls=0)
        while not self.life.ended:
            request = f"lease {self.now['calls']}"
            pack = await self.queue.lease_groups(
                self.name, epoch=self.now["epoch"], want=2, request=request, wait_s=0.05
            )
            await asyncio.sleep(0)
            if pack:
                await self._put([judged(group) for group in schema.decode(pack)])
            self._save(calls=self.now["calls"] + 1)

    async def _put(self, verdicts: list[GroupVerdict]) -> None:
        reach("reward.put.before")
        call = {"epoch": self.now["epoch"], "verdicts": verdicts, "request": f"put {self.now['calls']}"}
        for receipt in await self.queue.put_verdicts(self.name, **call):
            if receipt.accepted:
                told(self.life.root / "promises", "verdict", *receipt.id)
        reach("answer.verdicts")
        if self.life.rng.random() < 0.3:
            receipts = await self.queue.put_verdicts(self.name, **{**call, "request": f"again {call['request']}"})
            assert not any(receipt.accepted for receipt in receipts), "one verdict was taken twice"


def judged(group: Group) -> GroupVerdict:
    seeds = tuple(each.seed for each in group.rollouts)
    if chance(14, "judge", seeds):
        one = Verdict(kind=VerdictKind.JUDGE_FAILED, score=None, feedback="no answer")
        return GroupVerdict(id=group.id, verdicts=(one,) * len(seeds))
    scores = [float(each.tokens_T.sum() % 7) / 7 for each in group.rollouts]
    return GroupVerdict(id=group.id, verdicts=tuple(Verdict(kind=VerdictKind.SCORED, score=score) for score in scores))


class Life:
    """Args: hook: of the failpoints; memories: by component, those of what outlived the last kill."""

    def __init__(self, plan: Plan, root: Path, seed: int, memories: dict[str, Memory]) -> None:
        self.plan, self.root, self.memories = plan, root, memories
        self.rng = random.Random(seed)
        queue_module._BEHIND = plan.behind
        self.journal = DiskJournal(root, plan.journal)
        self.queue = ReplayQueue(plan.queue, Prompts(), seed=plan.seed, journal=self.journal)
        connection = self.journal._connection
        assert connection is not None
        connection.executescript(HISTORY)
        self.store = FileWeightStore(str(root / "weights"), keep=2)
        self.ended = False

    async def run(self) -> None:
        """To the end of the run. Raises whatever fails."""
        crew: list[Coroutine[Any, Any, None]] = [
            self._staffed("learner", lambda memory: ChainLearner(self.plan, self.root, self.queue, self.store, memory)),
            *(self._staffed(name, lambda memory, name=name: Engine(self, name, memory)) for name in self.engines),
            *(self._staffed(name, lambda memory, name=name: Judge(self, name, memory)) for name in self.judges),
        ]
        learner, *workers = [asyncio.ensure_future(each) for each in crew]
        done, _ = await asyncio.wait([learner, *workers], return_when=asyncio.FIRST_EXCEPTION, timeout=DEADLINE_S)
        if not done or not all(task.done() for task in (learner, *workers)):
            for task in done:
                task.result()
            raise AssertionError(f"it stands still: {await self.queue.stalled()}")
        for task in (learner, *workers):
            task.result()
        assert not await self.queue.damage(), await self.queue.damage()
        await self.queue.export()
        await self.queue.close()

    @property
    def engines(self) -> list[str]:
        return [f"generation-{n}" for n in range(self.plan.engines)]

    @property
    def judges(self) -> list[str]:
        return [f"reward-{n}" for n in range(self.plan.judges)]

    async def _staffed(self, name: str, make: Callable[[Memory], Any]) -> None:
        """A component, and whoever follows it when it crashes."""
        while True:
            try:
                await make(self.memories[name]).run()
                break
            except Crash:
                self.memories[name].save({})
                told(self.root / "crashes", name)
                if name != "learner":
                    await self.queue.fence(WorkerId(name), cause="crashed")
        self.ended = self.ended or name == "learner"


class Trigger:
    """The n-th reach of a name; `act` gets the name."""

    def __init__(self, wanted: dict[str, tuple[int, Callable[[str], None]]]) -> None:
        self.seen: Counter[str] = Counter()
        self._wanted = wanted
        self._lock = threading.Lock()

    def __call__(self, name: str) -> None:
        with self._lock:
            self.seen[name] += 1
            number, act = self._wanted.get(name, (0, print))
            due = number == self.seen[name]
        if due:
            act(name)
