"""Warm start, then reinforcement learning as run.toml says: `python -m examples.chat [key=value ...]`."""

import sys
from pathlib import Path

from examples.chat import task
from examples.warm_start import Phase, from_nothing, settings
from millrace.cluster import cli

WARM_STEPS, BATCH_ROWS = 300, 32


def main(arguments: list[str]) -> None:
    """Make the model and train it.

    Args:
        arguments: as behind `millrace train run.toml`.
    """
    guesses = task.guesses(WARM_STEPS * BATCH_ROWS)
    from_nothing("chat", Phase("dialogues, half right", guesses, settings(WARM_STEPS, batch_rows=BATCH_ROWS)))
    cli.main(["train", str(Path(__file__).with_name("run.toml")), *arguments])


if __name__ == "__main__":
    main(sys.argv[1:])
