"""Names of engines, and what is said when one is not there."""

import asyncio
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from millrace.actors.engines import engine
from millrace.core.errors import ConfigError, EngineError, ModelError
from millrace.core.protocols import Sampling


def test_importing_the_catalogue_imports_no_engine() -> None:
    heavy = ("torch", "vllm", "transformers")
    code = f"import sys, millrace.actors.engines; print([name for name in {heavy} if name in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"


def test_an_unknown_name_is_refused_with_the_nearest() -> None:
    with pytest.raises(ConfigError, match=r"no engine is called 'vlm'; did you mean 'vllm'\? There are table,"):
        engine("vlm")


def test_an_engine_that_does_not_import_names_the_way_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "millrace.actors.engines.vllm", None)
    with pytest.raises(EngineError, match="engine 'vllm' does not import here .*set engine = \"transformers\""):
        engine("vllm", model="anywhere", slots=1, max_model_len=8)


def test_options_of_the_table_are_checked(table_model: str) -> None:
    with pytest.raises(ConfigError, match="engine table: .*unknown key 'token_delay'; did you mean 'token_delay_s'"):
        engine("table", model=table_model, slots=1, max_model_len=8, token_delay=1)


def test_a_directory_that_is_no_table(table_model: str, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"config.json is missing: a table checkpoint has"):
        engine("table", model=str(tmp_path), slots=1, max_model_len=8)
    config = Path(table_model) / "config.json"
    config.write_text(config.read_text().replace("millrace_table", "qwen2"))
    with pytest.raises(ModelError, match=r"model_type is 'qwen2', the table engine runs 'millrace_table'"):
        engine("table", model=table_model, slots=1, max_model_len=8)


def test_a_table_of_another_shape(table_model: str) -> None:
    config = Path(table_model) / "config.json"
    config.write_text(config.read_text().replace('"positions": 40', '"positions": 41'))
    with pytest.raises(ModelError, match=r"describes one tensor table of shape \(12, 41, 12\)"):
        engine("table", model=table_model, slots=1, max_model_len=8)


def test_a_directory_that_is_no_model(tmp_path: Path) -> None:
    with pytest.raises(EngineError, match="transformers engine: its start raised"):
        engine("transformers", model=str(tmp_path), slots=1, max_model_len=8)


def test_kept_keys_and_values_are_those_of_the_old_weights(build_case: Callable[..., Any]) -> None:
    case = build_case("transformers", prefix_cache="keep")
    prompt = np.array([3, 1, 4], np.int32)

    async def work() -> None:
        await case.engine.load(case.publish(), prove=True)
        sampling = Sampling(max_tokens=100)
        running = asyncio.create_task(case.engine.sample(prompt, sampling=sampling, seeds=[1], key="long"))
        while case.engine.progress().get("long", 0) < 30:
            await asyncio.sleep(0.001)
        await case.engine.load(case.publish(), prove=False)
        (rollout,) = await running
        first, second = rollout.versions
        whole = np.concatenate([prompt, rollout.tokens_T])
        for run, low, high in ((first, 0.0, 1e-5), (second, 1e-2, 100.0)):
            exact = case.logprobs(run.version, whole, 1.0)[2:]
            assert low <= np.abs(exact - rollout.behaviour_logprob_T)[run.start : run.end].max() <= high

    case.run(work)
