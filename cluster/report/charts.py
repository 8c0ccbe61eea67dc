"""The curves of a report: which of them a run has numbers for. The page only draws them."""

from collections.abc import Callable, Sequence
from itertools import pairwise

from millrace.cluster.report.lags import by_lag, lag, lag_shares
from millrace.cluster.report.read import Found, Row
from millrace.cluster.report.series import BARS, POINTS, Chart, Numbers, Series, buckets, line, mean

WAITS = {  # cause -> how it is called, and its colour
    "data": ("waiting for data", "c3"),
    "judge": ("for verdicts", "c1"),
    "weights": ("for weights", "c4"),
    "scheduler": ("for the rules", "c6"),
}
SMOOTHED_FROM = 60  # steps: from so many a running mean is drawn over the single ones


def charts(found: Found) -> list[Chart]:
    """All that the run has numbers for, the most asked for first."""
    rows = found.rows
    makers: list[Callable[[], Chart | None]] = [
        lambda: _reward(found),
        lambda: lag(found),
        lambda: lag_shares(rows),
        lambda: _throughput(found),
        lambda: _waste(rows),
        lambda: _time(rows),
        lambda: _entropy(rows),
        lambda: by_lag(
            rows,
            id="gap",
            title="Gap between sampler and learner",
            unit="nats, largest |log ratio|",
            about="Largest difference between a token's log-probability when it was sampled and as the step began. At "
            "lag 0 both are the same weights: what is left is rounding.",
            number="max_gap",
            log=True,
            fold=max,
            said="largest",
        ),
        lambda: by_lag(
            rows,
            id="ess",
            title="Effective sample size",
            unit="share of the tokens",
            about="How many of the tokens of a lag count after importance weighting: (sum w)^2 / (n sum w^2).",
            number="effective_sample_size",
            percent=True,
            fold=mean,
            said="mean",
        ),
        lambda: _plain(
            rows, id="length", title="Response length", unit="tokens", name="rollout/mean_length", zero=True
        ),
        lambda: _plain(rows, id="loss", title="Loss", unit="as the recipe aggregates it", name="train/loss"),
        lambda: _plain(
            rows, id="gradient", title="Gradient norm", unit="before clipping", name="train/gradient_norm", zero=True
        ),
    ]
    return [chart for make in makers if (chart := make()) is not None]


def _plain(rows: Sequence[Row], *, id: str, title: str, unit: str, name: str, zero: bool = False) -> Chart | None:
    having = [row for row in rows if row.get(name) is not None]
    if not having:
        return None
    return Chart(
        id=id,
        title=title,
        unit=unit,
        about=_each_point(rows),
        series=_smoothed(having, name, said=title.lower(), colour="c0"),
        zero=zero,
    )


def _each_point(rows: Sequence[Row]) -> str:
    size = max(1, -(-len(rows) // POINTS))
    return "Of each step." if size == 1 else f"Each point is the mean of {size} steps."


def _smoothed(rows: Sequence[Row], name: str, *, said: str, colour: str) -> list[Series]:
    """Each step; in a long run also a running mean, so that the trend can be seen through the noise."""
    if len(rows) < SMOOTHED_FROM:
        return [line(rows, name, said=said, colour=colour)]
    size = max(1, -(-len(rows) // POINTS))
    each_said = "each step" if size == 1 else f"mean of {size} steps"
    each = line(rows, name, said=f"{said}, {each_said}", colour=colour, style="faint")
    window = max(5, len(each.y) // 25)
    smooth: Numbers = []
    for end in range(1, len(each.y) + 1):
        near = [y for y in each.y[max(0, end - window) : end] if y is not None]
        smooth.append(mean(near) if near else None)
    return [
        Series(name=f"{said}, mean of {window * size} steps", colour=colour, x=each.x, y=smooth),
        each,
    ]


def _reward(found: Found) -> Chart | None:
    having = [row for row in found.rows if row.get("reward/mean") is not None]
    if not having and not found.held_out:
        return None
    series = _smoothed(having, "reward/mean", said="training", colour="c0") if having else []
    if found.held_out:
        series.append(
            Series(
                name="held-out",
                colour="c1",
                style="dots",
                x=[each["step"] for each in found.held_out],
                y=[each["mean"] for each in found.held_out],
            )
        )
    return Chart(
        id="reward",
        title="Reward",
        unit="mean",
        about="Mean over the rollouts of a step, and over held-out prompts at fixed weights.",
        series=series,
    )


def _polls(rows: Sequence[Row]) -> list[Sequence[Row]]:
    """Rows that were recorded at one look at the ledger carry the same books: they stay together."""
    cuts = [0]
    for at, (before, after) in enumerate(pairwise(rows), 1):
        if any(before.get(f"waste/{row}") != after.get(f"waste/{row}") for row in ("generated", "trained")):
            cuts.append(at)
    polls = [rows[low:high] for low, high in pairwise([*cuts, len(rows)])]
    size = max(1, -(-len(polls) // BARS))
    return [[row for poll in polls[at : at + size] for row in poll] for at in range(0, len(polls), size)]


def _throughput(found: Found) -> Chart | None:
    having = [row for row in found.rows if row.get("time/step_s") and "train/tokens" in row]
    if not having:
        return None
    known = having[-1].get("waste/generated") is not None
    parts = _polls(having) if known else buckets(having, BARS)
    x = [part[-1]["step"] for part in parts]
    seconds = [sum(row["time/step_s"] for row in part) for part in parts]
    trained: Numbers = [sum(row["train/tokens"] for row in p) / s for p, s in zip(parts, seconds, strict=True)]
    series = [Series(name="trained", colour="c2", x=x, y=trained)]
    if known:
        counter = [0, *((part[-1].get("waste/generated") or 0) for part in parts)]
        made: Numbers = [(after - before) / s for (before, after), s in zip(pairwise(counter), seconds, strict=True)]
        series.insert(0, Series(name="generated", colour="c0", x=x, y=made))
    return Chart(
        id="throughput",
        title="Throughput",
        unit="tokens per second",
        about="Tokens that the engines sampled, and that entered the loss.",
        series=series,
        zero=True,
    )


def _waste(rows: Sequence[Row]) -> Chart | None:
    having = [row for row in rows if row.get("waste/generated")]
    if not having:
        return None
    last = [part[-1] for part in buckets([poll[-1] for poll in _polls(having)], BARS)]
    names = [
        name
        for name in dict.fromkeys(name.removeprefix("waste/") for row in having for name in row if "waste/" in name)
        if name not in ("generated", "trained", "reused") and any(row.get(f"waste/{name}") for row in having)
    ]
    series = [
        Series(
            name=name.replace("_", " "),
            colour=f"c{1 + at % 7}",
            x=[row["step"] for row in last],
            y=[max(0, row.get(f"waste/{name}") or 0) / row["waste/generated"] for row in last],
        )
        for at, name in enumerate(names)
    ]
    return Chart(
        id="waste",
        title="Generated and not trained",
        unit="share of all generated tokens so far",
        about="Where the other tokens are: still on their way, or lost, and to what."
        if series
        else "Nothing was lost.",
        series=series,
        stack=True,
        percent=True,
        zero=True,
    )


def _time(rows: Sequence[Row]) -> Chart | None:
    having = [row for row in rows if row.get("time/step_s")]
    if not having:
        return None
    parts = buckets(having, BARS)
    totals = [sum(row["time/step_s"] for row in part) for part in parts]
    waiting = {f"idle/{cause}_s": name for cause, name in WAITS.items()}
    if not any(name in row for row in having for name in waiting):
        waiting = {"time/wait_s": ("waiting", "c3")}
    named: dict[str, tuple[str, str]] = {
        "time/compute_s": ("computing", "c0"),
        **waiting,
        "time/publish_s": ("publishing weights", "c2"),
        "time/checkpoint_s": ("writing checkpoints", "c5"),
    }
    spent = {
        name: [sum(row.get(name) or 0.0 for row in part) / total for part, total in zip(parts, totals, strict=True)]
        for name in named
    }
    spent["other"] = [max(0.0, 1 - sum(each)) for each in zip(*spent.values(), strict=True)]
    named["other"] = ("other", "c7")
    series = [
        Series(name=said, colour=colour, x=[part[-1]["step"] for part in parts], y=[*spent[name]])
        for name, (said, colour) in named.items()
    ]
    return Chart(
        id="time",
        title="The learner's time",
        unit="share",
        about="What the learner did. It waits for data where generation is the bottleneck, for verdicts where judging "
        "is, for weights where engines had not loaded them, for the rules where the queue held groups back.",
        series=series,
        stack=True,
        percent=True,
        zero=True,
    )


def _entropy(rows: Sequence[Row]) -> Chart | None:
    return _plain(rows, id="entropy", title="Entropy", unit="nats per token", name="train/entropy", zero=True)
