"""Which checkpoints stay."""

import json
from pathlib import Path

import pytest

from millrace.learner import retention
from millrace.learner.retention import collect, retain, surviving


def directories(root: Path, rewards: dict[str, float]) -> list[tuple[str, float]]:
    for name, reward in rewards.items():
        (root / name / "learner").mkdir(parents=True)
        (root / name / "learner" / "state.json").write_text(json.dumps({"reward": reward}))
    return [(str(root / name), reward) for name, reward in rewards.items()]


def test_the_last_n_and_the_best_stay(tmp_path):
    committed = directories(tmp_path, {"step_1.1": 0.2, "step_2.1": 0.9, "step_3.1": 0.1, "step_4.1": 0.3})
    (tmp_path / "step_9.1").mkdir()  # an orphan
    (tmp_path / "step_5.1.partial").mkdir()
    left = retain(str(tmp_path), committed, keep=1)
    assert [Path(path).name for path, _ in left] == ["step_2.1", "step_4.1"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step_2.1", "step_4.1"]


def test_a_resumed_run_knows_the_checkpoints_before_it(tmp_path):
    directories(tmp_path, {"step_2.1": 0.5, "step_10.1": 0.1, "step_4.2": 0.3, "step_12.1": 0.9})
    (tmp_path / "step_3.1.partial").mkdir()
    found = surviving(str(tmp_path), str(tmp_path / "step_10.1"))
    assert [(Path(path).name, reward) for path, reward in found] == [
        ("step_2.1", 0.5),
        ("step_4.2", 0.3),
        ("step_10.1", 0.1),
    ]


def test_what_the_ledger_can_fall_back_to_stays(tmp_path):
    committed = directories(tmp_path, {"step_1.1": 0.2, "step_2.1": 0.1, "step_3.1": 0.1, "step_4.1": 0.3})
    left = retain(str(tmp_path), committed, keep=1, needed=[2, 4])
    assert [Path(path).name for path, _ in left] == ["step_2.1", "step_4.1"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step_2.1", "step_4.1"]


def test_what_a_later_learner_writes_is_left_alone(tmp_path):
    directories(tmp_path, {"step_1.1": 0.2, "step_2.3": 0.2})
    (tmp_path / "step_3.1.partial").mkdir()
    (tmp_path / "step_3.3.partial").mkdir()
    collect(str(tmp_path), [], epoch=2)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step_2.3", "step_3.3.partial"]


def test_an_earlier_checkpoint_without_a_state_that_can_be_read_is_nobodys_best(tmp_path):
    directories(tmp_path, {"step_1.1": 0.5, "step_2.1": 0.1})
    (tmp_path / "step_1.1" / "learner" / "state.json").write_text("{")
    found = surviving(str(tmp_path), str(tmp_path / "step_2.1"))
    assert found == [(str(tmp_path / "step_1.1"), float("-inf")), (str(tmp_path / "step_2.1"), 0.1)]


def test_copies_that_a_person_keeps_are_nobodys_and_stay(tmp_path):
    copies = ["step_1.1.bak", "step_2.1 (copy)", "step_x.1", "step_1.1.partial.old"]
    committed = directories(tmp_path, {"step_1.1": 0.1, "step_2.1": 0.2} | dict.fromkeys(copies, 0.9))[:2]
    assert surviving(str(tmp_path), committed[1][0]) == committed
    retain(str(tmp_path), committed, keep=1)
    assert {path.name for path in tmp_path.iterdir()} == {"step_2.1", *copies}


def test_a_checkpoint_that_is_half_deleted_has_no_name_of_a_whole_one(tmp_path, monkeypatch):
    directories(tmp_path, {"step_1.1": 0.2, "step_1.1.partial": 0.1})

    def killed(path):
        if not path.name.endswith(".partial") or (path / "learner" / "state.json").read_text() == '{"reward": 0.2}':
            (path / "learner" / "state.json").unlink()
            raise KeyboardInterrupt
        remove(path)

    remove = retention.shutil.rmtree
    monkeypatch.setattr(retention.shutil, "rmtree", killed)
    with pytest.raises(KeyboardInterrupt):
        collect(str(tmp_path), [])
    monkeypatch.undo()
    assert [path.name for path in tmp_path.iterdir()] == ["step_1.1.partial"]
    collect(str(tmp_path), [])
    assert not list(tmp_path.iterdir())
