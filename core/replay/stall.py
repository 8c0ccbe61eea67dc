"""What everything waits for, said in a few lines. Pure: it reads the ledger and changes nothing."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from millrace.core.protocols import Role
from millrace.core.replay.draws import OPEN, Draw, State
from millrace.core.replay.leases import Hold
from millrace.core.replay.ledger import Ledger


@dataclass(frozen=True, slots=True, kw_only=True)
class Scene:
    """What the ledger does not know by itself."""

    prompt: Callable[[int], str]  # draw -> prompt id
    idle: Mapping[str, str]  # worker -> what it says it waits for
    causes: Mapping[str, str]  # worker -> one of IDLE
    learner: str  # "waits" in a take, else the last call it made; "" before its first
    learner_s: float  # seconds since that call


def report(ledger: Ledger, scene: Scene) -> str:
    """The draw, its prompt, who has it, since when without progress, what it waits for, what to do."""
    state, config = ledger.state, ledger.config
    head = f"step {state.step} of {config.steps}, {state.commits[-1].step} committed"
    if ledger.finished:
        return _lines(head, "all steps are trained; only the last commit is missing", _learner_acts(scene))
    if state.epoch == 0:
        return _lines(head, "no learner has joined: look at the learner's log; until it joins nothing is sampled")
    if scene.learner != "waits" and _batch_is_there(ledger, scene):
        return _lines(head, "a batch is there and the learner does not take it", _learner_acts(scene))
    draw = _urgent(ledger)
    if draw is None or (draw.state is State.WAITING and not state.leases.held):
        return _lines(head, *_nothing_leased(ledger, scene, draw))
    return _lines(head, *_about(ledger, scene, draw), *_counts(ledger))


def _lines(*lines: str) -> str:
    return "\n".join(line for line in lines if line)


def _batch_is_there(ledger: Ledger, scene: Scene) -> bool:
    """Recorded, or enough scored for it."""
    step = ledger.state.step
    return ledger.waits_for(step, scene.causes) in ("", "scheduler")


def _learner_acts(scene: Scene) -> str:
    if not scene.learner:
        return "the learner has joined and called nothing since: look at its log"
    return (
        f"the learner's last call was {scene.learner}, {scene.learner_s:.0f} s ago: it computes, publishes or writes a "
        "checkpoint. Look at its log and its process; if it hangs, kill it: it goes on from the last commit"
    )


def _urgent(ledger: Ledger) -> Draw | None:
    """The draw that the batch waits for: the one that must be trained first, in lease order, and is not scored."""
    state = ledger.state
    missing = [draw for draw in state.draws.values() if draw.state in OPEN and draw.state is not State.SCORED]
    missing = missing or [draw for draw in state.draws.values() if draw.state is State.WAITING]
    return min(missing, key=lambda draw: (draw.deadline, draw.index), default=None)


def _name(draw: Draw, scene: Scene) -> str:
    return f"draw {draw.index} attempt {draw.attempt} of prompt {scene.prompt(draw.index)!r}"


def _about(ledger: Ledger, scene: Scene, draw: Draw) -> list[str]:
    """Lines on the draw that is waited for."""
    state, now = ledger.state, ledger.clock()
    lines = [f"everything waits for {_name(draw, scene)}: {draw.state.value}, {draw.tokens} tokens so far"]
    if draw.state is State.LEASED:
        hold = state.leases.held[draw.index]
        lines.append(_held(hold, now, "tokens"))
        lines.append(
            f"to do: look at the log and the process of {hold.worker}; if its engine is wedged, kill it: the draw goes "
            "to another. If one response takes that long, lower max_tokens or raise loop.lease_s"
        )
    elif draw.state is State.JUDGING:
        hold = state.judgings.held[draw.index]
        lines.append(_held(hold, now, "verdicts"))
        lines.append(
            f"to do: look at the log of {hold.worker} and at the reward on this prompt; a time limit per rollout ends "
            "a judge that hangs"
        )
    elif not _judges(ledger):
        lines.append("it waits for a verdict, and no reward worker has joined: look at the reward workers' logs")
    else:
        said = _idle(scene, _judges(ledger)) or [
            f"{_few(_judges(ledger))} did not ask for it: busy, or look at the log"
        ]
        lines.append(f"it waits for a reward worker: {'; '.join(said)}")
        lines.append("to do: more reward workers, or a faster reward; `judge` in the idle times says what it costs")
    return lines


def _held(hold: Hold, now: float, unit: str) -> str:
    return (
        f"{hold.worker} has had it for {now - hold.granted_at:.0f} s; its last progress ({hold.progress} {unit}) was "
        f"{now - hold.seen_at:.0f} s ago; the lease ends in {hold.deadline - now:.0f} s without any"
    )


def _nothing_leased(ledger: Ledger, scene: Scene, draw: Draw | None) -> list[str]:
    """Lines for when no engine has a draw, and nothing is on its way."""
    state = ledger.state
    engines = _workers(ledger, Role.GENERATION)
    next_ = _name(draw, scene) if draw else f"draw {state.next_draw} of prompt {scene.prompt(state.next_draw)!r}"
    lines = [f"nothing is being generated; next is {next_}"]
    if not engines:
        lines.append("no engine has joined: look at the generation workers' logs; they load or start again")
    elif state.versions.newest < 0:
        lines.append(f"{_few(engines)} wait for the first weights, and the learner has announced none")
        lines.append(_learner_acts(scene))
    elif all(scene.causes.get(name) == "weights" for name in engines):
        lines.append(
            f"{_few(engines)} do not hold version {state.versions.newest} of the weights yet: look at their logs and "
            "at the weight store; fetching, loading and proving it is what they are at"
        )
    else:
        lines += _idle(scene, engines)
        lines.append("to do: what the lines above say; an engine that says nothing has not asked: look at its log")
    return lines


def _counts(ledger: Ledger) -> list[str]:
    counts = ledger.state.counts
    shown = ", ".join(f"{counts[name]} {name.value}" for name in (State.WAITING, *sorted(OPEN)) if counts[name])
    return [f"draws: {shown}; {len(_workers(ledger, Role.GENERATION))} engines, {len(_judges(ledger))} reward workers"]


def _workers(ledger: Ledger, role: Role) -> list[str]:
    return sorted(name for name, entry in ledger.state.workers.items() if entry.role == role.value)


def _judges(ledger: Ledger) -> list[str]:
    return _workers(ledger, Role.REWARD)


def _idle(scene: Scene, workers: list[str]) -> list[str]:
    said = [f"{name}: {scene.idle[name]}" for name in workers if scene.idle.get(name)]
    return said[:4] + ([f"and {len(said) - 4} more"] if len(said) > 4 else [])


def _few(workers: list[str]) -> str:
    return ", ".join(workers[:4]) + (f" and {len(workers) - 4} more" if len(workers) > 4 else "")
