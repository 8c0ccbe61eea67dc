"""The records and the payloads outlive the process: nothing is lost, nothing is trained twice."""

import asyncio
import gc
import os
import signal
from pathlib import Path

import pytest

from millrace.core import failpoint, schema
from millrace.core.errors import LedgerError
from millrace.core.replay import queue as queue_module
from tests.core.replay.life import ENGINE, TOKENS, Life, a_life_until_the_kill, as_killed


async def to_the_end(life: Life) -> None:
    while life.step < 4:
        await life.one_step()
    await life.commit()


def test_a_restarted_run_loses_nothing_and_redoes_what_was_not_committed(tmp_path: Path) -> None:
    async def main() -> None:
        first = await a_life_until_the_kill(tmp_path / "run")
        committed = set(list(first.trained)[:2])
        redone = schema.decode((await first.queue.take(step=1, epoch=first.resumption.epoch, wait_s=0)).pack)
        second = Life(as_killed(tmp_path / "run"))
        await second.begin()
        assert (second.resumption.step, second.resumption.directory) == (1, "step_1")
        assert second.resumption.version > first.version
        again = schema.decode((await second.queue.take(step=1, epoch=second.resumption.epoch, wait_s=0)).pack)
        assert schema.encode(again) == schema.encode(redone), "the batch of step 2 is another one"
        await to_the_end(second)
        status = await second.queue.status()
        assert status.states["committed"] == 8
        assert not committed & set(second.trained)
        assert set(second.trained.values()) == {1} and set(second.trained) | committed == set(range(8))
        assert status.tokens["unaccounted"] == 0 and status.tokens["trained"] == 8 * 2 * TOKENS
        assert status.tokens.get("failed:lost", 0) == 0
        assert not await second.queue.damage()

    asyncio.run(main())


def test_a_location_of_an_earlier_life_is_never_given_out_again(tmp_path: Path) -> None:
    async def main() -> None:
        first = await a_life_until_the_kill(tmp_path / "run", keep_rollouts="needed")
        given = {draw.location for draw in first.queue._ledger.state.draws.values() if draw.location}
        await first.queue.close()
        second = Life(tmp_path / "run", keep_rollouts="needed")
        await second.begin()
        await to_the_end(second)
        fresh = {outcome.location for outcome in second.queue._ledger.state.released}
        fresh |= {draw.location for draw in second.queue._ledger.state.draws.values() if draw.location}
        assert not given & fresh
        await second.queue.close()

    asyncio.run(main())


def test_a_fresh_journal_changes_nothing(tmp_path: Path) -> None:
    async def main() -> None:
        life = Life(tmp_path / "run")
        await life.begin()
        assert (life.resumption.step, life.resumption.version, life.resumption.directory) == (0, 0, None)

    asyncio.run(main())


def test_a_run_is_resumed_in_the_process_in_which_it_was_ended(tmp_path: Path) -> None:
    async def main() -> None:
        first = Life(tmp_path / "run")
        await first.begin()
        await first.queue.heartbeat(ENGINE, epoch=first.engine, progress={}, generated=7)
        with pytest.raises(LedgerError, match=f"held by process {os.getpid()} on"):
            Life(tmp_path / "run")
        await first.queue.close()
        second = Life(tmp_path / "run")
        await second.begin()
        await second.generate()
        del first
        gc.collect()
        await second.queue.close()
        third = await Life(tmp_path / "run").queue.status()
        assert third.tokens["generated"] == 7 + second.generated > 7 and third.tokens["unaccounted"] == 7

    asyncio.run(main())


def test_a_restart_from_an_image_goes_on_in_the_same_way(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(queue_module, "_BEHIND", 0)

    async def main() -> None:
        first = await a_life_until_the_kill(tmp_path / "run")
        many = first.journal.behind
        await first.commit()
        assert first.journal.behind == 1 < many
        state = first.queue._ledger.state
        second = Life(as_killed(tmp_path / "run"))
        assert second.queue._ledger.state == state
        await second.begin()
        assert second.resumption.directory == "step_2"
        await to_the_end(second)
        assert (await second.queue.status()).tokens["unaccounted"] == 0
        lengths = await second.queue.lengths()
        assert lengths == {TOKENS: [16, 16]}

    asyncio.run(main())


POINTS = [
    "journal.store.before",
    "journal.store.torn",
    "journal.store.after",
    "journal.flush.before",
    "journal.flush.after",
    "journal.compact",
    "journal.seal",
]


@pytest.mark.parametrize("point", POINTS)
@pytest.mark.parametrize("number", [1, 2, 7])
def test_a_real_kill_anywhere_in_the_journal(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, point: str, number: int
) -> None:
    """The child is killed there; what it had been promised before is here afterwards, and the run ends as any other."""
    monkeypatch.setattr(queue_module, "_BEHIND", 8)
    promised = tmp_path / "promised"
    promised.write_text("0 0")

    async def life(child: bool) -> dict[str, int]:
        own = Life(tmp_path / "run", segment_bytes=1 << 12)
        started = own.queue._ledger.state.next_draw
        await own.begin()
        if not child:
            committed, draws = map(int, promised.read_text().split())
            assert own.step >= committed and started >= draws, "what was answered before the kill is gone"
        committed = 0
        while own.step < 4:
            await own.generate()
            if child:
                promised.write_text(f"{committed} {own.queue._ledger.state.next_draw}")
            await own.score()
            await own.learn()
            await own.commit()
            committed = own.step
        status = await own.queue.status()
        await own.queue.close()
        return {**status.states, **status.tokens}

    pid = os.fork()
    if not pid:
        code = 1
        try:
            failpoint.arm(failpoint.parsed(f"{point}@{number}=kill:{tmp_path / 'marker'}"))
            asyncio.run(life(child=True))
            code = 0
        finally:
            os._exit(code)
    _, status = os.waitpid(pid, 0)
    assert (os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL) or not (tmp_path / "marker").exists()
    end = asyncio.run(life(child=False))
    assert end["committed"] == 8 and end["trained"] == 8 * 2 * TOKENS
    assert end.get("failed:lost", 0) == 0
