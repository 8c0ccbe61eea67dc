"""Loaded by every process of a run whose PYTHONPATH names this folder: the table engine dies of one prompt, 3=4."""

import os
import signal
import sys
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from importlib.util import find_spec
from types import ModuleType
from typing import Any

ENGINE = "millrace.actors.engines.table"
SPECIAL = 4  # tokens before the digits


class Poisoned(MetaPathFinder):
    """Finds the engine's module as it is, and changes it once it is loaded."""

    def find_spec(self, name: str, path: Any, target: ModuleType | None = None) -> ModuleSpec | None:
        if name != ENGINE:
            return None
        sys.meta_path.remove(self)
        spec = find_spec(name)
        assert spec is not None and spec.loader is not None
        spec.loader = After(spec.loader)
        return spec


class After(Loader):
    def __init__(self, inner: Loader) -> None:
        self._inner = inner

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self._inner.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        self._inner.exec_module(module)
        sample = module.TableEngine.sample

        async def picky(engine: Any, tokens_P: Any, **options: Any) -> Any:
            if tokens_P.tolist()[::2] == [SPECIAL + 3, SPECIAL + 4]:
                os.kill(os.getpid(), signal.SIGKILL)
            return await sample(engine, tokens_P, **options)

        module.TableEngine.sample = picky


sys.meta_path.insert(0, Poisoned())
