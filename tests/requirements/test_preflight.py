"""What is missing is said in two lines, before anything is downloaded."""

import importlib.util
import shutil
import sys
from collections import namedtuple
from pathlib import Path
from types import ModuleType

import pytest

FILE = Path(__file__).resolve().parents[2] / "requirements" / "preflight.py"


@pytest.fixture
def preflight() -> ModuleType:
    spec = importlib.util.spec_from_file_location("preflight", FILE)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_another_machine_is_named(preflight: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(preflight.platform, "system", lambda: "Darwin")
    cause, remedy = preflight.complaint()
    assert "locked for x86-64 Linux; this is Darwin" in cause
    assert "x86-64 Linux" in remedy


def test_another_python_is_named(preflight: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    version = namedtuple("version", "major minor micro")
    monkeypatch.setattr(preflight.sys, "version_info", version(3, 13, 0))
    cause, remedy = preflight.complaint()
    assert "Python 3.11" in cause
    assert "make PYTHON=python3.11" in remedy


def test_a_full_disk_is_named(preflight: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(preflight.shutil, "disk_usage", lambda path: usage(100, 99, 2**30))
    assert "needs 5 GiB of disk, 1.0 are free" in preflight.complaint()[0]


def test_links_unpacked_as_text_are_named(
    preflight: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    shutil.copytree(FILE.parent, tmp_path / "requirements")
    (tmp_path / "millrace").mkdir()
    (tmp_path / "millrace" / "actors").write_text("../actors")
    monkeypatch.setattr(preflight, "ROOT", tmp_path)
    cause, remedy = preflight.complaint()
    assert "millrace/actors is not a link" in cause
    assert "core.symlinks=true" in remedy


def test_a_missing_torch_wheel_is_named(preflight: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(preflight, "torch_is_there", lambda pin: False)
    cause, remedy = preflight.complaint()
    assert "cannot find torch==" in cause and "+cpu" in cause
    assert "PIP_EXTRA_INDEX_URL" in remedy


def test_pip_is_asked_for_the_pinned_wheel(preflight: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    class Answer:
        returncode = 1

    monkeypatch.setattr(preflight.subprocess, "run", lambda command, **_: asked.append(command) or Answer())
    assert not preflight.torch_is_there(preflight.torch_pin())
    assert asked[0][:3] == [sys.executable, "-m", "pip"]
    assert asked[0][-1].startswith("torch==2.13.0")
