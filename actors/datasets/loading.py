"""From a file to prompts: read, validate, tokenise; whatever is wrong is said before anything expensive starts."""

from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from millrace.actors.datasets.config import DataConfig
from millrace.actors.datasets.files import Row, jsonl, parquet
from millrace.actors.datasets.rows import Source, Tokenizer, check, shown
from millrace.core.errors import DataError, nearest
from millrace.core.types import Prompt

T = TypeVar("T")

READERS = {".jsonl": jsonl, ".ndjson": jsonl, ".parquet": parquet}
SHOWN = 5  # bad rows spelt out in one message
TOKENISED_AT_ONCE = 8192  # texts; bounds memory, large enough for the tokenizer's threads

# The words that every rollout supplies, whatever the data; core/words.py says what they mean.
SUPPLIED = frozenset({"text", "prompt", "tokens_T", "finish_reason", "row"})


def load(
    path: str | Path,
    tokenizer: Tokenizer,
    config: DataConfig,
    *,
    context_tokens: int,
    max_new_tokens: int,
    limit: int | None = None,
) -> Sequence[Prompt]:
    """Read, validate and tokenise a file of the user's data.

    Args:
        path: a .jsonl or .parquet file.
        tokenizer: of the model; strings get its special tokens, chat messages its template's.
        config: the names of the columns.
        context_tokens: what the model can hold, prompt and response together.
        max_new_tokens: the longest response.
        limit: read only the first rows.
    Returns:
        One prompt per row, in the file's order.
    Raises:
        DataError: naming the file, the first bad rows by line, how many there are, and what to do.
    """
    path = Path(path)
    reader = _reader(path)
    wanted = None if config.columns is None else {config.prompt, config.answer, config.id, *config.columns}
    mistakes = _Mistakes(path)
    sources = list(mistakes.sift(_check(islice(reader(path, wanted), limit), tokenizer, config, path.stem)))
    mistakes.raise_any()
    if not sources:
        raise DataError(f"{path}: the dataset is empty; it needs at least one row with a '{config.prompt}'")
    _refuse_repeated_ids(path, sources, config.id)
    for name in config.columns or ():
        if not any(name in source.row for source in sources):
            raise DataError(f"{path}: data.columns names '{name}', which no row has; leave it out, or correct it")
    prompts = list(
        mistakes.sift(_tokenise(sources, tokenizer, context_tokens=context_tokens, max_new_tokens=max_new_tokens))
    )
    mistakes.raise_any()
    return prompts


def columns(prompts: Sequence[Prompt]) -> frozenset[str]:
    """The words that every one of `prompts` can supply to a verifier: `answer` and the names of further columns."""
    if not prompts:
        return frozenset()
    shared = set(prompts[0].row)
    for prompt in prompts:
        shared &= prompt.row.keys()
    if all(prompt.answer is not None for prompt in prompts):
        shared.add("answer")
    return frozenset(shared)


def require(prompts: Sequence[Prompt], words: Iterable[str], *, whose: str, source: str) -> None:
    """Check that the data supply every word that a verifier asks for.

    Args:
        words: the verifier's positional parameters.
        whose: the verifier, as the message should name it.
        source: the file, as the message should name it.
    Raises:
        DataError: naming the word, the columns there are, and the first row that lacks it.
    """
    known = columns(prompts) | SUPPLIED
    for word in words:
        if word in known:
            continue
        lacking = [prompt for prompt in prompts if not _has(prompt, word)]
        if len(lacking) < len(prompts):
            raise DataError(
                f"{whose} asks for '{word}', which {len(lacking)} of {len(prompts)} rows of {source} lack "
                f"(first: {lacking[0].id}); fill it in, or leave these rows out"
            )
        way_out = "name its column with data.answer" if word == "answer" else "add the column, or rename the word"
        raise DataError(
            f"{whose} asks for '{word}', which no row of {source} has; it has "
            f"{', '.join(sorted(columns(prompts))) or 'no further columns'}, and every rollout supplies "
            f"{', '.join(sorted(SUPPLIED))}; {way_out}{nearest(word, known)}"
        )


def _has(prompt: Prompt, word: str) -> bool:
    return prompt.answer is not None if word == "answer" else word in prompt.row


def _reader(path: Path) -> Any:
    if not path.parent.is_dir():
        raise DataError(f"{path}: there is no folder {path.parent}; give a path that exists")
    if not path.exists():
        beside = sorted(file.name for file in path.parent.iterdir() if file.is_file())
        hint = nearest(path.name, beside) or f"; the folder holds {_some(beside)}"
        raise DataError(f"{path}: there is no such file{hint}")
    if path.is_dir():
        raise DataError(f"{path} is a folder; name one file in it: {_some(sorted(p.name for p in path.iterdir()))}")
    if path.suffix.lower() not in READERS:
        raise DataError(
            f"{path}: cannot read '{path.suffix or path.name}'; it must end in {', '.join(READERS)}"
            + ("; write one JSON object per line" if path.suffix == ".json" else "")
        )
    return READERS[path.suffix.lower()]


def _some(names: Sequence[str]) -> str:
    return (", ".join(names[:SHOWN]) + (", ..." if len(names) > SHOWN else "")) or "nothing"


class _Mistakes:
    """Collects what is wrong with rows, so that one message names the first few and counts all."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._unit = "row" if path.suffix.lower() == ".parquet" else "line"
        self._found: list[str] = []
        self._count = 0

    def sift(self, results: Iterable[tuple[int, T | DataError]]) -> Iterator[T]:
        """The results that are no errors."""
        for number, result in results:
            if not isinstance(result, DataError):
                yield result
                continue
            self._count += 1
            if self._count <= SHOWN:
                self._found.append(f"{self._unit} {number}: {result}")

    def raise_any(self) -> None:
        if self._count == 1:
            raise DataError(f"{self._path}, {self._found[0]}")
        if self._count:
            more = [f"... and {self._count - SHOWN} more"] if self._count > SHOWN else []
            raise DataError("\n  ".join([f"{self._path}: {self._count} bad {self._unit}s", *self._found, *more]))


def _check(
    rows: Iterable[Row], tokenizer: Tokenizer, config: DataConfig, stem: str
) -> Iterator[tuple[int, Source | DataError]]:
    for number, row in rows:
        if isinstance(row, DataError):
            yield number, row
            continue
        try:
            yield number, check(number, row, tokenizer, config, stem=stem)
        except DataError as mistake:
            yield number, mistake


def _refuse_repeated_ids(path: Path, sources: Sequence[Source], name: str) -> None:
    rows: dict[str, list[str]] = {}
    for source in sources:
        rows.setdefault(source.id, []).append(str(source.number))
    repeated = [id for id in rows if len(rows[id]) > 1]
    if repeated:
        raise DataError(
            f"{path}: the column '{name}' repeats {len(repeated)} of its values: '{repeated[0]}' stands in rows "
            f"{_some(rows[repeated[0]])}; make them unique, or set data.id to a column that is"
        )


def _tokenise(
    sources: Sequence[Source], tokenizer: Tokenizer, *, context_tokens: int, max_new_tokens: int
) -> Iterator[tuple[int, Prompt | DataError]]:
    for start in range(0, len(sources), TOKENISED_AT_ONCE):
        some = sources[start : start + TOKENISED_AT_ONCE]
        for source, tokens in zip(some, _token_ids(some, tokenizer), strict=True):
            if not tokens:
                yield (
                    source.number,
                    DataError(f"the prompt {shown(source.text)} has no tokens; write one, or leave the row out"),
                )
            elif len(tokens) + max_new_tokens > context_tokens:
                room = context_tokens - len(tokens)
                shorter = f"set max_tokens to at most {room}, " if room > 0 else ""
                yield (
                    source.number,
                    DataError(
                        f"a prompt of {len(tokens)} tokens and max_tokens = {max_new_tokens} exceed the context of "
                        f"{context_tokens} tokens; {shorter}shorten the prompt, or leave the row out"
                    ),
                )
            else:
                yield (
                    source.number,
                    Prompt(
                        id=source.id,
                        text=source.text,
                        tokens_P=np.array(tokens, np.int32),
                        answer=source.answer,
                        row=source.row,
                    ),
                )


def _token_ids(sources: Sequence[Source], tokenizer: Tokenizer) -> list[list[int]]:
    """Token ids of each text, tokenised together. Rendered texts hold their special tokens already."""
    ids: list[list[int]] = [[] for _ in sources]
    for rendered in (False, True):
        places = [place for place, source in enumerate(sources) if source.rendered is rendered and source.text]
        if not places:
            continue
        encoded = tokenizer(
            [sources[place].text for place in places],
            add_special_tokens=not rendered,
            return_attention_mask=False,
            return_token_type_ids=False,
            verbose=False,  # its own warning of long texts; ours is an error
        )["input_ids"]
        for place, tokens in zip(places, encoded, strict=True):
            ids[place] = tokens
    return ids
