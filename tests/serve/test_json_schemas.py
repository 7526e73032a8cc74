"""JSON schemas and expressions: what is taken is kept to, and what xgrammar would leave out is refused by its key."""

from __future__ import annotations

import json
from typing import Any

import pytest

from fastattn.serve.json_schemas import check_regex, check_schema

NUMBER, TEXT = {"type": "integer"}, {"type": "string"}
CLOSED = {"type": "object", "properties": {"a": NUMBER, "b": TEXT}}


def tagged(name: str) -> dict[str, Any]:
    return {"type": "object", "properties": {"k": {"const": name}}, "required": ["k"]}


# schema, a text that fits, texts that do not
TAKEN: list[tuple[dict[str, Any], str, tuple[str, ...]]] = [
    ({}, "[1]", ()),
    ({"type": "integer", "minimum": 3, "exclusiveMaximum": 12, "title": "t"}, "11", ("2", "12", "3.5")),
    ({"type": "integer", "multipleOf": 5}, "10", ("7",)),
    ({"type": "number", "minimum": 0.5, "maximum": 2.25}, "1.7", ("0.4", "2.3")),
    ({"type": "string", "minLength": 2, "maxLength": 3}, '"ab"', ('"a"', '"abcd"')),
    ({"type": "string", "pattern": "^(?:a|[^b$])+$"}, '"ac"', ('"ab"',)),
    ({"type": "string", "format": "date"}, '"2020-01-02"', ('"x"',)),
    ({"type": ["string", "null"]}, "null", ("1",)),
    ({"type": "array", "items": NUMBER, "minItems": 1, "maxItems": 2}, "[1]", ("[]", "[1,2,3]", '["a"]')),
    ({"type": "array", "prefixItems": [NUMBER, TEXT], "items": False}, '[1,"a"]', ('["a",1]', '[1,"a",2]')),
    ({**CLOSED, "required": ["b"]}, '{"b":"x"}', ("{}", '{"a":1}', '{"b":"x","c":1}')),
    ({**CLOSED, "minProperties": 2}, '{"a":1,"b":"x"}', ('{"a":1}',)),
    ({"type": "object", "additionalProperties": NUMBER, "maxProperties": 1}, '{"c":1}', ('{"c":"x"}', '{"a":1,"b":1}')),
    ({"type": "object", "propertyNames": {"enum": ["a"]}}, '{"a":1}', ('{"b":1}',)),
    ({"type": "string", "enum": ["a", "b"]}, '"a"', ('"c"',)),
    ({"anyOf": [NUMBER, {"type": "null"}], "default": None}, "null", ('"a"',)),
    ({"oneOf": [NUMBER, TEXT]}, '"a"', ("null",)),
    ({"oneOf": [tagged("x"), tagged("y")], "discriminator": {"propertyName": "k"}}, '{"k":"y"}', ('{"k":"z"}',)),
    ({"allOf": [{"$ref": "#/$defs/n"}], "$defs": {"n": NUMBER}, "$id": "http://a/"}, "1", ('"a"',)),
    ({"type": "object", "properties": {"a": {"$ref": "#"}}}, '{"a":{}}', ('{"a":1}',)),
]  # fmt: skip
REFUSED: list[tuple[str, Any]] = [
    ("uniqueItems", {"type": "array", "items": NUMBER, "uniqueItems": True}),
    ("not", {"not": TEXT}),
    ("allOf", {"allOf": [CLOSED, CLOSED]}),
    ("maximum", {"allOf": [NUMBER], "maximum": 5}),
    ("dependentRequired", {**CLOSED, "dependentRequired": {"a": ["b"]}}),
    ("patternProperties", {"type": "object", "patternProperties": {"^x": NUMBER}}),
    ("minLength", {"type": "string", "minLength": 3, "pattern": "^a+$"}),
    ("pattern", {"type": "string", "format": "date", "pattern": "^2"}),
    ("pattern", {"type": "string", "pattern": "(?!a)[ab]"}),
    ("format", {"type": "string", "format": "regex"}),
    ("oneOf", {"oneOf": [NUMBER, {"type": "number"}]}),
    ("oneOf", {"oneOf": [{"const": 1}, {"enum": [1, 2]}]}),
    ("oneOf", {"oneOf": [tagged("x"), CLOSED]}),
    ("oneOf", {"oneOf": [{"$ref": "#/$defs/n"}, {"const": 3}], "$defs": {"n": NUMBER}}),
    ("contains", {"type": "array", "contains": NUMBER}),
    ("multipleOf", {"type": "number", "multipleOf": 0.5}),
    ("multipleOf", {"type": "integer", "multipleOf": 2.5}),
    ("required", {**CLOSED, "required": ["c"]}),
    ("required", {"type": "object", "required": ["c"]}),
    ("required", {"required": ["a"]}),
    ("minLength", {"minLength": 2}),
    ("propertyNames", {**CLOSED, "propertyNames": {"maxLength": 2, "type": "string"}}),
    ("minProperties", {"type": "object", "minProperties": 2, "additionalProperties": NUMBER}),
    ("enum", {"type": "string", "enum": ["a", 1]}),
    ("enum", {"const": "a", "enum": ["b"]}),
    ("type", {"type": "integer", "anyOf": [NUMBER, TEXT]}),
    ("minimum", {"$ref": "#/$defs/n", "minimum": 3, "$defs": {"n": NUMBER}}),
    ("$ref", {"$ref": "http://a/b"}),
    ("$ref", {"$ref": "#/$defs/m", "$defs": {"n": NUMBER}}),
    ("if", {"type": "integer", "if": {"minimum": 3}, "then": {"multipleOf": 2}}),
    ("type", {"type": []}),
    ("type", {"type": "any"}),
]  # fmt: skip
KEPT_EXPRESSIONS = ["^a$", r"\d{3}\.[^\]$^]+", "(?:ab|c)+", "(?<n>a)", r"\x41\u0042", "(?:=a)"]
OTHERS = ["a^b", "a$b", "(?=a)b", "(?!a)b", "(?<=a)b", "(?i)a", r"\bab", r"a\Z", r"(a)\1", r"\p{L}", r"[\pa]"]
INSIDE = (
    lambda schema: {"type": "array", "items": schema},
    lambda schema: {"type": "object", "properties": {"x": schema}},
    lambda schema: {"anyOf": [{"type": "null"}, schema]},
    lambda schema: {"type": "array", "prefixItems": [schema]},
    lambda schema: {"type": "object", "additionalProperties": schema},
)


@pytest.mark.parametrize(("key", "schema"), REFUSED)
def test_what_is_not_kept_is_refused_by_its_key_wherever_it_stands(key: str, schema: dict[str, Any]) -> None:
    for given in [schema, *({**make(schema), "$defs": schema.get("$defs", {})} for make in INSIDE)]:
        with pytest.raises(ValueError, match=rf"'{key.replace('$', '[$]')}'"):
            check_schema(given)
    check_schema({"type": "integer", "$defs": {"unused": schema}})


def test_a_reference_is_followed_to_what_is_not_kept() -> None:
    schema = {"$ref": "#/$defs/n", "$defs": {"n": {"type": "array", "uniqueItems": True}}}
    with pytest.raises(ValueError, match="uniqueItems"):
        check_schema(schema)


@pytest.mark.parametrize("expression", OTHERS)
def test_expressions_that_are_not_kept_are_refused(expression: str) -> None:
    with pytest.raises(ValueError, match="support"):
        check_regex(expression)


@pytest.mark.parametrize("expression", KEPT_EXPRESSIONS)
def test_other_expressions_are_taken(expression: str) -> None:
    check_regex(expression)
    assert_compiles = pytest.importorskip("xgrammar").Grammar.from_regex
    assert_compiles(expression)


@pytest.mark.parametrize(("schema", "good", "bad"), TAKEN)
def test_what_is_taken_is_kept(schema: dict[str, Any], good: str, bad: tuple[str, ...]) -> None:
    check_schema(schema)
    xgrammar: Any = pytest.importorskip("xgrammar")
    info = xgrammar.TokenizerInfo(
        [bytes([i]) for i in range(256)] + [b""], vocab_size=257, stop_token_ids=[256]
    )
    compiled = xgrammar.GrammarCompiler(info, max_threads=1).compile_json_schema(
        json.dumps(schema), max_whitespace_cnt=2
    )

    def fits(text: str) -> bool:
        matcher = xgrammar.GrammarMatcher(compiled)
        return matcher.accept_string(text) and matcher.accept_token(256)

    assert fits(good)
    assert not any(map(fits, bad))
