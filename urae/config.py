"""Typed configs from TOML, the command line and Python: one source of truth, strictly read."""

import difflib
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import fields
from functools import cache
from pathlib import Path
from typing import Any, TypeVar, cast, get_type_hints

from pydantic import TypeAdapter, ValidationError

Config = TypeVar("Config")

_RULES = {
    "int_parsing": "must be a whole number",
    "int_type": "must be a whole number",
    "int_from_float": "must be a whole number",
    "float_parsing": "must be a number",
    "float_type": "must be a number",
    "bool_parsing": "must be true or false",
    "bool_type": "must be true or false",
    "dataclass_type": "must be a section",
}


def read_toml(path: Path) -> dict[str, Any]:
    """Read a TOML file.

    Raises:
        FileNotFoundError: If there is none.
        ValueError: If it is not TOML.
    """
    if not path.is_file():
        raise FileNotFoundError(f"recipe {path} does not exist")
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"recipe {path} is not TOML: {error}") from error


def override(settings: dict[str, Any], arguments: Sequence[str]) -> dict[str, str]:
    """Set fields from `--section.field value` arguments, in place.

    Values are read as TOML (numbers, true, ["a", "b"]), and as plain text where they are not.

    Returns:
        What was typed for each field, `--section.field value`, by the field's dotted name.

    Raises:
        ValueError: If an argument is no option or lacks its value.
    """
    remaining = list(arguments)
    typed: dict[str, str] = {}
    while remaining:
        option = remaining.pop(0)
        if not option.startswith("--") or len(option) < 3:
            raise ValueError(f"unexpected argument {option!r}; fields are set as --name value")
        key, equals, text = option[2:].partition("=")
        if not equals:
            if not remaining:
                raise ValueError(f"option --{key} needs a value")
            text = remaining.pop(0)
        dotted = key.replace("-", "_")
        typed[dotted] = f"--{key} {text}"
        *sections, name = dotted.split(".")
        target = settings
        for section in sections:
            target = target.setdefault(section, {})
            if not isinstance(target, dict):
                raise ValueError(f"option --{key}: {section} is a value, not a section")
        target[name] = _parse_value(text)
    return typed


def _parse_value(text: str) -> Any:
    try:
        return tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        return None if text == "none" else text


def build_config(
    kind: type[Config],
    settings: Mapping[str, Any],
    origin: str,
    typed: Mapping[str, str] | None = None,
) -> Config:
    """Build a config object from plain settings.

    Args:
        kind: A dataclass whose `__pydantic_config__` forbids extra keys.
        settings: Field values, nested as the dataclass is.
        origin: Where they come from, for the error.
        typed: What `override` returned; an error of such a field names the option, not the origin.

    Raises:
        ValueError: One line that names the field, what is wrong and, for an unknown key, the
            nearest one.
    """
    typed = typed or {}
    _check_options(kind, typed)
    adapter: TypeAdapter[Config] = _build_adapter(cast(Any, kind))
    try:
        return adapter.validate_python(dict(settings))
    except ValidationError as error:
        raise ValueError(_explain(adapter, error, origin, typed)) from error


def _check_options(kind: Any, typed: Mapping[str, str]) -> None:
    known = [name for name, _, _ in describe_fields(kind)] if typed else []
    for name, option in typed.items():
        if any(f"{name}.".startswith(f"{each}.") or each.startswith(f"{name}.") for each in known):
            continue
        near = _find_near(name, known)
        hint = f"; did you mean --{near.replace('_', '-')}?" if near else ";"
        raise ValueError(
            f"{option.partition(' ')[0]}: no such field{hint} urae train --fields lists all"
        )


def _explain(
    adapter: TypeAdapter[Any], error: ValidationError, origin: str, typed: Mapping[str, str]
) -> str:
    """Say in one line what is wrong: the option as it was typed, or the origin and the field."""
    first = error.errors()[0]
    where = ".".join(map(str, first["loc"]))
    field = f"{where}: " if where else ""
    if first["type"] in ("unexpected_keyword_argument", "extra_forbidden"):
        return f"{origin}: {field}unknown key{_suggest(adapter, first['loc'])}"
    if first["type"] in ("missing", "missing_argument"):
        return f"{origin}: {field}is required"
    if "error" in first.get("ctx", {}):  # a rule of the config itself: "rank 0 must be ..."
        message = first["msg"].removeprefix("Value error, ")
        name, _, rest = message.partition(" ")
        if option := typed.get(f"{where}.{name}" if where else name):
            return f"{option.partition(' ')[0]} {rest}"
        return f"{origin}{' and the options' if typed else ''}: {field}{message}"
    for name, option in typed.items():
        if f"{where}.".startswith(f"{name}."):
            return f"{option}: {_describe_rules(error, name)}"
    rule = _RULES.get(first["type"], first["msg"])
    return f"{origin}: {field}{rule}, not {first['input']!r}"


def _describe_rules(error: ValidationError, name: str) -> str:
    """Say what a field may be; a union has an error for each of its choices."""
    rules = [
        _RULES.get(each["type"], each["msg"].replace("Input should be", "must be", 1))
        for each in error.errors()
        if f"{'.'.join(map(str, each['loc']))}.".startswith(f"{name}.")
    ]
    first, *others = dict.fromkeys(rules)
    return " or ".join([first, *(rule.removeprefix("must be ") for rule in others)])


def check_types(config: Any) -> None:
    """Check what Python passes to a frozen dataclass as strictly as what TOML says.

    For its `__post_init__`, before anything else. Lists become tuples and texts paths where the
    annotations say so.

    Raises:
        ValueError: One line that names the field, what it must be and what it is.
    """
    kind: Any = type(config)
    for name, adapter in _list_adapters(kind).items():
        value = getattr(config, name)
        try:
            checked = adapter.validate_python(value)
        except ValidationError as error:
            first = error.errors()[0]
            where = ".".join([name, *(str(at) for at in first["loc"] if isinstance(at, int))])
            raise ValueError(f"{where}: {first['msg']}, not {first['input']!r}") from error
        object.__setattr__(config, name, checked)


@cache  # it reads the source for the descriptions
def _build_adapter(kind: Any) -> TypeAdapter[Any]:
    return TypeAdapter(kind)


@cache
def _list_adapters(kind: Any) -> dict[str, TypeAdapter[Any]]:
    hints = get_type_hints(kind, include_extras=True)
    return {field.name: TypeAdapter(hints[field.name]) for field in fields(kind)}


def flatten(settings: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Write nested settings as one level of dotted names, with plain JSON values."""
    flat: dict[str, Any] = {}
    for name, value in settings.items():
        if isinstance(value, Mapping):
            flat |= flatten(value, f"{prefix}{name}.")
        elif isinstance(value, tuple) and value and isinstance(value[0], Mapping):
            flat |= flatten({str(at): each for at, each in enumerate(value)}, f"{prefix}{name}.")
        elif value is None or isinstance(value, bool | int | float):
            flat[prefix + name] = value
        else:
            flat[prefix + name] = str(value)
    return flat


@cache
def describe_fields(kind: Any) -> tuple[tuple[str, str, str], ...]:
    """List a config's fields for a help page: dotted name, default, description."""
    schema = _build_adapter(kind).json_schema()
    return tuple(_walk_fields(schema, schema, ""))


def _walk_fields(schema: Any, root: Any, prefix: str) -> list[tuple[str, str, str]]:
    rows = []
    for name, entry in schema.get("properties", {}).items():
        if nested := _follow(entry, root):
            rows += _walk_fields(nested, root, f"{prefix}{name}.")
            continue
        default = entry.get("default", "required")
        text = "none" if default is None else str(default)
        rows.append((prefix + name, text, " ".join(entry.get("description", "").split())))
    return rows


def _follow(entry: Any, root: Any) -> Any:
    """Return the schema that a field refers to, as it is or as one choice of several."""
    for choice in (entry, *entry.get("anyOf", [])):
        if "$ref" in choice:
            return root["$defs"][choice["$ref"].rsplit("/", 1)[1]]
    return None


def _suggest(adapter: TypeAdapter[Any], location: tuple[int | str, ...]) -> str:
    schema = adapter.json_schema()
    level = schema
    for part in location[:-1]:
        level = _follow(level.get("properties", {}).get(part, {}), schema) or {}
    names = list(level.get("properties", {}))
    if near := difflib.get_close_matches(str(location[-1]), names, n=1):
        return f"; did you mean {near[0]}?"
    fields = [name for name, _, _ in _walk_fields(schema, schema, "")]
    if len(location) == 1 and (other := _find_near(str(location[0]), fields)):
        return f"; did you mean {other}?"
    return f"; known keys: {', '.join(names)}"


def _find_near(name: str, known: Sequence[str]) -> str | None:
    """Find the dotted name that is most like another one, by its last part or as a whole."""
    texts = {each.rpartition(".")[2]: each for each in known}
    if "." not in name:
        texts |= {each: each for each in known}
    near = difflib.get_close_matches(name.rpartition(".")[2], texts, n=1)
    return texts[near[0]] if near else None
