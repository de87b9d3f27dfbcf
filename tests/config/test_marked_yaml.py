import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mmrec_train.config.marked_yaml import Mark, Problem, dump_yaml, merge, parse_json, parse_yaml
from mmrec_train.errors import UserError

FILE = Mark("a.yaml", 0, Path())

SCALARS = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.floats(allow_nan=False, allow_infinity=False),
    st.text(st.characters(exclude_categories=["Cs"])),
    st.sampled_from(
        ["1e3", "1_000", "010", "no", "null", "~", "", "-", ".5", "5.", "true", "0x1F", "1:30", "<<", "=", "a: b"]
    ),
)
TREES = st.recursive(
    SCALARS,
    lambda children: (
        st.lists(children, max_size=3) | st.dictionaries(st.text("abc:- #\n", max_size=5), children, max_size=3)
    ),
    max_leaves=8,
)


@given(st.dictionaries(st.text("abc1eé .", max_size=4), TREES, max_size=4))
def test_what_is_dumped_is_read_back(tree: dict[str, object]) -> None:
    problems: list[Problem] = []
    assert parse_yaml(dump_yaml(tree), FILE, problems).plain() == tree
    assert problems == []


@given(
    st.dictionaries(st.text("abc_", max_size=4), st.lists(st.integers() | st.booleans() | st.floats(-9, 9)) | st.none())
)
def test_json_is_read_as_json(tree: dict[str, object]) -> None:
    assert parse_json(json.dumps(tree, indent="\t"), FILE, []).plain() == tree


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1e-3", 0.001),
        ("1.5E+2", 150.0),
        (".5", 0.5),
        ("1_000", 1000),
        ("010", "010"),
        ("no", "no"),
        ("on", "on"),
        ("1:30", "1:30"),
        ("0x1F", "0x1F"),
        (".inf", ".inf"),
        ("true", True),
        ("~", None),
        ("2026-01-01", "2026-01-01"),
    ],
)
def test_plain_scalars_follow_yaml_1_2(text: str, value: object) -> None:
    read = parse_yaml(text, FILE, []).value
    assert read == value
    assert type(read) is type(value)


def test_every_value_knows_its_line() -> None:
    document = parse_yaml("a:\n  b: 1\n  c:\n    - x\n    - y\n", FILE, [])
    marks = {path: str(document.mark_of(path)) for path in [(), ("a",), ("a", "c"), ("a", "c", 1), ("a", "nothing")]}
    assert marks == {
        (): "a.yaml",
        ("a",): "a.yaml:1",
        ("a", "c"): "a.yaml:3",
        ("a", "c", 1): "a.yaml:5",
        ("a", "nothing"): "a.yaml:1",
    }


def test_upper_marks_and_values_win_a_merge() -> None:
    below = parse_yaml("s:\n  x: 1\n  y: 2\nt: [1, 2]\n", FILE, [])
    above = parse_yaml("\n\ns:\n  y: 3\nt: [4]\n", Mark("b.yaml", 0, Path()), [])
    merged = merge(below, above)
    assert merged.plain() == {"s": {"x": 1, "y": 3}, "t": [4]}
    assert str(merged.mark_of(("s", "x"))) == "a.yaml:2"
    assert str(merged.mark_of(("s", "y"))) == "b.yaml:4"
    assert str(merged.mark_of(("s", "z"))) == "b.yaml:3"


def test_duplicate_and_odd_keys_are_problems() -> None:
    problems: list[Problem] = []
    parse_yaml("a: 1\nb:\n  c: 1\n  c: 2\n7: x\na: 2\n", FILE, problems)
    assert list(map(str, problems)) == [
        "a.yaml:4: duplicate key 'c' (first at a.yaml:3)",
        "a.yaml:5: key 7 is not text",
        "a.yaml:6: duplicate key 'a' (first at a.yaml:1)",
    ]


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("a: [1, 2\nb: 3", 2),
        ("a: 1\n\tb: 2", 2),
        ("a: &x [*x]", 1),
        ("a: b: c", 1),
        ("a: 1\n---\nb: 2", 2),
        ("a: !!python/name:os.system x", 1),
    ],
)
def test_broken_yaml_names_the_line(text: str, line: int) -> None:
    with pytest.raises(UserError, match=rf"^a\.yaml:{line}: not valid YAML: "):
        parse_yaml(text, FILE, [])


@pytest.mark.parametrize("text", ["a: \x07", "a: !!int x"])
def test_unreadable_values_are_the_users_mistake(text: str) -> None:
    with pytest.raises(UserError, match=r"^a\.yaml: not valid YAML: "):
        parse_yaml(text, FILE, [])


def test_broken_json_names_the_line() -> None:
    with pytest.raises(UserError, match=r"^a\.yaml:3: not valid JSON: "):
        parse_json('{\n"a": 1,\n}', FILE, [])
