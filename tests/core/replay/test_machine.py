"""A hypothesis state machine: crashes, repeats, late puts, restarts and clock jumps against the production ledger."""

import json

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, precondition, rule

from tests.core.replay.cast import Budget
from tests.core.replay.explorer import drain
from tests.core.replay.scenarios import config
from tests.core.replay.world import World


class LedgerMachine(RuleBasedStateMachine):
    @initialize(
        stale=st.sampled_from(["wait", "wait", "mask", "train", "drop", "requeue"]),
        max_lag=st.integers(0, 3),
        per_step=st.integers(1, 3),
        size=st.integers(1, 2),
        forgetful=st.booleans(),
        keep=st.integers(1, 2),
        reuse=st.integers(1, 3),
    )
    def begin(self, stale, max_lag, per_step, size, forgetful, keep, reuse):
        requeues = 2 if stale == "requeue" else 0
        queue = config(
            groups_per_step=per_step,
            group_size=size,
            max_lag=max_lag,
            stale=stale,
            requeues=requeues,
            steps=3 if reuse == 1 else 5,
            keep_commits=keep,
            reuse=min(reuse, max_lag + 1),
        )
        faults = Budget(**dict.fromkeys(Budget.__slots__, 100))
        self.world = World(queue, engines=2, judges=2, forgetful=forgetful, budget=faults, record=True)

    @rule(choice=st.integers(0, 1_000))
    def anything(self, choice):
        actions = self.world.actions()
        if actions:
            self.world.do(actions[choice % len(actions)])

    @rule(choice=st.integers(0, 1_000))
    def something_useful(self, choice):
        ordinary = ("announce", "load", "lease", "put", "judge", "score", "take", "train", "commit")
        actions = [action for action in self.world.actions() if action[0] in ordinary]
        if actions:
            self.world.do(actions[choice % len(actions)])

    @precondition(lambda self: self.world.engines[0].version >= 0)
    @rule(want=st.integers(2, 5))
    def lease_many(self, want):
        self.world._do_lease(0, want)
        self.world.check()

    @rule(seconds=st.sampled_from([-3600.0, -1.0, 3600.0]))
    def the_clock_jumps(self, seconds):
        self.world.now += seconds
        self.world.ledger.expire()
        self.world.check()
        for engine in self.world.engines:  # the world's own view of time has no meaning any more
            for hand in engine.hands:
                hand.seen_at = hand.granted_at = self.world.now + abs(seconds)

    @rule()
    def the_ledger_restarts(self):
        """Its records, as JSON, rebuild it; the run goes on with the rebuilt one."""
        world = self.world
        records = json.loads(json.dumps(world.witness.records))
        rebuilt = world.new_ledger()
        rebuilt.replay(records)
        assert rebuilt.state == world.ledger.state
        world.ledger = rebuilt
        for engine in world.engines:  # every lease has one full grace
            for hand in engine.hands:
                hand.seen_at = hand.granted_at = world.now
        world.check()

    def teardown(self):
        if hasattr(self, "world"):
            drain(self.world)


TestLedger = LedgerMachine.TestCase
TestLedger.settings = settings(
    max_examples=40,
    stateful_step_count=60,
    deadline=None,
    derandomize=True,
    suppress_health_check=list(HealthCheck),
)
