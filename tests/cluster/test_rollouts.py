"""The table of rollouts of a run that was cut off."""

from collections import Counter
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from millrace.cluster import config as configs
from millrace.cluster import rollouts
from millrace.cluster.cli import main
from millrace.core.errors import ConfigError
from tests.cluster.test_resume import cut, go_on


def test_a_run_that_was_cut_off_has_its_rollouts(make_run: Any, capsys: pytest.CaptureFixture[str]) -> None:
    config = make_run(loop={"steps": 10}, learner={"checkpoint_every": 3})
    cut(config, after=5, orderly=False)
    main(["rollouts", str(config.directory)])
    table = pq.read_table(config.directory / "rollouts.parquet")
    assert f"rollouts.parquet: {len(table)} rollouts" in capsys.readouterr().out
    states = Counter(table["state"].to_pylist())
    assert states["committed"] >= 3 * 16 * 8
    assert len(table) % 8 == 0
    assert all(
        len(tokens) == len(logprobs)
        for tokens, logprobs in zip(
            *map(list, (table["tokens"].to_pylist(), table["behaviour_logprob"].to_pylist())), strict=True
        )
    )
    scored = table.filter(table["state"].combine_chunks().is_valid())
    assert set(scored["verdict"].drop_null().to_pylist()) <= {"scored"}

    found = go_on(config)
    whole = pq.read_table(config.directory / "rollouts.parquet")
    assert Counter(whole["state"].to_pylist())["committed"] == found["samples"] == 10 * 16 * 8


def test_a_run_without_a_ledger_says_so(make_run: Any, tmp_path: Path) -> None:
    config = make_run()
    config.directory.mkdir(parents=True)
    configs.save(config, config.directory / "config.toml")
    with pytest.raises(ConfigError, match=r"has no ledger\.sqlite.*journal\.on_disk"):
        rollouts.write(config.directory)
