"""The learner's side of the small world: it restarts, is replaced, filters, and falls back to older checkpoints."""

from functools import partial

from millrace.core.errors import Fenced
from millrace.core.protocols import Feedback
from millrace.core.replay.draws import OPEN
from millrace.core.types import GroupId
from tests.core.replay.oracle import Oracle


class LearnerSide(Oracle):
    """What a learner may do, and what must follow."""

    recorded: dict[int, list[GroupId]]  # the batch of each step, as it was last seen
    node: int
    forgetful: bool
    accepted: set[GroupId]
    kept: list[int]  # steps of the commits to fall back to

    def _learner_actions(self) -> list[tuple]:
        state, budget, out = self.ledger.state, self.budget, []
        if self.pending is not None:
            out.append(("announce",))
        if state.step < self.config.steps:
            if self.taken is None:
                out.append(("take",))
            elif self.pending is None:
                out.append(("train",))
            if self.taken and budget.filter:
                out.append(("filter",))
        if state.step > self.committed and self.pending is None:
            out.append(("commit",))
        if budget.learner_crash and (state.step > self.committed or self.taken):
            out.append(("learner_crash",))
        if budget.revert and len(state.commits) > 1:
            out.append(("revert",))
        if budget.lose and len(state.commits) == 1 and any(draw.location for draw in state.draws.values()):
            out += [("lose", 0), ("lose", 1)]
        return out

    def _learner_joins(self) -> None:
        resumption = self.ledger.join_learner()
        assert resumption.step == self.committed, "the learner resumes where no commit was"
        assert [*resumption.earlier] == self.kept[-2::-1], f"{resumption.earlier} are not the earlier of {self.kept}"
        self.epoch = resumption.epoch
        self.history = self.history[: resumption.step]
        self.path = self.path[: resumption.step + 1] or [0]
        self.taken = None
        self._reserve(resumption.version)

    def _reserve(self, version: int) -> None:
        assert version == len(self.paths), f"version {version} was used before"
        self.paths.append(tuple(self.path))
        self.pending = version

    def _do_announce(self) -> None:
        self.ledger.announce(version=self.pending, epoch=self.epoch)
        self.pending = None

    def _do_take(self) -> bool:
        step = len(self.history)
        batch = self.ledger.state.batches.get(step)
        known = {entry.draw for entry in batch.entries} if batch else set()
        open_before = {index for index, draw in self.ledger.state.draws.items() if draw.state in OPEN}
        before = self._progress(step)
        entries = self._take_filtered(step)
        if entries is None:
            return self._progress(step) != before
        ids = [GroupId(entry.draw, entry.attempt) for entry in entries]
        again = [GroupId(e.draw, e.attempt) for e in self.ledger.take(step=step, epoch=self.epoch)]
        assert ids == again, f"take({step}) gave {ids}, then {again}"
        assert len(set(ids)) == len(ids) == self.config.groups_per_step
        if step in self.recorded:
            kept = self.recorded[step][: len(ids)]
            assert ids[: len(kept)] == kept, f"step {step} was {kept} and is redone with {ids}"
        self.recorded[step] = ids
        self._check_fresh(step, [e for e in entries if e.draw not in known], open_before)
        uses = [self.ledger.use(entry.draw, step) for entry in entries]
        assert uses == [self.use(group) for group in ids], f"step {step}: {ids} are not the uses {uses}"
        self.taken = ids
        return True

    def _progress(self, step: int) -> tuple:
        """What a take may change without giving a batch."""
        batch = self.ledger.state.batches.get(step)
        return dict(self.ledger.state.counts), dict(batch.filtered) if batch else {}

    def _take_filtered(self, step: int) -> list | None:
        """Take, and filter again what the recipe's filter threw out before a restart."""
        while entries := self.ledger.take(step=step, epoch=self.epoch):
            ids = [GroupId(entry.draw, entry.attempt) for entry in entries]
            gone = [group for group in ids if (group, self.use(group)) in self.rejects]
            if not gone:
                return entries
            self._filter(step, gone)
        return None

    def _do_filter(self) -> None:
        self.budget.filter -= 1
        step = len(self.history)
        gone = self.taken[0]
        self.recorded[step] = self.taken[1:]
        for _ in range(2):
            self._filter(step, [gone])
        self.rejects.add((gone, self.use(gone)))
        self.returned += 1
        self.taken = None

    def _filter(self, step: int, gone: list[GroupId]) -> None:
        self.ledger.filtered(step=step, epoch=self.epoch, groups=dict.fromkeys(gone, "zero"))
        for later in (k for k in self.recorded if k > step):  # it is not used again
            self.recorded[later] = [group for group in self.recorded[later] if group not in gone]

    def _do_train(self) -> None:
        step = len(self.history)
        first = sum(self.sizes[group] for group in self.taken if not self.use(group))
        again = sum(self.sizes[group] for group in self.taken) - first
        masked = min(1, first) if self.ledger.masks else 0
        feedback = Feedback(trained_tokens=first + again - masked, masked_tokens=masked, reused_tokens=again)
        version = self.ledger.trained(step=step, epoch=self.epoch, feedback=feedback)
        assert self.ledger.trained(step=step, epoch=self.epoch, feedback=feedback) == version
        self.history.append(self.taken)
        self.node += 1
        self.path.append(self.node)
        self.taken = None
        self._reserve(version)

    def _do_commit(self) -> None:
        step = len(self.history)
        call = {"step": step, "directory": f"step_{step}.{self.epoch}", "digest": "d", "epoch": self.epoch}
        self.ledger.commit(**call)
        self.ledger.commit(**call)
        self.committed = step
        self.kept = [*(old for old in self.kept if old < step), step][-self.config.keep_commits :]

    def _do_learner_crash(self) -> None:
        self.budget.learner_crash -= 1
        self._learner_restarts()

    def _do_revert(self) -> None:
        """The last checkpoint cannot be read: the one before it is the last."""
        self.budget.revert -= 1
        self.committed = self.ledger.state.commits[-2].step
        self.ledger.revert(step=self.committed)
        self.kept = [step for step in self.kept if step <= self.committed]
        self._learner_restarts()

    def _do_lose(self, parity: int) -> None:
        """The queue restarts, and every other payload is gone."""
        self.budget.lose -= 1
        self.ledger.recover(lambda location: location[0] % 2 == parity)
        self._groups_lost({group for group in self.accepted if group.draw % 2 != parity})

    def _groups_lost(self, groups: set[GroupId]) -> None:
        """Their payloads are gone, and the learner was fenced."""
        self.lost |= groups
        if len(self.ledger.state.versions.steps) > len(self.paths):  # no learner will ever publish this one
            self.paths.append(tuple(self.path[: self.committed + 1]))
        for step in (k for k in self.recorded if k >= self.committed):
            self.recorded[step] = [group for group in self.recorded[step] if group not in groups]
        self._learner_restarts()

    def _learner_restarts(self) -> None:
        self.forked = True
        old, step = self.epoch, self.ledger.state.step
        if self.forgetful:
            self.rejects = set()
            self.recorded = {k: ids for k, ids in self.recorded.items() if k < self.committed}
        self._learner_joins()
        for late in (self.ledger.take, partial(self.ledger.commit, directory="late", digest="d")):
            try:
                late(step=step, epoch=old)
            except Fenced:
                continue
            raise AssertionError("a learner that was replaced may still take or commit")
        self._do_announce()
