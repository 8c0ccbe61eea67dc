"""The generation engine's start, and its first batch: arguments and prompts come as JSON on the command line."""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import asyncio
import json
import sys

import numpy as np

from millrace.actors.engines import engine
from millrace.core.protocols import Sampling


async def generated(options: dict[str, object], prompts: list[list[int]], group_size: int, max_tokens: int) -> None:
    """Start, say so; generate every prompt's group, say so."""
    built = engine(**options)
    print("ready", flush=True)
    calls = [
        built.sample(
            np.array(tokens, np.int32),
            sampling=Sampling(max_tokens=max_tokens),
            seeds=range(number * group_size, (number + 1) * group_size),
            key=str(number),
        )
        for number, tokens in enumerate(prompts)
    ]
    await asyncio.gather(*calls)
    print("generated", flush=True)


if __name__ == "__main__":
    asyncio.run(generated(**json.loads(sys.argv[1])))
    sys.stdout.flush()
    os._exit(0)  # the next arm does not wait for vLLM's end
