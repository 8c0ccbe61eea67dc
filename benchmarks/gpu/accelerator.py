"""The device that is measured: its name, its peak, its clock and its memory. A CPU serves to try the scripts."""

import gc
import importlib.util
import time
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import version

import numpy as np
import torch

# Dense bfloat16 peak of the datasheets, floating-point operations per second, by a part of the name.
DATASHEET = {"H200": 989e12, "H100": 989e12, "B200": 2250e12, "A100": 312e12}
GEMM = 8192
OPTIONAL = ("liger_kernel", "flash_attn")  # faster kernels that may be there; nothing here uses them


@dataclass(frozen=True, slots=True)
class Accelerator:
    """One device."""

    device: torch.device

    @staticmethod
    def here() -> "Accelerator | None":
        """The first GPU; None where there is none."""
        return Accelerator(torch.device("cuda", 0)) if torch.cuda.is_available() else None

    @property
    def name(self) -> str:
        """As its maker calls it."""
        return torch.cuda.get_device_name(self.device) if self.device.type == "cuda" else "CPU"

    @property
    def datasheet(self) -> float | None:
        """Dense bfloat16 peak, operations per second; None: not known here."""
        return next((peak for part, peak in DATASHEET.items() if part in self.name), None)

    def facts(self) -> dict[str, str]:
        """Versions, and which faster kernels are not there."""
        found = {"gpu": self.name, "torch": torch.__version__, "transformers": version("transformers")}
        missing = [name for name in OPTIONAL if importlib.util.find_spec(name) is None]
        return found | dict.fromkeys(missing, "not available")

    def synchronize(self) -> None:
        """Wait until it has done what it was asked."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def seconds(self, work: Callable[[], object]) -> float:
        """Of one call, from an idle device to an idle device."""
        self.synchronize()
        began = time.perf_counter()
        work()
        self.synchronize()
        return time.perf_counter() - began

    def clear(self) -> None:
        """Give back what nothing holds."""
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    def held_bytes(self) -> int:
        """By whatever is alive."""
        return torch.cuda.memory_allocated(self.device) if self.device.type == "cuda" else 0

    def peak_bytes(self, work: Callable[[], object]) -> int | None:
        """The most that the call held at a time beyond what was held before it; None: nobody counts."""
        if self.device.type != "cuda":
            work()
            return None
        self.clear()
        before = self.held_bytes()
        torch.cuda.reset_peak_memory_stats(self.device)
        work()
        self.synchronize()
        return torch.cuda.max_memory_allocated(self.device) - before

    def gemm(self, *, size: int = GEMM, repeats: int = 10) -> float:
        """Operations per second of a square bfloat16 product of random numbers: the median of `repeats`."""
        left, right = (torch.randn(size, size, device=self.device, dtype=torch.bfloat16) for _ in range(2))
        for _ in range(3):
            left @ right
        return 2 * size**3 / float(np.median([self.seconds(lambda: left @ right) for _ in range(repeats)]))
