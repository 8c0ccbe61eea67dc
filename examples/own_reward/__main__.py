"""Warm start, then reinforcement learning as run.toml says: `python -m examples.own_reward [key=value ...]`."""

import json
import sys
from pathlib import Path

from examples.own_reward import task
from examples.warm_start import RUNS, Phase, from_nothing, settings
from millrace.cluster import cli

WARM_STEPS, BATCH_ROWS = 150, 64
ENDS = 5  # steps at either end of the run, whose sampled rollouts are compared


def main(arguments: list[str]) -> None:
    """Make the model, train it, and say what became of the component.

    Args:
        arguments: as behind `millrace train run.toml`.
    """
    guesses = task.guesses(WARM_STEPS * BATCH_ROWS)
    from_nothing("own_reward", Phase("half right, a third in brackets", guesses, settings(WARM_STEPS)))
    cli.main(["train", str(Path(__file__).with_name("run.toml")), *arguments])
    samples = RUNS / "own_reward" / "rollouts.jsonl"
    if samples.is_file():
        print(compared(samples.read_text()))


def compared(samples: str) -> str:
    """The mean of the component `format` in the first and in the last steps' sampled rollouts.

    Args:
        samples: the text of a rollouts.jsonl.
    """
    rollouts = [json.loads(line) for line in samples.splitlines()]
    last = rollouts[-1]["step"]
    ends = ([r for r in rollouts if r["step"] <= ENDS], [r for r in rollouts if r["step"] > last - ENDS])
    first, final = (sum(r["verdict"]["components"]["format"] for r in end) / len(end) for end in ends)
    return f"in brackets {first:.0%} -> {final:.0%} (of the rollouts in {ENDS} steps at either end of rollouts.jsonl)"


if __name__ == "__main__":
    main(sys.argv[1:])
