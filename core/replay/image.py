"""The whole state of the ledger as one record, so that the records before it can go.

What is written follows from the types of the state's fields, so a new field needs nothing here. Left out is what a
restart counts afresh (fields that equality leaves out) and what the configuration says (fields without a default).
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import MISSING, Field, fields, is_dataclass
from enum import Enum
from functools import cache
from types import NoneType, UnionType
from typing import Any, NamedTuple, Union, get_args, get_origin, get_type_hints

from millrace.core.errors import LedgerError
from millrace.core.replay.journal import Record


class Codec(NamedTuple):
    """How values of one type become plain data, and the same values again."""

    plain: Callable[[Any], Any]
    rich: Callable[[Any], Any]


def image(state: Any) -> Record:
    """The record that stands for every record so far."""
    own = {name: codec.plain(getattr(state, name)) for name, codec in _codecs(_kind(state)).items()}
    return {"op": "image", "state": own}


def restore(state: Any, record: Record) -> None:
    """Give a fresh state what the image holds. A field that is newer than the image keeps its default.

    Raises:
        LedgerError: the image has a field that this version does not know.
    """
    codecs = _codecs(_kind(state))
    for name, value in _known(record["state"], codecs).items():
        setattr(state, name, codecs[name].rich(value))


def _known(plain: Mapping[str, Any], codecs: Mapping[str, Codec]) -> Mapping[str, Any]:
    """What is not known is not dropped: a newer version wrote it because it needs it."""
    if unknown := sorted(plain.keys() - codecs.keys()):
        raise LedgerError(
            f"the journal's image has the fields {', '.join(unknown)}, which this version of millrace does not know; "
            "resume the run with the version that wrote it"
        )
    return plain


def _kind(state: Any) -> Any:
    return type(state)


@cache
def _codecs(owner: Any) -> dict[str, Codec]:
    """Of the fields of the state that an image holds."""
    hints = get_type_hints(owner)
    return {each.name: _codec(hints[each.name]) for each in fields(owner) if each.compare and _has_default(each)}


def _has_default(each: Field[Any]) -> bool:
    return each.default is not MISSING or each.default_factory is not MISSING


@cache
def _codec(hint: Any) -> Codec:
    origin, args = get_origin(hint), get_args(hint)
    if origin in (Union, UnionType):
        return _optional(args)
    if origin in (list, Sequence, set, frozenset):
        return _many(origin, _codec(args[0]))
    if origin in (dict, Mapping):
        return _mapping(_codec(args[0]), _codec(args[1]))
    if origin is tuple:
        return _many(tuple, _codec(args[0])) if args[-1] is Ellipsis else _tuple([_codec(arg) for arg in args])
    if hint in (int, float, str, bool, None, NoneType, object, Any):
        return Codec(_same, _same)
    if isinstance(hint, type):
        if issubclass(hint, Enum):
            return Codec(lambda value: value.value, hint)
        if is_dataclass(hint):
            kept = {each.name for each in fields(hint) if each.compare}
            return _fielded(hint, {name: own for name, own in get_type_hints(hint).items() if name in kept})
        if issubclass(hint, tuple) and hasattr(hint, "_fields"):
            return _fielded(hint, get_type_hints(hint))
    raise TypeError(f"the ledger's state has a value of type {hint}: an image cannot hold it")


def _same(value: Any) -> Any:
    return value


def _optional(args: Sequence[Any]) -> Codec:
    inner = [arg for arg in args if arg is not NoneType]
    if len(inner) > 1:
        raise TypeError(f"the ledger's state has a value of one of the types {inner}: an image cannot hold it")
    plain, rich = _codec(inner[0])
    return Codec(
        lambda value: None if value is None else plain(value), lambda value: None if value is None else rich(value)
    )


def _many(kind: Any, each: Codec) -> Codec:
    whole = list if kind is Sequence else kind
    if each.plain is _same:
        return Codec(list if whole in (list, tuple) else sorted, whole)
    return Codec(
        lambda values: [each.plain(value) for value in values],
        lambda values: whole(each.rich(value) for value in values),
    )


def _tuple(each: Sequence[Codec]) -> Codec:
    return Codec(
        lambda values: [codec.plain(value) for codec, value in zip(each, values, strict=True)],
        lambda values: tuple(codec.rich(value) for codec, value in zip(each, values, strict=True)),
    )


def _mapping(key: Codec, value: Codec) -> Codec:
    """As pairs: keys of every type keep it, and all keep their order."""
    return Codec(
        lambda table: [[key.plain(k), value.plain(v)] for k, v in table.items()],
        lambda pairs: {key.rich(k): value.rich(v) for k, v in pairs},
    )


def _fielded(kind: Any, hints: Mapping[str, Any]) -> Codec:
    each = {name: _codec(hint) for name, hint in hints.items()}
    return Codec(
        lambda value: {name: codec.plain(getattr(value, name)) for name, codec in each.items()},
        lambda plain: kind(**{name: each[name].rich(value) for name, value in _known(plain, each).items()}),
    )
