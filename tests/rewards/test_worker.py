"""Reward workers on the real queue; generation and learner are scripted."""

import asyncio
import pickle
import threading
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Split
from transformers import PreTrainedTokenizerFast

from millrace.core.catalogue import Method
from millrace.core.errors import DeadlineError, RewardError
from millrace.core.protocols import Feedback, QueueStatus, Role, Taken
from millrace.core.replay.config import QueueConfig
from millrace.core.replay.queue import ReplayQueue
from millrace.core.schema import decode as unpack
from millrace.core.schema import encode
from millrace.core.types import Group, GroupId, Ints, Lease, Prompt, Rollout, VerdictKind, VersionRun, WorkerId
from millrace.rewards.config import RewardConfig
from millrace.rewards.worker import DeferredJudge, RewardWorker

N = 4
MAKER = WorkerId("generation-0")


class Prompts:
    def draw(self, index: int) -> Prompt:
        return Prompt(id=f"p{index}", text="", tokens_P=np.array([1], np.int32), answer="a", row={"draw": index})


class Home:
    """The queue, callable from any event loop. Can be made to lose answers."""

    def __init__(self, queue: ReplayQueue) -> None:
        self._queue = queue
        self._loop = asyncio.get_running_loop()
        self.lost_answers: dict[str, int] = {}

    def __getattr__(self, method: str) -> Callable[..., Awaitable[Any]]:
        bound = getattr(self._queue, method)

        async def call(*args: Any, **kwargs: Any) -> Any:
            if asyncio.get_running_loop() is self._loop:
                answer = await bound(*args, **kwargs)
            else:
                calling = asyncio.run_coroutine_threadsafe(bound(*args, **kwargs), self._loop)
                answer = await asyncio.wrap_future(calling)
            if self.lost_answers.get(method):
                self.lost_answers[method] -= 1
                raise ConnectionResetError("the answer got lost")
            return answer

        return call


def letters(responses: Sequence[Ints]) -> list[str]:
    return ["".join(chr(97 + token) for token in tokens_T) for tokens_T in responses]


def group_of(lease: Lease, member_tokens: Sequence[int]) -> Group:
    rollouts = tuple(
        Rollout(
            tokens_T=np.array([token], np.int32),
            sampled_T=np.ones(1, np.bool_),
            behaviour_logprob_T=np.zeros(1, np.float32),
            versions=(VersionRun(0, 0, 1),),
            finish_reason="stop",
            seed=seed,
        )
        for token, seed in zip(member_tokens, lease.seeds, strict=True)
    )
    return Group(id=lease.id, prompt=lease.prompt, rollouts=rollouts, lease_epoch=lease.epoch)


class World:
    """A run whose generation and learner the test scripts."""

    def __init__(self, **config: Any) -> None:
        given = {"groups_per_step": 2, "group_size": N, "steps": 4, "max_lag": 100, **config}
        self.queue = ReplayQueue(QueueConfig.model_validate(given), Prompts(), seed=0)
        self.home = Home(self.queue)
        self.epoch = self.maker_epoch = -1
        self._requests = 0

    def worker(self, verifier: Any, name: str = "reward-0", **config: Any) -> RewardWorker:
        given = {"heartbeat_s": 0.02, "linger_s": 0.02, "poll_s": 0.5, **config}
        return RewardWorker(
            WorkerId(name),
            queue=self.home,  # type: ignore[arg-type]  # forwards every method of the queue
            verifier=verifier,
            tokenizer=letters,
            columns=("draw",),
            config=RewardConfig.model_validate(given),
        )

    async def start(self) -> None:
        resumption = await self.queue.join_learner()
        self.epoch = resumption.epoch
        await self.queue.announce(version=resumption.version, epoch=self.epoch)
        self.maker_epoch = await self.queue.join(MAKER, role=Role.GENERATION, slots=64)

    async def make(self, groups: int, tokens: Sequence[int] = (0, 1, 0, 1)) -> None:
        """Generate groups whose responses are one letter each."""
        self._requests += 1
        grant = await self.queue.lease_draws(
            MAKER, epoch=self.maker_epoch, version=0, want=groups, request=f"lease/{self._requests}", wait_s=0
        )
        assert len(grant.leases) == groups
        pack = encode([group_of(lease, tokens) for lease in grant.leases])
        await self.queue.put_groups(MAKER, epoch=self.maker_epoch, pack=pack, request=f"put/{self._requests}")

    async def take(self, step: int) -> Taken:
        taken = await self.queue.take(step=step, epoch=self.epoch, wait_s=30)
        assert taken is not None
        return taken

    async def train(self, steps: int) -> list[Taken]:
        batches = []
        for step in range(steps):
            batches.append(await self.take(step))
            await self.queue.trained(step=step, epoch=self.epoch, feedback=Feedback(trained_tokens=2 * N))
        return batches


@asynccontextmanager
async def running(*workers: RewardWorker) -> AsyncIterator[list[asyncio.Task[None]]]:
    tasks = [asyncio.create_task(worker.run()) for worker in workers]
    try:
        yield tasks
        for worker in workers:
            await worker.stop()
        await asyncio.gather(*(task for task in tasks if not task.cancelled()))
    finally:
        for task in tasks:
            task.cancel()


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(60):
        while not condition():
            await asyncio.sleep(0.001)


def test_groups_are_judged_by_name_and_the_run_ends_by_itself() -> None:
    async def scenario() -> tuple[list[Taken], QueueStatus, Mapping[str, Any]]:
        world = World()
        worker = world.worker("exact")
        await world.start()
        await world.make(8)
        async with running(worker) as (task,):
            batches = await world.train(4)
            await task
        return batches, await world.queue.status(), await worker.status()

    batches, status, worker = asyncio.run(scenario())
    for taken in batches:
        for verdict in taken.verdicts:
            assert [one.score for one in verdict.verdicts] == [1.0, 0.0, 1.0, 0.0]
    assert worker["verdicts"] == {"scored": 32, "subject_failed": 0, "judge_failed": 0, "in_a_row": 0}
    assert status.calls["lease_groups"] <= 6
    assert status.calls["put_verdicts"] <= 3


def test_a_verifier_of_one_s_own_takes_columns(tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text("def even(text, draw):\n    return 1.0 if draw % 2 == 0 else 0.5\n")

    async def scenario() -> Taken:
        world = World()
        await world.start()
        await world.make(2)
        async with running(world.worker(f"{tmp_path}/mine.py:even")):
            return await world.take(0)

    taken = asyncio.run(scenario())
    scores = {
        group.id.draw: one.verdicts[0].score for group, one in zip(unpack(taken.pack), taken.verdicts, strict=True)
    }
    assert scores == {0: 1.0, 1: 0.5}


def test_a_failed_verdict_is_masked_and_never_a_score(tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text("def picky(text):\n    return 1.0 if text == 'a' else 'no'\n")

    async def scenario() -> tuple[Taken, Mapping[str, Any]]:
        world = World(judge_retries=0)
        worker = world.worker(f"{tmp_path}/mine.py:picky")
        await world.start()
        await world.make(2)
        async with running(worker):
            return await world.take(0), await worker.status()

    taken, worker = asyncio.run(scenario())
    for verdict in taken.verdicts:
        assert [one.score for one in verdict.verdicts] == [1.0, None, 1.0, None]
        assert [one.kind for one in verdict.verdicts[1::2]] == [VerdictKind.JUDGE_FAILED] * 2
        assert "picky" in verdict.verdicts[1].feedback
        assert "'no'" in verdict.verdicts[1].feedback
    assert worker["verdicts"]["judge_failed"] == 4
    assert "'p0'" in worker["first_failure"] or "'p1'" in worker["first_failure"]


def test_a_verifier_that_always_fails_ends_the_run_with_its_cause(tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text("def broken(text):\n    return {}['score']\n")

    async def scenario() -> None:
        world = World()
        await world.start()
        await world.make(4)
        async with running(world.worker(f"{tmp_path}/mine.py:broken", max_judge_failures=8)) as (task,):
            await task

    with pytest.raises(RewardError) as caught:
        asyncio.run(scenario())
    for part in ("8 judge failures in a row", "mine.py:broken", "KeyError: 'score'", "prompt 'p", "return {}['score']"):
        assert part in str(caught.value)


HELD = threading.Event()


def hold_draw_0(text: str, draw: int) -> float:
    """Hangs on the responses to draw 0."""
    if draw == 0:
        HELD.wait(30)
    return 1.0


def test_a_slow_group_does_not_hold_the_others() -> None:
    HELD.clear()

    async def scenario() -> list[int]:
        world = World()
        worker = world.worker("exact")
        worker._judge._method = _own(hold_draw_0)
        await world.start()
        await world.make(4)
        async with running(worker):
            first = await world.take(0)
            HELD.set()
            return [group.id.draw for group in unpack(first.pack)]

    assert 0 not in asyncio.run(scenario())


def test_a_group_that_waits_for_one_verdict_takes_the_room_of_one() -> None:
    """So that as many slow verdicts are in the making as `concurrency` allows, however many groups they are of."""

    async def scenario() -> int:
        world = World(steps=8)
        worker = world.worker("exact", concurrency=16)
        under_way, go_on = asyncio.Semaphore(0), asyncio.Event()

        async def waits_for_b(text: str) -> float:
            if text == "b":
                under_way.release()
                await go_on.wait()
            return 1.0

        worker._judge._method = Method("mine", waits_for_b, ("text",), {}, {}, True, RewardError)
        await world.start()
        await world.make(1, tokens=(0, 0, 1, 0))
        async with running(worker):
            await asyncio.wait_for(under_way.acquire(), 5)  # from now on it knows how large a group is
            await world.make(12, tokens=(0, 0, 1, 0))
            for _ in range(12):
                await asyncio.wait_for(under_way.acquire(), 5)
            hand = (await worker.status())["hand"]
            go_on.set()
            await world.train(6)
        return int(hand)

    assert asyncio.run(scenario()) == 13


def _own(function: Callable[..., float]) -> Any:
    return Method(function.__name__, function, ("text", "draw"), {}, {}, False, RewardError)


def test_a_heartbeat_tells_the_verdicts_so_far() -> None:
    async def scenario() -> None:
        world = World()
        worker = world.worker("exact")
        go_on = asyncio.Event()

        async def waits_for_b(text: str, draw: int) -> float:
            if text == "b":
                await go_on.wait()
            return 1.0

        worker._judge._method = Method("mine", waits_for_b, ("text", "draw"), {}, {}, True, RewardError)
        told: list[Any] = []
        heartbeat = world.home.heartbeat

        async def noted(*args: Any, progress: Any, **kwargs: Any) -> Any:
            told.append(dict(progress))
            return await heartbeat(*args, progress=progress, **kwargs)

        world.home.heartbeat = noted  # type: ignore[attr-defined]  # hides the forwarded method
        await world.start()
        await world.make(1, tokens=(0, 0, 1, 0))
        async with running(worker):
            await until(lambda: {GroupId(0, 0): 3} in told)
            go_on.set()
            await until(lambda: worker._counts["groups"] == 1)

    asyncio.run(scenario())


def test_a_group_that_comes_back_while_it_is_judged_is_judged_once() -> None:
    HELD.clear()

    async def scenario() -> Mapping[str, Any]:
        world = World(judge_lease_s=0.1, judge_expiries=1000)
        worker = world.worker("exact")
        worker._judge._method = _own(hold_draw_0)
        await world.start()
        await world.make(2)
        async with running(worker):
            leases: list[Any] = []
            leased = world.queue._ledger.lease_groups
            world.queue._ledger.lease_groups = lambda *a, **k: leases.append(leased(*a, **k)) or leases[-1]  # type: ignore[method-assign]
            await until(lambda: [GroupId(0, 0)] in leases)  # its lease ended, and it was leased to the same worker
            HELD.set()
            await world.take(0)
            return await worker.status()

    status = asyncio.run(scenario())
    assert status["verdicts"]["scored"] == 2 * N
    assert status["hand"] == 0


def test_another_worker_judges_what_a_killed_one_had_leased() -> None:
    HELD.clear()

    async def scenario() -> Mapping[str, Any]:
        world = World(judge_lease_s=0.3, judge_expiries=5)
        victim = world.worker("exact", "reward-1")
        victim._judge._method = _own(hold_draw_0)
        await world.start()
        await world.make(1)
        dying = asyncio.create_task(victim.run())
        await until(lambda: bool(victim._hand))
        dying.cancel()
        await asyncio.wait([dying])
        await world.make(1)
        survivor = world.worker("exact")
        async with running(survivor):
            await world.take(0)
        HELD.set()
        return await survivor.status()

    assert asyncio.run(scenario())["groups"] == 2


def test_a_lost_answer_is_asked_for_again_and_a_silent_queue_is_named() -> None:
    async def scenario(lost: int) -> Mapping[str, Any]:
        world = World()
        world.home.lost_answers = {"put_verdicts": lost, "lease_groups": min(lost, 2)}
        worker = world.worker("exact", silence_s=0.4)
        await world.start()
        await world.make(8)
        async with running(worker) as (task,):
            await asyncio.wait({task, asyncio.create_task(world.train(4))}, return_when=asyncio.ALL_COMPLETED)
            await task
        return await worker.status()

    assert asyncio.run(scenario(2))["refused"] == 0
    with pytest.raises(DeadlineError, match=r"reward-0: put_verdicts \(draw .*the answer got lost"):
        asyncio.run(scenario(10**6))


def test_stopping_gives_back_what_is_in_hand() -> None:
    HELD.clear()

    async def scenario() -> QueueStatus:
        world = World()
        worker = world.worker("exact")
        worker._judge._method = _own(hold_draw_0)
        await world.start()
        await world.make(1)
        async with running(worker):
            await until(lambda: bool(worker._hand))
        HELD.set()
        return await world.queue.status()

    states = asyncio.run(scenario()).states
    assert (states["judging"], states["generated"]) == (0, 1)


async def never(*args: Any, **kwargs: Any) -> Any:
    """A queue whose process is stopped: it neither answers nor refuses."""
    await asyncio.Event().wait()


@pytest.mark.parametrize("silent", ["join", "put_verdicts", "leave", "heartbeat", "lease_groups"])
def test_stopping_does_not_wait_for_a_queue_that_is_silent(silent: str) -> None:
    """The bound of the whole farewell is 3 s; what a verdict on a dead queue costs is judging it again."""

    async def scenario() -> None:
        world = World()
        await world.start()
        await world.make(1)
        setattr(world.home, silent, never)
        worker = world.worker("exact", silence_s=600.0)
        task = asyncio.create_task(worker.run())
        if silent in ("put_verdicts", "leave"):
            await until(lambda: worker._counts["put_calls"] > 0)
        else:
            await asyncio.sleep(0)
        await worker.stop()
        async with asyncio.timeout(30):  # silence_s is 600
            await task

    asyncio.run(scenario())


def character_tokenizer(directory: Path) -> None:
    vocabulary = {"<pad>": 0, "<eos>": 1, "<unk>": 2, **{letter: 3 + i for i, letter in enumerate("abc ")}}
    inner = Tokenizer(WordLevel(vocabulary, unk_token="<unk>"))
    inner.pre_tokenizer = Split("", "isolated")
    PreTrainedTokenizerFast(
        tokenizer_object=inner, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>"
    ).save_pretrained(directory)


def test_a_judge_crosses_a_machine_as_data(tmp_path: Path) -> None:
    character_tokenizer(tmp_path)
    judge = pickle.loads(pickle.dumps(DeferredJudge("exact", str(tmp_path))))
    lease = Lease(id=(0, 0), prompt=Prompts().draw(0), n=2, seeds=(0, 1), min_version=0, epoch=1)  # type: ignore[arg-type]
    group = group_of(lease, [3, 4])

    async def twice() -> list[float | None]:
        await judge(group.prompt, group.rollouts)
        return [one.score for one in await judge(group.prompt, group.rollouts)]

    assert asyncio.run(twice()) == [1.0, 0.0]
    pickle.dumps(judge)
