"""vLLM: the wiring of every architecture, the bugs it must find, and both policies for tokens in flight."""

import asyncio
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch

from millrace.actors.engines import engine
from millrace.actors.engines.wiring import check_wiring, load_reference, manifest_of, perturb, probe_sequences
from millrace.core.errors import ConfigError, EngineError, WeightsError
from millrace.core.protocols import Sampling

pytestmark = pytest.mark.ray

PROMPT = np.array([3, 1, 4, 1, 5], np.int32)
GRID = [*((name, tied) for name in ("qwen2", "llama", "gpt2") for tied in (True, False)), ("qwen3", True)]


def start(model: str, **options: Any) -> Any:
    return engine("vllm", **{"model": model, "slots": 8, "max_model_len": 64, "kv_cache_gib": 0.1, **options})


def closing(built: Any, work: Callable[[], Any]) -> Any:
    async def whole() -> Any:
        try:
            return await asyncio.wait_for(work(), 60)
        finally:
            await built.close()

    return asyncio.run(whole())


@pytest.mark.parametrize(("architecture", "tied"), GRID)
def test_every_tensor_reaches_the_kernels(model_of: Callable[..., str], architecture: str, tied: bool) -> None:
    model = model_of(architecture, tied)
    built = start(model)
    gap = closing(built, lambda: check_wiring(built, model, tolerance=1e-5))
    assert gap <= 1e-5
    assert built.version == -1


@pytest.mark.parametrize(("architecture", "tied"), [("qwen2", True), ("llama", False)])
def test_a_stale_packed_head_is_found(
    model_of: Callable[..., str], monkeypatch: pytest.MonkeyPatch, architecture: str, tied: bool
) -> None:
    """The head's packed copy stays as it was: what vLLM's own reload does with tied embeddings, silently."""
    model = model_of(architecture, tied)
    built = start(model)
    extension = pytest.importorskip("millrace.actors.engines.vllm_weights")

    def without_head(self: Any, loaded: torch.nn.Module) -> None:
        for name, module in loaded.named_modules():
            if hasattr(module, "cpu_linear") and name != "lm_head":
                extension._pack(module, remove_weight=False)
        head = loaded.lm_head
        assert hasattr(head, "cpu_linear")

    monkeypatch.setattr(extension.WorkerExtension, "repack", without_head)
    with pytest.raises(WeightsError, match=r"version -2: probe 0, token \d+ .* tolerance 1e-05"):
        closing(built, lambda: check_wiring(built, model, tolerance=1e-5))


def test_the_probes_see_every_tensor(model_of: Callable[..., str]) -> None:
    """Were any one tensor stale, the probes would be off by more than the tolerance."""
    model = model_of("qwen2", True)
    sequences = probe_sequences(load_reference(model, "float32"))
    new = load_reference(model, "float32")
    perturb(new, 0)
    manifest, _ = manifest_of(new, sequences, version=0, dtype="float32", tolerance=1e-4)
    old = dict(load_reference(model, "float32").named_parameters())
    for name, parameter in new.named_parameters():
        kept = parameter.clone()
        parameter.copy_(old[name])
        stale, _ = manifest_of(new, sequences, version=0, dtype="float32", tolerance=1e-4)
        parameter.copy_(kept)
        gap = max(np.abs(a.logprob_T - b.logprob_T).max() for a, b in zip(manifest.probes, stale.probes, strict=True))
        # A bias on every key shifts all scores of a query alike: softmax cannot see most of it.
        assert gap > (1e-4 if name.endswith("k_proj.bias") else 1e-3), name


def test_a_perturbation_that_would_not_show_proves_nothing(model_of: Callable[..., str]) -> None:
    model = model_of("qwen2", True)
    built = engine("transformers", model=model, slots=2, max_model_len=64)
    with pytest.raises(WeightsError, match="nothing would be proved"):
        closing(built, lambda: check_wiring(built, model, tolerance=10.0))


def test_kept_keys_and_values_are_those_of_the_old_weights(build_case: Callable[..., Any]) -> None:
    case = build_case("vllm", prefix_cache="keep")

    async def work() -> None:
        for _ in range(2):
            await case.engine.load(case.publish(), prove=True)
        sampling = Sampling(max_tokens=150)
        running = asyncio.create_task(case.engine.sample(PROMPT, sampling=sampling, seeds=range(2), key="long"))
        while case.engine.progress().get("long", 0) < 60:
            await asyncio.sleep(0.001)
        await case.engine.load(case.publish(), prove=False)
        for rollout in await running:
            first, second = rollout.versions
            assert (first.version, second.version) == (1, 2)
            whole = np.concatenate([PROMPT, rollout.tokens_T])
            gaps = [
                np.abs(case.logprobs(run.version, whole, 1.0)[len(PROMPT) - 1 :] - rollout.behaviour_logprob_T)[
                    run.start : run.end
                ].max()
                for run in (first, second)
            ]
            assert gaps[0] <= 1e-5  # before the swap, exact
            assert gaps[1] > 1e-2  # after it, old keys and values under new weights

    case.run(work)


@pytest.mark.parametrize("prefix_cache", ["recompute", "keep"])
def test_probes_do_not_queue_behind_waiting_responses(build_case: Callable[..., Any], prefix_cache: str) -> None:
    case = build_case("vllm", prefix_cache=prefix_cache)

    async def work() -> None:
        await case.engine.load(case.publish(), prove=True)
        sampling = Sampling(max_tokens=200)
        sample = partial(case.engine.sample, PROMPT, sampling=sampling)
        calls = [asyncio.create_task(sample(seeds=[seed], key=str(seed))) for seed in range(64)]  # on 16 slots
        while case.engine.progress().get("0", 0) < 20:
            await asyncio.sleep(0.001)
        await case.engine.load(case.publish(), prove=True)
        assert case.engine.progress()["63"] == 0  # has not even started
        await asyncio.gather(*calls)

    case.run(work)


def test_a_small_kv_cache_costs_time_and_nothing_else(build_case: Callable[..., Any]) -> None:
    """vLLM takes requests out and computes them again: tokens, versions, log-probabilities and the count stay right."""
    case = build_case("vllm", kv_cache_gib=0.0015)
    scheduler = case.engine._core._core.scheduler
    preempt, preempted = scheduler._preempt_request, []
    scheduler._preempt_request = lambda request, *a, **k: (
        preempted.append(request.request_id),
        preempt(request, *a, **k),
    )

    async def work() -> None:
        await case.engine.load(case.publish(), prove=True)
        sampling = Sampling(max_tokens=200, temperature=0.7)
        sample = partial(case.engine.sample, PROMPT, sampling=sampling)
        calls = [asyncio.create_task(sample(seeds=[seed], key=str(seed))) for seed in range(32)]
        while not preempted:
            await asyncio.sleep(0.001)
        await case.engine.load(case.publish(), prove=False)
        rollouts = [one for (one,) in await asyncio.gather(*calls)]
        assert {rollout.finish_reason for rollout in rollouts} == {"length"}
        assert case.engine.generated == sum(map(len, rollouts)) == 32 * 200
        assert {len(rollout.versions) for rollout in rollouts} == {1, 2}
        for rollout in rollouts:
            whole = np.concatenate([PROMPT, rollout.tokens_T])
            for version, start, end in rollout.versions:
                exact = case.logprobs(version, whole, 0.7)[len(PROMPT) - 1 :]
                assert np.abs(exact - rollout.behaviour_logprob_T)[start:end].max() <= 1e-5

    case.run(work)


def test_a_model_it_cannot_compute_is_refused_at_the_start(tmp_path: Any) -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.Qwen2Config(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=4,
    )
    transformers.Qwen2ForCausalLM(config).save_pretrained(tmp_path)
    with pytest.raises(EngineError, match=r"vllm engine: its start raised RuntimeError: .*head_dim=8"):
        start(str(tmp_path))


def test_an_engine_has_counted_nothing_after_its_start(build_case: Callable[..., Any]) -> None:
    case = build_case("vllm")
    assert (case.engine.generated, case.engine.aborted, dict(case.engine.progress())) == (0, 0, {})


def test_a_model_is_computed_with_our_norms(build_case: Callable[..., Any]) -> None:
    kernels = pytest.importorskip("millrace.actors.engines.vllm_kernels")
    operations = [getattr(pytest.importorskip("vllm.ir").ops, name) for name in kernels.OPS]
    build_case("vllm")
    assert [each.get_priority() for each in operations] == [[kernels.PROVIDER, "native"]] * 2


def test_vllm_is_asked_for_the_distribution_that_samples() -> None:
    """Our CPU sampler reports nothing else; on a GPU vLLM's own default is the raw distribution."""
    module = pytest.importorskip("millrace.actors.engines.vllm")
    arguments = module.engine_arguments("model", 1, 8, "float32", 0, module.VllmOptions())
    assert arguments["logprobs_mode"] == "processed_logprobs"


def test_a_directory_without_model_is_named(tmp_path: Any) -> None:
    with pytest.raises(EngineError, match="vllm engine: its start raised"):
        start(str(tmp_path))


def test_options_are_checked(tmp_path: Any) -> None:
    with pytest.raises(ConfigError, match="unknown key 'kv_cache_gb'; did you mean 'kv_cache_gib'"):
        engine("vllm", model=str(tmp_path), slots=1, max_model_len=8, kv_cache_gb=1)
