"""vLLM as its documentation uses it: one `LLM`, one `generate` for all prompts. Imported in the raw arm's process only.

The engine's settings are those of the worker's engine (in-process core, eager, float32, the same number of sequences,
processed log-probabilities); tokens are counted in its outputs.
"""

import os
import time

os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
os.environ.setdefault("TORCHDYNAMO_DISABLE", "1")
os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")

from vllm import LLM, SamplingParams
from vllm.inputs import TokensPrompt
from vllm.platforms import current_platform
from vllm.sampling_params import RequestOutputKind

from benchmarks.generation_work import Done, Setting, Work, order, prompts
from millrace.core.types import seed_of


class Raw:
    """`LLM.generate`."""

    def __init__(self, setting: Setting) -> None:
        self._source = order(prompts(setting))
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
        self._bursts = 0

    def run(self, work: Work) -> Done:
        """Generate all groups in one call."""
        self._bursts += 1
        inputs = [TokensPrompt(prompt_token_ids=self._source.draw(i).tokens_P.tolist()) for i in range(work.groups)]
        params = [self._params(work, draw) for draw in range(work.groups)]
        began, began_cpu = time.perf_counter(), time.process_time()
        outputs = self._llm.generate(inputs, params, use_tqdm=False)
        seconds, cpu_s = time.perf_counter() - began, time.process_time() - began_cpu
        tokens = sum(len(one.token_ids) for output in outputs for one in output.outputs)
        assert all(len(one.logprobs) == len(one.token_ids) for output in outputs for one in output.outputs)
        return Done(tokens=tokens, seconds=seconds, cpu_s=cpu_s, details={})

    def _params(self, work: Work, draw: int) -> SamplingParams:
        return SamplingParams(
            n=work.group_size,
            temperature=1.0,
            max_tokens=work.max_tokens,
            stop_token_ids=list(work.stop_token_ids),
            ignore_eos=True,
            logprobs=0,
            detokenize=False,
            output_kind=RequestOutputKind.FINAL_ONLY,
            seed=seed_of(self._bursts, draw, 0, 0) if work.seeded else None,
        )
