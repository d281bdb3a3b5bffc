"""The embedded texts: documentation of Python's standard library, which every installation brings along."""

import ast
import sysconfig
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from sinkformer_pl.data.source import Source
from sinkformer_pl.data.splitting import stratified_split
from sinkformer_pl.data.texts.base import TextData, Texts, read_utf8
from sinkformer_pl.errors import UserError

AREAS = {
    "concurrency": """
        asyncio concurrent contextvars multiprocessing queue sched selectors subprocess threading _threading_local
    """,
    "debugging": """
        bdb cProfile cgitb doctest logging pdb profile pstats pydoc timeit trace traceback tracemalloc unittest warnings
    """,
    "files": """
        _pyio bz2 dbm filecmp fileinput fnmatch genericpath glob gzip io lzma ntpath os pathlib posixpath shelve shutil
        stat tarfile tempfile zipapp zipfile
    """,
    "formats": """
        base64 configparser csv email html json mailbox mailcap mimetypes netrc pickle pickletools plistlib quopri
        tomllib wave xml
    """,
    "language": """
        _collections_abc abc ast code codeop collections compileall contextlib copy dataclasses dis enum functools
        importlib inspect operator pkgutil py_compile pyclbr runpy symtable tokenize types typing weakref zipimport
    """,
    "networking": """
        asynchat asyncore cgi ftplib http imaplib ipaddress nntplib poplib smtpd smtplib socket socketserver ssl
        telnetlib urllib webbrowser wsgiref xmlrpc
    """,
    "numbers": """
        _pydecimal _pydatetime _strptime bisect calendar colorsys datetime fractions heapq numbers random statistics
        zoneinfo
    """,
}
"""Modules and packages of each class; those that have no place or that some installations leave out are not there."""

_TESTS = {"test", "tests"}
_TEST_FRACTION = 0.2
_FEWEST_TEXTS = 1000


class Docstrings(TextData):
    """Documentation strings of modules, classes and functions, by the area of the library that they come from.

    They are read from the library's source files, without importing them, and depend on the version of Python alone.
    Of equal strings the first is kept. No module has strings in two splits; the test split is always the same.
    Licence: Python Software Foundation License.
    """

    def __init__(self, *, min_words: int = 12, **kwargs: Any) -> None:
        """Check the arguments.

        Args:
            min_words: fewest words of a string, 1 or more.
            **kwargs: what `TextData` takes.

        Raises:
            UserError: an argument out of its range.
        """
        super().__init__(list(AREAS), **kwargs)
        if min_words < 1:
            raise UserError(f"data.min_words is {min_words}: give 1 or more")
        self.min_words = min_words
        self.root = Path(sysconfig.get_paths()["stdlib"])

    def load(self) -> Source[Texts]:
        """Read and divide the strings: about two seconds.

        Raises:
            UserError: the source files are not there.
        """
        found: dict[str, tuple[int, str, str]] = {}
        for target, modules in enumerate(AREAS.values()):
            for file in sorted(file for name in modules.split() for file in _sources(self.root, name)):
                module = ".".join(file.relative_to(self.root).with_suffix("").parts).removesuffix(".__init__")
                for name, text in _docstrings(file):
                    if len(text.split()) >= self.min_words:
                        found.setdefault(text, (target, f"{module}:{name}", module))
        if len(found) < _FEWEST_TEXTS:
            raise UserError(
                f"{self.root}: {len(found)} documentation strings of {self.min_words} words or more, because Python's "
                "source files are not there or data.min_words is high; lower it or use other data"
            )
        targets, names, groups = zip(*found.values(), strict=True)
        texts = Texts(list(found), torch.tensor(targets), names, groups)
        train, test = stratified_split(texts.targets, val_fraction=_TEST_FRACTION, seed=0, groups=groups)
        return Source(texts.subset(train), texts.subset(test))


def _sources(root: Path, name: str) -> list[Path]:
    """List the files of a module or package, but for its tests; modules come and go between versions."""
    if (root / f"{name}.py").is_file():
        return [root / f"{name}.py"]
    return [file for file in (root / name).rglob("*.py") if not _TESTS & set(file.relative_to(root).parts)]


def _docstrings(file: Path) -> Iterator[tuple[str, str]]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            tree = ast.parse(read_utf8(file))
        except (SyntaxError, ValueError) as error:
            raise UserError(f"{file}: cannot be parsed ({error}); repair this installation of Python") from None
    yield from _below(tree, "")


def _below(node: ast.AST, prefix: str) -> Iterator[tuple[str, str]]:
    if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
        prefix += "" if isinstance(node, ast.Module) else f"{node.name}."
        if text := ast.get_docstring(node):
            yield prefix.removesuffix("."), text
    for child in ast.iter_child_nodes(node):
        # Expressions, most of a tree, hold no definitions.
        if isinstance(child, (ast.stmt, ast.excepthandler)):
            yield from _below(child, prefix)
