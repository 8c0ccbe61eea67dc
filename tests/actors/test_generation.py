"""Generation workers on the real queue, the real weight store and the table engine; only the learner is scripted."""

import asyncio
import json
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from msgspec.structs import replace
from safetensors.numpy import save_file

from millrace.actors.config import GenerationConfig
from millrace.actors.engines.sampling import log_softmax
from millrace.actors.engines.table import TableEngine
from millrace.actors.generation import ROOM_S, GenerationWorker
from millrace.core.errors import DeadlineError, EngineError, WeightsError
from millrace.core.protocols import Feedback, Manifest, Probe, Proof, QueueStatus, Role, Sampling, WeightHandle
from millrace.core.replay.config import QueueConfig
from millrace.core.replay.queue import ReplayQueue
from millrace.core.schema import decode
from millrace.core.types import Group, GroupVerdict, Ints, Prompt, Rollout, Verdict, VerdictKind, VersionRun, WorkerId
from millrace.core.weight_store import FileWeightStore
from millrace.core.weights import digest_of, layout

V, L, N = 6, 64, 4  # vocabulary, positions, rollouts of a group
JUDGE = WorkerId("judge-0")


class Prompts:
    """Draw i is prompt i."""

    def draw(self, index: int) -> Prompt:
        return Prompt(id=f"p{index}", text="", tokens_P=np.array([1 + index % (V - 1)], np.int32))


class Home:
    """The queue as `cluster.spawn.here` would hand it out: callable from any event loop. Can be made to misbehave."""

    def __init__(self, queue: ReplayQueue) -> None:
        self._queue = queue
        self._loop = asyncio.get_running_loop()
        self.lost_answers: dict[str, int] = {}  # method -> how many answers get lost from now on

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


class World:
    """A run without a learner: what a learner would do is scripted by the test."""

    def __init__(self, folder: Path, *, slots: int = 16, token_delay_s: float = 0.0, **config: Any) -> None:
        self.folder = folder
        self.slots = slots
        self.token_delay_s = token_delay_s
        given = {"groups_per_step": 4, "group_size": N, "steps": 6, "max_lag": 1, **config}
        self.queue = ReplayQueue(QueueConfig.model_validate(given), Prompts(), seed=0)
        self.home = Home(self.queue)
        self.store = FileWeightStore(str(folder / "weights"), keep=3)
        self.epoch = self.judge_epoch = -1
        self.taken: list[Group] = []
        self.trained = asyncio.Event()
        table = np.random.default_rng(0).normal(size=(V, L, V)).astype(np.float32)
        table[:, :, 0] -= 2  # the stop token: lengths vary
        (folder / "model").mkdir()
        shape = {"model_type": "millrace_table", "vocab_size": V, "positions": L}
        (folder / "model" / "config.json").write_text(json.dumps(shape))
        save_file({"table": table}, folder / "model" / "model.safetensors")
        self.table = table

    def engine(self, **changes: Any) -> TableEngine:
        options = {"slots": self.slots, "max_model_len": L, "token_delay_s": self.token_delay_s, **changes}
        return TableEngine(str(self.folder / "model"), **options)

    def worker(self, name: str = "generation-0", *, engine: Any = None, **config: Any) -> GenerationWorker:
        given = {"slots": self.slots, "heartbeat_s": 0.02, "linger_s": 0.02, "pack_groups": 2, **config}
        return GenerationWorker(
            WorkerId(name),
            queue=self.home,  # type: ignore[arg-type]  # forwards every method of the queue
            store=self.store,
            engine=engine or self.engine(),
            config=GenerationConfig.model_validate(given),
            sampling=Sampling(max_tokens=40, stop_token_ids=(0,)),
        )

    async def publish(self, version: int, step: int, *, lie: float = 0.0) -> None:
        """Announce a version; `lie` is the probes' error in nats."""
        table = np.ascontiguousarray(self.table + 0.01 * version)
        table[:, :, 1] += 0.05 * version
        tokens = np.array([1, 2, 3], np.int32)
        logprobs = log_softmax(table[tokens[:-1], np.arange(2)])[np.arange(2), tokens[1:]] + lie
        buffer = table.view(np.uint8).reshape(-1)
        manifest = Manifest(
            version=version,
            step=step,
            epoch=self.epoch,
            tensors=layout([("table", "float32", table.shape)]),
            digest=digest_of(buffer),
            probes=(Probe(tokens_T=tokens, logprob_T=logprobs.astype(np.float32)),),
        )
        await self.store.publish(manifest, buffer)
        await self.queue.announce(version=version, epoch=self.epoch)

    async def start(self, **publish: Any) -> None:
        """The learner joins and announces the first version; the judge joins."""
        resumption = await self.queue.join_learner()
        self.epoch = resumption.epoch
        self.judge_epoch = await self.queue.join(JUDGE, role=Role.REWARD, slots=1)
        await self.publish(resumption.version, resumption.step, **publish)

    async def judge(self) -> None:
        for request in range(10**6):
            await asyncio.sleep(0.001)  # when the run is over the queue answers at once
            pack = await self.queue.lease_groups(
                JUDGE, epoch=self.judge_epoch, want=100, request=f"lease/{request}", wait_s=0.05
            )
            verdicts = [
                GroupVerdict(id=group.id, verdicts=(Verdict(kind=VerdictKind.SCORED, score=1.0),) * len(group.rollouts))
                for group in (decode(pack) if pack else [])
            ]
            if verdicts:
                await self.queue.put_verdicts(
                    JUDGE, epoch=self.judge_epoch, verdicts=verdicts, request=f"put/{request}"
                )

    async def learn(self, steps: int, *, first: int = 0) -> None:
        for step in range(first, steps):
            taken = None
            while taken is None:
                taken = await self.queue.take(step=step, epoch=self.epoch, wait_s=1)
            groups = decode(taken.pack)
            self.taken += groups
            feedback = Feedback(trained_tokens=sum(group.tokens for group in groups))
            version = await self.queue.trained(step=step, epoch=self.epoch, feedback=feedback)
            self.trained.set()
            await self.publish(version, step + 1)

    async def train(self, steps: int) -> None:
        """Judge and learn beside whatever generates."""
        judging = asyncio.create_task(self.judge())
        try:
            await self.learn(steps)
        finally:
            judging.cancel()


@asynccontextmanager
async def running(*workers: GenerationWorker) -> AsyncIterator[list[asyncio.Task[None]]]:
    """Run workers; those that have not ended by themselves are stopped in order."""
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


def closes(status: QueueStatus) -> None:
    rows = {row: tokens for row, tokens in status.tokens.items() if row not in ("generated", "unaccounted")}
    assert status.tokens["unaccounted"] == 0
    assert status.tokens["generated"] == sum(rows.values()) > 0


def test_a_run_ends_by_itself_and_every_token_is_accounted_for(tmp_path: Path) -> None:
    async def scenario() -> tuple[World, QueueStatus, Mapping[str, Any]]:
        world = World(tmp_path)
        worker = world.worker()
        await world.start()
        async with running(worker) as (task,):
            await world.train(6)
            await task
        return world, await world.queue.status(), await worker.status()

    world, status, worker = asyncio.run(scenario())
    assert len(world.taken) == 6 * 4
    assert len({group.id.draw for group in world.taken}) == 6 * 4
    assert all(len(group.rollouts) == N for group in world.taken)
    closes(status)
    assert status.tokens["generated"] == worker["generated"]
    assert status.tokens["trained"] == sum(group.tokens for group in world.taken)
    assert max(status.lag_histogram) <= 1
    assert worker["failed"] == worker["refused"] == 0


def test_a_synchronous_run_is_the_same_code(tmp_path: Path) -> None:
    async def scenario() -> tuple[World, QueueStatus]:
        world = World(tmp_path, max_lag=0, steps=4)
        await world.start()
        async with running(world.worker(), world.worker("generation-1")) as tasks:
            await world.train(4)
            await asyncio.gather(*tasks)
        return world, await world.queue.status()

    world, status = asyncio.run(scenario())
    assert set(status.lag_histogram) == {0}
    assert [{run.version for r in group.rollouts for run in r.versions} for group in world.taken[::4]] == [
        {0},
        {1},
        {2},
        {3},
    ]
    closes(status)


def test_tokens_of_two_versions_stand_in_one_rollout_and_match_them(tmp_path: Path) -> None:
    async def scenario() -> World:
        world = World(tmp_path, token_delay_s=0.002, max_lag=4, groups_per_step=2, steps=8)
        await world.start()
        async with running(world.worker(slots=8)):
            await world.train(8)
        return world

    world = asyncio.run(scenario())
    mixed = [r for group in world.taken for r in group.rollouts if len(r.versions) > 1]
    assert mixed
    for rollout in mixed:
        assert [run.start for run in rollout.versions] == [0, *(run.end for run in rollout.versions[:-1])]
        assert rollout.versions[-1].end == len(rollout)
        versions = [run.version for run in rollout.versions]
        assert versions == sorted(set(versions))


def test_calls_carry_packs(tmp_path: Path) -> None:
    async def scenario() -> tuple[QueueStatus, Mapping[str, Any]]:
        world = World(tmp_path, slots=64, groups_per_step=16, steps=8, max_lag=2, group_size=N)
        worker = world.worker(pack_groups=4, linger_s=1.0, heartbeat_s=1.0)
        await world.start()
        async with running(worker) as (task,):
            await world.train(8)
            await task
        return await world.queue.status(), await worker.status()

    status, worker = asyncio.run(scenario())
    assert worker["groups"] >= 8 * 16
    calls = {method: status.calls[method] for method in ("lease_draws", "put_groups")}
    assert calls["put_groups"] <= worker["groups"] / 4 + 8 * 2  # full packs, and what a step's end flushes
    assert sum(calls.values()) <= 0.15 * 8 * 16 * N


class Held:
    """An engine whose responses end when the test says so."""

    def __init__(self) -> None:
        self.version = -1
        self.calls: dict[str, asyncio.Future[None]] = {}
        self.started: list[str] = []
        self.tokens: dict[str, int] = {}
        self.pending: dict[str, int] = {}  # responses that go on
        self.finished = self.aborted = 0
        self.failing: set[str] = set()
        self.loads: list[tuple[int, bool]] = []

    @property
    def generated(self) -> int:
        return self.finished + self.aborted + sum(self.tokens.values())

    async def sample(self, tokens_P: Ints, *, sampling: Sampling, seeds: Sequence[int], key: str) -> Sequence[Rollout]:
        self.started.append(key)
        if key in self.failing:
            raise EngineError(f"sample '{key}': out of memory")
        self.calls[key] = asyncio.get_running_loop().create_future()
        self.tokens[key] = self.pending[key] = len(seeds)
        version = self.version
        try:
            await self.calls[key]
        except EngineError:
            self.aborted += self.tokens.pop(key)
            raise
        finally:
            del self.calls[key], self.pending[key]
        self.finished += self.tokens.pop(key)
        return tuple(
            Rollout(
                tokens_T=np.zeros(1, np.int32),
                sampled_T=np.ones(1, np.bool_),
                behaviour_logprob_T=np.zeros(1, np.float32),
                versions=(VersionRun(version, 0, 1),),
                finish_reason="stop",
                seed=seed,
            )
            for seed in seeds
        )

    def finish(self, key: str, responses: int = N) -> None:
        self.pending[key] -= responses
        if not self.pending[key]:
            self.calls[key].set_result(None)

    async def load(self, weights: WeightHandle, *, prove: bool) -> Proof:
        self.version = weights.manifest.version
        self.loads.append((self.version, prove))
        return Proof(version=self.version, digest=weights.manifest.digest, consumed=frozenset({"table"}))

    async def score(self, tokens_T: Ints) -> Any:
        raise NotImplementedError

    async def watch(self) -> None:
        await asyncio.Event().wait()

    async def abort(self, key: str) -> None:
        if key in self.calls and not self.calls[key].done():
            self.calls[key].set_exception(EngineError(f"sample '{key}' was aborted"))

    def progress(self) -> Mapping[str, int]:
        return dict(self.tokens)

    @property
    def unfinished(self) -> int:
        return sum(self.pending.values())

    async def close(self) -> None:
        pass


def test_the_engine_has_more_work_than_slots_and_a_finished_response_is_replaced_without_a_round_trip(
    tmp_path: Path,
) -> None:
    async def scenario() -> None:
        world = World(tmp_path, max_lag=100)
        engine = Held()
        worker = world.worker(engine=engine, slots=16, prefetch=8)
        await world.start()
        async with running(worker):
            # 16 slots are 4 groups of 4; the engine's own queue holds more, so that none waits for a lease.
            await until(lambda: len(engine.calls) == 8)
            leases = (await worker.status())["lease_calls"]
            engine.finish("draw 0 attempt 0", 1)
            await asyncio.sleep(3 * ROOM_S)
            assert (await worker.status())["lease_calls"] == leases  # room for one is not worth a round trip
            # All but one response of each of the first six groups end. Room is counted in responses: a long one keeps
            # its group in hand, but not the slots of the others idle.
            for draw in range(6):
                engine.finish(f"draw {draw} attempt 0", N - 1 if draw else N - 2)
            await until(lambda: engine.unfinished == (4 + 8) * N - 2)
            assert (await worker.status())["lease_calls"] == leases + 1
            assert (await worker.status())["groups"] == 0

    asyncio.run(scenario())


def test_groups_that_finish_one_after_another_leave_together(tmp_path: Path) -> None:
    async def scenario() -> None:
        world = World(tmp_path, max_lag=100)
        engine = Held()
        worker = world.worker(engine=engine, slots=16, prefetch=8, pack_groups=4, linger_s=3600)
        await world.start()
        async with running(worker):
            await until(lambda: len(engine.calls) == 8)
            for draw in range(4):
                engine.finish(f"draw {draw} attempt 0")
                for _ in range(50):
                    await asyncio.sleep(0)
                assert f"draw {draw} attempt 0" not in engine.calls
                assert world.queue._calls["put_groups"] == (draw == 3)
            await until(lambda: worker._counts["groups"] == 4)

    asyncio.run(scenario())


def test_a_request_that_waits_is_repeated_with_newer_weights_under_the_same_id(tmp_path: Path) -> None:
    async def scenario() -> list[tuple[str, int]]:
        world = World(tmp_path, max_lag=0, groups_per_step=2)
        lease_draws = world.home.lease_draws
        asked: list[tuple[str, int]] = []

        async def noted(*args: Any, request: str, version: int, **kwargs: Any) -> Any:
            asked.append((request, version))
            if version == 0 and world.queue._ledger.state.live == 2:
                await asyncio.Event().wait()  # this call does not hear of newer weights
            return await lease_draws(*args, request=request, version=version, **kwargs)

        world.home.lease_draws = noted  # type: ignore[attr-defined]  # hides the forwarded method
        await world.start()
        async with running(world.worker(engine=Held(), slots=64)):
            await until(lambda: len(asked) >= 2 and world.queue._ledger.state.live == 2)  # admission is full
            resumption = await world.queue.join_learner()
            world.epoch = resumption.epoch
            await world.publish(resumption.version, resumption.step)
            await until(lambda: asked[-1][1] == 1)
        return asked

    asked = asyncio.run(scenario())
    first_with_1 = next(i for i, (_, version) in enumerate(asked) if version == 1)
    assert asked[first_with_1][0] == asked[first_with_1 - 1][0]


def test_a_call_that_fails_fails_its_group_not_the_worker(tmp_path: Path) -> None:
    async def scenario() -> QueueStatus:
        world = World(tmp_path, max_lag=100, attempts=1)
        engine = Held()
        worker = world.worker(engine=engine, slots=16, prefetch=0)
        await world.start()
        async with running(worker):
            await until(lambda: "draw 1 attempt 0" in engine.calls)
            engine.calls["draw 1 attempt 0"].set_exception(EngineError("out of memory"))
            await until(lambda: "draw 4 attempt 0" in engine.calls)  # leased into the room of draw 1
            assert "draw 1 attempt 0" not in engine.calls
            assert "draw 0 attempt 0" in engine.calls
            assert (await worker.status())["failed"] == 1
        return await world.queue.status()

    status = asyncio.run(scenario())
    assert status.states["dead"] == 1  # at once, not when its lease would have expired
    assert status.tokens["failed:engine"] == N  # what its responses had sampled
    closes(status)


def test_an_engine_that_fails_group_after_group_ends_the_worker(tmp_path: Path) -> None:
    async def scenario() -> None:
        world = World(tmp_path, max_lag=100)
        engine = Held()
        engine.failing = {f"draw {draw} attempt {attempt}" for draw in range(50) for attempt in range(5)}
        await world.start()
        async with running(world.worker(engine=engine, max_engine_failures=3)) as (task,):
            await task

    with pytest.raises(EngineError, match=r"generation-0: 3 groups in a row failed.*draw \d+ attempt 0.*out of memory"):
        asyncio.run(scenario())


def test_a_fenced_group_is_aborted_and_its_tokens_are_reported(tmp_path: Path) -> None:
    async def scenario() -> QueueStatus:
        world = World(tmp_path, max_lag=100, lease_cap_s=0.3, lease_s=0.3, start_s=0.3)
        engine = Held()
        worker = world.worker(engine=engine, slots=4, prefetch=0)
        await world.start()
        async with running(worker):
            await until(lambda: "draw 0 attempt 0" in engine.calls)
            await until(lambda: "draw 0 attempt 1" in engine.calls)  # its cap ended it: granted again
            assert "draw 0 attempt 0" not in engine.calls
            assert engine.aborted >= N
        return await world.queue.status()

    status = asyncio.run(scenario())
    assert status.tokens["failed:capped"] >= N
    closes(status)


def test_another_worker_redoes_what_a_killed_one_had_leased(tmp_path: Path) -> None:
    async def scenario() -> tuple[World, QueueStatus]:
        world = World(tmp_path, lease_s=0.3, start_s=0.3, token_delay_s=0.001)
        await world.start()
        engine = Held()  # generates nothing to the end
        victim = asyncio.create_task(world.worker("generation-1", engine=engine).run())
        while (await world.queue.status()).tokens["in_flight"] < N:  # a heartbeat has told of its tokens
            await asyncio.sleep(0.001)
        lost = {key.split(" attempt")[0] for key in engine.calls}
        victim.cancel()
        await asyncio.wait([victim])
        async with running(world.worker()) as (task,):
            await world.train(6)
            await task
        again = {f"draw {group.id.draw}" for group in world.taken if group.id.attempt > 0}
        assert lost <= again
        return world, await world.queue.status()

    world, status = asyncio.run(scenario())
    assert len({group.id.draw for group in world.taken}) == 6 * 4
    assert status.tokens["failed:expired"] >= N
    closes(status)


def test_a_lost_answer_is_asked_for_again_and_changes_nothing(tmp_path: Path) -> None:
    async def scenario() -> tuple[World, QueueStatus, Mapping[str, Any]]:
        world = World(tmp_path)
        world.home.lost_answers = {"put_groups": 2, "lease_draws": 2, "heartbeat": 2}
        worker = world.worker()
        await world.start()
        async with running(worker) as (task,):
            await world.train(6)
            await task
        return world, await world.queue.status(), await worker.status()

    world, status, worker = asyncio.run(scenario())
    assert len({group.id for group in world.taken}) == 6 * 4
    assert worker["refused"] == 0
    assert not any(world.home.lost_answers.values())
    closes(status)


def test_a_queue_that_stays_silent_is_named_with_the_draws(tmp_path: Path) -> None:
    async def scenario() -> None:
        world = World(tmp_path)
        world.home.lost_answers = {"put_groups": 10**6}
        await world.start()
        async with running(world.worker(silence_s=0.3)) as (task,):
            await task

    with pytest.raises(DeadlineError) as caught:
        asyncio.run(scenario())
    for part in ("generation-0: put_groups (draw ", "attempt 0", "the answer got lost", "silence_s = 0.3"):
        assert part in str(caught.value)


def test_nothing_is_served_before_the_weights_are_proved(tmp_path: Path) -> None:
    async def scenario() -> None:
        world = World(tmp_path)
        await world.start(lie=0.5)
        async with running(world.worker()) as (task,):
            await task

    with pytest.raises(WeightsError, match="probe 0"):
        asyncio.run(scenario())


def test_it_waits_for_the_first_version_and_can_be_stopped_meanwhile(tmp_path: Path) -> None:
    async def scenario() -> QueueStatus:
        world = World(tmp_path)
        worker = world.worker()
        async with running(worker):
            await until(lambda: world.queue._calls["heartbeat"] > 2)
            assert "no version was announced" in (await worker.status())["idle"]
            assert world.queue._calls["lease_draws"] == 0
        return await world.queue.status()

    assert asyncio.run(scenario()).tokens["generated"] == 0


def test_counter_and_progress_are_of_one_moment_in_every_heartbeat(tmp_path: Path) -> None:
    async def scenario() -> list[int]:
        world = World(tmp_path, steps=200, max_lag=100, lease_cap_s=0.06, lease_s=0.06, start_s=0.06, attempts=10**6)
        engine = world.engine()
        worker = world.worker(engine=engine, heartbeat_s=0.002)
        gaps: list[int] = []
        answered = 0
        put_groups, read = world.home.put_groups, worker._heart._read

        async def put(*args: Any, pack: bytes, **kwargs: Any) -> Any:
            nonlocal answered
            receipts = await put_groups(*args, pack=pack, **kwargs)
            tokens = {group.id: group.tokens for group in decode(pack)}
            answered += sum(tokens[receipt.id] for receipt in receipts if receipt.accepted)
            if answered:  # slower from then on than its leases allow
                engine._options = engine._options.model_copy(update={"token_delay_s": 0.02})
            return receipts

        async def checked() -> Any:
            pulse = await read()
            gaps.append(pulse.generated - sum(pulse.progress.values()) - answered)
            return pulse

        world.home.put_groups = put  # type: ignore[attr-defined]  # hides the forwarded method
        worker._heart._read = checked
        await world.start()
        async with running(worker):
            judging = asyncio.create_task(world.judge())
            await until(
                lambda: len(gaps) > 100 and answered > 0 and bool(worker._hand.abandoned)
            )  # groups are finished, then fenced and given up
            judging.cancel()
        return gaps

    assert set(asyncio.run(scenario())) == {0}


def test_no_first_token_is_sampled_below_the_lease_s_version(tmp_path: Path) -> None:
    async def scenario() -> None:
        world = World(tmp_path, max_lag=100)
        engine = Held()
        plain = world.queue._lease_of
        world.queue._lease_of = lambda group: replace(plain(group), min_version=1)  # type: ignore[method-assign]
        worker = world.worker(engine=engine, slots=4, prefetch=0)
        await world.start()
        async with running(worker):
            await until(lambda: engine.version == 0 and len(worker._hand) == 1)
            for _ in range(20):
                await asyncio.sleep(0)
            assert not engine.started
            resumption = await world.queue.join_learner()
            world.epoch = resumption.epoch
            await world.publish(resumption.version, resumption.step)
            await until(lambda: len(engine.calls) == 1)
            assert engine.version == 1

    asyncio.run(scenario())


def test_a_lease_whose_weights_never_come_names_what_is_missing(tmp_path: Path) -> None:
    async def scenario() -> None:
        world = World(tmp_path, max_lag=100)
        plain = world.queue._lease_of
        world.queue._lease_of = lambda group: replace(plain(group), min_version=7)  # type: ignore[method-assign]
        await world.start()
        async with running(world.worker(engine=Held(), weights_s=0.1)) as (task,):
            await task

    with pytest.raises(DeadlineError, match=r"generation-0: draw \d attempt 0 waits for version 7 .* holds 0"):
        asyncio.run(scenario())
