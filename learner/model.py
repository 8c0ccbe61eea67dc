"""The policy and its reference: packed tokens -> the words that objectives ask for.

Models are Hugging Face causal language models with `packed_attention` inside. Weights are float32 masters;
matrix products run in `compute_dtype`, under autocast: norms, the residual stream, softmax and gradients stay float32.
Dropout is off: engines sample without it.
"""

from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.utils import logging

from millrace.core.errors import ModelError, TrainingError, boundary
from millrace.core.one_at_a_time import MODEL_LOADING
from millrace.learner import table_model
from millrace.learner.assemble import Microbatch, Sample, pack
from millrace.learner.attention import KEYWORD, NAME, Plan, Spans
from millrace.learner.logprobs import Head, logprobs_of_logits, token_logprobs
from millrace.learner.lora import Adapters, AdaptersOff
from millrace.learner.tokenizer import config_of, require_files

# Nats between packed and plain log-probabilities in float32: rounding stays far below, a leak lies far above.
TOLERANCE = 1e-3

# Layers that carry state along the row without asking an attention function.
_LEAKING_LAYERS = frozenset({"linear_attention", "conv", "mamba", "recurrent", "hybrid", "chunked_attention"})

__all__ = ["Policy", "device_of", "load_model", "prove_packing"]


_ = table_model.TableForCausalLM  # imported for its registration with the Auto classes

logging.disable_progress_bar()  # it would tear the run's own progress lines


def device_of(name: str | None = None) -> torch.device:
    """The named device; without a name, the GPU if there is one."""
    return torch.device(name or ("cuda" if torch.cuda.is_available() else "cpu"))


def load_model(name: str, *, device: torch.device | None = None) -> PreTrainedModel:
    """A causal language model for packed rows: float32, no dropout, every weight from the files, proved.

    Raises:
        ModelError: the directory, the files or the architecture will not do; says what would.
    """
    require_files(name, "model")
    config = config_of(name)
    layers = set(getattr(config.get_text_config(), "layer_types", None) or ())
    if leaking := sorted(layers & _LEAKING_LAYERS):
        raise _unsupported(config.model_type, f"its layers of type {', '.join(leaking)} run along the packed row")
    with boundary(f"loading model {name} (type '{config.model_type}')", ModelError), MODEL_LOADING:
        model, report = AutoModelForCausalLM.from_pretrained(
            name, dtype=torch.float32, attn_implementation=NAME, output_loading_info=True
        )
    if missing := sorted(report["missing_keys"]):
        raise ModelError(
            f"model {name}: its files lack {len(missing)} weights ({', '.join(missing[:3])}, ...), which would start"
            " from random numbers; give a directory saved by `save_pretrained` of a causal language model"
        )
    model = model.to(device or device_of()).eval()
    prove_packing(model)
    return model


def _unsupported(model_type: str, why: str) -> ModelError:
    return ModelError(
        f"model type '{model_type}' is not supported: {why}; use a decoder with plain attention, such as Qwen2, Qwen3,"
        " Llama, Mistral, Gemma 3 or GPT-2"
    )


def prove_packing(model: PreTrainedModel) -> None:
    """Score two small random groups packed and one by one with transformers' own attention, and compare.

    Raises:
        ModelError: they differ, so that packed sequences see each other or the head does something unknown.
    """
    micro, sequences, answers = _probe_groups(int(model.config.get_text_config().vocab_size))
    inputs = Inputs.of(micro, model.device)
    with torch.no_grad():
        packed, _ = logprobs(model, inputs)
        plain = _plain_logprobs(model, sequences, answers)
    _judge(model, inputs.plan, float((packed - plain).abs().max()))


def _probe_groups(vocabulary: int) -> tuple[Microbatch, list[np.ndarray], list[int]]:
    """Two random groups packed, the same sequences one by one, and the lengths of their answers."""
    rng = np.random.default_rng(0)
    samples = []
    for group, (length, answers) in enumerate(((3, (4, 6)), (5, (2, 5)))):
        prompt_P = rng.integers(vocabulary, size=length, dtype=np.int32)
        for answer in answers:
            sample = Sample(
                group=group,
                prompt_P=prompt_P,
                token_T=rng.integers(vocabulary, size=answer, dtype=np.int32),
                behaviour_logprob_T=np.zeros(answer, np.float32),
                lag_T=np.zeros(answer, np.int32),
                place_N=np.arange(answer),
                weight_N=np.zeros(answer, np.float32),
            )
            samples.append(sample)
    sequences = [np.concatenate([s.prompt_P, s.token_T]) for s in samples]
    return pack(samples), sequences, [len(s.token_T) for s in samples]


def _judge(model: PreTrainedModel, plan: Plan, gap: float) -> None:
    config = model.config.get_text_config()
    layers = set(getattr(config, "layer_types", None) or ())
    if "sliding_attention" in layers and not any(plan.windows):
        raise _unsupported(config.model_type, "it slides its attention window without telling the attention function")
    if not gap <= TOLERANCE:
        raise _unsupported(
            config.model_type,
            f"its log-probabilities of packed sequences are {gap:.2g} nats off those of single ones"
            f" (at most {TOLERANCE:g} is rounding), so sequences see each other or its logits are scaled unusually",
        )


def _plain_logprobs(model: PreTrainedModel, sequences: list[np.ndarray], answers: list[int]) -> torch.Tensor:
    """Of the last `answers` tokens of each sequence, by the model's own forward pass."""
    model.set_attn_implementation("sdpa" if model._supports_sdpa else "eager")
    parts = []
    for sequence, length in zip(sequences, answers, strict=True):
        tokens = torch.from_numpy(sequence).to(model.device)
        logits = model(input_ids=tokens[None], use_cache=False).logits[0]
        parts.append(logprobs_of_logits(logits[-length - 1 : -1], tokens[-length:])[0])
    model.set_attn_implementation(NAME)
    return torch.cat(parts)


def head_of(model: PreTrainedModel) -> Head | None:
    """How the model makes logits from hidden states; None for models that only hand out logits."""
    output = model.get_output_embeddings()
    if output is None:
        return None
    config = model.config.get_text_config()
    scale = getattr(config, "logit_scale", None) or 1.0  # Cohere multiplies
    scale /= getattr(config, "logits_scaling", None) or 1.0  # Granite divides
    return Head(
        weight_VD=output.weight,
        bias_V=getattr(output, "bias", None),
        scale=scale,
        softcap=getattr(config, "final_logit_softcapping", None),
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class Inputs:
    """A micro-batch on its device."""

    token_C: torch.Tensor
    position_C: torch.Tensor
    plan: Plan
    row_N: torch.Tensor
    token_N: torch.Tensor

    @staticmethod
    def of(micro: Microbatch, device: torch.device) -> "Inputs":
        """Move what the model reads."""
        return Inputs(
            token_C=_tensor(micro.token_C, device),
            position_C=_tensor(micro.position_C, device),
            plan=micro.plan.to(device),
            row_N=_tensor(micro.row_N, device),
            token_N=_tensor(micro.token_N, device),
        )


def _tensor(array: np.ndarray, device: torch.device) -> torch.Tensor:
    return torch.from_numpy(np.ascontiguousarray(array)).to(device, non_blocking=True)


def logprobs(
    model: PreTrainedModel, inputs: Inputs, *, temperature: float = 1.0, fused: bool = False
) -> tuple[torch.Tensor, torch.Tensor]:
    """logprob_N and entropy_N in nats. Without `use_cache=False` transformers lets packed sequences see each other."""
    row = {
        "input_ids": inputs.token_C[None],
        "position_ids": inputs.position_C[None],
        "use_cache": False,
        KEYWORD: inputs.plan,
    }
    head = head_of(model)
    if head is None:
        logits_NV = model(logits_to_keep=inputs.row_N, **row).logits[0]
        return logprobs_of_logits(logits_NV, inputs.token_N, temperature=temperature)
    hidden_ND = _rows(model.base_model(**row).last_hidden_state[0], inputs.row_N)
    return token_logprobs(hidden_ND, head, inputs.token_N, temperature=temperature, fused=fused)


def _rows(hidden_CD: torch.Tensor, row_N: torch.Tensor) -> torch.Tensor:
    """hidden_CD[row_N]. Answers share the last row of their prompt: its gradients are added in one order, always."""
    # On a GPU the backward pass of index_select adds them as they come, that of indexing sorts them first.
    return hidden_CD[row_N] if hidden_CD.is_cuda else hidden_CD.index_select(0, row_N)


class Policy:
    """The model that learns, and the frozen one it may be compared with.

    Args:
        model: from `load_model`.
        reference: likewise, frozen; gives `reference_logprob_N`. Or the model itself without its adapters.
        reference_moves: it follows the policy, so that checkpoints keep it.
        adapters: of the model, when they alone are trained.
        temperature: of sampling; every log-probability is of the distribution that sampled.
        compute_dtype: of matrix products.
        compiled: what is done to logits is; blocks are by `compile_blocks`.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        *,
        reference: PreTrainedModel | AdaptersOff | None = None,
        reference_moves: bool = False,
        adapters: Adapters | None = None,
        temperature: float = 1.0,
        compute_dtype: torch.dtype = torch.float32,
        compiled: bool = False,
    ) -> None:
        self.model = model
        self.reference = reference.requires_grad_(False) if isinstance(reference, PreTrainedModel) else reference
        self.moving_reference = None if not reference_moves or isinstance(reference, AdaptersOff) else reference
        self.adapters = adapters
        self.temperature = temperature
        self.compute_dtype = compute_dtype
        self.compiled = compiled
        self.device = model.device
        config = model.config.get_text_config()
        self.vocabulary = int(config.vocab_size)
        self.context: int | None = getattr(config, "max_position_embeddings", None)

    @property
    def models(self) -> frozenset[str]:
        """Which models beside the policy there are, for `Objective.of`."""
        return frozenset() if self.reference is None else frozenset({"reference"})

    def weights(self) -> Iterable[tuple[str, torch.Tensor]]:
        """Every weight by the name that it has in the model's files, adapters merged."""
        return self.model.named_parameters() if self.adapters is None else self.adapters.whole()

    def words(self, micro: Microbatch, needs: Collection[str] = ()) -> dict[str, Any]:
        """What an objective is called with: `logprob_N` with its gradient, the batch's own words, and `needs`.

        Raises:
            TrainingError: a sequence is longer than the model's context.
        """
        inputs = self._inputs(micro)
        have: dict[str, Any] = {
            "advantage_N": _tensor(micro.advantage_N, self.device),
            "weight_N": _tensor(micro.weight_N, self.device),
            "staleness_N": _tensor(micro.staleness_N, self.device),
            "sequences": micro.sequences,
            "reward_S": _tensor(micro.reward_S, self.device),
            "group_S": micro.group_S,
            "step": micro.step,
        }
        if micro.behaviour_logprob_N is not None:
            have["behaviour_logprob_N"] = _tensor(micro.behaviour_logprob_N, self.device)
        have["logprob_N"], have["entropy_N"] = self._score(self.model, inputs)
        # Where nothing else is known, this is the first optimiser step on the batch: the policy before it is this one.
        have["proximal_logprob_N"] = have["logprob_N"].detach()
        have |= {word: _tensor(value_N, self.device) for word, value_N in micro.scored.items()}
        if self.reference is not None and "reference_logprob_N" in needs and "reference_logprob_N" not in have:
            with torch.no_grad():
                have["reference_logprob_N"], _ = self._score(self.reference, inputs)
        return have

    def scores(self, micro: Microbatch, words: Collection[str]) -> dict[str, np.ndarray]:
        """The words of core/words.py SCORED for a micro-batch, float32, without gradient.

        Raises:
            TrainingError: a sequence is longer than the model's context.
        """
        inputs = self._inputs(micro)
        models = {"proximal_logprob_N": self.model, "reference_logprob_N": self.reference}
        found = {}
        with torch.no_grad():
            for word in words:
                model = models[word]
                assert model is not None, f"{word} needs a reference model"
                found[word] = self._score(model, inputs)[0].float().cpu().numpy()
        return found

    def _inputs(self, micro: Microbatch) -> Inputs:
        longest = int(micro.position_C.max()) + 1
        if self.context is not None and longest > self.context:
            raise TrainingError(
                f"a sequence of {longest} tokens ({', '.join(map(str, micro.groups[:3]))}) exceeds the model's context"
                f" of {self.context}; lower max_tokens or leave out longer prompts"
            )
        return Inputs.of(micro, self.device)

    def _score(self, model: PreTrainedModel | AdaptersOff, inputs: Inputs) -> tuple[torch.Tensor, torch.Tensor]:
        if isinstance(model, AdaptersOff):
            with model.adapters.off():
                return self._score(self.model, inputs)
        reduced = self.compute_dtype is not torch.float32
        with torch.autocast(self.device.type, dtype=self.compute_dtype, enabled=reduced):
            return logprobs(model, inputs, temperature=self.temperature, fused=self.compiled)

    def score(self, token_T: np.ndarray, *, dtype: torch.dtype = torch.float32) -> np.ndarray:
        """Log-probabilities of token_T[1:] at temperature 1, nats, float32; matrix products in `dtype`."""
        return self.score_all([token_T], dtype=dtype)[0]

    def score_all(self, sequences: Sequence[np.ndarray], *, dtype: torch.dtype = torch.float32) -> list[np.ndarray]:
        """`score` of each, in one packed row.

        Args:
            sequences: of at least one token each.
            dtype: of matrix products.
        """
        length_S = np.array([len(token_T) for token_T in sequences])
        start_S = np.cumsum(length_S) - length_S
        row_C = np.arange(length_S.sum())
        within_C = row_C - np.repeat(start_S, length_S)
        none = np.zeros(0, np.int64)
        spans = Spans(prompt_start_K=start_S, prompt_length_K=length_S, prompt_S=none, start_S=none, length_S=none)
        token_C = np.concatenate(sequences).astype(np.int64)
        inputs = Inputs(
            token_C=_tensor(token_C, self.device),
            position_C=_tensor(within_C, self.device),
            plan=Plan.of(spans).to(self.device),
            row_N=_tensor(row_C[within_C > 0] - 1, self.device),
            token_N=_tensor(token_C[within_C > 0], self.device),
        )
        reduced = dtype is not torch.float32
        with torch.no_grad(), torch.autocast(self.device.type, dtype=dtype, enabled=reduced):
            logprob_N, _ = logprobs(self.model, inputs, fused=self.compiled)
        return np.split(logprob_N.float().cpu().numpy(), np.cumsum(length_S - 1)[:-1])
