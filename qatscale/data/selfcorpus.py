"""The embedded corpus: English prose and Python from what is on the machine anyway, so that nothing is downloaded.

It comes from the standard library and from the packages that qatscale itself depends on. A module gives two
kinds of documents: its docstrings, each under the name and arguments of what it describes, and its source without
them, both cut between definitions.
Tests, generated tables, and functions, classes or docstrings that occurred before are left out, so that held-out
documents are not copies of training documents. Modules come in the order of a hash of their names, and the first ones
that fill the wanted size make the corpus: a sample of all packages, already shuffled. The same Python and the same
package versions give the same bytes.

Prose and code of one field, documents of a few thousand characters: regular enough for a model of a million
parameters to learn from, and not so regular that it could learn it by heart.
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
"""Characters: of a document at least; about at most; and of what one module gives, lest a few be most of the corpus."""
_REPEATABLE = 120
"""Definitions shorter than this may occur again; they are everyday code, no copy of something."""
_LEFT_OUT = re.compile(
    r"(^|/)(tests?|testing|_?test_[^/]*|[^/]*_tests?|idle_test|conftest|_sysconfigdata[^/]*)(/|\.py$)"
    r"|(^|/)(site-packages|dist-packages|__pycache__|config-[^/]*|_vendor|lib2to3|encodings)/|_installed\.py$"
)
"""Tests, other people's copies, tables, and what is written when a package is built."""

Definition = ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef


def fingerprint() -> str:
    """sha256 of what decides the corpus: the versions of Python, of the packages, and of the recipe below."""
    versions = [f"{d.metadata['Name']}=={d.version}" for d in _distributions()]
    recipe = f"{_SMALLEST} {_DOCUMENT} {_MODULE} {_REPEATABLE} {_LEFT_OUT.pattern}"
    return hashlib.sha256("\n".join([platform.python_version(), *versions, recipe]).encode()).hexdigest()


@functools.lru_cache(maxsize=1)
def documents(size: int) -> tuple[str, ...]:
    """Documents of about `size` bytes in all; fewer where the machine holds less."""
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
    """(name, file) of every module considered, in the corpus's order; names do not tell where Python is installed."""
    library = Path(sysconfig.get_path("stdlib"))
    found = [(path.relative_to(library).as_posix(), path) for path in library.rglob("*.py")]
    for distribution in _distributions():
        files = [file for file in distribution.files or [] if file.suffix == ".py" and ".." not in file.parts]
        found += [(file.as_posix(), Path(str(file.locate()))) for file in files]
    wanted = [module for module in found if not _LEFT_OUT.search(module[0])]
    return tuple(sorted(wanted, key=lambda module: hashlib.sha256(module[0].encode()).digest()))


def _distributions() -> list[importlib.metadata.Distribution]:
    """The installed packages that qatscale requires itself, by name; those of its extras left out."""
    try:
        requirements = importlib.metadata.requires("qatscale") or []
    except importlib.metadata.PackageNotFoundError:
        allowed = "is made of the packages that qatscale requires, and qatscale is not installed."
        raise UserError("source", "self", allowed, "Run: pip install --no-deps -e CHECKOUT") from None
    required = [r for r in requirements if "extra ==" not in r]
    names = sorted({re.split(r"[^A-Za-z0-9._-]", r, maxsplit=1)[0].lower() for r in required})
    return [importlib.metadata.distribution(name) for name in names]


def module_documents(source: bytes, seen: set[bytes]) -> list[str]:
    """The docstrings of a module and its code, less what is in `seen`, which what is taken is added to."""
    try:
        text = source.decode("utf-8-sig").replace("\r\n", "\n").replace("\r", "\n")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # invalid escapes in other people's strings
            tree = ast.parse(text)
    except (SyntaxError, ValueError):
        return []
    lines = [line + "\n" for line in text.split("\n")]  # as ast counts them: a form feed ends none
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
    """Each docstring as `name(arguments)` and its text, in the order of the file, with the statement that holds it."""
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
    """The source of each run of top-level statements that ends with a definition, comments before it included."""
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
    """Neighbouring texts joined into documents."""
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
    """Tables of numbers and escapes are not: too few of their characters are letters or spaces."""
    letters = sum(map(str.isalpha, text)) + text.count(" ")
    return letters > 0.7 * len(text)
