import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mmrec_train.errors import UserError
from mmrec_train.preparation.records import Document, Extraction, Template, decode_utf8
from tests.preparation.reading import read, texts


@given(st.binary(max_size=40))
def test_decoding_counts_exactly_what_it_replaces(data: bytes) -> None:
    document = decode_utf8(data)
    whole = data.removeprefix(b"\xef\xbb\xbf")
    if document.replaced == 0:
        assert document.text.encode() == whole
    else:
        with pytest.raises(UnicodeDecodeError):
            whole.decode()
    assert document.text.count("\ufffd") == document.replaced + whole.count("\ufffd".encode())


@given(st.text())
def test_decoding_leaves_valid_text_alone(text: str) -> None:
    assert decode_utf8(text.encode()) == Document(text.removeprefix("\ufeff"), 0)


def test_templates() -> None:
    template = Template.parse("{{{a.b}}} {c}{d}!")
    assert template.literals == ("{", "} ", "", "!")
    assert template.fields == ("a.b", "c", "d")
    values = ["x", 3, None]
    assert Extraction(template).document(values, "here").text == "{x} 3!"
    assert Extraction(template).document(["x", True, 1.5], "here").text == "{x} true1.5!"
    with pytest.raises(UserError, match="here: field c is not text but list"):
        Extraction(template).document(["x", [1], None], "here")


@pytest.mark.parametrize("template", ["no field", "{}", "{a!r}", "{a:>5}", "{a[0]}", "{a", "a}"])
def test_templates_that_are_none(template: str) -> None:
    with pytest.raises(ValueError, match=r"field|brace|'}'|'{'"):
        Template.parse(template)


def test_a_field_with_a_dot_in_its_name(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"a.b": "dotted", "a": {"b": "inner"}}\n{"a": {"b": "inner"}}\n{"a": null}')
    assert texts(tmp_path, text_field="a.b") == ["dotted", "inner", ""]
    with pytest.raises(UserError, match=r"line 1: no field a\.c; there are a\.b, a\."):
        texts(tmp_path, text_field="a.c")


def test_half_a_surrogate_pair_in_json_is_replaced(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text(r'{"text": "x\ud800y \ud83d\ude00"}')
    assert read(path) == [Document("x\ufffdy 😀", 1)]


def test_null_text_is_empty(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": null}\n')
    pq.write_table(pa.table({"text": pa.array([None, "x"], pa.string())}), tmp_path / "b.parquet")
    pq.write_table(pa.table({"text": pa.array([None], pa.null())}), tmp_path / "c.parquet")
    assert texts(tmp_path) == ["", "", "x", ""]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"text": "a"}\n{"text": ', r"line 2: not JSON \(Expecting value\)"),
        ('["text"]', "line 1: not a JSON object"),
        ('{"body": "a", "id": 1}', "line 1: no field text; there are body, id. Choose one with --text-field"),
        ('{"text": 3}', "line 1: field text is not text but int"),
        ("[" * 100_000, "line 1: not JSON"),
    ],
)
def test_bad_json_lines_are_named(tmp_path: Path, content: str, message: str) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text(content)
    with pytest.raises(UserError, match=rf"a\.jsonl, {message}.*\.$"):
        read(path)


def test_json_over_several_lines_is_named_with_the_remedy(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("a")
    (tmp_path / "b.json").write_text(json.dumps({"text": "a"}, indent=2))
    expected = (
        r"b\.json, line 1: not JSON \(Expecting property name enclosed in double quotes\); "
        r"one object a line is expected\. Mend or remove it; in a folder, --pattern chooses the files to read\.$"
    )
    with pytest.raises(UserError, match=expected):
        texts(tmp_path)
