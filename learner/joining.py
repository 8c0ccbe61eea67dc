"""How a learner finds where to begin: the last commit whose checkpoint is whole."""

from collections.abc import Awaitable, Callable

from millrace.core.errors import CheckpointError, TrainingError
from millrace.core.protocols import Resumption


async def join(
    ask: Callable[[], Awaitable[Resumption]],
    *,
    verify: Callable[[Resumption], Awaitable[None]],
    revert: Callable[[Resumption, int, str], Awaitable[None]],
) -> tuple[Resumption, tuple[str, ...]]:
    """Join; where the checkpoint is damaged, fall back to the commit before it and join again.

    Args:
        ask: joins.
        verify: raises CheckpointError for a damaged checkpoint. One of another model is not damaged.
        revert: gives up a resumption for the commit of an earlier step, for a reason.
    Returns:
        what to begin with, and the directories that were given up.

    Raises:
        TrainingError: all are damaged; says how.
    """
    refused: dict[str, str] = {}
    while True:
        resumption = await ask()
        if resumption.directory is None:
            return resumption, tuple(refused)
        try:
            await verify(resumption)
            return resumption, tuple(refused)
        except CheckpointError as caught:
            why = refused[resumption.directory] = str(caught)
        if not resumption.earlier:
            reasons = "".join(f"\n  {reason}" for reason in refused.values())
            raise TrainingError(
                f"no checkpoint of the run can be read:{reasons}\nNothing of them was deleted. Restore one from a copy,"
                " then resume the run"
            )
        await revert(resumption, resumption.earlier[0], why)
