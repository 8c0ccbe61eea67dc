"""Loading the user's data: what becomes of good rows, and what is said of bad ones."""

import datetime
import json
from collections.abc import Mapping, Sequence
from decimal import Decimal
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from millrace.actors import datasets
from millrace.actors.datasets import arithmetic, jsonl, sorting
from millrace.actors.datasets.config import DataConfig
from millrace.actors.datasets.loading import columns, load, require
from millrace.core.errors import ConfigError, DataError
from millrace.core.types import Prompt


class Letters:
    """A tokenizer: one token per character, its code point; 1 begins a text unless special tokens are declined."""

    def __init__(self, chat_template: str | None = "letters", bos: bool = False) -> None:
        self.chat_template = chat_template
        self.bos = bos
        self.calls: list[int] = []

    def __call__(self, text: list[str], *, add_special_tokens: bool, **_: Any) -> Mapping[str, Any]:
        self.calls.append(len(text))
        return {"input_ids": [[1] * (self.bos and add_special_tokens) + [ord(char) for char in part] for part in text]}

    def apply_chat_template(self, conversation: Sequence[Any], *, tokenize: bool, add_generation_prompt: bool) -> str:
        assert not tokenize and add_generation_prompt
        if conversation[0]["role"] == "tool":
            raise RuntimeError("roles must alternate")
        return "".join(f"\x01{message['role'][0]}:{message['content']}" for message in conversation) + "\x01a:"


def write(folder: Path, *rows: Any, name: str = "train.jsonl") -> Path:
    path = folder / name
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return path


def read(path: Path, tokenizer: Letters | None = None, *, limit: int | None = None, **config: Any) -> Sequence[Prompt]:
    return load(
        path, tokenizer or Letters(), DataConfig(train="", **config), context_tokens=32, max_new_tokens=8, limit=limit
    )


def refused(path: Path, tokenizer: Letters | None = None, **config: Any) -> str:
    """The message, with the folder's path cut out."""
    with pytest.raises(DataError) as caught:
        read(path, tokenizer, **config)
    return str(caught.value).replace(f"{path.parent}/", "")


# Good data


def test_a_row_becomes_a_tokenised_prompt_with_its_further_columns(tmp_path: Path) -> None:
    path = write(tmp_path, {"prompt": "2+3=", "answer": 5, "level": 1, "tags": ["a", {"b": None}]}, "", {"prompt": "x"})
    first, second = read(path)
    assert (first.id, first.text, first.answer) == ("train:1", "2+3=", "5")
    assert first.row == {"level": 1, "tags": ["a", {"b": None}]}
    assert first.tokens_P.tolist() == [50, 43, 51, 61] and first.tokens_P.dtype == np.int32
    assert (second.id, second.answer, second.row) == ("train:3", None, {})  # line 3: the blank line counts


@pytest.mark.parametrize(
    ("given_", "kept"),
    [("5", "5"), (5, "5"), (-1, "-1"), (0.5, "0.5"), (2**70, str(2**70)), (None, None), ("", "")],
)
def test_answers_are_strings(tmp_path: Path, given_: Any, kept: str | None) -> None:
    assert read(write(tmp_path, {"prompt": "p", "answer": given_}))[0].answer == kept


def test_columns_may_have_other_names_and_be_left_out(tmp_path: Path) -> None:
    path = write(tmp_path, {"question": "q", "gold": "g", "key": 7, "prompt": "not this", "secret": 1, "kind": "k"})
    (prompt,) = read(path, prompt="question", answer="gold", id="key", columns=("kind",))
    assert (prompt.text, prompt.answer, prompt.id, prompt.row) == ("q", "g", "7", {"kind": "k"})


def test_a_limit_reads_no_further(tmp_path: Path) -> None:
    path = write(tmp_path, {"prompt": "a"}, {"prompt": "b"}, "not JSON")
    assert [prompt.text for prompt in read(path, limit=2)] == ["a", "b"]


def test_a_byte_order_mark_is_no_part_of_the_data(tmp_path: Path) -> None:
    path = tmp_path / "train.jsonl"
    path.write_bytes(b'\xef\xbb\xbf{"prompt": "a"}\r\n{"prompt": "b\\u2028c"}\r\n')
    assert [prompt.text for prompt in read(path)] == ["a", "b\u2028c"]


def test_parquet_gives_the_same_prompts_as_json_lines(tmp_path: Path) -> None:
    rows = [
        {"prompt": [{"role": "user", "content": "hi"}], "answer": 5, "id": "x", "level": 1.5, "tags": ["a"]},
        {"prompt": [{"role": "user", "content": "ho"}], "answer": None, "id": None, "level": None, "tags": []},
    ]
    file = tmp_path / "train.parquet"
    pq.write_table(pa.Table.from_pylist(rows), file)
    from_parquet, from_jsonl = read(file), read(write(tmp_path, *rows))
    for one, other in zip(from_parquet, from_jsonl, strict=True):
        assert (one.id, one.text, one.answer, one.row) == (other.id, other.text, other.answer, other.row)
        np.testing.assert_array_equal(one.tokens_P, other.tokens_P)
    assert [prompt.id for prompt in from_parquet] == ["x", "train:2"]


def test_dates_and_decimals_of_parquet_become_plain_values(tmp_path: Path) -> None:
    day = datetime.date(2024, 2, 29)
    file = tmp_path / "train.parquet"
    pq.write_table(pa.table({"prompt": ["p"], "day": [day], "price": [Decimal("1.50")], "all": [[day]]}), file)
    assert read(file)[0].row == {"day": "2024-02-29", "price": 1.5, "all": ["2024-02-29"]}
    assert json.loads(json.dumps(read(file)[0].row)) == read(file)[0].row


def test_chat_messages_go_through_the_template_and_get_no_special_tokens_twice(tmp_path: Path) -> None:
    messages = [{"role": "system", "content": "be brief"}, {"role": "user", "content": "hi"}]
    chat, plain = read(write(tmp_path, {"prompt": messages}, {"prompt": "hi"}), Letters(bos=True))
    assert chat.text == "\x01s:be brief\x01u:hi\x01a:"
    assert chat.tokens_P.tolist() == [ord(char) for char in chat.text]
    assert plain.tokens_P.tolist() == [1, ord("h"), ord("i")]


def test_texts_are_tokenised_together(tmp_path: Path) -> None:
    tokenizer = Letters()
    prompts = read(write(tmp_path, *({"prompt": f"{n}"} for n in range(10_000))), tokenizer)
    assert [prompt.text for prompt in prompts] == [f"{n}" for n in range(10_000)]
    assert all(bytes(prompt.tokens_P.tolist()).decode() == prompt.text for prompt in prompts)
    assert tokenizer.calls == [8192, 10_000 - 8192]


def test_a_prompt_may_fill_the_context_to_the_last_token(tmp_path: Path) -> None:
    assert len(read(write(tmp_path, {"prompt": "p" * 24}))[0].tokens_P) == 24  # 24 + 8 = 32


# Bad files


def test_a_missing_file_names_the_nearest(tmp_path: Path) -> None:
    write(tmp_path, {"prompt": "p"}, name="train.jsonl")
    assert refused(tmp_path / "trian.jsonl") == "trian.jsonl: there is no such file; did you mean 'train.jsonl'?"
    assert refused(tmp_path / "xyz") == "xyz: there is no such file; the folder holds train.jsonl"


def test_a_missing_folder_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"there is no folder .*nowhere; give a path that exists"):
        read(tmp_path / "nowhere" / "train.jsonl")


def test_a_folder_is_no_file(tmp_path: Path) -> None:
    write(tmp_path, {"prompt": "p"})
    with pytest.raises(DataError, match=r"is a folder; name one file in it: train.jsonl"):
        read(tmp_path)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("t.csv", "t.csv: cannot read '.csv'; it must end in .jsonl, .ndjson, .parquet"),
        (
            "t.json",
            "t.json: cannot read '.json'; it must end in .jsonl, .ndjson, .parquet; write one JSON object per line",
        ),
        ("t", "t: cannot read 't'; it must end in .jsonl, .ndjson, .parquet"),
    ],
)
def test_other_formats_are_refused(tmp_path: Path, name: str, message: str) -> None:
    assert refused(write(tmp_path, name=name)) == message


@pytest.mark.parametrize("lines", [[], ["", "  "]])
def test_an_empty_file_is_refused(tmp_path: Path, lines: list[str]) -> None:
    assert refused(write(tmp_path, *lines)) == (
        "train.jsonl: the dataset is empty; it needs at least one row with a 'prompt'"
    )


def test_what_is_no_parquet_file_is_refused(tmp_path: Path) -> None:
    message = refused(write(tmp_path, {"prompt": "p"}, name="train.parquet"))
    assert message.startswith("train.parquet: not a Parquet file that can be read (Parquet magic bytes not found")
    assert message.endswith("; write it anew")


# Bad rows


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"prompt": "p"', "not JSON (Expecting ',' delimiter at column 15): {\"prompt\": \"p\"; "
         "write one JSON object per line"),
        ("[" * 100_000, f"not JSON (nested too deep): {'[' * 57}...; write one JSON object per line"),
        ('["p"]', 'list instead of a JSON object: ["p"]; write one object per line'),
        ({"promt": "p", "answer": 1}, "no column 'prompt'; it has promt, answer; name the column that holds the prompt "
         "with data.prompt; did you mean 'promt'?"),
        ({"x": 1}, "no column 'prompt'; it has x; name the column that holds the prompt with data.prompt"),
        ({}, "no column 'prompt'; it has none; name the column that holds the prompt with data.prompt"),
        ({"prompt": 5}, "'prompt' is 5 (int); it must be a string, or a list of messages "
         '[{"role": "user", "content": "..."}]'),
        ({"prompt": None}, "'prompt' is None (NoneType); it must be a string, or a list of messages "
         '[{"role": "user", "content": "..."}]'),
        ({"prompt": []}, "'prompt' is [] (list); it must be a string, or a list of messages "
         '[{"role": "user", "content": "..."}]'),
        ({"prompt": [{"role": "user", "text": "x"}]}, "message 0 of 'prompt' is {'role': 'user', 'text': 'x'} (dict); "
         "it must be an object with the strings 'role' and 'content'"),
        ({"prompt": ["hi"]}, "message 0 of 'prompt' is 'hi' (str); "
         "it must be an object with the strings 'role' and 'content'"),
        ({"prompt": [{"role": "user", "content": "x"}, {"role": "assistant", "content": "y"}]},
         "the last message of 'prompt' is the assistant's, so the model would see an answer; "
         "end with the user's message and put the answer in a column of its own"),
        ({"prompt": [{"role": "tool", "content": "x"}]},
         "the tokenizer's chat template raised RuntimeError: roles must alternate"),
        ({"prompt": ""}, "the prompt '' (str) has no tokens; write one, or leave the row out"),
        ({"prompt": "p" * 25}, "a prompt of 25 tokens and max_tokens = 8 exceed the context of 32 tokens; "
         "set max_tokens to at most 7, shorten the prompt, or leave the row out"),
        ({"prompt": "p" * 40}, "a prompt of 40 tokens and max_tokens = 8 exceed the context of 32 tokens; "
         "shorten the prompt, or leave the row out"),
        ({"prompt": "p", "answer": True}, "'answer' is True (bool); it must be a string or a finite number, "
         "or null where there is none"),
        ({"prompt": "p", "answer": ["5"]}, "'answer' is ['5'] (list); it must be a string or a finite number, "
         "or null where there is none"),
        ('{"prompt": "p", "answer": NaN}', "'answer' is nan (float); it must be a string or a finite number, "
         "or null where there is none"),
        ({"prompt": "p", "id": 1.5}, "'id' is 1.5 (float); it must be a string or a whole number"),
    ],
)  # fmt: skip
def test_a_bad_row_is_named_by_line_value_and_way_out(tmp_path: Path, line: Any, message: str) -> None:
    assert refused(write(tmp_path, {"prompt": "p"}, "", line)) == f"train.jsonl, line 3: {message}"


def test_chat_messages_need_a_chat_template(tmp_path: Path) -> None:
    path = write(tmp_path, {"prompt": [{"role": "user", "content": "hi"}]})
    assert refused(path, Letters(chat_template=None)) == (
        "train.jsonl, line 1: 'prompt' holds chat messages, but the model's tokenizer has no chat template; use a chat "
        "model, add chat_template.jinja to the model's folder, or write the prompts as strings"
    )


def test_bytes_that_are_not_utf8_are_named(tmp_path: Path) -> None:
    path = tmp_path / "train.jsonl"
    path.write_bytes(b'{"prompt": "\xff"}\n')
    assert refused(path) == "train.jsonl, line 1: not UTF-8 (invalid start byte at byte 12); save the file as UTF-8"


def test_bytes_in_a_parquet_column_are_refused_unless_left_out(tmp_path: Path) -> None:
    file = tmp_path / "train.parquet"
    pq.write_table(pa.table({"prompt": ["p"], "image": [[{"bytes": b"\x00"}]], "level": [1]}), file)
    assert refused(file) == (
        "train.parquet, row 1: column 'image' holds bytes, which JSON has no word for; "
        "leave it out by naming the columns to keep with data.columns"
    )
    assert read(file, columns=("level",))[0].row == {"level": 1}


def test_several_bad_rows_come_in_one_message_with_their_number(tmp_path: Path) -> None:
    message = refused(write(tmp_path, {"prompt": "p"}, *({"prompt": n} for n in range(7)), "["))
    lines = message.split("\n")
    assert lines[0] == "train.jsonl: 8 bad lines"
    assert [line.split(":")[0] for line in lines[1:-1]] == [f"  line {n}" for n in (2, 3, 4, 5, 6)]
    assert lines[-1] == "  ... and 3 more"


def test_several_long_prompts_come_in_one_message(tmp_path: Path) -> None:
    message = refused(write(tmp_path, {"prompt": "p" * 40}, {"prompt": "p"}, {"prompt": "p" * 30}))
    assert message.startswith("train.jsonl: 2 bad lines\n  line 1: a prompt of 40 tokens")
    assert "\n  line 3: a prompt of 30 tokens" in message


def test_repeated_ids_are_refused(tmp_path: Path) -> None:
    rows = [{"prompt": "p", "id": name} for name in ("a", "b", "a", "b", "c", "a")]
    assert refused(write(tmp_path, *rows)) == (
        "train.jsonl: the column 'id' repeats 2 of its values: 'a' stands in rows 1, 3, 6; "
        "make them unique, or set data.id to a column that is"
    )


def test_an_id_may_not_be_another_rows_position(tmp_path: Path) -> None:
    assert "'train:2' stands in rows 1, 2" in refused(
        write(tmp_path, {"prompt": "p", "id": "train:2"}, {"prompt": "q"})
    )


def test_a_column_to_keep_that_no_row_has_is_refused(tmp_path: Path) -> None:
    path = write(tmp_path, {"prompt": "p", "level": 1})
    assert refused(path, columns=("levle",)) == (
        "train.jsonl: data.columns names 'levle', which no row has; leave it out, or correct it"
    )


def test_unknown_keys_of_the_configuration_name_the_nearest() -> None:
    with pytest.raises(ConfigError, match=r"run\.toml: .*unknown key 'heldout'; did you mean 'held_out'\?"):
        DataConfig.parse({"train": "t.jsonl", "heldout": "h.jsonl"}, source="run.toml")


# What verifiers may ask for


def test_columns_are_those_that_every_row_has(tmp_path: Path) -> None:
    both = read(write(tmp_path, {"prompt": "p", "answer": 1, "a": 1, "b": 2}, {"prompt": "q", "answer": 2, "b": None}))
    assert columns(both) == {"answer", "b"}
    assert columns(both[:1]) == {"answer", "a", "b"}
    assert columns(read(write(tmp_path, {"prompt": "p", "answer": 1}, {"prompt": "q"}))) == set()
    assert columns([]) == set()


def test_words_that_the_data_supply_are_accepted(tmp_path: Path) -> None:
    prompts = read(write(tmp_path, {"prompt": "p", "answer": 1, "level": 3}))
    words = ["text", "answer", "level", "prompt", "tokens_T", "finish_reason", "row"]
    require(prompts, words, whose="verifier exact", source="train.jsonl")


@pytest.mark.parametrize(
    ("rows", "word", "message"),
    [
        (
            [{"prompt": "p"}, {"prompt": "q"}],
            "answer",
            "verifier exact asks for 'answer', which no row of train.jsonl has; it has no further columns, and every "
            "rollout supplies finish_reason, prompt, row, text, tokens_T; name its column with data.answer",
        ),
        (
            [{"prompt": "p", "answer": "1"}],
            "anwser",
            "verifier exact asks for 'anwser', which no row of train.jsonl has; it has answer, and every rollout "
            "supplies finish_reason, prompt, row, text, tokens_T; add the column, or rename the word; "
            "did you mean 'answer'?",
        ),
        (
            [{"prompt": "p", "answer": "1"}, {"prompt": "q"}, {"prompt": "r"}],
            "answer",
            "verifier exact asks for 'answer', which 2 of 3 rows of train.jsonl lack (first: train:2); "
            "fill it in, or leave these rows out",
        ),
        (
            [{"prompt": "p", "level": 1}, {"prompt": "q"}],
            "level",
            "verifier exact asks for 'level', which 1 of 2 rows of train.jsonl lack (first: train:2); "
            "fill it in, or leave these rows out",
        ),
    ],
)
def test_a_word_that_the_data_lack_is_refused(
    tmp_path: Path, rows: list[dict[str, Any]], word: str, message: str
) -> None:
    prompts = read(write(tmp_path, *rows))
    with pytest.raises(DataError) as caught:
        require(prompts, ["text", word], whose="verifier exact", source="train.jsonl")
    assert str(caught.value) == message


# The catalogue


def test_the_catalogue_lists_what_it_holds() -> None:
    assert datasets.__all__ == ["arithmetic", "jsonl", "parquet", "sorting"]
    assert all(callable(getattr(datasets, name)) for name in datasets.__all__)


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=5,
)


@given(rows=st.lists(st.dictionaries(st.text(), VALUES, max_size=4), max_size=5))
def test_json_lines_are_read_as_they_were_written(
    rows: list[dict[str, Any]], tmp_path_factory: pytest.TempPathFactory
) -> None:
    path = write(tmp_path_factory.mktemp("rows"), *rows)
    assert list(jsonl(path)) == list(enumerate(rows, 1))


def test_sorting_gives_every_prompt_once_with_its_digits_in_order() -> None:
    rows = list(sorting(seed=0, digits=2))
    assert sorted(row["prompt"] for row in rows) == [f"sort {n:02d}=" for n in range(100)]
    assert all(list(row["answer"]) == sorted(row["prompt"][5:-1]) for row in rows)


def test_arithmetic_gives_every_sum_and_every_difference_that_is_not_negative_once() -> None:
    rows = list(arithmetic(seed=0, largest=9))
    assert len({row["prompt"] for row in rows}) == len(rows) == 100 + 55
    for row in rows:
        a, operator, b = int(row["prompt"][:2]), row["prompt"][2], int(row["prompt"][3:5])
        assert row["answer"] == f"{a + b if operator == '+' else a - b:02d}"


def test_arithmetic_keeps_to_the_signs_it_was_given() -> None:
    sums = list(arithmetic(seed=0, largest=9, signs="+"))
    assert len(sums) == 100
    assert all("+" in row["prompt"] for row in sums)
    assert len(list(arithmetic(seed=0, largest=9, signs="-"))) == 55


@pytest.mark.parametrize("task", [sorting, arithmetic])
def test_a_seed_fixes_a_generated_task(task: Any) -> None:
    first, again, other = ([row["prompt"] for row, _ in zip(task(seed=s), range(50), strict=False)] for s in (1, 1, 2))
    assert first == again != other


@pytest.mark.parametrize(
    ("task", "options", "message"),
    [
        (sorting, {"digits": 0}, "sorting: digits=0; choose 1 to 9"),
        (arithmetic, {"largest": 50}, "arithmetic: largest=50; choose 1 to 49"),
        (arithmetic, {"signs": "x"}, "arithmetic: signs='x'; choose"),
    ],
)
def test_sizes_that_a_task_cannot_have_are_refused(task: Any, options: dict[str, int], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        next(task(seed=0, **options))
