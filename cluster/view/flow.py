"""The sections about the line: lag, rates, draws, tokens. Pure."""

from collections.abc import Sequence

from rich.text import Text

from millrace.cluster.progress import count
from millrace.cluster.view.charts import bar, plot
from millrace.cluster.view.picture import WAITING, Picture
from millrace.cluster.view.words import Part, fitted, joined, number, percent
from millrace.core.replay.draws import State

LIVE = (State.WAITING, State.LEASED, State.GENERATED, State.JUDGING, State.SCORED, State.IN_STEP)
FIRST = ("trained", "unaccounted")  # rows of the waste ledger that are always shown
CALLED = {State.LEASED: "generating", State.IN_STEP: "in step"}
TIME_STYLES = {"computing": "magenta", **dict.fromkeys(WAITING.values(), "yellow")}


def lag_short(picture: Picture, columns: int) -> Text:
    """Mean and bound, and a small histogram."""
    line, shares = Text.assemble((f"{_lag(picture):>6}", "bold")), picture.lags
    if not shares:
        return line
    widest = max(shares) + 1
    chart = plot([shares.get(lag) for lag in range(widest)], widest, 1, picture.glyphs, floor=0.0)[0]
    line.append("  ").append(chart, "yellow").append("  ")
    said = [Part(f"{lag}: {percent(share)}", "dim") for lag, share in shares.items()]
    return line.append_text(joined(said, columns - line.cell_len, picture.glyphs))


def lag_tall(picture: Picture, columns: int, _lines: int) -> list[Text]:
    """A bar per lag."""
    shares = picture.lags
    room, most = max(columns - 10, 4), max(shares.values())
    lag = picture.status.lag
    said = (Part(f"mean {number(lag['mean'], 2)}", "bold"), Part(f"at most {lag['max']:g}"))
    bars = [
        Text.assemble(
            (f"{lag:>4} ", "dim"), (bar(share / most, room, picture.glyphs), "yellow"), f" {percent(share):>4}"
        )
        for lag, share in shares.items()
    ]
    return [joined(said, columns, picture.glyphs), *bars]


def lag_sizes(picture: Picture, _columns: int) -> Sequence[int]:
    """All of them or none."""
    return (1 + len(picture.lags),) if picture.lags else ()


def rates_short(picture: Picture, columns: int) -> Text:
    """Tokens per second on both sides."""
    parts = [Part(f"{name} {count(rate)} tok/s", style) for name, rate, style in _rates(picture)]
    return joined([*parts, Part(f"{_samples(picture)} samples/s")], columns, picture.glyphs)


def rates_tall(picture: Picture, columns: int, lines: int) -> list[Text]:
    """A bar for either side; with room, one for each thing that the learner's time went on."""
    rates, spent = _rates(picture), picture.spent
    most, room = max(rate for _, rate, _ in rates) or 1.0, max(columns - 23, 4)
    rows = [
        Text(f"{name:<9}")
        .append(f"{count(rate):>6}", "bold")
        .append(" tok/s ", "dim")
        .append(bar(rate / most, room, picture.glyphs), style)
        for name, rate, style in rates
    ]
    rows.append(Text("samples  ").append(f"{_samples(picture):>6}", "bold").append(" /s", "dim"))
    if lines < 4 + len(spent):
        shares = [Part(f"{name.removeprefix('wait: ')} {percent(share)}") for name, share in spent.items()]
        row = Text("time     ").append_text(joined(shares, columns - 9, picture.glyphs))
        return [*rows, row] if lines > len(rows) and spent else rows
    rows.append(Text("time of the learner", "dim"))
    return rows + [
        Text(f"{name:<15}")
        .append(f"{percent(share):>5} ", "bold")
        .append(bar(share, max(columns - 21, 4), picture.glyphs), TIME_STYLES.get(name, "dim"))
        for name, share in spent.items()
    ]


def rates_sizes(picture: Picture, _columns: int) -> Sequence[int]:
    """The rates; the rates and the learner's time, in one line or in bars."""
    if not any(rate for _, rate, _ in _rates(picture)):
        return ()
    return (3, 4, 4 + len(picture.spent)) if picture.spent else (3,)


def draws_short(picture: Picture, columns: int) -> Text:
    """How many draws are in which state, on their way through the line."""
    live, past = _draws(picture)
    parts = [Part(f"{name} {many}") for name, many in live if many]
    if not parts and not past:
        return Text("none yet", "dim")
    return joined([*parts, *(Part(f"{name} {many}", "dim") for name, many in past)], columns, picture.glyphs)


def draws_tall(picture: Picture, columns: int, _lines: int) -> list[Text]:
    """A bar per state."""
    live, past = _draws(picture)
    most, room = max([1, *(many for _, many in live)]), max(columns - 18, 4)
    rows = [
        Text(f"{name:<10} ")
        .append(f"{many:>5} ", "bold" if many else "dim")
        .append(bar(many / most, room, picture.glyphs), "blue")
        for name, many in live
    ]
    return [*rows, joined([Part(f"{name} {many}", "dim") for name, many in past], columns, picture.glyphs)]


def draws_sizes(picture: Picture, _columns: int) -> Sequence[int]:
    """The states and what became of the others."""
    return (len(LIVE) + 1,) if picture.status.draws else ()


def tokens_short(picture: Picture, columns: int) -> Text:
    """The waste ledger in shares of what was generated."""
    generated, rows = _tokens(picture)
    if not generated:
        return Text("none generated yet", "dim")
    parts = [Part(f"{row} {percent(many / generated)}", _style(row, many)) for row, many in rows]
    return joined([Part(f"{count(generated)} generated", "bold"), *parts], columns, picture.glyphs)


def tokens_tall(picture: Picture, columns: int, lines: int) -> list[Text]:
    """A line per row of the waste ledger."""
    generated, rows = _tokens(picture)
    room = columns - 37 if columns >= 44 else 0  # of the bars, after 24 columns of names and 13 of numbers
    name_room = 24 if room else columns - 12
    table = [Text(f"{'generated':<{name_room}} ").append(f"{count(generated):>6}", "bold")]
    for row, many in rows:
        share, style = many / generated, _style(row, many)
        name = f"{fitted(row, name_room, picture.glyphs.cut):<{name_room}} "
        numbers = (f"{count(many):>6}", "bold"), (f" {percent(share):>4} ", "dim")
        table.append(Text.assemble((name, style), *numbers, (bar(share, room, picture.glyphs), style)))
    return table[:lines]


def tokens_sizes(picture: Picture, _columns: int) -> Sequence[int]:
    """All rows, or the largest."""
    generated, rows = _tokens(picture)
    return range(min(4, 1 + len(rows)), 2 + len(rows)) if generated else ()


def _lag(picture: Picture) -> str:
    lag = picture.status.lag
    return f"{number(lag['mean'], 2)} of {lag['max']:g}"


def _rates(picture: Picture) -> tuple[tuple[str, float, str], ...]:
    rates = picture.status.rates
    return (
        ("generate", rates.get("generated_tokens_per_s") or 0.0, "blue"),
        ("learn", rates.get("trained_tokens_per_s") or 0.0, "magenta"),
    )


def _samples(picture: Picture) -> str:
    rate = picture.status.rates.get("samples_per_s") or 0.0
    return f"{rate:.1f}" if rate < 100 else count(rate)


def _draws(picture: Picture) -> tuple[list[tuple[str, int]], list[tuple[str, int]]]:
    """Draws on their way, in the order of the way; and what became of the others."""
    counts = picture.status.draws
    live = [(CALLED.get(state, state.value), counts.get(state.value, 0)) for state in LIVE]
    known = {state.value for state in LIVE}
    trained = sum(counts.get(state.value, 0) for state in (State.TRAINED, State.COMMITTED))
    known |= {State.TRAINED.value, State.COMMITTED.value}
    past = [("trained", trained), *((name, many) for name, many in counts.items() if name not in known)]
    return live, [(name, many) for name, many in past if many]


def _tokens(picture: Picture) -> tuple[int, list[tuple[str, int]]]:
    """Generated tokens, and the rows that they are in: trained and unaccounted first, then the largest.

    Tokens that were trained again are no part of them.
    """
    tokens = picture.status.tokens
    rows = [(row, many) for row, many in tokens.items() if many and row not in ("generated", "reused", *FIRST)]
    rows.sort(key=lambda pair: -abs(pair[1]))
    rows = [(row, tokens[row]) for row in FIRST if row in tokens] + rows
    return tokens.get("generated", 0), [(row.replace("_", " "), many) for row, many in rows]


def _style(row: str, many: int) -> str:
    if row == "unaccounted":
        return "bold red" if many else "dim"
    lost = row.startswith(("failed", "stale", "filtered", "masked"))
    return "green" if row == "trained" else "yellow" if lost else ""
