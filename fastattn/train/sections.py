"""Sections of options as dataclasses, read from YAML files and command-line words; keys and types are checked."""

from __future__ import annotations

import collections.abc
import dataclasses
import difflib
import inspect
import os
import types
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

import yaml

from fastattn.cache import write_atomically


class ConfigError(ValueError):
    """An option is unknown, of the wrong type or out of range, or the output directory cannot be used."""


def check_types(config: Any) -> None:
    """Convert the fields of a frozen dataclass to their types, or raise ConfigError."""
    hints = get_type_hints(type(config))
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        object.__setattr__(config, field.name, _convert(value, hints[field.name], field.name, text=False))


def load_config(
    sections: Mapping[str, type],
    *,
    file: str | os.PathLike[str] | None = None,
    overrides: Sequence[str] = (),
    defaults: Mapping[str, Mapping[str, Any]] | None = None,
) -> dict[str, Any]:
    """Build one dataclass per section from defaults, then a YAML file, then command-line overrides.

    The file maps each section's name to its options. An override is `--section.key=value`, or `--key=value` if only one
    section has that key.

    Args:
        sections: name of each section and its dataclass.
        file: YAML file, or None.
        overrides: command-line words.
        defaults: values to start from, per section.

    Returns:
        For each section's name its dataclass with the options.

    Raises:
        ConfigError: the file is missing or not a mapping of sections, a section or key is unknown (the message has the
            nearest name) or ambiguous, a required option is missing, or a value has the wrong type or range.
    """
    given = given_options(sections, file=file, overrides=overrides)
    start = {name: (defaults or {}).get(name, {}) for name in sections}
    return {name: _build(kind, name, {**start[name], **given[name]}) for name, kind in sections.items()}


def given_options(
    sections: Mapping[str, type],
    *,
    file: str | os.PathLike[str] | None = None,
    overrides: Sequence[str] = (),
) -> dict[str, dict[str, Any]]:
    """The options that a file and overrides set, by section, converted to their types; as `load_config` reads them."""
    values: dict[str, dict[str, Any]] = {name: {} for name in sections}
    if file is not None:
        for name, options in _read_yaml(Path(file)).items():
            _known(name, sections, f"{file}: section")
            if not isinstance(options, dict):
                raise ConfigError(f"{file}: section {name} holds {options!r}, needs options as key: value")
            for key, value in options.items():
                hint = _hint(sections[name], key, f"{file}: {name}")
                values[name][key] = _convert(value, hint, f"{file}: {name}.{key}", text=False)
    for word in overrides:
        name, key, written = _parse_override(word, sections)
        values[name][key] = _convert(written, _hint(sections[name], key, name), f"--{name}.{key}", text=True)
    return values


def save_config(sections: Mapping[str, Any], path: str | os.PathLike[str]) -> None:
    """Write sections as a YAML file that `load_config` reads back to equal ones.

    Args:
        sections: name of each section and its options, a dataclass.
        path: the file; its directory is created if it does not exist.

    Raises:
        OSError: the file cannot be written.
    """
    values = {name: dataclasses.asdict(section) for name, section in sections.items()}
    for options in values.values():
        options.update({key: list(value) for key, value in options.items() if isinstance(value, tuple)})
        # subclasses of int in configs, such as derived sizes, are written as numbers
        options.update(
            {key: int(v) for key, v in options.items() if isinstance(v, int) and not isinstance(v, bool)}
        )
    text = yaml.safe_dump(values, sort_keys=False, allow_unicode=True)
    # PyYAML writes some line separators as they are and folds them when it reads.
    if yaml.safe_load(text) != values:
        text = yaml.safe_dump(values, sort_keys=False)
    write_atomically(Path(path), text)


def _read_yaml(path: Path) -> dict[str, Any]:
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read ({error.strerror or error})") from None
    except (yaml.YAMLError, ValueError, RecursionError) as error:  # ValueError: bytes, or an impossible date
        raise ConfigError(f"{path}: is not YAML ({' '.join(str(error).split())})") from None
    if content is None:
        return {}
    if not isinstance(content, dict):
        raise ConfigError(f"{path}: holds a {type(content).__name__}, needs sections as name: options")
    return content


def _parse_override(word: str, sections: Mapping[str, type]) -> tuple[str, str, str]:
    path, equals, written = word.partition("=")
    if not path.startswith("--") or not equals:
        raise ConfigError(f"{word}: needs --section.key=value")
    path = path[2:].replace("-", "_")
    name, dot, key = path.partition(".")
    if dot:
        _known(name, sections, "--" + path + ": section")
        return name, key, written
    owners = [section for section, kind in sections.items() if path in _keys(kind)]
    if len(owners) > 1:
        choices = " or ".join(f"--{owner}.{path}" for owner in owners)
        raise ConfigError(f"--{path}: more than one section has it, write {choices}")
    if not owners:
        everywhere = {key: f"{section}.{key}" for section, kind in sections.items() for key in _keys(kind)}
        near = difflib.get_close_matches(path, everywhere, n=1)
        hint = f", did you mean --{everywhere[near[0]]}?" if near else ""
        raise ConfigError(f"--{path}: no section has this option{hint}")
    return owners[0], path, written


def _known(name: str, choices: Mapping[str, Any] | Sequence[str], what: str) -> None:
    if name not in choices:
        near = difflib.get_close_matches(str(name), list(choices), n=1)
        hint = f", did you mean {near[0]}?" if near else f", the names are {', '.join(choices)}"
        raise ConfigError(f"{what} {name!r} is unknown{hint}")


def _keys(kind: type) -> list[str]:
    return list(inspect.signature(kind).parameters)


def _hint(kind: type, key: str, where: str) -> Any:
    _known(key, _keys(kind), f"{where}: option")
    hint = get_type_hints(kind)[key]
    return hint.type if isinstance(hint, dataclasses.InitVar) else hint


def _build(kind: type, name: str, values: dict[str, Any]) -> Any:
    parameters = inspect.signature(kind).parameters.values()
    missing = [p.name for p in parameters if p.default is p.empty and p.name not in values]
    if missing:
        raise ConfigError(f"{name}.{missing[0]}: is not set and has no default")
    return kind(**values)


def _convert(value: Any, hint: Any, where: str, *, text: bool) -> Any:
    """`value` as the hinted type, or ConfigError. With `text`, the value is a word of the command line."""
    origin = get_origin(hint)
    if hint is str and isinstance(value, os.PathLike):
        return os.fspath(value)
    if origin in (Union, types.UnionType):
        return _convert_union(value, get_args(hint), where, text=text)
    if origin is Literal:
        if value not in get_args(hint):
            near = difflib.get_close_matches(str(value), [str(choice) for choice in get_args(hint)], n=1)
            hinted = f", did you mean {near[0]}?" if near else ""
            raise ConfigError(
                f"{where}: got {value!r}, needs one of {', '.join(map(repr, get_args(hint)))}{hinted}"
            )
        return value
    if origin in (tuple, list, collections.abc.Sequence):
        return _convert_sequence(value, hint, where, text=text)
    if hint is float and isinstance(value, (int, str)) and not isinstance(value, bool):
        try:
            return float(value)  # YAML 1.1 reads 3e-4 as a string
        except (ValueError, OverflowError):
            pass
    elif text and hint in (int, bool):
        value = _parse_word(value, hint)
    if (
        isinstance(hint, type)
        and isinstance(value, hint)
        and not (hint is not bool and isinstance(value, bool))
    ):
        return value
    raise ConfigError(f"{where}: got {value!r}, needs {_TYPE_NAMES.get(hint, hint)}")


_TYPE_NAMES = {int: "an integer", float: "a number", bool: "true or false", str: "a string"}


def _parse_word(word: str, hint: type) -> Any:
    if hint is bool:
        return {"true": True, "false": False}.get(word.lower(), word)
    try:
        return int(word)
    except ValueError:
        return word


def _convert_union(value: Any, choices: tuple[Any, ...], where: str, *, text: bool) -> Any:
    if type(None) in choices and (value is None or (text and value.lower() in ("none", "null"))):
        return None
    choices = tuple(choice for choice in choices if choice is not type(None))
    for choice in choices:
        try:
            return _convert(value, choice, where, text=text)
        except ConfigError as error:
            failed = error
    if len(choices) == 1:
        raise failed
    raise ConfigError(
        f"{where}: got {value!r}, needs {' or '.join(str(_TYPE_NAMES.get(c, c)) for c in choices)}"
    )


def _without_brackets(text: str) -> str:
    """The text in the one pair of brackets that encloses all of it, or the text itself."""
    closing = {"[": "]", "(": ")"}.get(text[:1])
    depth = 0
    for place, character in enumerate(text if closing else ""):
        depth += (character == text[0]) - (character == closing)
        if depth == 0:
            return text[1:-1] if place == len(text) - 1 else text
    return text


def _convert_sequence(value: Any, hint: Any, where: str, *, text: bool) -> Any:
    if text:
        value = [word.strip() for word in _without_brackets(value.strip()).split(",") if word.strip()]
    if not isinstance(value, (list, tuple)):
        raise ConfigError(f"{where}: got {value!r}, needs a list")
    arguments = get_args(hint)
    if get_origin(hint) is not tuple or arguments[1:] == (Ellipsis,):
        arguments = (arguments[0],) * len(value)
    if len(value) != len(arguments):
        raise ConfigError(f"{where}: got {len(value)} values, needs {len(arguments)}")
    items = [
        _convert(item, kind, f"{where}[{i}]", text=text)
        for i, (item, kind) in enumerate(zip(value, arguments, strict=True))
    ]
    return tuple(items) if get_origin(hint) is tuple else items
