"""`millrace`: a thin command line over `Job` and the catalogues.

Commands are imported when they are called, and torch only by those that need it.
"""

import argparse
import os
import signal
import sys
import tomllib
from collections.abc import Sequence
from importlib import import_module
from typing import Any

from millrace import __version__
from millrace.core.errors import ConfigError, MillraceError

ID = "a run's directory, or its name below ./runs"


def parser() -> argparse.ArgumentParser:
    """The whole command line."""
    top = argparse.ArgumentParser(prog="millrace", description="Asynchronous, off-policy RL post-training on Ray.")
    top.add_argument("--version", action="version", version=f"millrace {__version__}")
    commands = top.add_subparsers(dest="command", required=True, metavar="COMMAND")
    _train(commands.add_parser("train", help="train a model as a TOML file says, and watch it"))
    jobs = commands.add_parser("jobs", help="the runs below a directory, and how they are doing")
    jobs.add_argument("runs", nargs="?", default="runs", metavar="DIRECTORY", help="of run directories (runs)")
    status = commands.add_parser("status", help="what a run does right now")
    status.add_argument("id", metavar="RUN", help=ID)
    status.add_argument("--json", action="store_true", help="as in status.json")
    attach = commands.add_parser("attach", help="watch a run until it ends; Ctrl-C leaves it alone")
    attach.add_argument("id", metavar="RUN", help=ID)
    _plain(attach)
    stop = commands.add_parser("stop", help="end a run after the step under way, with a checkpoint")
    stop.add_argument("id", metavar="RUN", help=ID)
    stop.add_argument("--now", action="store_true", help="at once, without a checkpoint")
    listing = commands.add_parser("list", help="what recipes and runs may name: a line each")
    listing.add_argument("catalogue", nargs="?", metavar="CATALOGUE", help="this one alone, as surrogates")
    show = commands.add_parser("show", help="a recipe's formula with its numbers, or a method's documentation")
    show.add_argument("name", metavar="NAME", help="as grpo, clip, surrogates.clip, or the path of a recipe")
    report = commands.add_parser("report", help="write report.html of a run")
    report.add_argument("id", metavar="RUN", help=ID)
    rollouts = commands.add_parser("rollouts", help="write rollouts.parquet of a run that was stopped or failed")
    rollouts.add_argument("id", metavar="RUN", help=ID)
    return top


def _train(train: argparse.ArgumentParser) -> None:
    train.add_argument("run", nargs="?", metavar="RUN.toml", help="the run's configuration")
    train.add_argument("settings", nargs="*", metavar="key=value", help="instead of the file's, as loop.steps=20")
    train.add_argument("--resume", metavar="RUN", help="continue this run from its last commit")
    train.add_argument("--dry-run", action="store_true", help="check everything, say what would run, and stop")
    train.add_argument(
        "--address", help="of a running Ray cluster ('auto': this machine's); without it one starts here"
    )
    train.add_argument("--local", action="store_true", help="everything in one process, without Ray")
    train.add_argument("--detach", action="store_true", help="return when it has started; it goes on by itself")
    _plain(train)


def _plain(command: argparse.ArgumentParser) -> None:
    command.add_argument("--plain", action="store_true", help="lines instead of the live view, in a terminal, too")


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
        if hasattr(given, "settings"):
            given.settings = [setting(text) for text in given.settings]
        module = "listing" if given.command in ("list", "show") else "commands"
        getattr(import_module(f"millrace.cluster.{module}"), given.command)(given)
    except ConfigError as caught:
        print(f"millrace: {caught}", file=sys.stderr)
        sys.exit(2)
    except MillraceError as caught:
        print(f"millrace: {caught}", file=sys.stderr)
        sys.exit(1)
    except KeyboardInterrupt:
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # a second one, on the way out, changes nothing
        sys.exit(130)
    except BrokenPipeError:  # `millrace list | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
