"""YAML 1.2, one walk along key paths, one sentence for every fault."""

from __future__ import annotations

from typing import Any, Literal

import pytest
from pydantic import BaseModel, ConfigDict, Field

from segfleet.core import settings
from segfleet.core.errors import InputError

BOMB = "a0: &a0 [x, x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 10)}]\n" for i in range(1, 12)
)


class Part(BaseModel):
    model_config = ConfigDict(extra="forbid")

    rate: float = Field(0.1, gt=0, description="how fast")
    kind: Literal["a", "b"] = "a"
    label: str = Field("", description="for people")


class Whole(BaseModel):
    model_config = ConfigDict(extra="forbid")

    name: str = Field(description="of the whole")
    limit: str | int = 0
    parts: tuple[Part, ...] = ()
    base: str | dict[str, int] = ""
    words: tuple[str, ...] = ()


@pytest.mark.parametrize(
    ("text", "value"),
    [  # https://yaml.org/spec/1.2.2/#103-core-schema
        ("off", "off"),
        ("yes", "yes"),
        ("True", True),
        ("12:30", "12:30"),
        ("1-06:00:00", "1-06:00:00"),
        ("010", 10),
        ("0o10", 8),
        ("0x1F", 31),
        ("1_000", "1_000"),
        ("1e-3", 0.001),
        ("-.5E+2", -50.0),
        ("1.", 1.0),
        ("1e", "1e"),
        ("2026-13-01", "2026-13-01"),
        ("~", None),
        ("", None),
        ("'5'", "5"),
        ("!!str 5", "5"),
        ("=", "="),
        ("[1, [a]]", [1, ["a"]]),
        ("{x: 1, y: {z: no}}", {"x": 1, "y": {"z": "no"}}),
    ],
)
def test_values(text, value):
    found = settings.loads(text)
    assert found == value and type(found) is type(value)
    assert settings.loads(settings.dumps({"key": value})) == {"key": value}


def test_merge_keys():
    text = "base: &base {x: 1, y: 2}\nmore: {<<: *base, y: 3}\nboth: {<<: [{x: 5}, *base]}"
    document = settings.loads(text)
    assert document["more"] == {"x": 1, "y": 3} and document["both"] == {"x": 5, "y": 2}


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("a: [1", "line 1"),
        ("a: 1\nb: 2\na: 3", "line 3: the key 'a' twice"),
        ("!!python/object/apply:os.system ['true']", "found the tag"),
        ("a: !!binary aGVsbG8=", "found the tag"),
        ("a: &a [*a]", "an alias of itself"),
        ("[1, 2]: x", "is no text"),
        ("--- 1\n--- 2", "single document"),
        ("<<: 3", "<< takes a mapping"),
        (BOMB, "more than 100,000 values"),
        ("[" * 60 + "]" * 60, "nested more than 50 deep"),
        ("[" * 5000, "nested more than 50 deep"),
    ],
)
def test_what_is_refused(text, words):
    with pytest.raises(ValueError, match=words.replace("[", r"\[")):
        settings.loads(text)


def test_files_that_cannot_be_read(tmp_path):
    path = tmp_path / "r.yaml"
    path.write_bytes(b"a: \xff")
    with pytest.raises(InputError, match="^recipe: .*r.yaml is no YAML document"):
        settings.read(path, "recipe")
    with pytest.raises(InputError, match="No such file"):
        settings.read(tmp_path / "nowhere.yaml", "recipe")


def test_text_stays_as_written():
    texts = settings.text_keys(Whole)
    assert texts == {"name", "label", "words"}
    text = "name: 010\nlimit: 010\nwords: [1e5, 2]\nparts: [{label: 1e5}, {label: ~}]"
    assert settings.loads(text, texts) == {
        "name": "010",
        "limit": 10,
        "words": ["1e5", "2"],
        "parts": [{"label": "1e5"}, {"label": None}],
    }
    changes = ["name=1e5", "parts.0.label=a: b", "limit=1e1", "words=[1, x]", "base.x=2"]
    assert settings.override({"parts": [{}]}, changes, texts) == {
        "name": "1e5",
        "parts": [{"label": "a: b"}],
        "limit": 10.0,
        "words": ["1", "x"],
        "base": {"x": 2},
    }


class Named(BaseModel):
    rates: dict[str, float] = {}
    options: dict[str, Any] = {}
    tolerance: float | dict[str, float] = 2.0


class Outer(BaseModel):
    parts: tuple[Named, ...] = ()


def test_below_a_key_that_maps_names_a_point_is_a_point():
    """Parameters are called `encoder.stem.weight`."""
    named = settings.named_keys(Outer)
    assert named == {"rates", "tolerance"}
    changes = ["parts.0.rates.encoder.stem=2", "parts.0.options.rates.a.b=1", "parts.0.tolerance=1"]
    assert settings.override({"parts": [{}]}, changes, named=named) == {
        "parts": [
            {"rates": {"encoder.stem": 2}, "options": {"rates": {"a": {"b": 1}}}, "tolerance": 1}
        ]
    }


def test_overrides_leave_the_document_alone():
    document = {"a": {"b": [1, {"c": 2}]}}
    assert settings.override(document, ["a.b.1.c=3", "x.y=1"]) == {
        "a": {"b": [1, {"c": 3}]},
        "x": {"y": 1},
    }
    assert document == {"a": {"b": [1, {"c": 2}]}}


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ("a", "expected key.path=value"),
        ("a=[", "is no YAML"),
        ("a.7=1", "'7' is no index of a list of 2; expected 0 to 1"),
        ("a.-1=1", "is no index"),
        ("a.0.x=1", "a.0 is 1, which has no keys below it"),
    ],
)
def test_overrides_that_fit_nowhere(change, words):
    with pytest.raises(InputError, match=f"^--resource: .*{words}"):
        settings.override({"a": [1, {}]}, [change], (), "--resource")


def test_one_sentence_for_every_fault():
    document = {"parts": [{"rate": -1}, {"rat": 1, "kind": "c"}], "limit": []}
    with pytest.raises(InputError) as caught:
        settings.validate(Whole, document, "job")
    first, *lines = str(caught.value).splitlines()
    assert first == "job is not valid:"
    assert lines[0] == "  name: missing (of the whole)"
    assert "  parts.0.rate: found -1. Input should be greater than 0 (how fast)" in lines
    expected = (
        "  parts.1.rat: unknown key; expected one of: rate, kind, label; did you mean 'rate'?"
    )
    assert expected in lines
    assert any(line.startswith("  parts.1.kind: found 'c'. Input should be 'a'") for line in lines)
    assert any(line.startswith("  limit") for line in lines)
