"""Copies of a ledger's state, several times cheaper than by pickle.

What the rules replace as a whole, such as a draw's runs, is shared; test_copies.py finds what they change in place.
"""

from collections.abc import Callable, Mapping
from dataclasses import fields
from operator import attrgetter
from typing import Any

from millrace.core.replay.draws import Batch, Draw, Worker
from millrace.core.replay.leases import Hold, Leases
from millrace.core.replay.state import LedgerState
from millrace.core.replay.versions import Versions
from millrace.core.replay.waste import Books, Meter

_PLAIN = {dict, list, set}


def by_constructor(cls: type) -> Callable[[Any], Any]:
    """How to copy its fields, and nothing that is in them."""
    values = attrgetter(*(each.name for each in fields(cls)))
    return lambda one: cls(*values(one))


def containers(attributes: Mapping[str, Any]) -> dict[str, Any]:
    """The same attributes, with plain containers of their own."""
    return {name: value.copy() if type(value) in _PLAIN else value for name, value in attributes.items()}


_draw, _batch, _worker, _hold = (by_constructor(cls) for cls in (Draw, Batch, Worker, Hold))
_meter, _versions = by_constructor(Meter), by_constructor(Versions)


def copied(state: LedgerState) -> LedgerState:
    """Equal to it in everything, and sharing nothing that a rule changes in place."""
    new = LedgerState.__new__(LedgerState)
    new.__dict__.update(containers(state.__dict__))
    for index, draw in state.draws.items():
        new.draws[index] = own = _draw(draw)
        own.steps = draw.steps.copy()
    for step, batch in state.batches.items():
        new.batches[step] = own = _batch(batch)
        own.entries, own.filtered = batch.entries.copy(), batch.filtered.copy()
    for name, worker in state.workers.items():
        new.workers[name] = own = _worker(worker)
        own.answers = worker.answers.copy()
    for length, counts in state.lengths.items():
        new.lengths[length] = counts.copy()
    new.leases, new.judgings = _leases(state.leases), _leases(state.judgings)
    new.versions = own = _versions(state.versions)
    own.epochs, own.steps, own.forks = own.epochs.copy(), own.steps.copy(), own.forks.copy()
    own.announced = own.announced.copy()
    new.books = Books(state.books.rows.copy(), {epoch: _metered(meter) for epoch, meter in state.books.meters.items()})
    return new


def _leases(leases: Leases) -> Leases:
    held = {draw: _hold(hold) for draw, hold in leases.held.items()}
    return Leases(held, {epoch: draws.copy() for epoch, draws in leases.by_epoch.items()}, leases.heap.copy())


def _metered(meter: Meter) -> Meter:
    new = _meter(meter)
    new.fenced, new.told = meter.fenced.copy(), meter.told.copy()
    return new
