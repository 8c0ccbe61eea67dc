"""The base of every configuration: frozen, unknown keys refused with the nearest right one."""

from collections.abc import Mapping
from typing import Any, Self

from pydantic import BaseModel, ConfigDict, ValidationError, model_validator

from millrace.core.errors import ConfigError, nearest

# What pydantic says of a type in Python's words.
WORDS = {"missing": "is missing", "model_type": "must be a table, as { key = value }"}


class Config(BaseModel):
    """A frozen pydantic model whose errors say what to write instead."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True, protected_namespaces=())

    @model_validator(mode="before")
    @classmethod
    def _refuse_unknown_keys(cls, data: Any) -> Any:
        if isinstance(data, Mapping):
            known = list(cls.model_fields)
            for key in data:
                if key not in known:
                    close = cls._of_a_section(str(key)) or nearest(str(key), known)
                    raise ValueError(f"unknown key '{key}'{close} It takes {', '.join(known)}.")
        return data

    @classmethod
    def _of_a_section(cls, key: str) -> str:
        """What to write for a key that belongs one level further down; empty where it belongs nowhere."""
        sections = {name: each.annotation for name, each in cls.model_fields.items()}
        places = [
            f"'{name}.{key}'"
            for name, section in sections.items()
            if isinstance(section, type) and issubclass(section, Config) and key in section.model_fields
        ]
        return f"; did you mean {' or '.join(places)}?" if places else ""

    @classmethod
    def parse(cls, data: Mapping[str, Any], *, source: str) -> Self:
        """Validate; every message names `source` and the dotted key.

        Raises:
            ConfigError: with one line per mistake.
        """
        try:
            return cls.model_validate(data)
        except ValidationError as caught:
            raise in_words(caught, source=source) from None


def in_words(caught: ValidationError, *, source: str) -> ConfigError:
    """What pydantic says, a line per mistake, each with `source` and the dotted key."""
    lines = []
    for error in caught.errors():
        where = ".".join(str(part) for part in error["loc"]) or "top level"
        text = WORDS.get(error["type"], error["msg"].removeprefix("Value error, "))
        given = "" if isinstance(error["input"], Mapping) else f" (got {error['input']!r})"
        lines.append(f"{source}: {where}: {text}{given}")
    return ConfigError("\n".join(lines))
