"""Responses as texts: what verifiers read."""

import json
from collections.abc import Iterator, Sequence
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from millrace.core.errors import ModelError, boundary
from millrace.core.types import Ints
from millrace.rewards.judge import Decode

FILE, CONFIG = "tokenizer.json", "tokenizer_config.json"


def decoder(directory: str) -> Decode:
    """Token arrays -> texts without special tokens, by the tokenizer of a model directory or hub id.

    Raises:
        ModelError: there is none.
    """
    with boundary(
        f"the tokenizer of {directory} (rewards judge text, so a model needs its tokenizer's files beside it)",
        ModelError,
    ):
        alone = whole(Path(directory))
        if alone is not None:
            decode = partial(alone.decode_batch, skip_special_tokens=True)
        else:
            tokenizer = _of_transformers(directory)
            decode = partial(tokenizer.batch_decode, skip_special_tokens=True, clean_up_tokenization_spaces=False)

    def texts(responses: Sequence[Ints]) -> Sequence[str]:
        return decode([tokens_T.tolist() for tokens_T in responses])

    return texts


def whole(directory: Path) -> Tokenizer | None:
    """A model's tokenizer.json, where it says by itself which tokens are special; decoding needs no more.

    Otherwise None: transformers reads further files, but its import takes seconds in which others start, too.
    """
    if not (directory / FILE).is_file() or not (directory / CONFIG).is_file():
        return None
    tokenizer: Tokenizer = Tokenizer.from_file(str(directory / FILE))
    special = {token.content for token in tokenizer.get_added_tokens_decoder().values() if token.special}
    named = set(_special(json.loads((directory / CONFIG).read_text())))
    return tokenizer if named <= special else None


def _special(config: dict[str, Any]) -> Iterator[str]:
    """The tokens that tokenizer_config.json calls special."""
    for key, value in config.items():
        if key.endswith("_token") or key.endswith("special_tokens"):
            listed = value if isinstance(value, list) else list(value.values()) if _is_table(value) else [value]
            yield from (_content(each) for each in listed if isinstance(each, str | dict))
    for each in config.get("added_tokens_decoder", {}).values():
        if each.get("special"):
            yield each["content"]


def _is_table(value: object) -> bool:
    """A dict of tokens by name, which is not a token itself."""
    return isinstance(value, dict) and "content" not in value


def _content(token: str | dict[str, Any]) -> str:
    return token if isinstance(token, str) else str(token["content"])


def _of_transformers(directory: str) -> Any:
    transformers = import_module("transformers")
    if (Path(directory) / FILE).is_file():  # AutoTokenizer would import torch and more
        return transformers.PreTrainedTokenizerFast.from_pretrained(directory)
    return transformers.AutoTokenizer.from_pretrained(directory)
