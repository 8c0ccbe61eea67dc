"""The books of generated tokens: where every one of them went. Pure.

    generated = trained + masked + filtered(by rule) + stale(by rule) + failed(by cause)
              + in flight + queued + unaccounted

`generated` is what the engines counted themselves, so that the other side of the equation is checked, not repeated.
A group's tokens stand where its first use put them; what further uses read again is `reused`, outside of the sum.
"""

from dataclasses import dataclass, field

IN_FLIGHT, QUEUED, TRAINED, MASKED = "in_flight", "queued", "trained", "masked"
REUSED = "reused"


@dataclass(slots=True)
class Meter:
    """The token counter of one incarnation of a worker, and what the ledger knows of its tokens."""

    worker: str
    counter: int = 0  # the last that it reported, counted from its joining
    base: int = 0  # what the engine had counted before it joined
    known: int = 0  # tokens of its groups, wherever they are booked
    final: bool = False  # it left in order: the counter is the last word
    fenced: dict[tuple[int, int], tuple[str, int]] = field(default_factory=dict)  # lost attempt -> row, tokens booked
    told: set[tuple[int, int]] = field(default_factory=set, compare=False)  # of these, the ones it knows of

    @property
    def generated(self) -> int:
        """A put may arrive before the heartbeat that counts its tokens."""
        return self.counter if self.final else max(self.counter, self.known)


@dataclass(slots=True)
class Books:
    """Rows of tokens, and the meters they must add up to."""

    rows: dict[str, int] = field(default_factory=dict)
    meters: dict[int, Meter] = field(default_factory=dict)  # by worker epoch

    def add(self, row: str, tokens: int) -> None:
        if tokens:
            self.rows[row] = self.rows.get(row, 0) + tokens

    def table(self) -> dict[str, int]:
        """All rows: "generated", what it is the sum of, "unaccounted"; then "reused", where groups were used again.

        >>> books = Books(); books.meters[1] = Meter("generation-0", counter=10, known=8); books.add("trained", 8)
        >>> books.table()
        {'generated': 10, 'trained': 8, 'masked': 0, 'in_flight': 0, 'queued': 0, 'unaccounted': 2}
        """
        generated = sum(meter.generated for meter in self.meters.values())
        fixed = (TRAINED, MASKED, IN_FLIGHT, QUEUED)
        rows = {row: self.rows.get(row, 0) for row in fixed}
        rows |= {row: tokens for row, tokens in sorted(self.rows.items()) if row not in (*fixed, REUSED) and tokens}
        again = {REUSED: tokens} if (tokens := self.rows.get(REUSED, 0)) else {}
        return {"generated": generated, **rows, "unaccounted": generated - sum(rows.values()), **again}
