"""The sections that are curves: reward (or loss) over the steps, and held-out evaluations. Pure."""

from collections.abc import Sequence

from rich.text import Text

from millrace.cluster.view.charts import Value, bounds, plot, spread
from millrace.cluster.view.picture import RECENT, Picture
from millrace.cluster.view.words import Part, joined, number

MOST_LINES = 14


def step_curve_short(picture: Picture, columns: int) -> Text:
    """Its last value and a sparkline with bounds."""
    values, glyphs = _values(picture), picture.glyphs
    found = bounds(values)
    if found is None:
        return _nothing(picture)
    low, high = (number(value) for value in found)
    line = Text.assemble((f"{number(_last(values)):>6}", "bold"))
    said, steps = f"  {low}{glyphs.to}{high}", f"  {_steps(picture)}"
    room = columns - line.cell_len - len(said) - len(steps) - 2
    if room < 16:
        room, steps = room + len(steps), ""
    if room < 8:
        return line
    return line.append("  ").append(plot(spread(values, room), room, 1, glyphs)[0], "green").append(said + steps, "dim")


def step_curve_tall(picture: Picture, columns: int, lines: int) -> list[Text]:
    """A caption over a chart with its bounds."""
    values, glyphs = _values(picture), picture.glyphs
    if bounds(values) is None:
        return [_nothing(picture)]
    many = min(RECENT, len(picture.steps))
    caption = joined(
        (
            Part(f"{number(_last(values)):>6}", "bold"),
            Part(f"mean of {many} steps {number(picture.recent(_column(picture)))}"),
            Part(_steps(picture), "dim"),
        ),
        columns,
        glyphs,
    )
    return [caption, *_area(picture, values, columns, lines - 1, "green")]


def step_curve_sizes(picture: Picture, _columns: int) -> Sequence[int]:
    """A chart is worth it from three lines of it on."""
    return range(4, MOST_LINES + 1) if bounds(_values(picture)) else ()


def held_out_short(picture: Picture, columns: int) -> Text:
    """The last value, a sparkline, and the values before."""
    found, glyphs = picture.evaluations, picture.glyphs
    if not found:
        return _not_evaluated(picture)
    line = Text.assemble((f"{number(found[-1]['mean']):>6}", "bold"), (f" @{found[-1]['step']}  ", "dim"))
    wide = min(len(found), max((columns - line.cell_len) // 3, 4))
    line.append(plot([each["mean"] for each in found], wide, 1, glyphs)[0], "cyan").append("  ")
    return line.append(_newest(picture, columns - line.cell_len), "dim")


def held_out_tall(picture: Picture, columns: int, lines: int) -> list[Text]:
    """A caption over a chart; with room, a bar per evaluation over its value and its step."""
    found, glyphs = picture.evaluations, picture.glyphs
    if not found:
        return [_not_evaluated(picture)]
    means: list[Value] = [each["mean"] for each in found]
    first, last = found[0], found[-1]
    caption = joined(
        (
            Part(f"{number(last['mean']):>6}", "bold"),
            Part(f"at step {last['step']}"),
            Part(f"{number(first['mean'])} at step {first['step']}" if len(found) > 1 else "", "dim"),
        ),
        columns,
        glyphs,
    )
    wide = min(columns // len(found), 14)
    if wide < 7:
        return [caption, *_area(picture, means, columns, lines - 1, "cyan")]
    cells: list[Value] = [value for mean in means for value in [*[mean] * (wide - 2), None, None]]
    chart = plot(cells, len(cells), lines - 3, glyphs)
    values = "".join(f"{number(mean):<{wide}}" for mean in means)
    steps = "".join(f"{'@' + str(each['step']):<{wide}}" for each in found)
    return [caption, *(Text(line, "cyan") for line in chart), Text(values), Text(steps, "dim")]


def held_out_sizes(picture: Picture, _columns: int) -> Sequence[int]:
    """A chart, its values and its steps."""
    return range(5, MOST_LINES + 1) if picture.evaluations else ()


def _column(picture: Picture) -> str:
    return "train/loss" if picture.supervised else "reward/mean"


def _values(picture: Picture) -> list[Value]:
    return picture.curve(_column(picture))


def _last(values: Sequence[Value]) -> Value:
    return next(value for value in reversed(values) if bounds([value]))


def _steps(picture: Picture) -> str:
    return f"steps {picture.steps[0]['step']}{picture.glyphs.to}{picture.steps[-1]['step']}"


def _nothing(picture: Picture) -> Text:
    return Text("     -  " + ("no judged rollout yet" if picture.steps else "no step yet"), "dim")


def _not_evaluated(picture: Picture) -> Text:
    return Text("     -  " + ("nothing was evaluated" if picture.ended else "not evaluated yet"), "dim")


def _newest(picture: Picture, columns: int) -> str:
    """The evaluations before the last one; the oldest are left out first."""
    kept: list[str] = []
    labels = [f"{number(each['mean'])} @{each['step']}" for each in picture.evaluations[:-1]]
    for label in reversed(labels):
        whole = len(kept) + 1 == len(labels)
        if len("  ".join([label, *kept])) + (0 if whole else len(picture.glyphs.cut) + 2) > columns:
            return "  ".join([picture.glyphs.cut, *kept]) if kept else ""
        kept.insert(0, label)
    return "  ".join(kept)


def _area(picture: Picture, values: Sequence[Value], columns: int, lines: int, style: str) -> list[Text]:
    """A chart as wide as there is room, its largest value beside the top and its smallest beside the foot."""
    low, high = bounds(values) or (None, None)
    marks = [number(high), *[""] * (lines - 2), number(low)]
    margin = max(map(len, marks))
    room = columns - margin - 1
    chart = plot(spread(values, room), room, lines, picture.glyphs)
    return [
        Text.assemble((f"{mark:>{margin}} ", "dim"), (line, style)) for mark, line in zip(marks, chart, strict=True)
    ]
