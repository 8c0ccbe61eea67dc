"""Which rows there are, of which shapes, and what each should reach."""

from dataclasses import dataclass

from benchmarks import harness
from benchmarks.gpu.work import ROLLOUTS, SEQUENCE

# Published: 26.8 % and 36 to 37 % at 64k tokens, 11.1 % at 16k, on H100 and H200 with another trainer.
MFU_TARGET = {("0.6B", 65_536): 1.1 * 0.268, ("4B", 65_536): 1.1 * 0.365, ("0.6B", 16_384): 1.1 * 0.111}
CELLS = ((65_536, ROLLOUTS), (16_384, ROLLOUTS), (65_536, SEQUENCE))


@dataclass(frozen=True, slots=True, kw_only=True)
class Shapes:
    """What is measured: the real thing, or every path once with tiny shapes, which a CPU can compute."""

    models: tuple[str, ...]
    cells: tuple[tuple[int, str], ...]  # rows and kind
    head_tokens: tuple[int, ...]
    error_tokens: int
    hidden: int
    vocabulary: int
    heads: tuple[int, int, int]  # of queries, of keys, and their width
    error_rows: int
    gemm: int

    def planned(self) -> dict[str, tuple[str, harness.Target | None]]:
        """All rows: what each is, and its target."""
        full = f"{self.vocabulary} words"
        rows: dict[str, tuple[str, harness.Target | None]] = {
            # bfloat16 itself rounds by 0.004; full logits in it are off by 0.06 nats.
            "attention-error": (
                "largest relative error of packed attention in bfloat16 against float64, outcome and gradients",
                ("<=", 0.02),
            ),
            "head-error": (
                "largest error of a chunked log-probability, products in bfloat16, against float64, nats",
                ("<=", 1e-3),
            ),
        }
        for tokens in self.head_tokens:
            what = f"peak memory of chunked log-probabilities / full logits, {tokens} tokens, {full}"
            rows[f"head-memory-{tokens}"] = what, ("<=", 1.0)
        for rows_, kind in dict.fromkeys((max(self.cells)[0], kind) for _, kind in self.cells):
            what = f"packed attention of a layer, forward and backward, {rows_} rows of {kind}: share of the peak"
            rows[f"attention-{rows_}-{kind}"] = what, None
        for name in self.models:
            for rows_, kind in self.cells:
                bound = MFU_TARGET.get((name, rows_))
                what = f"MFU of a learner step, {name}, {rows_} packed rows of {kind}"
                rows[f"mfu-{name}-{rows_}-{kind}"] = what, (">=", bound) if bound else None
            what = f"weights of {name} whose gradients differ in any bit between two passes over the same batch"
            rows[f"repeat-{name}"] = what, ("<=", 0)
        return rows


REAL = Shapes(
    models=("0.6B", "4B"),
    cells=CELLS,
    head_tokens=(16_384, 65_536),
    error_tokens=512,
    hidden=1024,
    vocabulary=151_936,
    heads=(16, 8, 128),
    error_rows=2048,
    gemm=8192,
)
TINY = Shapes(
    models=("tiny",),
    cells=((256, ROLLOUTS), (256, SEQUENCE)),
    head_tokens=(64,),
    error_tokens=64,
    hidden=16,
    vocabulary=512,
    heads=(2, 1, 16),
    error_rows=128,
    gemm=256,
)
