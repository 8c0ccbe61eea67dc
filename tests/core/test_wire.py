"""What crosses processes with every pack: nothing is lost, and little of it is pickled."""

import copy
import pickle

import numpy as np
import pytest

from millrace.core import schema
from millrace.core.protocols import Receipt, Taken
from millrace.core.types import Group, GroupId, GroupVerdict, Prompt, Rollout, Verdict, VerdictKind, VersionRun

VERDICTS = GroupVerdict(
    id=GroupId(7, 2),
    verdicts=(
        Verdict(kind=VerdictKind.SCORED, score=0.5, components={"exact": 0.5}, feedback="half"),
        Verdict(kind=VerdictKind.SUBJECT_FAILED, score=0.0),
        Verdict(kind=VerdictKind.JUDGE_FAILED, score=None, feedback="gone"),
    ),
)


def pack_of(*draws: int, tokens: int = 100, sampled: bool = True) -> schema.Pack:
    rollout = Rollout(
        tokens_T=np.arange(tokens, dtype=np.int32),
        sampled_T=np.full(tokens, sampled),
        behaviour_logprob_T=np.zeros(tokens, np.float32),
        versions=(VersionRun(3, 0, tokens),),
        finish_reason="stop",
        seed=0,
    )
    prompt = Prompt(id="p", text="", tokens_P=np.zeros(1, np.int32))
    return schema.encode(
        [Group(id=GroupId(draw, 0), prompt=prompt, rollouts=(rollout,) * 2, lease_epoch=1) for draw in draws]
    )


@pytest.mark.parametrize("copied", [lambda value: pickle.loads(pickle.dumps(value)), copy.deepcopy])
def test_verdicts_and_receipts_arrive_as_they_were(copied: object) -> None:
    assert callable(copied)
    other = copied(VERDICTS)
    assert other == VERDICTS and type(other.id) is GroupId
    assert [type(one.kind) for one in other.verdicts] == [VerdictKind] * 3
    receipt = Receipt(id=GroupId(7, 2), accepted=False, reason="fenced")
    assert copied(receipt) == receipt and type(copied(receipt).id) is GroupId


def test_verdicts_cost_no_lookup_of_their_class_each() -> None:
    many = GroupVerdict(id=GroupId(0, 0), verdicts=VERDICTS.verdicts * 20)
    assert pickle.dumps(many, protocol=5).count(b"Verdict") == 0


def test_a_batch_crosses_beside_its_pickle() -> None:
    taken = Taken(step=0, pack=pack_of(0, 1, tokens=5000), verdicts=[VERDICTS], lag=[(0,)])
    beside: list[pickle.PickleBuffer] = []
    data = pickle.dumps(taken, protocol=5, buffer_callback=beside.append)
    assert len(data) < 1000 and [buffer.raw().nbytes for buffer in beside] == [len(taken.pack)]
    arrived = pickle.loads(data, buffers=[bytes(buffer.raw()) for buffer in beside])
    assert [group.id.draw for group in schema.decode(arrived.pack)] == [0, 1]
    assert bytes(arrived.pack) == bytes(taken.pack)


def test_a_whole_pack_is_not_copied_and_a_part_is() -> None:
    pack = pack_of(0, 1, 2)
    assert schema.select([(pack, 0), (pack, 1), (pack, 2)]) is pack
    assert [header.id.draw for header in schema.headers(schema.select([(pack, 1), (pack, 2)]))] == [1, 2]
    assert [header.id.draw for header in schema.headers(schema.select([(pack, 2), (pack, 0)]))] == [2, 0]
    other = pack_of(3)
    both = schema.select([(pack, 0), (pack, 1), (pack, 2), (other, 0)])
    assert [header.id.draw for header in schema.headers(both)] == [0, 1, 2, 3]


def test_what_was_not_sampled_stays_so() -> None:
    for sampled in (True, False):
        (group,) = schema.decode(pack_of(0, sampled=sampled))
        assert [each.sampled_T.tolist() for each in group.rollouts] == [[sampled] * 100] * 2
        assert [len(each.sampled_T) for each in group.rollouts] == [100, 100]
