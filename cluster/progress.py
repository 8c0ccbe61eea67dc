"""What a person reads while a run goes on: one plain line now and then, made from a Status alone."""

from math import isfinite

from millrace.cluster.snapshot import Status


def duration(seconds: float) -> str:
    """Hours, minutes and seconds.

    >>> duration(61.5), duration(3700)
    ('1:01', '1:01:40')
    """
    minutes, rest = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def seconds(number: float) -> str:
    """A short time.

    >>> seconds(0.25), seconds(2.34), seconds(75.2)
    ('0.2 s', '2.3 s', '1:15')
    """
    return f"{number:.1f} s" if number < 60 else duration(number)


def count(number: float) -> str:
    """A number in at most four characters or so.

    >>> count(950), count(12_345), count(3_400_000)
    ('950', '12.3k', '3.4M')
    """
    for limit, unit in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if number >= limit:
            return f"{number / limit:.1f}{unit}"
    return f"{number:.0f}"


def shown(mean: float | None) -> str:
    """A mean reward; there is none where every judgement failed.

    >>> shown(0.5), shown(float("nan")), shown(None)
    ('0.500', 'no score', 'no score')
    """
    return f"{mean:.3f}" if mean is not None and isfinite(mean) else "no score"


def line(status: Status) -> str:
    """How far, how well, how stale, how fast, and who waits for whom.

    >>> line(Status(id="runs/x", state="running", step=7, steps=12, reward=0.25, eta_s=75))
    'step  7/12  reward 0.250  eta 1:15'
    """
    parts = [f"step {status.step:>{len(str(status.steps))}}/{status.steps}"]
    if status.reward is not None:
        parts.append(f"reward {shown(status.reward)}")
    if status.held_out is not None:
        parts.append(f"held-out {shown(status.held_out['mean'])} @{status.held_out['step']}")
    if status.draws:
        parts.append(f"lag {status.lag['mean']:.1f} of {status.lag['max']}")
        parts.append(f"generate {count(status.rates['generated_tokens_per_s'])} tok/s")
        parts.append(f"learn {count(status.rates['trained_tokens_per_s'])} tok/s")
        parts.append(waits(status))
    if status.down:
        parts.append(down(status))
    if status.eta_s is not None:
        parts.append(f"eta {duration(status.eta_s)}")
    return "  ".join(parts)


def waits(status: Status) -> str:
    """Who waits for whom, in few words."""
    said = [f"learner waits {min(status.learner['wait_share'], 1):.0%}"]
    idle = {name: why for name, why in status.waits.items() if name.startswith("generation")}
    if idle:
        name, why = next(iter(idle.items()))
        said.append(f"{name} waits: {_short(why)}" if len(idle) == 1 else f"{len(idle)} engines wait: {_short(why)}")
    return ", ".join(said)


def down(status: Status) -> str:
    """Which components should serve and do not."""
    return ", ".join(f"{name} {each['state']}" for name, each in status.down.items())


def _short(why: str) -> str:
    text = why.split(";")[0].split(". ")[0].split(":")[0]
    return text if len(text) <= 60 else text[:57] + "..."
