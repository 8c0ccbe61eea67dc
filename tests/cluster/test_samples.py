"""rollouts.jsonl: the text of every token, and a file that stays small and belongs to the surviving history."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from millrace.cluster.samples import RolloutLog, line, texts
from millrace.core.types import GroupId, Verdict, VerdictKind, VersionRun
from millrace.learner.samples import SampledRollout


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """A token per byte, two merges, and one special token, as the tokenizers of GPT-2, Llama 3 and Qwen are made."""
    pieces = ["<eos>", *sorted(pre_tokenizers.ByteLevel.alphabet()), "th", "the", "Ġthe"]
    core = Tokenizer(
        models.BPE(vocab={piece: at for at, piece in enumerate(pieces)}, merges=[("t", "h"), ("th", "e"), ("Ġ", "the")])
    )
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=core, eos_token="<eos>")


def word_tokenizer() -> PreTrainedTokenizerFast:
    """Words with their leading space as ▁, and bytes for what is not among them, as those of Llama 2 and Gemma."""
    pieces = ["<unk>", "<eos>", "▁the", "▁sum", "s", "▁", *(f"<0x{byte:02X}>" for byte in range(256))]
    core = Tokenizer(
        models.BPE(
            vocab={piece: at for at, piece in enumerate(pieces)}, merges=[], unk_token="<unk>", byte_fallback=True
        )
    )
    core.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return PreTrainedTokenizerFast(tokenizer_object=core, eos_token="<eos>", unk_token="<unk>")


BYTES, WORDS = byte_tokenizer(), word_tokenizer()


def test_a_character_of_several_tokens_stands_at_its_last() -> None:
    ids = np.array(BYTES.encode("the the 😀<eos>"), np.int32)
    assert texts(ids, BYTES) == ["the", " the", " ", "", "", "", "😀", "<eos>"]


def test_a_character_cut_off_at_the_end_is_shown_as_such() -> None:
    ids = np.array(BYTES.encode("a😀")[:-1], np.int32)
    assert texts(ids, BYTES) == ["a", "", "", "\ufffd"]


def test_leading_spaces_belong_to_their_words() -> None:
    ids = WORDS.convert_tokens_to_ids(["▁the", "▁sum", "s", "▁", "<0xE2>", "<0x9C>", "<0x93>", "<eos>"])
    assert texts(np.array(ids, np.int32), WORDS) == ["the", " sum", "s", " ", "", "", "✓", "<eos>"]


@settings(deadline=None, max_examples=200)
@given(ids=st.lists(st.integers(0, len(BYTES) - 1), max_size=40))
def test_the_texts_joined_are_the_text_whatever_the_model_sampled(ids: list[int]) -> None:
    """An untrained model samples bytes that are no characters at all."""
    found = texts(np.array(ids, np.int32), BYTES)
    assert len(found) == len(ids)
    assert "".join(found) == BYTES.decode(ids, clean_up_tokenization_spaces=False)


@settings(deadline=None, max_examples=50)
@given(text=st.text(max_size=30))
def test_the_texts_joined_are_any_text(text: str) -> None:
    ids = np.array(BYTES.encode(text.replace("<eos>", "")), np.int32)
    assert "".join(texts(ids, BYTES)) == text.replace("<eos>", "")


def sample(step: int, *, length: int = 3, **changes: Any) -> SampledRollout:
    facts: dict[str, Any] = {
        "step": step,
        "group": GroupId(step, 0),
        "member": 2,
        "prompt_id": f"train:{step}",
        "prompt": "1+1=",
        "tokens_T": np.array(BYTES.encode("x" * length), np.int32),
        "sampled_T": np.ones(length, bool),
        "behaviour_logprob_T": np.full(length, -0.1, np.float32),
        "length": length,
        "cut": None,
        "versions": (VersionRun(step - 1, 0, length),),
        "lag": (1,),
        "finish_reason": "stop",
        "reward": 0.5,
        "advantage": None,
        "verdict": Verdict(kind=VerdictKind.SCORED, score=1.0, components={"format": 0.5}, feedback="nearly"),
    }
    return SampledRollout(**(facts | changes))


def test_a_line_holds_what_the_report_needs() -> None:
    found = line(
        sample(
            3,
            sampled_T=np.array([True, False, True]),
            behaviour_logprob_T=np.array([-0.1234567, 0.0, -3e-7], np.float32),
            versions=(VersionRun(1, 0, 2), VersionRun(2, 2, 3)),
            lag=(2, 1),
            advantage=float("nan"),
            tokens_T=np.array(BYTES.encode("abc"), np.int32),
            length=103,
            cut=(1, 101),
        ),
        BYTES,
    )
    assert found == {
        "step": 3,
        "group": "draw 3 attempt 0",
        "member": 2,
        "prompt_id": "train:3",
        "prompt": "1+1=",
        "reward": 0.5,
        "advantage": None,
        "lag": 2,
        "finish_reason": "stop",
        "length": 103,
        "cut": [1, 101],
        "tokens": ["a", "b", "c"],
        "logprobs": [-0.123457, 0.0, -3e-7],
        "given": [1],
        "versions": [[1, 0, 2], [2, 2, 3]],
        "lags": [2, 1],
        "verdict": {"kind": "scored", "score": 1.0, "components": {"format": 0.5}, "feedback": "nearly"},
    }


def steps(directory: Path) -> list[int]:
    return [json.loads(text)["step"] for text in (directory / "rollouts.jsonl").read_text().splitlines()]


def test_lines_are_appended_and_the_tokenizer_is_opened_once_and_only_for_samples(tmp_path: Path) -> None:
    opened = []
    log = RolloutLog(tmp_path, lambda: opened.append(1) or BYTES)  # type: ignore[func-returns-value]
    log.write([])
    assert opened == [] and not (tmp_path / "rollouts.jsonl").exists()
    log.write([sample(1), sample(1)])
    log.write([sample(2)])
    assert steps(tmp_path) == [1, 1, 2] and opened == [1]


def test_a_rewound_run_forgets_what_it_makes_again(tmp_path: Path) -> None:
    RolloutLog(tmp_path, lambda: BYTES).rewind(3)  # nothing was sampled yet
    RolloutLog(tmp_path, lambda: BYTES).write([sample(step) for step in range(1, 6)])
    with (tmp_path / "rollouts.jsonl").open("a") as file:
        file.write('{"step": 1, "torn')
    log = RolloutLog(tmp_path, lambda: BYTES)
    log.rewind(3)
    log.write([sample(4)])
    assert steps(tmp_path) == [1, 2, 3, 4]


def test_a_long_run_stays_within_its_bound_and_is_covered_from_end_to_end(tmp_path: Path) -> None:
    max_bytes = 20_000
    log = RolloutLog(tmp_path, lambda: BYTES, max_bytes=max_bytes)
    sizes = []
    for step in range(1, 501):
        log.write([sample(step), sample(step)])
        sizes.append((tmp_path / "rollouts.jsonl").stat().st_size)
    assert max(sizes) <= max_bytes and max(sizes) > max_bytes / 2
    kept = sorted(set(steps(tmp_path)))
    stride = kept[0]
    assert kept == list(range(stride, 501, stride)), "evenly spread, the late steps among them"
    assert stride & (stride - 1) == 0 and 10 < len(kept) < 100


def test_a_resumed_run_thins_on_without_knowing_how_often_it_was_thinned(tmp_path: Path) -> None:
    log = RolloutLog(tmp_path, lambda: BYTES, max_bytes=20_000)
    for step in range(1, 401):
        if step == 200:
            log = RolloutLog(tmp_path, lambda: BYTES, max_bytes=20_000)
            log.rewind(step - 1)
        log.write([sample(step)])
        assert (tmp_path / "rollouts.jsonl").stat().st_size <= 20_000
    kept = steps(tmp_path)
    assert kept == sorted(set(kept)) and max(kept) > 380 and min(kept) < 20


@pytest.mark.parametrize("max_bytes", [1, 300])
def test_a_bound_below_one_line_leaves_an_empty_file(tmp_path: Path, max_bytes: int) -> None:
    log = RolloutLog(tmp_path, lambda: BYTES, max_bytes=max_bytes)
    for step in range(1, 10):
        log.write([sample(step)])
        assert (tmp_path / "rollouts.jsonl").stat().st_size <= max_bytes
