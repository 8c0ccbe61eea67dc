"""The raw parts of a synchronous loop, each alone: vLLM's `LLM.generate`, and a plain padded torch step on its output.

Beside vLLM stands transformers' own `generate`, which is the faster of the two on a tiny model.

Imported in the parts' own process only. Nothing is judged, no weights are loaded into the engine, and the rollouts of
a step are made into a batch beside the clock: a loop of these parts could only be slower.
"""

import os
import time
from collections.abc import Sequence
from multiprocessing.connection import Connection
from typing import Any

os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
os.environ.setdefault("TORCHDYNAMO_DISABLE", "1")
os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")

import numpy as np
import torch
from transformers import AutoModelForCausalLM
from vllm import LLM, SamplingParams
from vllm.inputs import TokensPrompt
from vllm.platforms import current_platform
from vllm.sampling_params import RequestOutputKind

from benchmarks.generation_work import EOS, Setting, order, prompts
from benchmarks.learner_step import Batch, Plain
from benchmarks.serial_order import Order, Rate
from millrace.core.recipe import load
from millrace.core.types import Group, GroupId, GroupVerdict, Rollout, Verdict, VerdictKind, VersionRun
from millrace.learner.objective import Objective


def serve(connection: Connection, setting: Setting) -> None:
    """The body of the process: build, say so, then a measurement per request, until told None."""
    os.sched_setaffinity(0, setting.cores)
    parts = Parts(setting)
    connection.send(f"raw parts: cores {sorted(os.sched_getaffinity(0))}")
    while (asked := connection.recv()) is not None:
        connection.send(parts.measure(asked))


class Parts:
    """An engine and a trainer that know nothing of each other; their weights stay those of the model."""

    def __init__(self, setting: Setting) -> None:
        cpu = {"async_scheduling": False, "kv_cache_memory_bytes": 2**30} if current_platform.is_cpu() else {}
        self._llm = LLM(
            model=setting.model,
            skip_tokenizer_init=True,
            max_num_seqs=setting.slots,
            max_model_len=setting.max_model_len,
            dtype="float32",
            seed=0,
            logprobs_mode="processed_logprobs",
            generation_config="vllm",
            enforce_eager=current_platform.is_cpu(),
            **cpu,
        )
        self._rows = prompts(setting)
        self._source = order(self._rows)
        self._plain = Plain(setting.model, Objective.of(load("grpo").objective))
        self._sampler = AutoModelForCausalLM.from_pretrained(setting.model, dtype=torch.float32).eval()
        self._drawn = 0
        self._batches: list[Batch] = []

    def measure(self, asked: Order) -> Rate:
        """Do it. The first order generates: a trainer has nothing before."""
        torch.set_num_threads(asked.threads)
        samples = asked.steps * asked.groups * asked.group_size
        do = {"generate": self._generate, "generate with transformers": self._sample, "train": self._train}
        seconds = do[asked.part](asked)
        tokens = sum(batch.tokens for batch in self._batches)
        held = sum(len(batch.groups) for batch in self._batches) * asked.group_size
        return Rate(samples_per_s=samples / seconds, tokens_per_sample=tokens / held)

    def _generate(self, asked: Order) -> float:
        many = asked.steps * asked.groups
        drawn = [self._source.draw(self._drawn + number) for number in range(many)]
        self._drawn += many
        inputs = [TokensPrompt(prompt_token_ids=prompt.tokens_P.tolist()) for prompt in drawn]
        params = SamplingParams(
            n=asked.group_size,
            temperature=1.0,
            max_tokens=asked.max_tokens,
            stop_token_ids=[EOS],
            ignore_eos=True,
            logprobs=0,
            detokenize=False,
            output_kind=RequestOutputKind.FINAL_ONLY,
        )
        size = many if asked.at_once else asked.groups
        began = time.perf_counter()
        outputs = [
            output
            for start in range(0, many, size)
            for output in self._llm.generate(inputs[start : start + size], params, use_tqdm=False)
        ]
        seconds = time.perf_counter() - began
        groups = [_group(number, prompt, out) for number, (prompt, out) in enumerate(zip(drawn, outputs, strict=True))]
        self._batches = [_batch(groups[at : at + asked.groups]) for at in range(0, many, asked.groups)]
        return seconds

    def _sample(self, asked: Order) -> float:
        """With transformers' own `generate`; the prompts are equally long. Its log-probabilities are not asked for."""
        drawn = [self._source.draw(self._drawn + number).tokens_P for number in range(asked.steps * asked.groups)]
        self._drawn += len(drawn)
        prompts_QP = torch.from_numpy(np.stack(drawn).astype(np.int64))
        began = time.perf_counter()
        for tokens_GP in prompts_QP.split(asked.groups):
            self._sampler.generate(
                tokens_GP,
                attention_mask=torch.ones_like(tokens_GP),
                do_sample=True,
                top_k=0,
                num_return_sequences=asked.group_size,
                max_new_tokens=asked.max_tokens,
                eos_token_id=EOS,
                pad_token_id=0,
            )
        return time.perf_counter() - began

    def _train(self, asked: Order) -> float:
        batches = (self._batches * asked.steps)[: asked.steps]
        began = time.perf_counter()
        for batch in batches:
            self._plain.step(batch)
        return time.perf_counter() - began


def _group(number: int, prompt: Any, output: Any) -> Group:
    return Group(id=GroupId(number, 0), prompt=prompt, rollouts=tuple(map(_rollout, output.outputs)), lease_epoch=0)


def _rollout(output: Any) -> Rollout:
    tokens = list(output.token_ids)
    chosen = [at[token].logprob for at, token in zip(output.logprobs, tokens, strict=True)]
    return Rollout(
        tokens_T=np.array(tokens, np.int32),
        sampled_T=np.ones(len(tokens), np.bool_),
        behaviour_logprob_T=np.array(chosen, np.float32),
        versions=(VersionRun(0, 0, len(tokens)),),
        finish_reason="stop" if output.finish_reason == "stop" else "length",
        seed=0,
    )


def _batch(groups: Sequence[Group]) -> Batch:
    """Judged at random: the step computes the same, whatever the scores."""
    rng = np.random.default_rng(len(groups))
    verdicts = [
        GroupVerdict(
            id=group.id,
            verdicts=tuple(Verdict(kind=VerdictKind.SCORED, score=x) for x in rng.random(len(group.rollouts)).tolist()),
        )
        for group in groups
    ]
    return Batch(groups=list(groups), verdicts=verdicts)
