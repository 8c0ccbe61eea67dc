"""Rules of the learner's side: join, take, filtered, trained, announce, commit, revert."""

from collections.abc import Callable, Mapping, Sequence
from math import inf

from millrace.core.errors import LedgerError
from millrace.core.protocols import Feedback, Resumption, Role
from millrace.core.replay import selectors
from millrace.core.replay.draws import OPEN, Batch, Commit, Draw, Entry, State
from millrace.core.replay.journal import Location
from millrace.core.replay.selectors import Candidate
from millrace.core.replay.transaction import Transaction
from millrace.core.replay.versions import forced, overfull, pick
from millrace.core.types import GroupId


class StepRules(Transaction):
    """scored -> in_step -> trained -> committed, and back to in_step when a learner restarts."""

    def join_learner(self) -> Resumption:
        """History goes on from the last commit; recorded batches after it will be redone."""
        commit = self.state.commits[-1]
        version = len(self.state.versions.steps)
        self.do("rejoined", epoch=self.state.epoch + 1, step=commit.step, version=version)
        # A payload that was lost after its first use was committed is needed again when that commit is given up.
        self._draw_again([d for d in self.state.draws.values() if d.state is State.IN_STEP and d.location is None])
        self._evict_overfull()
        return Resumption(
            epoch=self.state.epoch,
            step=commit.step,
            version=version,
            directory=commit.directory,
            digest=commit.digest,
            earlier=[earlier.step for earlier in reversed(self.state.commits[:-1])],
        )

    def recover(self, holds: Callable[[Location], bool]) -> None:
        """After a restart: groups whose payload did not survive are drawn again, as part of no step.

        Steps after the last commit are undone, since their batches may not be whole; a learner joins afterwards.
        """
        state, commit = self.state, self.state.commits[-1].step
        lost = [
            draw
            for draw in state.draws.values()
            if draw.location and self._needs_payload(draw, commit) and not holds(draw.location)
        ]
        if lost:
            version = len(state.versions.steps)
            self.do("rejoined", epoch=state.epoch + 1, step=commit, version=version)
            self._draw_again(lost)

    def _draw_again(self, lost: Sequence[Draw]) -> None:
        """Their payloads are gone: others take their places."""
        if lost:
            self.do("lost", rows=[[draw.index, draw.attempt] for draw in lost])

    def _needs_payload(self, draw: Draw, commit: int) -> bool:
        """Some step from `commit` on may train it."""
        over = draw.state in (State.COMMITTED, State.FILTERED)
        return not over or draw.steps[-1] >= commit or draw.index in self.state.reusable

    def use(self, draw: int, step: int) -> int:
        """How many of its uses are in earlier steps."""
        return self.state.draws[draw].steps.index(step)

    # -- batches

    def take(self, *, step: int, epoch: int) -> list[Entry] | None:
        """The recorded batch of a step; forms it when enough groups are there, else None."""
        self.learner(epoch)
        if step >= self.config.steps:
            raise LedgerError(f"take(step={step}): the run has {self.config.steps} steps, the first is 0")
        if step > self.state.step + 1:
            raise LedgerError(f"take(step={step}): only {self.state.step} steps are trained; one may be taken ahead")
        if step < self.state.commits[0].step:
            raise LedgerError(f"take(step={step}): it is committed and its groups are gone")
        if any(self._missing(k) for k in range(self.state.step, step)):
            return None
        if step >= self.state.step and self._missing(step) and not self._form(step):
            return None
        return self.state.batches[step].accepted(self.config.groups_per_step)

    def _missing(self, step: int) -> int:
        """Places left in the batch of a step."""
        batch = self.state.batches.get(step)
        have = len(batch.accepted(self.config.groups_per_step)) if batch else 0
        return self.config.groups_per_step - have

    def _rooms(self) -> dict[int, int]:
        """Places left in recorded batches; a redone step may have some before steps that are complete."""
        steps = (step for step in self.state.batches if step >= self.state.step)
        return {step: room for step in steps if (room := self._missing(step))}

    def _last(self) -> int:
        """The last step that has a batch."""
        return max(self.state.batches, default=self.state.step - 1)

    def _form(self, step: int) -> bool:
        """Record groups for the places left, if the rules allow it now."""
        room = self._missing(step)
        if self.config.stale == "wait":
            self._evict_overfull()
        elif self.config.stale in ("drop", "requeue"):
            self._evict_old(step)
        inserts = self.state.inserts
        samples = inserts * self.config.reuse - self._available(step)
        if not self.config.rate.may_sample(inserts=inserts, samples=samples, want=room):
            return False
        candidates = self._candidates(step)
        chosen = self._in_lease_order(room) if self.config.max_lag == 0 else self._choose(step, room, candidates)
        if chosen is None:
            return False
        self.do("took", step=step, rows=[self._row(self.state.draws[index], step) for index in chosen])
        return True

    def _in_lease_order(self, room: int) -> list[int] | None:
        """The first open draws, once all of them are scored: never the first to be ready."""
        first = sorted(index for index, draw in self.state.draws.items() if draw.state in OPEN)[:room]
        return first if all(index in self.state.scored for index in first) else None

    def _candidates(self, step: int) -> list[Candidate]:
        """Scored groups and further uses, best first. Further uses leave a place for the first of every open group."""
        state, max_lag = self.state, self.config.max_lag
        found = [state.draws[index] for index in (*state.scored, *state.reusable)]
        order: list[Candidate] = getattr(selectors, self.config.order)(
            [Candidate(draw.index, draw.deadline, step + max_lag - draw.deadline, len(draw.steps)) for draw in found]
        )
        further = [c.draw for c in order if c.use and c.deadline >= step]
        kept = {*state.scored, *further[: max(0, self._needed(state.open))]}
        return [c for c in order if c.draw in kept]

    def _available(self, step: int) -> int:
        """How many candidates there are. Asked after every change while a take waits, hence without their order."""
        state = self.state
        further = sum(state.draws[index].deadline >= step for index in state.reusable)
        return len(state.scored) + min(further, max(0, self._needed(state.open)))

    def _choose(self, step: int, room: int, candidates: Sequence[Candidate]) -> list[int] | None:
        """By the selector; under the rule `wait` those that must go now go first, and are waited for."""
        state, musts = self.state, []
        if self.config.stale == "wait":
            others = {k: places for k, places in self._rooms().items() if k != step}
            last, per_step = max(step, self._last()), self.config.groups_per_step
            due = forced(state.due, state.ready, others, room=room, last=last, per_step=per_step)
            if due is None:
                return None
            musts = due
        deadlines = [inf if c.use else c.deadline for c in candidates]
        return pick([c.draw for c in candidates], deadlines, musts, room)

    def _row(self, draw: Draw, step: int) -> list[object]:
        lag_of = {version: self.state.versions.lag(version, step) for version in self._versions(draw)}
        lags = [[lag_of[run[0]] for run in runs] for runs in draw.runs]
        oldest = [max(own, default=0) for own in lags]
        return [draw.index, draw.attempt, [lag for own in lags for lag in own], oldest]

    def _versions(self, draw: Draw) -> set[int]:
        return {run[0] for runs in draw.runs for run in runs}

    # -- what is too old

    def _evict_overfull(self) -> None:
        """Give up what no waiting can train in time. Only a fork of history brings that about."""
        if self.config.stale != "wait":
            return
        state, per_step = self.state, self.config.groups_per_step
        while True:
            found = overfull(state.due, self._rooms(), last=self._last(), per_step=per_step)
            if found is None:
                return
            deadline, excess = found
            late = [draw for draw in state.draws.values() if draw.state in OPEN and draw.deadline <= deadline]
            late.sort(key=lambda draw: (draw.deadline, draw.state is State.SCORED, -draw.index))
            # Engines of the surviving branch begin them anew, with the same seeds: no draw is lost to a restart.
            self._give_up(late[:excess], "wait", State.WAITING)

    def _evict_old(self, step: int) -> None:
        """Under `drop` and `requeue` no scored group older than max_lag enters a batch."""
        if min(self.state.ready, default=step) >= step:
            return
        old = [draw for index in self.state.scored if (draw := self.state.draws[index]).deadline < step]
        again = [draw for draw in old if draw.requeues < self.config.requeues]
        self._give_up(again, "requeue", State.WAITING)
        if self.config.stale == "drop" or self.config.stale_then == "drop":
            self._give_up([draw for draw in old if draw not in again], "drop", State.STALE)

    def _give_up(self, draws: list[Draw], rule: str, state: State) -> None:
        if draws:
            self.do("stale", rule=rule, rows=[[draw.index, draw.attempt, state.value] for draw in draws])

    @property
    def masks(self) -> bool:
        """Tokens beyond max_lag leave the loss."""
        return "mask" in (self.config.stale, self.config.stale_then if self.config.stale == "requeue" else "")

    # -- what the learner did

    def filtered(self, *, step: int, epoch: int, groups: Mapping[GroupId, str]) -> None:
        """Groups of an untrained step leave it, each by its rule. A repetition does nothing."""
        self.learner(epoch)
        batch = self._untrained(step, "filtered")
        members = {(entry.draw, entry.attempt) for entry in batch.entries}
        for group in groups:
            if group not in members:
                raise LedgerError(f"filtered(step={step}): {group} is not in its batch")
        rows = [[*group, rule] for group, rule in groups.items() if group.draw not in batch.filtered]
        if rows:
            self.do("filtered", step=step, rows=rows)

    def trained(self, *, step: int, epoch: int, feedback: Feedback) -> int:
        """Its optimiser step was made. A repetition gets the same version."""
        self.learner(epoch)
        batch = self.state.batches.get(step)
        if batch is not None and batch.trained is not None:
            return batch.version
        batch = self._untrained(step, "trained")
        if step != self.state.step:
            raise LedgerError(f"trained(step={step}): step {self.state.step} comes first")
        if missing := self._missing(step):
            raise LedgerError(
                f"trained(step={step}): {missing} of {self.config.groups_per_step} places in its batch are empty "
                "after filtering; take it again"
            )
        version = len(self.state.versions.steps)
        self.do("trained", step=step, epoch=epoch, version=version, **self._tokens(step, batch, feedback))
        return version

    def _tokens(self, step: int, batch: Batch, feedback: Feedback) -> dict[str, int]:
        """Those of first uses, trained and masked; and all of further uses, where there are any."""
        draws = [self.state.draws[entry.draw] for entry in batch.accepted(self.config.groups_per_step)]
        reused = sum(draw.tokens for draw in draws if draw.steps[0] != step)
        tokens, masked = feedback.trained_tokens, feedback.masked_tokens
        if not reused:
            return {"tokens": tokens, "masked": masked}
        of_them = feedback.reused_tokens
        if of_them is None:
            of_them = tokens * reused // max(1, tokens + masked)
        return {"tokens": tokens - of_them, "masked": masked - (reused - of_them), "reused": reused}

    def _untrained(self, step: int, call: str) -> Batch:
        batch = self.state.batches.get(step)
        if batch is None or batch.trained is not None:
            known = "it was never taken" if batch is None and step >= self.state.step else "it is trained already"
            raise LedgerError(f"{call}(step={step}): {known}; the ledger is at step {self.state.step}")
        return batch

    def announce(self, *, version: int, epoch: int) -> None:
        """Engines may fetch it from now on. A repetition does nothing."""
        self.learner(epoch)
        versions = self.state.versions
        if not 0 <= version < len(versions.steps) or versions.epochs[version] != epoch:
            raise LedgerError(f"announce(version={version}): it was not reserved for learner epoch {epoch}")
        if version not in versions.announced:
            self.do("announced", version=version)

    def commit(self, *, step: int, directory: str, digest: str, epoch: int) -> None:
        """One compare-and-set: the pointer, and every trained group of steps < `step`. A repetition does nothing."""
        self.learner(epoch)
        last = self.state.commits[-1]
        if last == Commit(step, directory, digest, epoch):
            return
        if step > self.state.step:
            raise LedgerError(f"commit(step={step}): only {self.state.step} steps are trained")
        if step < last.step or (step == last.step and last.directory is not None):
            raise LedgerError(f"commit(step={step}): step {last.step} is committed already, as {last.directory}")
        keep = self.config.keep_commits
        self.do("committed", step=step, directory=directory, digest=digest, epoch=epoch, keep=keep)

    def revert(self, *, step: int) -> None:
        """Fall back to an older commit: what it does not contain is trained, not committed. A learner then rejoins."""
        steps = [commit.step for commit in self.state.commits]
        if step not in steps:
            raise LedgerError(f"revert(step={step}): the commits kept are those of steps {steps}")
        if step != steps[-1]:
            self.do("reverted", step=step)

    def waits_for(self, step: int, causes: Mapping[str, str]) -> str:
        """What the batch of a step lacks, one of IDLE; "" when it is there.

        Args:
            causes: worker -> what it waits for, one of IDLE.
        """
        state, room = self.state, self._missing(step)
        if any(self._missing(k) for k in range(state.step, step)):
            return "scheduler"
        if not room:
            return ""
        scored = self._available(step)
        if scored >= room:
            return "scheduler"
        if scored + state.counts[State.GENERATED] + state.counts[State.JUDGING] >= room:
            return "judge"
        engines = [name for name, entry in state.workers.items() if entry.role == Role.GENERATION.value]
        behind = engines and all(causes.get(name) == "weights" for name in engines)
        return "weights" if behind and not state.counts[State.LEASED] else "data"

    def why_no_batch(self, step: int) -> str:
        """What the learner waits for."""
        state, room = self.state, self._missing(step)
        scored = self._available(step)
        text = f"step {step} has {scored} scored groups for {room} places"
        if scored >= room:
            text += "; it waits for groups that would become too old" if self.config.max_lag else "; for lease order"
        holds = list(state.leases.held.values())
        late = min(holds, key=lambda hold: (state.draws[hold.draw].deadline, hold.draw), default=None)
        if late is not None:
            text += f"; the most urgent is draw {late.draw}, leased to {late.worker}, {late.progress} tokens so far"
        return f"{text}; {state.counts[State.GENERATED]} wait for a judge, {state.counts[State.JUDGING]} are judged"
