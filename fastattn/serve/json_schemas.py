"""What of JSON schemas and regular expressions xgrammar keeps text to. It ignores the rest, so the rest is refused."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

ANNOTATIONS = {
    "$comment", "$defs", "$schema", "default", "definitions", "deprecated", "description", "discriminator", "examples",
    "nullable", "readOnly", "title", "writeOnly",
}  # fmt: skip
RANGES = {"minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum", "multipleOf"}
KEPT = {  # by the type whose values they are about
    "string": {"minLength", "maxLength", "pattern", "format"},
    "integer": RANGES,
    "number": RANGES,
    "array": {"items", "prefixItems", "minItems", "maxItems", "unevaluatedItems"},
    "object": {
        "properties", "required", "additionalProperties", "minProperties", "maxProperties", "propertyNames",
        "unevaluatedProperties",
    },
    "boolean": set(),
    "null": set(),
}  # fmt: skip
WHOLE = ("$ref", "const", "enum", "anyOf", "oneOf", "allOf")  # beside one of which nothing else is kept
FORMATS = {
    "date", "time", "date-time", "duration", "email", "hostname", "ipv4", "ipv6", "uuid", "uri", "uri-reference",
    "uri-template", "json-pointer", "relative-json-pointer",
}  # fmt: skip
DEEPEST = 8  # levels at which branches of a oneOf are told apart
_ESCAPE = re.compile(r"\\(?:[dDwWsSnrtfv0]|x[0-9a-fA-F]{2}|u[0-9a-fA-F]{4}|[^0-9A-Za-z])")
_GROUP = re.compile(r"\(\?(?::|<[^=!])")
_CLASS = re.compile(r"\[\^?\]?(?:\\.|[^\]\\])*\]", re.DOTALL)


def check_schema(schema: dict[str, Any]) -> None:
    """ValueError, which names the key, for a schema with something that text would not be held to.

    Args:
        schema: a JSON schema whose references, "#/...", lie within it.
    """
    waiting, seen = [schema], set()
    while waiting:
        each = waiting.pop()
        if isinstance(each, bool) or id(each) in seen:
            continue
        if not isinstance(each, dict):
            raise ValueError(f"got a {type(each).__name__} where a schema stands")
        seen.add(id(each))
        _check(each, schema)
        waiting += _parts(each, schema)


def check_regex(expression: str) -> None:
    """ValueError for an expression with something that text would not be held to."""
    place, last = 0, len(expression) - 1
    while place <= last:
        character = expression[place]
        if character == "\\":
            found = _ESCAPE.match(expression, place)
            if found is None:
                raise ValueError(f"the escape {expression[place : place + 2]!r} is not supported")
            place = found.end()
        elif character == "[" and (found := _CLASS.match(expression, place)):
            for escape in re.finditer(r"\\.", found[0], re.DOTALL):
                if not _ESCAPE.match(found[0], escape.start()):
                    raise ValueError(f"the escape {escape[0]!r} is not supported")
            place = found.end()
        else:
            if character == "(" and expression.startswith("?", place + 1):
                if not _GROUP.match(expression, place):
                    raise ValueError(f"the group {expression[place : place + 3]!r} is not supported")
            elif (character == "^" and place) or (character == "$" and place < last):
                raise ValueError(f"{character!r} is supported at the ends of an expression alone")
            place += 1


def _check(schema: dict[str, Any], root: dict[str, Any]) -> None:
    known = ANNOTATIONS.union(WHOLE, ("type",), *KEPT.values())
    for key in schema:
        if key not in known and not (key == "$id" and schema is root):
            raise ValueError(f"{key[:40]!r} is not supported")
    whole = [key for key in WHOLE if key in schema]
    if whole:
        _check_whole(whole[0], schema, root)
        return
    types = _types(schema)
    if unknown := [name for name in types if name not in KEPT]:
        raise ValueError(f"'type' is {str(unknown[0])[:40]!r}, needs {', '.join(KEPT)}")
    if not types and (alone := [key for key in schema if key not in ANNOTATIONS]):
        raise ValueError(f"{alone[0]!r} needs a 'type' beside it")
    if "string" in types:
        _check_string(schema)
    if "multipleOf" in schema and "number" in types:
        raise ValueError("'multipleOf' is supported for integers alone")
    if "multipleOf" in schema and "integer" in types and not _whole_number(schema["multipleOf"]):
        raise ValueError("'multipleOf' needs an integer")
    if "object" in types:
        _check_object(schema)


def _check_whole(key: str, schema: dict[str, Any], root: dict[str, Any]) -> None:
    fits = ("type",) if key in ("const", "enum") else ()
    for other in schema:
        if other != key and other not in ANNOTATIONS and other not in fits and other != "$id":
            raise ValueError(f"{other!r} is not supported beside {key!r}")
    given = schema[key]
    if key == "$ref":
        _resolved(schema, root)
    elif key in ("anyOf", "oneOf", "allOf") and not (isinstance(given, list) and given):
        raise ValueError(f"{key!r} needs a list of schemas")
    elif key == "allOf" and len(given) > 1:
        raise ValueError("'allOf' is supported with one schema alone")
    elif key == "oneOf":
        for number, one in enumerate(given):
            if not all(_apart(one, other, root) for other in given[:number]):
                raise ValueError(
                    "'oneOf' needs schemas of which a value fits one at most, or else to be 'anyOf'"
                )
    elif "type" in schema:
        for value in given if key == "enum" and isinstance(given, list) else [given]:
            if not _types_of(value) & set(_types(schema)):
                raise ValueError(f"{key!r} has a value of another type than 'type'")


def _check_string(schema: dict[str, Any]) -> None:
    lengths = [key for key in ("minLength", "maxLength") if key in schema]
    for key in ("pattern", "format"):
        if key in schema and (
            beside := [*lengths, *(["pattern"] if "pattern" in schema and key == "format" else [])]
        ):
            raise ValueError(f"{beside[0]!r} is not supported beside {key!r}")
    if "format" in schema and schema["format"] not in FORMATS:
        raise ValueError(f"'format' is {str(schema['format'])[:40]!r}, needs {', '.join(sorted(FORMATS))}")
    if "pattern" in schema:
        if not isinstance(schema["pattern"], str):
            raise ValueError("'pattern' needs a regular expression")
        try:
            check_regex(schema["pattern"])
        except ValueError as error:
            raise ValueError(f"'pattern': {error}") from None


def _check_object(schema: dict[str, Any]) -> None:
    properties, required = schema.get("properties", {}), schema.get("required", [])
    if not isinstance(properties, dict) or not isinstance(required, list):
        raise ValueError("'properties' needs an object, 'required' a list")
    if missing := [name for name in required if name not in properties]:
        raise ValueError(f"'required' has {str(missing[0])[:40]!r}, which is not among 'properties'")
    closed = bool(properties) and not schema.get("additionalProperties")
    if not closed and schema.get("minProperties", 0) > 1:  # a name that comes twice counts once
        raise ValueError("'minProperties' above 1 is supported for objects without further properties alone")
    if "propertyNames" in schema and properties:
        raise ValueError("'propertyNames' is not supported beside 'properties'")


def _parts(schema: dict[str, Any], root: dict[str, Any]) -> Iterator[Any]:
    """The schemas that a schema is made of."""
    if "$ref" in schema:
        yield _resolved(schema, root)
    for key in ("anyOf", "oneOf", "allOf", "prefixItems"):
        yield from schema.get(key, ())
    yield from schema.get("properties", {}).values()
    keys = ("items", "additionalProperties", "propertyNames", "unevaluatedItems", "unevaluatedProperties")
    yield from (schema[key] for key in keys if key in schema)


def _resolved(schema: dict[str, Any], root: dict[str, Any]) -> Any:
    path = schema["$ref"]
    if not isinstance(path, str) or (path != "#" and not path.startswith("#/")) or "~" in path or "%" in path:
        raise ValueError("'$ref' needs a place in the schema, as '#/$defs/name'")
    found: Any = root
    for name in path.split("/")[1:]:
        if isinstance(found, list) and name.isdecimal() and int(name[:9]) < len(found):
            found = found[int(name[:9])]
        elif isinstance(found, dict) and name in found:
            found = found[name]
        else:
            raise ValueError("'$ref' names a place that the schema has not")
    return found


def _types(schema: dict[str, Any]) -> list[Any]:
    """The types that a schema names, or that its parts stand for."""
    named = schema.get("type")
    if named is None:
        return [name for name, key in (("object", "properties"), ("array", "items")) if key in schema][:1]
    if named == []:
        raise ValueError("'type' needs a type at least")
    return named if isinstance(named, list) else [named]


def _types_of(value: Any) -> set[str]:
    """The types of a value, as "type" names them."""
    if isinstance(value, bool):
        return {"boolean"}
    if isinstance(value, (int, float)):
        return {"number", "integer"} if _whole_number(value) else {"number"}
    kinds: dict[type, str] = {str: "string", list: "array", dict: "object"}
    return {kinds.get(type(value), "null")}


def _whole_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and value == value // 1


def _apart(one: Any, other: Any, root: dict[str, Any], level: int = 0) -> bool:
    """Whether it is plain that no value fits two schemas."""
    one, other = (_followed(each, root) for each in (one, other))
    if level > DEEPEST or not (isinstance(one, dict) and isinstance(other, dict)):
        return False
    for first, second in ((one, other), (other, one)):
        for key in ("anyOf", "oneOf", "allOf"):
            if key in first and isinstance(first[key], list):
                return all(_apart(each, second, root, level + 1) for each in first[key])
    values = [_values(each) for each in (one, other)]
    if values[0] is not None and values[1] is not None:
        return not any(value in values[1] for value in values[0])
    kinds = [_kinds(each) for each in (one, other)]
    if all(kinds) and not kinds[0] & kinds[1]:
        return True
    shared = set(one.get("required", ())) & set(other.get("required", ()))
    return kinds == [{"object"}, {"object"}] and any(
        _apart(one["properties"][name], other["properties"][name], root, level + 1)
        for name in shared & set(one.get("properties", ())) & set(other.get("properties", ()))
    )


def _followed(schema: Any, root: dict[str, Any]) -> Any:
    for _ in range(DEEPEST):
        if isinstance(schema, dict) and "$ref" in schema:
            schema = _resolved(schema, root)
    return schema


def _values(schema: dict[str, Any]) -> list[Any] | None:
    """The only values that fit, where a schema lists them."""
    if "const" in schema:
        return [schema["const"]]
    return schema["enum"] if isinstance(schema.get("enum"), list) else None


def _kinds(schema: dict[str, Any]) -> set[str]:
    """The types whose values may fit, with "number" for integers as well; none where any may."""
    values = _values(schema)
    names = _types(schema) if values is None else [name for value in values for name in _types_of(value)]
    return {"number" if name == "integer" else str(name) for name in names}
