"""What the commands of `millrace` that are about catalogues do. They import no more than they show."""

import shutil
import sys
from argparse import Namespace
from importlib import import_module
from pathlib import Path

from millrace.cluster import catalogues


def list(given: Namespace) -> None:
    """What there is to choose from."""
    columns = shutil.get_terminal_size().columns if sys.stdout.isatty() else None
    chosen = catalogues.PLACES if given.catalogue is None else [given.catalogue]
    for text in catalogues.listed(chosen, columns=columns):
        print(text)


def show(given: Namespace) -> None:
    """A recipe, composed, or a method's documentation."""
    if given.name.endswith(".toml"):
        path = Path(given.name).expanduser()
        text = path.read_text(encoding="utf-8") if path.is_file() else ""
        print(import_module("millrace.cluster.composed").described(given.name, text))
        return
    entry, *others = catalogues.find(given.name)
    if entry.catalogue == catalogues.RECIPES:
        print(import_module("millrace.cluster.composed").described(entry.name, entry.text))
    else:
        print(f"{entry.catalogue}.{entry.call}\n\n{entry.text}")
    for other in others:
        print(f"\nmillrace show {other.catalogue}.{other.name} shows another of that name")
