"""The loop's limit: its own rules in simulated time, with the times that each stage takes alone.

A discrete-event simulation around the real `Ledger`, whose clock is the simulation's. What is left out is what the
limit should not hold: calls, packs, polls, lingering, and whatever shares a core with an engine or the learner.

    engine      at most `slots` responses at a time, a token each per step; draws are leased whenever there is room for
                them; newer weights are swapped in between two steps and make it read all running contexts again
    judge       one group after the other
    learner     takes, learns, publishes, announces; one batch at a time
"""

from bisect import bisect_right
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from heapq import heappop, heappush
from itertools import count, pairwise

import numpy as np

from millrace.core.protocols import Feedback, Role
from millrace.core.replay.config import QueueConfig
from millrace.core.replay.draws import Entry
from millrace.core.replay.ledger import Ledger
from millrace.core.schema import GroupHeader
from millrace.core.types import GroupId, GroupVerdict, Verdict, VerdictKind, VersionRun

GENERATION, REWARD = "generation-0", "reward-0"
SCORE = Verdict(kind=VerdictKind.SCORED, score=0.0)

LengthsOf = Callable[[GroupId], Sequence[int]]  # tokens of each response of an attempt


@dataclass(frozen=True, slots=True, kw_only=True)
class StageTimes:
    """What each stage takes alone, seconds."""

    decode_s: tuple[tuple[int, float], ...]  # (sequences, seconds of an engine's step), ascending; lines between them
    prefill_s: float = 0.0  # more, per token that it reads beyond one for each sequence
    judge_s: float = 0.0  # per group
    learner_step_s: float = 0.0  # of the learner's step: per step
    token_s: float = 0.0  # and per token of the batch
    publish_s: float = 0.0  # per version
    load_s: float = 0.0  # per version; the engine stands still

    def engine_s(self, sequences: int, prefilled: int) -> float:
        """Of one engine step.

        >>> StageTimes(decode_s=((1, 2.0), (3, 4.0)), prefill_s=0.5).engine_s(2, 4)
        5.0
        """
        many, seconds = zip(*self.decode_s, strict=True)
        return float(np.interp(sequences, many, seconds)) + self.prefill_s * prefilled

    def learner_s(self, tokens: int) -> float:
        """Of one learner step, without publishing."""
        return self.learner_step_s + self.token_s * tokens


@dataclass(frozen=True, slots=True, kw_only=True)
class Simulated:
    """What a simulated run came to."""

    ends_s: Sequence[float]  # when each step was published
    learner_busy_s: Sequence[float]  # of each step: computing and publishing
    engine_busy_s: float  # in steps and loads
    tokens: dict[str, int]  # the ledger's books; what is in flight at the end is not in them
    lags: dict[int, int]  # lag of the oldest token -> rollouts

    def steps_per_s(self, skipped: int) -> float:
        """Without the first steps, at least one."""
        return (len(self.ends_s) - skipped) / (self.ends_s[-1] - self.ends_s[skipped - 1])

    def idle(self, skipped: int) -> float:
        """The share of the learner's time that it waits, likewise."""
        return 1 - sum(self.learner_busy_s[skipped:]) / (self.ends_s[-1] - self.ends_s[skipped - 1])


def simulate(
    config: QueueConfig,
    times: StageTimes,
    lengths: LengthsOf,
    *,
    slots: int,
    prompt_tokens: int = 0,
    prefetch: int | None = None,
) -> Simulated:
    """A whole run.

    Args:
        config: of the queue: sizes, max_lag and the stale rule.
        lengths: of the responses of an attempt at a draw.
        slots: responses that the engine generates at the same time.
        prompt_tokens: of every prompt.
        prefetch: groups leased beyond what fills the slots; None: half of what fills them.
    Raises:
        RuntimeError: nothing more can happen before the last step.
    """
    return _Loop(config, times, lengths, slots=slots, prompt_tokens=prompt_tokens, prefetch=prefetch).run()


@dataclass(slots=True)
class _Group:
    """In hand of the engine."""

    id: GroupId
    pending: int  # responses
    runs: list[tuple[VersionRun, ...]] = field(default_factory=list)  # of each finished response


@dataclass(slots=True)
class _Engine:
    """Its responses, by the number of the step in which each ends."""

    waiting: deque[tuple[_Group, int]] = field(default_factory=deque)  # and its length
    running: list[tuple[int, int, int, _Group]] = field(default_factory=list)  # last step, tie, first step, group
    tick: int = 0  # steps made
    swaps: list[tuple[int, int]] = field(default_factory=list)  # (first step, version), ascending
    unfinished: int = 0
    reread: bool = False  # all running contexts, after a swap
    free_s: float = 0.0  # when it is done with what it does
    stepping: bool = False
    busy_s: float = 0.0

    @property
    def version(self) -> int:
        return self.swaps[-1][1] if self.swaps else -1

    def runs(self, first: int, last: int) -> tuple[VersionRun, ...]:
        """Which version sampled each token of a response that ran in these steps, both among them."""
        at = bisect_right(self.swaps, (first, 1 << 60)) - 1
        bounds = [first, *(tick for tick, _ in self.swaps[at + 1 :] if tick <= last), last + 1]
        return tuple(
            VersionRun(self.swaps[at + number][1], start - first, end - first)
            for number, (start, end) in enumerate(pairwise(bounds))
        )


class _Loop:
    def __init__(
        self,
        config: QueueConfig,
        times: StageTimes,
        lengths: LengthsOf,
        *,
        slots: int,
        prompt_tokens: int,
        prefetch: int | None,
    ) -> None:
        self._config, self._times, self._lengths = config, times, lengths
        self._slots, self._prompt_tokens = slots, prompt_tokens
        fill = -(-slots // config.group_size)
        self._most = fill + (max(1, fill // 2) if prefetch is None else prefetch)  # groups in hand
        self._now = 0.0
        self._ledger = Ledger(config, clock=lambda: self._now, emit=lambda record: None)
        self._events: list[tuple[float, int, Callable[[], None]]] = []
        self._ties = count()
        self._engine = _Engine()
        self._announced = -1
        self._judge_free_s = 0.0
        self._step = 0
        self._learning = False
        self._ends_s: list[float] = []
        self._busy_s: list[float] = []

    def run(self) -> Simulated:
        ledger = self._ledger
        resumption = ledger.join_learner()
        self._learner = resumption.epoch
        self._worker = ledger.join(GENERATION, role=Role.GENERATION, slots=self._slots)
        self._judge = ledger.join(REWARD, role=Role.REWARD, slots=1)
        self._announce(resumption.version)
        while self._step < self._config.steps:
            if not self._events:
                raise RuntimeError(f"step {self._step} can never end: {ledger.why_no_batch(self._step)}")
            self._now, _, happens = heappop(self._events)
            happens()
        return Simulated(
            ends_s=self._ends_s,
            learner_busy_s=self._busy_s,
            engine_busy_s=self._engine.busy_s,
            tokens=ledger.state.books.table(),
            lags=dict(sorted(ledger.state.lags.items())),
        )

    def _at(self, time_s: float, happens: Callable[[], None]) -> None:
        heappush(self._events, (time_s, next(self._ties), happens))

    # -- the engine

    def _lease(self) -> None:
        engine, size = self._engine, self._config.group_size
        want = self._most - -(-engine.unfinished // size)
        if engine.version < 0 or want <= 0:
            return
        request = f"lease {next(self._ties)}"
        arguments = {"epoch": self._worker, "version": engine.version, "want": want, "request": request}
        for group_id in self._ledger.lease_draws(GENERATION, **arguments):
            group = _Group(group_id, size)
            engine.waiting.extend((group, length) for length in self._lengths(group_id))
            engine.unfinished += size

    def _advance(self) -> None:
        """Between two steps: swap, lease, fill the slots, and begin the next one."""
        engine, times = self._engine, self._times
        if engine.stepping:
            return
        stands_still_s = 0.0
        if self._announced > engine.version:
            stands_still_s = times.load_s if engine.swaps else 0.0  # the first one is loaded before the run begins
            engine.swaps.append((engine.tick, self._announced))
            engine.reread = True
        self._lease()
        prefilled = sum(engine.tick - first + self._prompt_tokens for _, _, first, _ in engine.running) * engine.reread
        engine.reread = False
        while engine.waiting and len(engine.running) < self._slots:
            group, length = engine.waiting.popleft()
            heappush(engine.running, (engine.tick + length - 1, next(self._ties), engine.tick, group))
            prefilled += max(0, self._prompt_tokens - 1)
        if not engine.running and not stands_still_s:
            return
        step_s = stands_still_s + (times.engine_s(len(engine.running), prefilled) if engine.running else 0.0)
        engine.stepping = True
        engine.busy_s += step_s
        self._at(self._now + step_s, self._stepped)

    def _stepped(self) -> None:
        engine = self._engine
        engine.stepping = False
        done = []
        if engine.running:
            while engine.running and engine.running[0][0] <= engine.tick:
                last, _, first, group = heappop(engine.running)
                group.runs.append(engine.runs(first, last))
                group.pending -= 1
                engine.unfinished -= 1
                if not group.pending:
                    done.append(group)
            engine.tick += 1
        for group in done:
            self._put(group)
        self._advance()

    def _put(self, group: _Group) -> None:
        tokens = sum(runs[-1].end for runs in group.runs)
        oldest = min(run.version for runs in group.runs for run in runs)
        header = GroupHeader(
            id=group.id,
            lease_epoch=self._worker,
            n=len(group.runs),
            tokens=tokens,
            oldest_version=oldest,
            runs=tuple(group.runs),
        )
        self._ledger.put_groups(
            GENERATION, epoch=self._worker, headers=[header], store=lambda rows: [(0, row) for row in rows]
        )
        self._judge_free_s = max(self._now, self._judge_free_s) + self._times.judge_s
        self._at(self._judge_free_s, lambda: self._score(group.id))

    # -- judge and learner

    def _score(self, group: GroupId) -> None:
        # The judge leases what waits longest, which is this one: groups are judged in the order in which they came.
        request = f"judge {next(self._ties)}"
        leased = self._ledger.lease_groups(REWARD, epoch=self._judge, want=1, request=request)
        assert leased == [group], f"{leased} is judged instead of {group}"
        verdict = GroupVerdict(id=group, verdicts=(SCORE,) * self._config.group_size)
        self._ledger.put_verdicts(REWARD, epoch=self._judge, verdicts=[verdict])
        self._take()
        self._advance()

    def _take(self) -> None:
        if self._learning or self._step >= self._config.steps:
            return
        entries = self._ledger.take(step=self._step, epoch=self._learner)
        self._advance()  # what `take` gave up waits to be drawn again
        if entries is None:
            return
        self._learning = True
        tokens, masked = self._tokens(entries)
        learner_s = self._times.learner_s(tokens + masked)
        self._busy_s.append(learner_s + self._times.publish_s)
        self._at(self._now + learner_s, lambda: self._trained(tokens, masked))

    def _tokens(self, entries: Sequence[Entry]) -> tuple[int, int]:
        """Of a batch: trained, masked."""
        total = masked = 0
        for entry in entries:
            draw = self._ledger.state.draws[entry.draw]
            total += draw.tokens
            if self._ledger.masks:
                runs = [run for own in draw.runs for run in own]
                masked += sum(
                    end - start
                    for (_, start, end), lag in zip(runs, entry.lags, strict=True)
                    if lag > self._config.max_lag
                )
        return total - masked, masked

    def _trained(self, tokens: int, masked: int) -> None:
        feedback = Feedback(trained_tokens=tokens, masked_tokens=masked)
        version = self._ledger.trained(step=self._step, epoch=self._learner, feedback=feedback)
        self._advance()
        self._at(self._now + self._times.publish_s, lambda: self._published(version))

    def _published(self, version: int) -> None:
        self._step += 1
        self._ends_s.append(self._now)
        self._learning = False
        self._announce(version)
        self._take()

    def _announce(self, version: int) -> None:
        self._ledger.announce(version=version, epoch=self._learner)
        self._announced = version
        self._advance()
