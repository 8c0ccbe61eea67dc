"""Tries a verifier on a few rows before a run: what always fails is better known at once."""

import asyncio
from collections.abc import Sequence
from itertools import islice

import numpy as np

from millrace.core.catalogue import Method
from millrace.core.types import Prompt, Rollout, VerdictKind, VersionRun
from millrace.rewards.config import JudgeConfig
from millrace.rewards.judge import Judge

ROWS = 4
DEADLINE_S = 2.0  # a verifier may take its time; this is no measure of it


def tried(method: Method, prompts: Sequence[Prompt], config: JudgeConfig) -> str:
    """The verifier on the first rows, their own answers being the responses.

    Args:
        method: the resolved verifier.
        config: of the judge.
    Returns:
        What failed, in words; "" if there was a verdict for each, or the time is up.

    Called from a thread without a running event loop.
    """
    rows = list(islice((prompt for prompt in prompts if prompt.answer is not None), ROWS))
    patient = config.model_copy(update={"max_judge_failures": ROWS + 1})
    failed = asyncio.run(_failures(method, rows, patient))
    if not failed:
        return ""
    return f"of the first {len(rows)} rows' own answers {len(failed)} could not be judged: {failed[0]}"


async def _failures(method: Method, rows: Sequence[Prompt], config: JudgeConfig) -> list[str]:
    failed: list[str] = []
    for prompt in rows:
        judge = Judge(method, decode=lambda responses, text=prompt.answer: [text], config=config)  # type: ignore[misc]
        try:
            async with asyncio.timeout(DEADLINE_S):
                (verdict,) = await judge(prompt, [_EMPTY])
        except TimeoutError:
            return failed
        if verdict.kind is VerdictKind.JUDGE_FAILED:
            failed.append(judge.first_failure)
    return failed


_EMPTY = Rollout(
    tokens_T=np.empty(0, np.int32),
    sampled_T=np.empty(0, np.bool_),
    behaviour_logprob_T=np.empty(0, np.float32),
    versions=(VersionRun(0, 0, 0),),
    finish_reason="stop",
    seed=0,
)
