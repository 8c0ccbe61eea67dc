"""Rules of the reward worker's side: lease generated groups, put verdicts back."""

from collections.abc import Sequence
from math import isfinite

from millrace.core.protocols import Receipt, Role
from millrace.core.replay.draws import Draw, State
from millrace.core.replay.transaction import Transaction, ids
from millrace.core.types import GroupId, GroupVerdict, Verdict, VerdictKind


class JudgeRules(Transaction):
    """generated -> judging -> scored; back to generated when the judge is lost or fails."""

    def lease_groups(self, worker: str, *, epoch: int, want: int, request: str) -> list[GroupId]:
        """The groups that wait longest, except those this worker has just failed on."""
        entry = self.current(worker, epoch, Role.REWARD)
        if request in entry.answers:
            held = self.state.judgings.holder
            return [group for group in ids(entry.answers[request]) if held(*group, epoch)]
        rows: list[list[int]] = []
        suspect: bool | None = None  # in hand; what is held, hundreds of groups, is only gone through for another one
        for index in self.state.generated:
            if len(rows) >= want:
                break
            draw = self.state.draws[index]
            if self._shunned(draw, worker):
                continue
            if draw.judge_suspect:
                suspect = self._holds_suspect(epoch) if suspect is None else suspect
                if suspect:
                    continue
                suspect = True
            rows.append([index, draw.attempt])
        if rows:
            durations = {"lease_s": self.config.judge_lease_s, "cap_s": self.config.judge_cap_s}
            self.do("judging", worker=worker, epoch=epoch, request=request, rows=rows, **durations)
        return ids((draw, attempt) for draw, attempt in rows)

    def _holds_suspect(self, epoch: int) -> bool:
        """One is enough: whose judge crashes next is then known."""
        return any(self.state.draws[hold.draw].judge_suspect for hold in self.state.judgings.of(epoch))

    def _shunned(self, draw: Draw, worker: str) -> bool:
        """A failed judge is asked again only if nobody else answers for the length of a lease."""
        if draw.shunned != worker or self.clock() >= draw.shun_until:
            return False
        judges = sum(entry.role == Role.REWARD.value for entry in self.state.workers.values())
        return judges > 1

    def put_verdicts(self, worker: str, *, epoch: int, verdicts: Sequence[GroupVerdict]) -> list[Receipt]:
        """Score the groups this incarnation was leased; each once."""
        self.current(worker, epoch, Role.REWARD)
        receipts, scored, failed = [], [], []
        tracebacks: dict[int, str] = {}
        seen: set[GroupId] = set()
        for verdict in verdicts:
            hold = self.state.judgings.holder(*verdict.id, epoch)
            if hold is None or verdict.id in seen:
                reason = f"fenced: {verdict.id} is not leased to {worker} any more"
                receipts.append(Receipt(id=verdict.id, accepted=False, reason=reason))
                continue
            seen.add(verdict.id)
            reason = self._bad_verdict(verdict)
            receipts.append(Receipt(id=verdict.id, accepted=not reason, reason=reason))
            broken = reason or self._judge_failures(verdict)
            draw = self.state.draws[verdict.id.draw]
            if broken and draw.judge_failures < self.config.judge_retries:
                self.give_back([draw], "failed")
            elif reason or self._valid(verdict) < min(2, self.config.group_size):
                failed.append((draw, draw.tokens))
                tracebacks[draw.index] = reason or self._why_broken(verdict)
            else:
                scored.append([*verdict.id, [plain(one) for one in verdict.verdicts]])
        self.fail(failed, "judge", tracebacks=tracebacks)
        if scored:
            self.do("scored", rows=scored)
            for verdict, receipt in zip(verdicts, receipts, strict=True):
                known = self.state.draws.get(verdict.id.draw) if receipt.accepted else None
                if known is not None and known.verdicts is not None:
                    known.judged = verdict
        return receipts

    def _bad_verdict(self, verdict: GroupVerdict) -> str:
        if len(verdict.verdicts) != self.config.group_size:
            return f"{verdict.id} has {len(verdict.verdicts)} verdicts for {self.config.group_size} rollouts"
        for member, one in enumerate(verdict.verdicts):
            if one.score is not None and not isfinite(one.score):
                return f"{verdict.id} rollout {member} has score {one.score}, which is no finite number"
            for name, part in one.components.items():
                if not isfinite(part):
                    return f"{verdict.id} rollout {member} has component {name!r} = {part}, which is no finite number"
        return ""

    def _judge_failures(self, verdict: GroupVerdict) -> int:
        return sum(one.kind is VerdictKind.JUDGE_FAILED for one in verdict.verdicts)

    def _why_broken(self, verdict: GroupVerdict) -> str:
        """The first failed judge's words."""
        said = (one.feedback for one in verdict.verdicts if one.kind is VerdictKind.JUDGE_FAILED)
        return next(filter(None, said), "")

    def _valid(self, verdict: GroupVerdict) -> int:
        """Rollouts with a score. Advantages need two, except in groups of one."""
        return len(verdict.verdicts) - self._judge_failures(verdict)

    def verdicts_of(self, draw: int) -> GroupVerdict:
        """The verdicts a scored group has."""
        entry = self.state.draws[draw]
        assert entry.verdicts is not None, f"draw {draw} is {entry.state.value} and has no verdicts"
        if entry.judged is None:  # after a restart
            verdicts = tuple(rich(one) for one in entry.verdicts)
            entry.judged = GroupVerdict(id=GroupId(entry.index, entry.attempt), verdicts=verdicts)
        return entry.judged

    def why_no_group(self) -> str:
        """What a reward worker waits for."""
        counts = self.state.counts
        text = f"no generated group: {counts[State.LEASED]} are being generated, {counts[State.JUDGING]} judged"
        kept = [index for index in self.state.generated if self.state.draws[index].judge_suspect]
        if kept:
            text += f"; draw {kept[0]}, whose judges crashed, waits until the suspect in hand is done"
        return text


def plain(verdict: Verdict) -> list[object]:
    """A verdict as data for a record.

    >>> plain(Verdict(kind=VerdictKind.SCORED, score=1.0))
    ['scored', 1.0, {}, '']
    """
    return [verdict.kind.value, verdict.score, dict(verdict.components), verdict.feedback]


def rich(row: list[object]) -> Verdict:
    """The verdict that `plain` made data of."""
    kind, score, components, feedback = row
    return Verdict(kind=VerdictKind(kind), score=score, components=components, feedback=feedback)  # type: ignore[arg-type]  # rows of a journal are untyped
