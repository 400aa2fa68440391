"""The YAML that recipes and overrides are written in."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qatscale.config.yaml_text import MAX_VALUES, parse_document, parse_yaml, to_yaml
from qatscale.errors import UserError


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1e-3", 1e-3),
        ("1.5E+3", 1500.0),
        (".5", 0.5),
        ("1.", 1.0),
        ("-3", -3),
        ("50_000", 50_000),
        ("0x10", 16),
        ("0o17", 15),
        ("007", 7),  # YAML 1.2: leading zeros are decimal
        ("2.3B", "2.3B"),
        ("no", "no"),  # YAML 1.1 reads false
        ("1:30", "1:30"),  # YAML 1.1 reads 90
        ("2024-01-01", "2024-01-01"),  # YAML 1.1 reads a date
        ("1-sqrt", "1-sqrt"),
        ("true", True),
        ("null", None),
        ("~", None),
        ("", None),
        ("[0.9, 0.99]", [0.9, 0.99]),
        ("{a: {b: 1}}", {"a": {"b": 1}}),
    ],
)
def test_scalars_follow_yaml_1_2(text: str, value: object) -> None:
    parsed = parse_yaml(text, "here")
    assert parsed == value
    assert type(parsed) is type(value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: 1\nb: 2\na: 3\n", "line 3, column 1: the key 'a' is here and on line 1"),
        ("s:\n  x: 1\n  x: 1\n", "line 3, column 3: the key 'x' is here and on line 2"),
        ("a: [1\nb: 2\n", "line 2"),
        ("a: 1\n b: 2\n", "line 2"),
        ("a: !!python/name:os.system ''", "line 1"),
        ("a: \x00", "not valid YAML"),
        ("a: 1\nb: !!timestamp 2020-99-9*", "line 2, column 4: the tag !!timestamp"),
        ("!!set {a}", "the tag !!set"),
        ("!!bool maybe", "not a valid bool"),
        ("!!float ''", "not a valid float"),
        ("9" * 5000, "not a valid int"),
        ("[" * 2000, "line 1, column 52: nested"),
        ("{a: " * 2000, "nested"),
        ("a: &a [*a]", "100,000 values"),
        ("a: *b", "undefined alias"),
        ("{[1]: 2}", "unhashable key"),
        ("a: 1\n---\nb: 2\n", "another document"),
    ],
)
def test_errors_name_file_and_line(text: str, message: str) -> None:
    with pytest.raises(UserError) as caught:
        parse_yaml(text, "my.yaml")
    assert str(caught.value).startswith("my.yaml")
    assert message in str(caught.value)


def test_every_key_and_item_has_its_line() -> None:
    document = parse_document("a:\n  b: [1,\n    2]\n\n'c d': &x {e: 3}\nf: *x\n", "my.yaml")
    assert document.value == {"a": {"b": [1, 2]}, "c d": {"e": 3}, "f": {"e": 3}}
    assert document.lines == {
        ("a",): 1, ("a", "b"): 2, ("a", "b", 0): 2, ("a", "b", 1): 3, ("c d",): 5, ("c d", "e"): 5, ("f",): 6,
        ("f", "e"): 5,
    }  # fmt: skip


def test_a_document_has_a_largest_size() -> None:
    """Aliases count with all that they stand for."""
    parse_yaml(f"[{'1,' * (MAX_VALUES - 1)}]", "here")
    for text in (f"[{'1,' * MAX_VALUES}]", f"a: &a [{'1,' * 999}]\nb: [{'*a, ' * 100}]"):
        with pytest.raises(UserError, match="100,000 values"):
            parse_yaml(text, "here")


PLAIN = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False)
    | st.text(
        st.characters(
            codec="utf-8", exclude_categories=["Cc", "Cs"], exclude_characters="\u2028\u2029\ufeff\ufffe\uffff"
        )
    ),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text("abc1e.-_~", min_size=1), inner, max_size=3),
    max_leaves=8,
)


@given(PLAIN)
def test_what_is_written_reads_back_equal(value: object) -> None:
    assert parse_yaml(to_yaml(value), "here") == value


@pytest.mark.parametrize(
    "text", ["1e3", "1e-3", "123", "null", "true", "~", "", "1_000", "0x10", ".5", "no", "a: b", "- a"]
)
def test_a_text_that_looks_like_something_else_stays_a_text(text: str) -> None:
    assert parse_yaml(to_yaml({"name": text}), "here") == {"name": text}
