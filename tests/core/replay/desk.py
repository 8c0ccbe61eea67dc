"""A ledger with one engine, two judges and a learner, moved by hand."""

from millrace.core.protocols import Feedback, Role
from millrace.core.replay.ledger import Ledger
from millrace.core.schema import GroupHeader
from millrace.core.types import GroupVerdict, VersionRun
from tests.core.replay.cast import OK
from tests.core.replay.scenarios import config


class Desk:
    """A ledger with one engine, two judges and a learner, moved by hand."""

    def __init__(self, **changes):
        self.now, self.records, self.requests = 0.0, [], 0
        self.ledger = Ledger(config(**changes), clock=lambda: self.now, emit=self.records.append)
        self.engine = self.ledger.join("generation-0", role=Role.GENERATION, slots=4)
        self.judges = {name: self.ledger.join(name, role=Role.REWARD, slots=4) for name in ("reward-0", "reward-1")}
        self.begin()

    @property
    def state(self):
        return self.ledger.state

    def begin(self):
        self.resumption = self.ledger.join_learner()
        self.learner = self.resumption.epoch
        self.ledger.announce(version=self.resumption.version, epoch=self.learner)
        self.version = self.resumption.version

    def request(self):
        self.requests += 1
        return f"r{self.requests}"

    def lease(self, want=1, version=None):
        version = self.version if version is None else version
        call = {"epoch": self.engine, "version": version, "want": want, "request": self.request()}
        return self.ledger.lease_draws("generation-0", **call)

    def put(self, *groups, tokens=5, version=None):
        version = self.version if version is None else version
        size = self.ledger.config.group_size
        headers = [
            GroupHeader(
                id=group,
                lease_epoch=self.engine,
                n=size,
                tokens=tokens,
                oldest_version=version,
                runs=((VersionRun(version, 0, tokens),),) * size,
            )
            for group in groups
        ]
        call = {"epoch": self.engine, "headers": headers}
        return self.ledger.put_groups("generation-0", store=lambda rows: [(0, row) for row in rows], **call)

    def judge(self, *verdicts, name="reward-0"):
        call = {"epoch": self.judges[name], "request": self.request()}
        groups = self.ledger.lease_groups(name, want=8, **call)
        members = verdicts or (OK,) * self.ledger.config.group_size
        sheet = [GroupVerdict(id=group, verdicts=members) for group in groups]
        self.ledger.put_verdicts(name, epoch=self.judges[name], verdicts=sheet)
        return groups

    def make(self, count, version=None):
        groups = self.lease(count, version)
        self.put(*groups, version=version)
        self.judge()
        return groups

    def take(self, step):
        entries = self.ledger.take(step=step, epoch=self.learner)
        return None if entries is None else [entry.draw for entry in entries]

    def train(self, step, tokens=5):
        version = self.ledger.trained(step=step, epoch=self.learner, feedback=Feedback(trained_tokens=tokens))
        self.ledger.announce(version=version, epoch=self.learner)
        self.version = version
        return version

    def states(self):
        return {index: draw.state for index, draw in self.state.draws.items()}
