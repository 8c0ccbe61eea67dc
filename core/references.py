"""References to code that is not ours: `"package.module:function"` and `"path/to/file.py:function"`.

A file is loaded by its path, under a module name that follows from path and content, so that it needs no
installation, collides with nothing, and is the same in every process.
"""

import importlib
import importlib.util
import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from hashlib import blake2b
from pathlib import Path
from types import ModuleType
from typing import Any

from millrace.core.errors import MillraceError, RecipeError, boundary, nearest


def is_reference(name: str) -> bool:
    """Whether it names code outside the catalogues.

    >>> is_reference("rewards.py:score"), is_reference("clip")
    (True, False)
    """
    return ":" in name


def find_beside(directory: Path) -> None:
    """Let "package.module:function" be found in this directory."""
    if str(directory) not in sys.path:
        sys.path.insert(0, str(directory))


def absolute(reference: str, root: Path) -> str:
    """The same reference with its file's path absolute; what is no file reference stays.

    >>> absolute("rewards.py:score", Path("/data")), absolute("package.module:score", Path("/data"))
    ('/data/rewards.py:score', 'package.module:score')
    """
    source, _, attribute = reference.rpartition(":")
    if not source.endswith(".py"):
        return reference
    return f"{(root / Path(source).expanduser()).resolve()}:{attribute}"


def load_reference(reference: str, *, slot: str, error: type[MillraceError] = RecipeError) -> Any:
    """The object a reference names. Relative paths start at the working directory.

    Raises:
        error: no such file, module or attribute; or its import failed: file, line and cause.
    """
    source, _, attribute = reference.rpartition(":")
    if not source or not attribute:
        raise error(f'{slot} \'{reference}\': write "package.module:function" or "path/to/file.py:function"')
    if source.endswith(".py"):
        module = _from_file(reference, source, slot, error)
    else:
        module = _from_package(reference, source, slot, error)
    value: Any = module
    for part in attribute.split("."):
        if not hasattr(value, part):
            public = [name for name in vars(module) if not name.startswith("_") and callable(vars(module)[name])]
            close = nearest(part, public) or "."
            raise error(
                f"{slot} '{reference}': {source} has no '{part}'{close} It has {', '.join(public) or 'nothing'}"
            )
        value = getattr(value, part)
    return value


def _from_file(reference: str, source: str, slot: str, error: type[MillraceError]) -> ModuleType:
    path = Path(source).expanduser().resolve()
    if not path.is_file():
        raise error(f"{slot} '{reference}': there is no file {path}; relative paths start at {Path.cwd()}")
    digest = blake2b(str(path).encode() + b"\0" + path.read_bytes(), digest_size=8).hexdigest()
    name = f"millrace_file_{path.stem}_{digest}"
    if name in sys.modules:
        return sys.modules[name]
    # Its neighbours can be imported, after everything installed: a user's cluster.py shadows nothing.
    if str(path.parent) not in sys.path:
        sys.path.append(str(path.parent))
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None and spec.loader is not None, path
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # before it runs: its dataclasses look themselves up
    try:
        with _attributed(reference, str(path), slot, error):
            spec.loader.exec_module(module)
    except MillraceError:
        del sys.modules[name]
        raise
    return module


def _from_package(reference: str, source: str, slot: str, error: type[MillraceError]) -> ModuleType:
    with _attributed(reference, source, slot, error):
        try:
            return importlib.import_module(source)
        except ModuleNotFoundError as missing:
            if missing.name is None or not f"{source}.".startswith(f"{missing.name}."):
                raise  # found; what is missing is something that it imports
            raise error(
                f"{slot} '{reference}': there is no module '{missing.name}' to import. Put its folder on PYTHONPATH,"
                ' or give the file itself: "path/to/file.py:function"'
            ) from None


@contextmanager
def _attributed(reference: str, source: str, slot: str, error: type[MillraceError]) -> Iterator[None]:
    """Whatever an import raises becomes `error`, with file, line and cause."""
    try:
        with boundary(reference, error):
            yield
    except SystemExit as caught:
        raise error(f"{slot} '{reference}' cannot be imported: it calls sys.exit({caught.code!r})") from caught
    except error as caught:
        cause = caught.__cause__
        if cause is None:
            raise
        raise error(
            f"{slot} '{reference}' cannot be imported: {_place(cause, source)}: {type(cause).__name__}: {_text(cause)}"
        ) from cause


def _place(cause: BaseException, source: str) -> str:
    if isinstance(cause, SyntaxError) and cause.filename:
        return f"{cause.filename}:{cause.lineno}"
    frames = [f for f in traceback.extract_tb(cause.__traceback__) if "importlib" not in f.filename]
    frames = [f for f in frames if f.filename != __file__]
    own = [f for f in frames if f.filename == source] or frames
    return f"{own[-1].filename}:{own[-1].lineno}" if own else source


def _text(cause: BaseException) -> str:
    return cause.msg if isinstance(cause, SyntaxError) else str(cause)
