"""What is told of dead draws: who they are, and when there are too many."""

from collections.abc import Sequence
from dataclasses import asdict

from millrace.core.errors import DataBudgetError
from millrace.core.protocols import PromptSource, Quarantined
from millrace.core.replay.draws import Death


def told(deaths: Sequence[Death], source: PromptSource) -> list[Quarantined]:
    """Dead draws with their prompts' ids."""
    return [Quarantined(prompt=source.draw(death.draw).id, **asdict(death)) for death in deaths]


def spent(deaths: Sequence[Death], source: PromptSource, *, most: int) -> DataBudgetError:
    """The error that ends a run with `most` dead draws."""
    last = [f"draw {one.draw} of prompt {one.prompt!r}: {one.cause}, {one.times} times" for one in told(deaths, source)]
    return DataBudgetError(
        f"{len(deaths)} draws are dead (loop.max_dead = {most}), the last: {'; '.join(last[-3:])}. Engines and judges "
        "fail on these prompts again and again: their tracebacks are in events.jsonl. Mend or remove the prompts, or "
        "the reward that fails on them; or raise loop.max_dead and go on with --resume"
    )
