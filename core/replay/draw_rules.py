"""Rules of the generation worker's side: join, lease, heartbeat, put, leave."""

from collections.abc import Callable, Mapping, Sequence
from heapq import nsmallest

from millrace.core.errors import Fenced, LedgerError
from millrace.core.protocols import Receipt, Role
from millrace.core.replay.draws import CRASHES, State
from millrace.core.replay.journal import Location
from millrace.core.replay.transaction import Transaction, ids
from millrace.core.replay.versions import admissible, possible
from millrace.core.schema import GroupHeader
from millrace.core.types import GroupId


class DrawRules(Transaction):
    """waiting -> leased -> generated, and back when a lease ends."""

    def join(self, worker: str, *, role: Role, slots: int, generated: int = 0) -> int:
        """A new incarnation; whatever the earlier one held is fenced."""
        if role is Role.LEARNER:
            raise LedgerError(f"{worker} joins as learner: a learner joins by join_learner")
        if (earlier := self.state.workers.get(worker)) is not None:
            self._lose(earlier.epoch, "fenced")
        epoch = self.state.epochs + 1
        self.do("joined", worker=worker, role=role.value, epoch=epoch, slots=slots, generated=generated)
        return epoch

    def leave(self, worker: str, *, epoch: int, generated: int, abandoned: Mapping[GroupId, int]) -> None:
        """The last word of an incarnation. A repetition does nothing."""
        meter = self.state.books.meters.get(epoch)
        if meter is not None and meter.final and meter.worker == worker:
            return
        entry = self.state.workers.get(worker)
        self.current(worker, epoch, Role(entry.role) if entry else Role.GENERATION)
        self._lose(epoch, "abandoned", abandoned)
        if abandoned:
            self.do("late", epoch=epoch, rows=[[*group, tokens] for group, tokens in abandoned.items()])
        self.do("left", worker=worker, epoch=epoch, generated=generated)

    def fence(self, worker: str, *, cause: str, traceback: str = "") -> list[GroupId]:
        """Its process is gone: "crashed", or "hung" and killed. Returns what it held; a repetition does nothing."""
        if cause not in CRASHES:
            raise LedgerError(
                f"fence({worker}, cause={cause!r}): a worker that is gone has {' or '.join(sorted(CRASHES))}; "
                "one that ends in order calls leave"
            )
        if (entry := self.state.workers.get(worker)) is None:
            return []
        holds = (*self.state.leases.of(entry.epoch), *self.state.judgings.of(entry.epoch))
        held = [GroupId(hold.draw, hold.attempt) for hold in holds]
        self._lose(entry.epoch, cause, traceback=traceback)
        self.do("gone", worker=worker)
        return held

    def _lose(
        self, epoch: int, cause: str, tokens: Mapping[GroupId, int] | None = None, *, traceback: str = ""
    ) -> None:
        """End all leases of an incarnation. None of it counts towards `attempts`: no draw is known to be at fault."""
        draws = [self.state.draws[hold.draw] for hold in self.state.leases.of(epoch)]
        last = [(draw, (tokens or {}).get(GroupId(draw.index, draw.attempt), draw.tokens)) for draw in draws]
        self.fail(last, cause, counted=False, tracebacks={draw.index: traceback for draw in draws})
        judged = [self.state.draws[hold.draw] for hold in self.state.judgings.of(epoch)]
        if cause in CRASHES:
            self.judge_crashed(judged, traceback)
        else:
            self.give_back(judged, "left")

    def fail_groups(self, worker: str, *, epoch: int, failures: Mapping[GroupId, str]) -> None:
        """The engine failed on these; the values are tracebacks. What is not held any more is left alone."""
        self.current(worker, epoch, Role.GENERATION)
        held = [group for group in failures if self.state.leases.holder(*group, epoch)]
        draws = [self.state.draws[group.draw] for group in held]
        tracebacks = {group.draw: failures[group] for group in held}
        self.fail([(draw, draw.tokens) for draw in draws], "engine", tracebacks=tracebacks)

    def lease_draws(self, worker: str, *, epoch: int, version: int, want: int, request: str) -> list[GroupId]:
        """As many of `want` as admission allows: draws whose lease ended first, then new ones."""
        entry = self.current(worker, epoch, Role.GENERATION)
        if request in entry.answers:
            held = self.state.leases.holder
            return [group for group in ids(entry.answers[request]) if held(*group, epoch)]
        count = min(want, self.room(version))
        if count <= 0:
            return []
        old, kept = self._again(count, epoch)
        new = range(self.state.next_draw, self.state.next_draw + count - len(old) - len(kept))
        if not old and not new:
            return []
        rows = [[index, self.state.draws[index].attempt + 1] for index in old] + [[index, 0] for index in new]
        config = self.config
        durations = {"start_s": config.start_s, "lease_s": config.lease_s, "cap_s": config.lease_cap_s}
        self.do("leased", worker=worker, epoch=epoch, request=request, version=version, rows=rows, **durations)
        return ids((draw, attempt) for draw, attempt in rows)

    def _again(self, count: int, epoch: int) -> tuple[list[int], list[int]]:
        """The first `count` waiting draws: those to lease now, and suspects that keep their place until their turn."""
        first, draws = nsmallest(count, self.state.waiting), self.state.draws
        suspects = [index for index in first if draws[index].suspect]
        if not suspects:
            return first, []
        kept = suspects if any(draws[hold.draw].suspect for hold in self.state.leases.of(epoch)) else suspects[1:]
        return [index for index in first if index not in kept], kept

    def room(self, version: int) -> int:
        """How many more groups an engine at `version` may be granted now."""
        if version < 0:
            return 0
        alive, uses = self.state.open, self._uses()
        most = min(self._admissible(version, alive), self._needed(alive))
        each = self._each(version)
        reserved = self._admissible(version, uses + self.config.stagger) // each
        return min(most, max(min(reserved, -(-self._needed(uses) // each)), self._short()))

    def _admissible(self, version: int, alive: int) -> int:
        """Places that an engine may still fill in time, besides the `alive` ones and those taken."""
        lag = self.state.versions.lag(version, self.state.step)
        ahead = alive + self._placed(self.state.step + self.config.max_lag - lag)
        return admissible(lag, ahead, per_step=self.config.groups_per_step, max_lag=self.config.max_lag)

    def _uses(self) -> int:
        """Places that live groups may come to take: one for each open group, and as many more as there is time for."""
        config, first = self.config, self.state.step
        uses = self.state.further
        for deadline, count in self.state.due.items():
            last = min(deadline, config.steps - 1)
            uses += count * max(1, possible(config.reuse, first=first, last=last))
        return uses

    def _each(self, version: int) -> int:
        """Uses that a draw granted now would have."""
        config, step = self.config, self.state.step
        last = min(self.state.versions.deadline(version, config.max_lag), config.steps - 1)
        return max(1, possible(config.reuse, first=step, last=last))

    def _short(self) -> int:
        """Groups that the present batch lacks: no group stands in it twice, whatever uses are left."""
        have = self._placed(self.state.step) + self.state.open + len(self.state.reusable)
        return self.config.groups_per_step - have

    def why_idle(self, version: int, short: int, epoch: int = 0) -> str:
        """Why `short` more groups were not granted, and what would change that."""
        state, config = self.state, self.config
        slots = f"{short * config.group_size} rollout slots stay idle"
        if version < 0:
            return f"{slots} until weights are loaded; the newest version is {state.versions.newest}"
        if (count := min(short, self.room(version))) > 0 and (kept := self._again(count, epoch)[1]):
            return (
                f"{slots}: whoever worked on draw {kept[0]} crashed {state.draws[kept[0]].crashes} times, and a worker "
                f"is given one such suspect at a time; {len(kept)} of them wait until the one it holds is done"
            )
        uses = self._uses()
        if self._needed(uses) <= self._admissible(version, uses + config.stagger):
            return (
                f"{slots}: step {state.step} of {config.steps}, and {state.live} live groups are "
                f"all that the steps to come can use"
            )
        lag = state.versions.lag(version, state.step)
        wider = config.max_lag - (-short * self._each(version) // config.groups_per_step)
        return (
            f"{slots}: at step {state.step}, version {version} (lag {lag}) and {state.live} live groups, "
            f"max_lag = {config.max_lag} and groups_per_step = {config.groups_per_step} admit no more "
            f"until a step is trained or newer weights are loaded; max_lag = {wider} would fill them"
        )

    def put_groups(
        self,
        worker: str,
        *,
        epoch: int,
        headers: Sequence[GroupHeader],
        store: Callable[[Sequence[int]], Sequence[Location]],
    ) -> list[Receipt]:
        """Accept what this incarnation was leased, once. `store` keeps the payloads of the accepted rows."""
        try:
            self.current(worker, epoch, Role.GENERATION)
        except Fenced:
            self._book_late(headers)
            raise
        reasons: list[str] = []
        seen: set[GroupId] = set()
        stored = {header.id for header in headers if header.lease_epoch == epoch and self._stored(header)}
        for header in headers:
            held = self.state.leases.holder(*header.id, header.lease_epoch) and header.lease_epoch == epoch
            if header.id in seen or not held:
                reasons.append(self._not_held(header, epoch))
            else:
                reasons.append(self._bad_group(header))
            seen.add(header.id)
        accepted = [row for row, reason in enumerate(reasons) if not reason]
        self._refuse(headers, reasons)
        if accepted:
            rows = []
            for row, location in zip(accepted, store(accepted), strict=True):
                header = headers[row]
                runs = [[list(run) for run in rollout] for rollout in header.runs]
                rows.append([*header.id, header.tokens, runs, list(location)])
            self.do("generated", rows=rows)
        return [
            Receipt(id=header.id, accepted=not reason or header.id in stored, reason=reason)
            for header, reason in zip(headers, reasons, strict=True)
        ]

    def _stored(self, header: GroupHeader) -> bool:
        """This very attempt, of this very lease, is here."""
        draw = self.state.draws.get(header.id.draw)
        if draw is None or (draw.attempt, draw.epoch) != (header.id.attempt, header.lease_epoch):
            return False
        return draw.location is not None

    def _not_held(self, header: GroupHeader, epoch: int) -> str:
        if self._stored(header):
            return f"{header.id} is stored already"
        return f"fenced: the lease of {header.id} under epoch {header.lease_epoch} has ended (caller's epoch {epoch})"

    def _bad_group(self, header: GroupHeader) -> str:
        draw, versions = self.state.draws[header.id.draw], self.state.versions
        if header.n != self.config.group_size:
            return f"{header.id} has {header.n} rollouts, not group_size = {self.config.group_size}"
        sampled = {run[0] for rollout in header.runs for run in rollout}
        if sampled and min(sampled) < draw.min_version:
            return f"{header.id} has tokens of version {min(sampled)}, but was leased from {draw.min_version} on"
        if unknown := [version for version in sampled if not versions.known(version)]:
            return f"{header.id} has tokens of version {max(unknown)}, which was never reserved"
        return ""

    def _refuse(self, headers: Sequence[GroupHeader], reasons: Sequence[str]) -> None:
        """What is not held is booked where the lost lease was; what is held but wrong ends its lease."""
        if not any(reasons):
            return
        late = []
        for header, reason in zip(headers, reasons, strict=True):
            if not reason:
                continue
            hold = self.state.leases.holder(*header.id, header.lease_epoch)
            if hold is not None and self._bad_group(header):
                why = {hold.draw: reason}
                self.fail([(self.state.draws[hold.draw], header.tokens)], "invalid", tracebacks=why)
            elif hold is None:
                late.append(header)
        self._book_late(late)

    def _book_late(self, headers: Sequence[GroupHeader]) -> None:
        for header in headers:
            meter = self.state.books.meters.get(header.lease_epoch)
            if meter is not None and header.tokens > meter.fenced.get(header.id, ("", header.tokens))[1]:
                self.do("late", epoch=header.lease_epoch, rows=[[*header.id, header.tokens]])

    def heartbeat(self, worker: str, *, epoch: int, progress: Mapping[GroupId, int], generated: int) -> list[GroupId]:
        """Renew what made progress; returns the groups to give up."""
        entry = self.state.workers.get(worker)
        self.current(worker, epoch, Role(entry.role) if entry else Role.GENERATION)
        meter = self.state.books.meters[epoch]
        rows = [[*group, tokens] for group, tokens in progress.items() if self._news(group, tokens, epoch)]
        if rows or generated - meter.base > meter.counter:
            self.do("heard", worker=worker, epoch=epoch, generated=generated, progress=rows)
        lost = [group for group in progress if not self._mine(group, epoch)]
        lost += [GroupId(*key) for key in meter.fenced if key not in meter.told and key not in progress]
        meter.told.update(meter.fenced)
        return lost

    def _news(self, group: GroupId, tokens: int, epoch: int) -> bool:
        hold = self.state.leases.holder(*group, epoch) or self.state.judgings.holder(*group, epoch)
        if hold is not None:
            return tokens > hold.progress
        fenced = self.state.books.meters[epoch].fenced
        return group in fenced and tokens > fenced[group][1]

    def _mine(self, group: GroupId, epoch: int) -> bool:
        """Held, or put a moment ago."""
        draw = self.state.draws.get(group.draw)
        if draw is None or draw.attempt != group.attempt:
            return False
        if self.state.judgings.holder(*group, epoch):
            return True
        return draw.epoch == epoch and draw.state is not State.WAITING
