"""From a recipe's words to a function, or exactly why not. No registry, no decorator: names resolve by import.

A *spec* is `"clip"` or `{name = "clip", low = 0.2}` (a name in a catalogue folder's `__all__`),
`"package.module:function"`, or `"path/to/file.py:function"`. A function's signature is a contract:

- positional parameters are words, filled in by name; one with a default is optional;
- keyword-only parameters are what a recipe may set; their annotations are checked when the spec is resolved.

A method with memory is a dataclass with `__call__`: its fields are the recipe's parameters, its `init=False`
fields its memory (`memory`, `restore`). The words are looked up once, in `resolve`; `Method.call` is a plain call.
Ship specs between processes, not methods: every process resolves for itself.
"""

import copy
import importlib
import inspect
import json
import typing
from collections.abc import Callable, Collection, Mapping
from dataclasses import MISSING, dataclass, field, fields, is_dataclass
from typing import Any

from pydantic import ConfigDict, TypeAdapter, ValidationError

from millrace.core.errors import MillraceError, RecipeError, nearest
from millrace.core.references import is_reference, load_reference

Spec = str | Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Method:
    """A resolved spec: a callable, the words it asks for, and the settings it was given."""

    name: str  # "surrogates.clip", or the reference as it was given
    function: Callable[..., Any]
    needs: tuple[str, ...]  # words it cannot do without, in the order of its parameters
    optional: Mapping[str, Any]  # words it takes when they are there -> what it gets when they are not
    settings: Mapping[str, Any]  # every parameter a recipe may set, with its value
    is_async: bool
    error: type[MillraceError] = field(default=RecipeError, repr=False)
    _bound: Mapping[str, Any] = field(default_factory=dict, repr=False)

    def call(self, have: Mapping[str, Any]) -> Any:
        """Call it with its words out of `have`. An async method returns its coroutine."""
        try:
            arguments = [have[word] for word in self.needs]
        except KeyError as missing:
            given = ", ".join(sorted(have))
            raise self.error(f"{self.name} asks for {missing.args[0]}, which is not here; given: {given}") from None
        arguments += [have.get(word, default) for word, default in self.optional.items()]
        return self.function(*arguments, **self._bound)

    @property
    def words(self) -> frozenset[str]:
        """All words it asks for, needed and optional."""
        return frozenset(self.needs) | frozenset(self.optional)


def resolve(
    spec: Spec, *, folder: str | None, words: Collection[str], slot: str, error: type[MillraceError] = RecipeError
) -> Method:
    """The method that a spec names.

    Args:
        spec: a name, a reference, or a table with `name` and settings.
        folder: the catalogue's module, as `"millrace.learner.surrogates"`; None where only references make sense.
        words: what a method of this slot may ask for.
        slot: the recipe's key, for messages: `"surrogate"`.
        error: raised for every mistake; a reward's is RewardError.

    Raises:
        error: unknown name, import failure, a word that is not there, a setting unknown or of a wrong type.

    >>> clip = resolve({"name": "clip", "high": 0.28}, folder="millrace.learner.surrogates",
    ...                words=("ratio_N", "advantage_N"), slot="surrogate")
    >>> clip.name, clip.needs, clip.settings["high"]
    ('surrogates.clip', ('ratio_N', 'advantage_N'), 0.28)
    """
    name, settings = split(spec, slot=slot, error=error)
    if is_reference(name):
        title, target = name, load_reference(name, slot=slot, error=error)
    else:
        title, target = _from_folder(name, folder, slot, error)
    if not callable(target):
        raise error(f"{slot} {title} is a {type(target).__name__}, not a function")
    if inspect.isclass(target):
        if not is_dataclass(target) or "__call__" not in dir(target):
            raise error(f"{slot} {title} is a class: a method with memory is a dataclass with __call__")
        parameters = {f.name: _default(f.default, f.default_factory) for f in fields(target) if f.init}
        checked = _check(title, parameters, _hints(target), settings, error)
        target, bound = typing.cast(Any, target)(**checked), {}
        needs, optional, own = _signature(title, target, error)
        if own:
            raise error(f"{title}.__call__ has parameter '{next(iter(own))}' after *: make it a field of the class")
    else:
        needs, optional, parameters = _signature(title, target, error)
        checked = bound = _check(title, parameters, _hints(target), settings, error, words)
    _check_words(title, [*needs, *optional], optional, words, slot, error)
    return Method(title, target, needs, optional, checked, _is_async(target), error, bound)


def names(folder: str) -> tuple[str, ...]:
    """The methods of a catalogue folder, as its `__all__` lists them."""
    return tuple(importlib.import_module(folder).__all__)


def memory(method: Method) -> dict[str, Any]:
    """What a method remembers, for the checkpoint; empty for a plain function."""
    return {name: copy.deepcopy(getattr(method.function, name)) for name in _memory_fields(method)}


def restore(method: Method, saved: Mapping[str, Any]) -> None:
    """Give a method its memory back.

    Raises:
        RecipeError: what was saved is another method's memory.
    """
    expected = _memory_fields(method)
    if set(saved) != set(expected):
        raise method.error(
            f"{method.name} remembers {', '.join(expected) or 'nothing'}, but the checkpoint holds"
            f" {', '.join(saved) or 'nothing'} for it: resume with the recipe that the run was started with"
        )
    for name, value in saved.items():
        setattr(method.function, name, copy.deepcopy(value))


def split(spec: Spec, *, slot: str, error: type[MillraceError] = RecipeError) -> tuple[str, dict[str, Any]]:
    """A spec's name and its settings.

    >>> split({"name": "clip", "low": 0.1}, slot="surrogate")
    ('clip', {'low': 0.1})
    """
    if isinstance(spec, str):
        return spec, {}
    if isinstance(spec, Mapping) and isinstance(spec.get("name"), str):
        return spec["name"], {key: value for key, value in spec.items() if key != "name"}
    raise error(f'{slot} = {spec!r}: write "name", or {{ name = "name", parameter = value }}')


def _from_folder(name: str, folder: str | None, slot: str, error: type[MillraceError]) -> tuple[str, Any]:
    own = 'your own is written "package.module:function" or "path/to/file.py:function"'
    if folder is None:
        raise error(f"unknown {slot} '{name}': {own}")
    known = names(folder)
    if name.endswith(".py"):
        raise error(f"{slot} '{name}': say which function of the file, \"{name}:function\"")
    if name not in known:
        raise error(f"unknown {slot} '{name}'{_close(name, known)} {folder} has {', '.join(known)}; {own}")
    return f"{folder.rpartition('.')[2]}.{name}", getattr(importlib.import_module(folder), name)


def _signature(
    title: str, target: Callable[..., Any], error: type[MillraceError]
) -> tuple[tuple[str, ...], dict[str, Any], dict[str, Any]]:
    """Needed words, optional words with their defaults, settings with theirs."""
    needs: list[str] = []
    optional: dict[str, Any] = {}
    settings: dict[str, Any] = {}
    try:
        parameters = inspect.signature(target).parameters
    except ValueError:  # some builtins have none
        raise error(f"{title} has no signature to fill in by name: wrap it in a function of your own") from None
    for name, parameter in parameters.items():
        if parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD):
            raise error(f"{title} takes {parameter}: name each word it asks for; they are filled in by name")
        if parameter.kind is parameter.KEYWORD_ONLY:
            settings[name] = MISSING if parameter.default is parameter.empty else parameter.default
        elif parameter.default is parameter.empty:
            needs.append(name)
        else:
            optional[name] = parameter.default
    return tuple(needs), optional, settings


def _check_words(
    title: str,
    asked: Collection[str],
    optional: Collection[str],
    words: Collection[str],
    slot: str,
    error: type[MillraceError],
) -> None:
    for word in asked:
        if word not in words:
            way_out = " To let a recipe set it, put it after a bare *." if word in optional else ""
            a = "an" if slot[0] in "aeiou" else "a"
            raise error(
                f"{title} asks for '{word}'{_close(word, words)}"
                f" {a.capitalize()} {slot} may ask for {', '.join(sorted(set(words)))}.{way_out}"
            )


def _check(
    title: str,
    parameters: Mapping[str, Any],
    hints: Mapping[str, Any],
    given: Mapping[str, Any],
    error: type[MillraceError],
    words: Collection[str] = (),
) -> dict[str, Any]:
    """The settings given, checked, over the defaults."""
    takes = ", ".join(key if default is MISSING else f"{key}={default!r}" for key, default in parameters.items())
    for key in given:
        if key not in parameters:
            raise error(
                f"{title} has no parameter '{key}'{_close(key, parameters)} It takes {takes or 'no parameters'}"
            )
    checked: dict[str, Any] = {}
    for key, default in parameters.items():
        if key in given:
            checked[key] = _coerce(title, key, given[key], hints.get(key, _type_of(default)), error)
        elif default is MISSING:
            way_out = f". To have the word '{key}' filled in, put it before the *" if key in words else ""
            raise error(f"{title} needs parameter '{key}'. It takes {takes}{way_out}")
        else:
            checked[key] = default
    return checked


def _coerce(title: str, key: str, value: Any, hint: Any, error: type[MillraceError]) -> Any:
    """The value as its annotation wants it. JSON's strict rules: a list may be a tuple, "1" is no number."""
    adapter: TypeAdapter[Any] = TypeAdapter(hint, config=ConfigDict(arbitrary_types_allowed=True))
    try:
        return adapter.validate_json(json.dumps(value, default=str), strict=True)
    except ValidationError as caught:
        message = caught.errors()[0]["msg"].removeprefix("Value error, ")
        raise error(f"{title}: {key} = {value!r}: {message[0].lower()}{message[1:]}") from None


def _hints(target: Any) -> dict[str, Any]:
    """Its annotations; those that name what only type checkers import are not checked."""
    owner = target if inspect.isclass(target) or inspect.isroutine(target) else type(target).__call__
    try:
        return typing.get_type_hints(inspect.unwrap(owner), include_extras=True)
    except NameError:
        return {}


def _type_of(default: Any) -> Any:
    return type(default) if isinstance(default, bool | int | float | str) else Any


def _default(default: Any, factory: Any) -> Any:
    return factory() if factory is not MISSING else default


def _is_async(target: Any) -> bool:
    return inspect.iscoroutinefunction(target) or inspect.iscoroutinefunction(getattr(target, "__call__", None))  # noqa: B004


def _memory_fields(method: Method) -> tuple[str, ...]:
    if not is_dataclass(method.function):
        return ()
    return tuple(f.name for f in fields(method.function) if not f.init)


def _close(word: str, known: Collection[str]) -> str:
    return nearest(word, known) or "."
