"""What a row must look like: each check says what is wrong and what to do."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from millrace.actors.datasets.config import DataConfig
from millrace.core.errors import DataError, boundary, nearest


class Tokenizer(Protocol):
    """What is asked of a Hugging Face tokenizer."""

    chat_template: Any

    def __call__(self, text: list[str], **options: Any) -> Mapping[str, Any]: ...

    def apply_chat_template(self, conversation: list[dict[str, Any]], **options: Any) -> Any: ...


@dataclass(frozen=True, slots=True)
class Source:
    """A row that has passed, before it is tokenised."""

    number: int
    id: str
    text: str
    rendered: bool  # by the chat template, which writes the special tokens itself
    answer: str | None
    row: Mapping[str, Any]


def check(number: int, row: Mapping[str, Any], tokenizer: Tokenizer, config: DataConfig, *, stem: str) -> Source:
    """The row `number` of the file `stem`, or a DataError that names the column, its value and the way out."""
    if config.prompt not in row:
        raise DataError(
            f"no column '{config.prompt}'; it has {', '.join(row) or 'none'}; "
            f"name the column that holds the prompt with data.prompt{nearest(config.prompt, row)}"
        )
    prompt = row[config.prompt]
    rendered = not isinstance(prompt, str)
    text = _render(prompt, tokenizer, config.prompt) if rendered else prompt
    further = {name: value for name, value in row.items() if name not in (config.prompt, config.answer, config.id)}
    for name, value in further.items():
        _refuse_what_is_not_json(name, value)
    return Source(
        number=number,
        id=_id(row.get(config.id), config.id) or f"{stem}:{number}",
        text=text,
        rendered=rendered,
        answer=_answer(row.get(config.answer), config.answer),
        row=further,
    )


def _render(prompt: Any, tokenizer: Tokenizer, name: str) -> str:
    """The chat template's output for a prompt that is no string."""
    if not isinstance(prompt, list) or not prompt:
        raise DataError(
            f"'{name}' is {shown(prompt)}; it must be a string, or a list of messages "
            '[{"role": "user", "content": "..."}]'
        )
    for position, message in enumerate(prompt):
        if not isinstance(message, dict) or not all(isinstance(message.get(key), str) for key in ("role", "content")):
            raise DataError(
                f"message {position} of '{name}' is {shown(message)}; it must be an object with the strings "
                "'role' and 'content'"
            )
    if prompt[-1]["role"] == "assistant":
        raise DataError(
            f"the last message of '{name}' is the assistant's, so the model would see an answer; "
            "end with the user's message and put the answer in a column of its own"
        )
    if not tokenizer.chat_template:
        raise DataError(
            f"'{name}' holds chat messages, but the model's tokenizer has no chat template; use a chat model, "
            "add chat_template.jinja to the model's folder, or write the prompts as strings"
        )
    with boundary("the tokenizer's chat template", DataError):
        return str(tokenizer.apply_chat_template(prompt, tokenize=False, add_generation_prompt=True))


def _answer(value: Any, name: str) -> str | None:
    if value is None or isinstance(value, str):
        return value
    if isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value):
        return str(value)
    raise DataError(f"'{name}' is {shown(value)}; it must be a string or a finite number, or null where there is none")


def _id(value: Any, name: str) -> str | None:
    if value is None or (isinstance(value, str) and value):
        return value
    if isinstance(value, int) and not isinstance(value, bool):
        return str(value)
    raise DataError(f"'{name}' is {shown(value)}; it must be a string or a whole number")


def _refuse_what_is_not_json(name: str, value: Any) -> None:
    match value:
        case None | str() | int() | float():
            return
        case list():
            for part in value:
                _refuse_what_is_not_json(name, part)
        case dict():
            for part in value.values():
                _refuse_what_is_not_json(name, part)
        case _:
            raise DataError(
                f"column '{name}' holds {type(value).__name__}, which JSON has no word for; "
                "leave it out by naming the columns to keep with data.columns"
            )


def shown(value: Any) -> str:
    """A value with its type, cut to fit a line."""
    text = repr(value)
    return f"{text if len(text) <= 60 else text[:57] + '...'} ({type(value).__name__})"
