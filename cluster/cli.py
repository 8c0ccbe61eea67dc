"""`millrace`: a thin command line over the job functions.

Commands are imported when they are called, so that `--help` does not wait for torch.
"""

import argparse
import json
import os
import sys
import tomllib
from collections.abc import Mapping, MutableMapping, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

from millrace import __version__
from millrace.core.errors import ConfigError, MillraceError


def parser() -> argparse.ArgumentParser:
    """The whole command line."""
    top = argparse.ArgumentParser(prog="millrace", description="Asynchronous, off-policy RL post-training on Ray.")
    top.add_argument("--version", action="version", version=f"millrace {__version__}")
    commands = top.add_subparsers(dest="command", required=True, metavar="COMMAND")
    train = commands.add_parser("train", help="train a model as a TOML file says")
    train.add_argument("run", nargs="?", metavar="RUN.toml", help="the run's configuration")
    train.add_argument("settings", nargs="*", metavar="key=value", help="instead of the file's, as loop.steps=20")
    train.add_argument("--resume", metavar="DIRECTORY", help="continue the run in this directory from its last commit")
    train.add_argument("--dry-run", action="store_true", help="check everything, say what would run, and stop")
    train.add_argument(
        "--address", help="of a running Ray cluster ('auto': this machine's); without it one starts here"
    )
    train.add_argument("--local", action="store_true", help="everything in this process, without Ray")
    return top


def setting(text: str) -> tuple[list[str], Any]:
    """One `key=value`; the value is TOML, or else a string.

    >>> setting("loop.steps=20"), setting("recipe=grpo")
    ((['loop', 'steps'], 20), (['recipe'], 'grpo'))
    """
    key, equals, value = text.partition("=")
    if not equals or not key:
        raise ConfigError(f"'{text}' is no setting: write key=value, as loop.steps=20")
    try:
        return key.split("."), tomllib.loads(f"value = {value}")["value"]
    except tomllib.TOMLDecodeError:
        return key.split("."), value


def main(arguments: Sequence[str] | None = None) -> None:
    """Run a command; what goes wrong on purpose is said without a traceback.

    Exit status: 0 done, 1 failed, 2 the command or configuration is wrong, 130 interrupted.
    """
    given, others = parser().parse_known_args(arguments)
    for text in others:  # argparse takes no positional argument behind an option that follows another one
        if text.startswith("-") or not hasattr(given, "settings"):
            parser().error(f"unrecognized argument: {text}")
        given.settings.append(text)
    try:
        _train(given)
    except ConfigError as caught:
        print(f"millrace: {caught}", file=sys.stderr)
        sys.exit(2)
    except MillraceError as caught:
        print(f"millrace: {caught}", file=sys.stderr)
        sys.exit(1)
    except KeyboardInterrupt:
        sys.exit(130)


def _train(given: argparse.Namespace) -> None:
    if given.run is None and given.resume is None:
        raise ConfigError("give either RUN.toml, or --resume DIRECTORY")
    if given.resume and (given.run or given.settings):
        raise ConfigError(
            "a resumed run keeps its configuration: leave out " + " ".join(filter(None, (given.run, *given.settings)))
        )
    if given.address:
        show_token(os.environ, Path.home() / ".ray" / "auth_token")
    configs = import_module("millrace.cluster.config")
    jobs = import_module("millrace.cluster.jobs")
    if given.resume:
        config = configs.of_directory(given.resume)
        if config.directory.resolve() != Path(given.resume).expanduser().resolve():
            raise ConfigError(f"{given.resume} was moved: its config.toml says {config.directory}; move it back there")
    else:
        config = configs.load(given.run, settings=[setting(text) for text in given.settings])
    if given.dry_run:
        print(jobs.dry_run(config))
        return
    found = jobs.train(config, address=given.address, local=given.local, resume=bool(given.resume))
    print(summary(found))


def show_token(environment: MutableMapping[str, str], file: Path) -> None:
    """Ray's clusters ask for a token unless told not to, and Ray reads the mode once, when it is imported."""
    if file.is_file() or {"RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"} & environment.keys():
        environment.setdefault("RAY_AUTH_MODE", "token")


def _shown(mean: float | None) -> str:
    return "no score" if mean is None else f"{mean:.3f}"


def summary(found: Mapping[str, Any]) -> str:
    """The end of a run, for a person.

    >>> print(summary({"ended": "finished", "steps": 2, "seconds": 61.0, "directory": "runs/x"}))
    finished after 2 steps in 61 s
    runs/x/result.json
    """
    lines = [f"{found['ended']} after {found['steps']} steps in {found['seconds']:.0f} s"]
    for name, title in (("reward", "training reward"), ("held_out", "held-out reward")):
        if pair := found.get(name):
            first, last = (
                value["mean"] if isinstance(value, Mapping) else value for value in (pair["first"], pair["last"])
            )
            lines.append(f"{title} {_shown(first)} -> {_shown(last)}")
    if waste := found.get("waste"):
        lines.append("tokens " + json.dumps({row: many for row, many in waste.items() if many or row == "unaccounted"}))
    lines.append(f"{found['directory']}/result.json")
    return "\n".join(lines)
