"""Warm start, then reinforcement learning as run.toml says: `python -m examples.countdown [key=value ...]`."""

import sys
from pathlib import Path

from examples.countdown import task
from examples.warm_start import Phase, from_nothing, settings
from millrace.cluster import cli

SOLVED_STEPS, GUESSED_STEPS, BATCH_ROWS = 600, 40, 64


def main(arguments: list[str]) -> None:
    """Make the model and train it.

    Args:
        arguments: as behind `millrace train run.toml`.
    """
    solved = Phase("solutions", task.solved(SOLVED_STEPS * BATCH_ROWS), settings(SOLVED_STEPS))
    # So that there is something to find again: the right numbers, with signs drawn by chance.
    guessed = task.guessed(GUESSED_STEPS * BATCH_ROWS)
    from_nothing("countdown", solved, Phase("guesses", guessed, settings(GUESSED_STEPS, learning_rate=3e-4)))
    cli.main(["train", str(Path(__file__).with_name("run.toml")), *arguments])


if __name__ == "__main__":
    main(sys.argv[1:])
