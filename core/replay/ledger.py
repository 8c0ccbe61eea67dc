"""The state machine of all draws: every rule, over one state. Pure; the clock is injected.

waiting -> leased -> generated -> judging -> scored -> in_step(k) -> trained(k) -> committed
    \\ (lease ended) -> waiting      \\ filtered(rule) | stale(rule) | dead

With `reuse` a group whose uses are all trained may be taken into another step's batch; its state stays that of the
first use.
"""

from collections.abc import Mapping

from millrace.core.protocols import QueueStatus
from millrace.core.replay.draw_rules import DrawRules
from millrace.core.replay.judge_rules import JudgeRules
from millrace.core.replay.step_rules import StepRules


class Ledger(DrawRules, JudgeRules, StepRules):
    """Who may do what, and what follows. Each method checks, makes one record per change, and applies it."""

    def status(self, *, idle: Mapping[str, str], causes: Mapping[str, str], calls: Mapping[str, int]) -> QueueStatus:
        """A consistent picture; `idle`, `causes` and `calls` are the queue's own."""
        state = self.state
        return QueueStatus(
            step=state.step,
            committed_step=state.commits[-1].step,
            checkpoint=state.commits[-1].directory,
            newest_version=state.versions.newest,
            states={name.value: count for name, count in state.counts.items()},
            tokens=state.books.table(),
            lag_histogram=dict(sorted(state.lags.items())),
            idle=dict(idle),
            calls=dict(calls),
            idle_causes=dict(causes),
            quarantined=len(state.quarantined),
            commits=[commit.step for commit in state.commits],
        )
