"""Small models, a way to publish versions of them, and what each token's log-probability must be."""

import asyncio
import json
from collections.abc import Awaitable, Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from safetensors.numpy import save_file
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from millrace.actors.engines import engine
from millrace.actors.engines.sampling import log_softmax
from millrace.actors.engines.wiring import load_reference, manifest_of, perturb
from millrace.core.protocols import Engine, Manifest, Probe, WeightHandle
from millrace.core.types import Ints
from millrace.core.weights import buffer_bytes, digest_of, layout, view_of, write

VOCABULARY = 64
CONTEXT = 256
ARCHITECTURES = ["qwen2", "llama", "qwen3", "gpt2"]


def save_model(directory: Path, architecture: str, *, tied: bool) -> str:
    """A random model of two layers; 32 is the smallest head that vLLM's CPU attention supports."""
    torch.manual_seed(0)
    common: dict[str, Any] = {"vocab_size": VOCABULARY, "tie_word_embeddings": tied}
    llama: dict[str, Any] = {
        "hidden_size": 128,
        "intermediate_size": 160,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": CONTEXT,
        **common,
    }
    build: dict[str, Callable[[], Any]] = {
        "qwen2": lambda: Qwen2ForCausalLM(Qwen2Config(**llama)),
        "llama": lambda: LlamaForCausalLM(LlamaConfig(**llama)),
        "qwen3": lambda: Qwen3ForCausalLM(Qwen3Config(head_dim=32, **llama)),
        "gpt2": lambda: GPT2LMHeadModel(
            GPT2Config(n_positions=CONTEXT, n_embd=128, n_layer=2, n_head=4, bos_token_id=0, eos_token_id=0, **common)
        ),
    }
    model = build[architecture]()
    with torch.no_grad():
        perturb(model, 1)  # biases and norms start as constants: a swapped or dropped one would not show
    model.save_pretrained(directory)
    return str(directory)


def save_table(directory: Path, *, vocabulary: int = 12, positions: int = 40, seed: int = 0) -> str:
    directory.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(seed)
    table = rng.normal(size=(vocabulary, positions, vocabulary)).astype(np.float32)
    save_file({"table": table}, directory / "model.safetensors")
    config = {"model_type": "millrace_table", "vocab_size": vocabulary, "positions": positions, "eos_token_id": 0}
    (directory / "config.json").write_text(json.dumps(config))
    return str(directory)


class Case:
    """One engine under test, the versions published to it, and their exact log-probabilities."""

    def __init__(self, name: str, directory: Path, **options: Any) -> None:
        self.name = name
        self.store = directory / "versions"
        self.table = name == "table"
        model = directory / "model"
        self.model = save_table(model) if self.table else save_model(model, "qwen2", tied=True)
        self.vocabulary = 12 if self.table else VOCABULARY
        if self.table:
            options = {"token_delay_s": 5e-4, **options}
        elif name.startswith("vllm"):
            options = {"kv_cache_gib": 0.1, **options}
        self.engine: Engine = engine(name, model=self.model, slots=16, max_model_len=CONTEXT, **options)
        self._references: dict[int, Any] = {}
        self.next_version = 0

    def publish(self, *, change: Callable[[Manifest, NDArray[np.uint8]], Manifest] | None = None) -> WeightHandle:
        """The next version: every value differs much from the one before."""
        version = self.next_version
        self.next_version += 1
        manifest, buffer = self._table_version(version) if self.table else self._model_version(version)
        if change is not None:
            manifest = change(manifest, buffer)
        return write(self.store, manifest, buffer)

    def logprobs(self, version: int, tokens_T: Ints, temperature: float) -> NDArray[np.float64]:
        """Of tokens_T[1:] under that version, [T - 1]."""
        reference = self._references[version]
        if self.table:
            position_T = np.minimum(np.arange(len(tokens_T) - 1), reference.shape[1] - 1)
            logits_TV = reference[tokens_T[:-1], position_T]
        else:
            with torch.inference_mode():
                ids = torch.from_numpy(tokens_T.astype(np.int64))[None]
                logits_TV = reference(input_ids=ids, use_cache=False).logits[0, :-1].double().numpy()
        logprob_TV: NDArray[np.float64] = log_softmax(logits_TV / temperature)
        return logprob_TV[np.arange(len(tokens_T) - 1), tokens_T[1:]]

    def run(self, work: Callable[[], Awaitable[Any]], deadline_s: float = 60.0) -> Any:
        async def bounded() -> Any:
            return await asyncio.wait_for(work(), deadline_s)

        return asyncio.run(bounded())

    def _model_version(self, version: int) -> tuple[Manifest, NDArray[np.uint8]]:
        reference = load_reference(self.model, "float32")
        perturb(reference, 100 + version)
        self._references[version] = reference
        probes = [np.random.default_rng(9).integers(VOCABULARY, size=20, dtype=np.int32)]
        return manifest_of(reference, probes, version=version, dtype="float32", tolerance=1e-5)

    def _table_version(self, version: int) -> tuple[Manifest, NDArray[np.uint8]]:
        table = np.random.default_rng(100 + version).normal(size=(12, 40, 12)).astype(np.float32)
        self._references[version] = table
        tensors = layout([("table", "float32", table.shape)])
        buffer = np.zeros(buffer_bytes(tensors), np.uint8)
        view_of(buffer, tensors[0])[...] = table
        tokens_T = np.random.default_rng(9).integers(12, size=60, dtype=np.int32)
        probe = Probe(tokens_T=tokens_T, logprob_T=self.logprobs(version, tokens_T, 1.0).astype(np.float32))
        manifest = Manifest(
            version=version,
            step=0,
            epoch=0,
            tensors=tensors,
            digest=digest_of(buffer),
            probes=(probe,),
            tolerance=1e-5,
        )
        return manifest, buffer


@pytest.fixture(scope="session")
def build_case(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[..., Case]]:
    built: list[Case] = []

    def build(name: str, **options: Any) -> Case:
        built.append(Case(name, tmp_path_factory.mktemp(name), **options))
        return built[-1]

    yield build
    for case in built:
        asyncio.run(case.engine.close())


ENGINES: Sequence[Any] = ["table", "transformers", pytest.param("vllm", marks=pytest.mark.ray)]


@pytest.fixture(scope="session", params=ENGINES)
def case(request: pytest.FixtureRequest, build_case: Callable[..., Case]) -> Case:
    return build_case(request.param)


@pytest.fixture(scope="session")
def model_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., str]:
    def save(architecture: str, tied: bool) -> str:
        return save_model(tmp_path_factory.mktemp(architecture), architecture, tied=tied)

    return save


@pytest.fixture
def table_model(tmp_path: Path) -> str:
    return save_table(tmp_path / "table")
