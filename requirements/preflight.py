"""Say in two lines what this machine lacks for the CPU environment, before anything is downloaded.

Runs on the bare system Python; standard library only.
"""

import importlib.util
import platform
import re
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
LINKS = ("actors", "cluster", "core", "learner", "recipes", "rewards")
NEEDED_BYTES = 5 * 2**30


def broken_link() -> str | None:
    """The first of the package's links that was unpacked as a text file."""
    return next((name for name in LINKS if not (ROOT / "millrace" / name).is_dir()), None)


def torch_pin() -> str:
    found = re.search(r"^torch==\S+", (ROOT / "requirements" / "cpu.txt").read_text(), re.M)
    assert found, "requirements/cpu.txt pins torch"
    return found.group()


def torch_is_there(pin: str) -> bool:
    """Whether pip finds PyTorch's CPU wheel, which is not on the public package index."""
    command = [sys.executable, "-m", "pip", "install", "--dry-run", "--ignore-installed", "--no-deps", "-q", pin]
    return subprocess.run(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL).returncode == 0


def complaint() -> tuple[str, str] | None:
    """What is missing, and the way out; None when nothing is."""
    machine = f"{platform.system()} {platform.machine()}, Python {platform.python_version()}"
    if platform.system() != "Linux" or platform.machine() not in ("x86_64", "AMD64"):
        return (
            f"millrace: the CPU environment is locked for x86-64 Linux; this is {machine}.",
            "Use an x86-64 Linux machine or container.",
        )
    if sys.version_info[:2] != (3, 11):
        return (
            f"millrace: the CPU environment is locked for Python 3.11; this is {machine}.",
            "Install Python 3.11 and run `make PYTHON=python3.11 ...`.",
        )
    if link := broken_link():
        return (
            f"millrace: millrace/{link} is not a link to {link}/, in a checkout made without symbolic links.",
            "Clone again with `git clone -c core.symlinks=true`, not from a zip file.",
        )
    if importlib.util.find_spec("ensurepip") is None or importlib.util.find_spec("venv") is None:
        return (
            f"millrace: this Python ({sys.executable}) cannot make virtual environments.",
            "Install its venv module (Debian and Ubuntu: `apt-get install python3.11-venv`).",
        )
    free = shutil.disk_usage(ROOT).free
    if free < NEEDED_BYTES:
        return (
            f"millrace: the environment needs {NEEDED_BYTES / 2**30:.0f} GiB of disk, {free / 2**30:.1f} are free.",
            "Free some space, or clone to another disk.",
        )
    pin = torch_pin()
    if not torch_is_there(pin):
        return (
            f"millrace: pip cannot find {pin}, which is not on the public package index.",
            "Point pip at PyTorch's CPU wheel index by PIP_EXTRA_INDEX_URL (or a folder, PIP_FIND_LINKS), and repeat.",
        )
    return None


if __name__ == "__main__":
    if missing := complaint():
        sys.exit("\n".join(missing))
