"""The embedded corpus: English prose and Python from the packages of this machine, so that nothing is downloaded.

It comes from the standard library and from the packages that qatscale depends on. A module gives two kinds of
documents, cut between definitions: its docstrings, each under the name and arguments of what it describes, and its
source without them. Tests, generated tables and repeated definitions are left out, so that held-out documents are not
copies of training documents. Modules are ordered by a hash of their names, and the first ones that fill the size make
the corpus, a shuffled sample of all packages. The same Python and package versions give the same bytes.

The text is regular enough for a model of a million parameters to learn from, and too varied to memorise.
"""

from __future__ import annotations

import ast
import functools
import hashlib
import importlib.metadata
import platform
import re
import sysconfig
import warnings
from collections.abc import Iterator
from pathlib import Path

from qatscale.errors import UserError

DEFAULT_BYTES = 12_000_000
_SMALLEST, _DOCUMENT, _MODULE = 400, 8_000, 60_000
"""Characters: least and about the most of a document, and the most of a module, so that no module dominates."""
_REPEATABLE = 120
"""Shorter definitions may occur again."""
_LEFT_OUT = re.compile(
    r"(^|/)(tests?|testing|_?test_[^/]*|[^/]*_tests?|idle_test|conftest|_sysconfigdata[^/]*)(/|\.py$)"
    r"|(^|/)(site-packages|dist-packages|__pycache__|config-[^/]*|_vendor|lib2to3|encodings)/|_installed\.py$"
)
"""Tests, vendored copies, tables, and files written when a package is built."""

Definition = ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef


def fingerprint() -> str:
    """sha256 of what decides the corpus: the versions of Python and of the packages, and the constants above."""
    versions = [f"{d.metadata['Name']}=={d.version}" for d in _distributions()]
    recipe = f"{_SMALLEST} {_DOCUMENT} {_MODULE} {_REPEATABLE} {_LEFT_OUT.pattern}"
    return hashlib.sha256("\n".join([platform.python_version(), *versions, recipe]).encode()).hexdigest()


@functools.lru_cache(maxsize=1)
def documents(size: int) -> tuple[str, ...]:
    """Documents of about `size` bytes in all; fewer if the packages hold less."""
    seen: set[bytes] = set()
    found: list[str] = []
    for _, path in modules():
        for document in module_documents(path.read_bytes(), seen):
            found.append(document)
            size -= len(document.encode())
            if size <= 0:
                return tuple(found)
    return tuple(found)


@functools.cache
def modules() -> tuple[tuple[str, Path], ...]:
    """(name, file) of every module considered, in the corpus's order. Names are independent of the installation."""
    library = Path(sysconfig.get_path("stdlib"))
    found = [(path.relative_to(library).as_posix(), path) for path in library.rglob("*.py")]
    for distribution in _distributions():
        files = [file for file in distribution.files or [] if file.suffix == ".py" and ".." not in file.parts]
        found += [(file.as_posix(), Path(str(file.locate()))) for file in files]
    wanted = [module for module in found if not _LEFT_OUT.search(module[0])]
    return tuple(sorted(wanted, key=lambda module: hashlib.sha256(module[0].encode()).digest()))


def _distributions() -> list[importlib.metadata.Distribution]:
    try:
        names = required_packages()
    except importlib.metadata.PackageNotFoundError:
        problem = "consists of the packages that qatscale requires, and qatscale is not installed."
        raise UserError("source", "self", problem, "Run: pip install --no-deps -e CHECKOUT") from None
    return [importlib.metadata.distribution(name) for name in names]


def required_packages() -> list[str]:
    """The packages that qatscale requires, by name, without those of its extras. PackageNotFoundError without it."""
    required = [line for line in importlib.metadata.requires("qatscale") or [] if "extra ==" not in line]
    return sorted({re.split(r"[^A-Za-z0-9._-]", line, maxsplit=1)[0].lower() for line in required})


def module_documents(source: bytes, seen: set[bytes]) -> list[str]:
    """The docstrings of a module and its code, without what is in `seen`; adds the rest to it."""
    try:
        text = source.decode("utf-8-sig").replace("\r\n", "\n").replace("\r", "\n")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # invalid escapes
            tree = ast.parse(text)
    except (SyntaxError, ValueError):
        return []
    lines = [line + "\n" for line in text.split("\n")]  # ast does not end a line at a form feed
    docstrings = _docstrings(tree)
    prose = list(_documents(_new((entry for entry, _ in docstrings), seen)))
    for _, node in docstrings:
        if lines[node.lineno - 1][: node.col_offset].strip():
            continue  # on the line of its def
        for line in range(node.lineno - 1, node.end_lineno or node.lineno):
            lines[line] = ""
    code = _documents(_new(_definitions(tree, lines), seen))
    return [document for document in (*prose, *code) if len(document) >= _SMALLEST and _is_language(document)]


def _docstrings(tree: ast.Module) -> list[tuple[str, ast.Expr]]:
    """Each docstring as `name(arguments)` and its text, with the statement that holds it."""
    found: list[tuple[str, ast.Expr]] = []

    def visit(node: ast.Module | Definition, prefix: str) -> None:
        name = prefix
        if not isinstance(node, ast.Module):
            name = f"{prefix}.{node.name}" if prefix else node.name
        if (text := ast.get_docstring(node)) and isinstance(first := node.body[0], ast.Expr):
            arguments = "" if isinstance(node, ast.Module | ast.ClassDef) else f"({ast.unparse(node.args)})"
            found.append((f"{name}{arguments}\n\n{text}" if name else text, first))
        for child in node.body:
            if isinstance(child, Definition):
                visit(child, name)

    visit(tree, "")
    return found


def _definitions(tree: ast.Module, lines: list[str]) -> Iterator[str]:
    """The source of each run of top-level statements that ends with a definition, with the comments before it."""
    start = 0
    for node in tree.body:
        if isinstance(node, Definition):
            yield "".join(lines[start : node.end_lineno]).strip("\n")
            start = node.end_lineno or node.lineno
    yield "".join(lines[start:]).strip("\n")


def _new(texts: Iterator[str], seen: set[bytes]) -> Iterator[str]:
    for text in texts:
        if not text.strip():
            continue
        digest = hashlib.sha256(" ".join(text.split()).encode()).digest()[:16]
        if len(text) >= _REPEATABLE and digest in seen:
            continue
        seen.add(digest)
        yield text


def _documents(texts: Iterator[str]) -> Iterator[str]:
    taken: list[str] = []
    total = 0
    for text in texts:
        if taken and sum(map(len, taken)) + len(text) > _DOCUMENT:
            yield "\n\n\n".join(taken) + "\n"
            taken = []
        total += len(text)
        if total > _MODULE:
            break
        taken.append(text)
    if taken:
        yield "\n\n\n".join(taken) + "\n"


def _is_language(text: str) -> bool:
    """False for tables of numbers and escapes, which hold few letters and spaces."""
    letters = sum(map(str.isalpha, text)) + text.count(" ")
    return letters > 0.7 * len(text)
