"""The embedded corpus."""

from __future__ import annotations

import ast
import hashlib

import pytest

from qatscale.data import selfcorpus

MODULE = '''"""Opening words of the module, long enough to be counted as prose here."""

import os


# A comment that belongs to f.
def f(a, b=1, *rest):
    """Add {0} and b,
    which is rather easy.
    """
    return a + b


class Shape:
    """A shape {0} without corners, or maybe with some of them."""

    def area(self) -> float: "on one line"

    def name(self):
        \'\'\'Say the name of the shape, and nothing else than that.\'\'\'
        return os.name
''' + "\n".join(f"\n\ndef helper_{i}(value):\n    return value * {i} + value // {i + 1}" for i in range(12))


def test_module_becomes_prose_and_code() -> None:
    prose, code = selfcorpus.module_documents((MODULE + PADDING).encode(), set())
    assert prose.startswith("Opening words of the module")
    assert "f(a, b=1, *rest)\n\nAdd {0} and b,\nwhich is rather easy." in prose
    assert "Shape.name(self)\n\nSay the name" in prose
    assert "# A comment that belongs to f.\ndef f(a, b=1, *rest):\n    return a + b" in code
    assert 'def area(self) -> float: "on one line"' in code
    assert "rather easy" not in code
    ast.parse(code)


PADDING = '\n\ndef last():\n    """' + "A long description of nothing in particular. " * 10 + '"""\n    return None\n'


def test_what_occurred_before_is_left_out() -> None:
    seen: set[bytes] = set()
    first = selfcorpus.module_documents((MODULE + PADDING).encode(), seen)
    assert len(first) == 2
    again = selfcorpus.module_documents((MODULE + PADDING).replace("Shape", "Figure").encode(), seen)
    assert not any("A long description" in document for document in again)


@pytest.mark.parametrize(
    "source", [b"def f(:", b"\xff\xfe", b"x = '\\ud800'\n" * 5, b"TABLE = [" + b"0x1f, " * 500 + b"]"]
)
def test_what_is_no_text_gives_nothing(source: bytes) -> None:
    assert selfcorpus.module_documents(source, set()) == []


def test_form_feeds_and_windows_line_ends_do_not_shift_lines() -> None:
    source = MODULE.replace("\n\n\nclass", "\n\f\n\nclass") + PADDING
    _, code = selfcorpus.module_documents(source.replace("\n", "\r\n").encode(), set())
    assert "\r" not in code
    assert "    return a + b" in code
    assert "Say the name" not in code


def test_corpus_of_this_machine() -> None:
    size = 600_000
    corpus = selfcorpus.documents(size)
    total = sum(len(document.encode()) for document in corpus)
    assert size <= total < size + 60_000
    assert len(set(corpus)) == len(corpus)
    smaller = selfcorpus.documents(size // 2)
    assert smaller == corpus[: len(smaller)]


def test_modules_left_out_and_in() -> None:
    names = [name for name, _ in selfcorpus.modules()]
    assert len(set(names)) == len(names)
    for kept in ("json/decoder.py", "textwrap.py", "numpy/linalg/_linalg.py", "scipy/optimize/_optimize.py"):
        assert kept in names
    parts = [part for name in names for part in name.split("/")]
    assert not {"tests", "test", "testing", "site-packages", "_vendor", "encodings", "__pycache__"} & set(parts)
    assert not [name for name in names if name.startswith(("qatscale/", "_sysconfigdata"))]


def test_fingerprint_is_of_versions() -> None:
    assert selfcorpus.fingerprint() == selfcorpus.fingerprint()
    assert len(bytes.fromhex(selfcorpus.fingerprint())) == hashlib.sha256().digest_size
