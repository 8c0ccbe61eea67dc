"""A learner without tensors: its weights are a chain of digests over all that it was given, in order.

Each phase repeats the call that a lost answer belongs to, so that it may outlive the queue; where it dies itself, it
goes on from the last commit, as `millrace.learner` does.
"""

import asyncio
import json
import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np

from millrace.core import schema
from millrace.core.failpoint import reach
from millrace.core.protocols import Feedback, Manifest, Resumption, Taken
from millrace.core.replay.judge_rules import plain
from millrace.core.replay.queue import ReplayQueue
from millrace.core.weight_store import FileWeightStore
from millrace.core.weights import digest_of, layout
from tests.faults.torture_plan import Memory, Plan, chance, digest, dull, payload, sampled, told

FIRST = {"weights": digest("weights"), "exact": digest("exact"), "seen": digest("seen")}
TENSORS = layout([("chain", "float32", (16,))])


class ChainLearner:
    """Args: memory: what it knew when the queue died; empty for a new process."""

    commits_first = False  # planted: the ledger points to a checkpoint before it is there

    def __init__(self, plan: Plan, root: Path, queue: ReplayQueue, store: FileWeightStore, memory: Memory) -> None:
        self.plan, self.root, self.queue, self.store, self.memory = plan, root, queue, store, memory
        self.now: dict[str, Any] = memory.load() or {"phase": "join"}

    async def run(self) -> None:
        while self.now["phase"] != "done":
            await getattr(self, f"_{self.now['phase']}")()
            await asyncio.sleep(0)

    def _goes_on(self, phase: str, **facts: Any) -> None:
        self.now |= {"phase": phase, **facts}
        self.memory.save(self.now)

    async def _join(self) -> None:
        found = await self.queue.join_learner()
        while found.directory and (why := damaged(Path(found.directory), found.digest)):
            assert why == "spoilt", f"the ledger points to {found.directory}: {why}"
            told(self.root / "promises", "reverted", found.earlier[0])
            await self.queue.revert(step=found.earlier[0])
            found = await self.queue.join_learner()
        promised = [line.split() for line in read(self.root / "promises")]
        least = next((int(step) for what, step, *_ in reversed(promised) if what in ("commit", "reverted")), 0)
        assert found.step >= least, f"commit {least} was answered, and the run resumes from {found.step}"
        state = json.loads((Path(found.directory) / "state.json").read_text()) if found.directory else FIRST
        self._collect(found)
        self._goes_on("publish", epoch=found.epoch, step=found.step, version=found.version, since=0, **state)

    def _collect(self, found: Resumption) -> None:
        """Half written, or of steps that are not history any more."""
        for path in (self.root / "checkpoints").glob("step_*"):
            step = int(path.name.split("_")[1].partition(".")[0])
            if path.suffix == ".partial" or step > found.step or (step == found.step and str(path) != found.directory):
                shutil.rmtree(path)

    async def _publish(self) -> None:
        now = self.now
        buffer = np.frombuffer(now["weights"].encode(), np.uint8)
        manifest = Manifest(
            version=now["version"], step=now["step"], epoch=now["epoch"], tensors=TENSORS, digest=digest_of(buffer)
        )
        await self.store.publish(manifest, buffer)
        await self.queue.announce(version=now["version"], epoch=now["epoch"])
        ended = now["step"] == self.plan.steps
        due = now["since"] and (ended or now["step"] % self.plan.checkpoint_every == 0)
        following = "commit" if due else "done" if ended else "take"
        self._goes_on(following, before=now["seen"], judged=[])

    async def _take(self) -> None:
        now, step, epoch = self.now, self.now["step"], self.now["epoch"]
        if self.plan.ahead and chance(3, "ahead", step) and step + 1 < self.plan.steps:
            await self.queue.take(step=step + 1, epoch=epoch, wait_s=0)
        taken = await self.queue.take(step=step, epoch=epoch, wait_s=1.0)
        if taken is None:
            return
        groups = schema.decode(taken.pack)
        for group in groups:
            if tuple(group.id) not in now["judged"]:
                now["judged"].append(tuple(group.id))
                now["seen"] = digest(now["seen"], group.id.draw)
        self.memory.save(now)
        if leaving := {group.id: "dull" for group in groups if dull(self.plan, group.id.draw)}:
            await self.queue.filtered(step=step, epoch=epoch, groups=leaving)
            return
        reach("learner.step.before")
        made = self._learn(taken)
        told(self.root / "made", step, made["exact"], made["weights"], epoch, *[f"{d}/{a}" for d, a in now["judged"]])
        reach("learner.step.after")
        self._goes_on("trained", made=made)

    def _learn(self, taken: Taken) -> dict[str, Any]:
        exact, weights = [], []
        facts = zip(schema.decode(taken.pack), taken.verdicts, taken.lag, taken.uses, strict=True)
        tokens = reused = 0
        for group, verdict, lag, use in facts:
            assert verdict.id == group.id
            said = [plain(each) for each in verdict.verdicts]
            exact.append((tuple(group.id), payload(group), said, list(lag), use))
            weights.append((sampled(group), said, max(lag), use))  # one version may have two numbers
            tokens += group.tokens
            reused += group.tokens if use else 0
        now = self.now
        return {
            "exact": digest(now["exact"], now["step"], exact, taken.masked, now["seen"]),
            "weights": digest(now["weights"], now["step"], weights, taken.masked, now["seen"]),
            "tokens": (tokens, reused),
        }

    async def _trained(self) -> None:
        now = self.now
        tokens, reused = now["made"]["tokens"]
        feedback = Feedback(trained_tokens=tokens, reused_tokens=reused)
        version = await self.queue.trained(step=now["step"], epoch=now["epoch"], feedback=feedback)
        reach("answer.trained")
        made = {key: now["made"][key] for key in ("exact", "weights")}
        self._goes_on("publish", version=version, step=now["step"] + 1, since=now["since"] + 1, **made)

    async def _commit(self) -> None:
        now = self.now
        final = self.root / "checkpoints" / f"step_{now['step']}.{now['epoch']}"
        partial, listing = write({key: now[key] for key in ("weights", "exact", "seen")}, final)
        if self.commits_first:
            await self.queue.commit(step=now["step"], directory=str(final), digest=listing, epoch=now["epoch"])
            reach("learner.commit.before")
        renamed(partial, final)
        self._goes_on("point", checkpoint=(str(final), listing))

    async def _point(self) -> None:
        now, (directory, listing) = self.now, self.now["checkpoint"]
        reach("learner.commit.before")
        await self.queue.commit(step=now["step"], directory=directory, digest=listing, epoch=now["epoch"])
        told(self.root / "promises", "commit", now["step"])
        reach("learner.commit.after")
        needed = (await self.queue.status()).commits
        for path in (self.root / "checkpoints").glob("step_*"):
            if int(path.name.split("_")[1].partition(".")[0]) not in needed:
                shutil.rmtree(path)
        self._goes_on("done" if now["step"] == self.plan.steps else "take", since=0)


def write(state: dict[str, Any], final: Path) -> tuple[Path, str]:
    """As `millrace.learner.checkpoint` does, up to the rename."""
    partial = final.with_name(final.name + ".partial")
    for stale in (partial, final):
        if stale.exists():
            shutil.rmtree(stale)
    partial.mkdir(parents=True)
    (partial / "state.json").write_text(json.dumps(state))
    reach("learner.checkpoint.write")
    (partial / "files.json").write_text(json.dumps({"state.json": digest((partial / "state.json").read_bytes())}))
    for path in (partial / "state.json", partial / "files.json", partial):
        fsync(path)
    return partial, digest((partial / "files.json").read_bytes())


def renamed(partial: Path, final: Path) -> None:
    partial.rename(final)
    fsync(final.parent)


def fsync(path: Path) -> None:
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def damaged(directory: Path, listing: str | None) -> str:
    """What is wrong with a committed checkpoint; "spoilt" for what the torturer did to it."""
    if not directory.is_dir():
        return "it is not there"
    if digest((directory / "files.json").read_bytes()) != listing:
        return "its list of files is another one"
    state = (directory / "state.json").read_bytes()
    if digest(state) != json.loads((directory / "files.json").read_text())["state.json"]:
        return "spoilt" if state.startswith(b"spoilt") else "its state is another one"
    return ""


def read(path: Path) -> list[str]:
    return path.read_text().splitlines() if path.exists() else []
