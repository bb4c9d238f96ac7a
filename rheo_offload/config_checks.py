"""Checks of configuration values: their types against the annotations, their ranges, and sizes in bytes."""

import re
import types
import typing
from dataclasses import fields
from typing import Any, Literal

from rheo_offload.errors import ConfigError

SIZE_UNITS = {"": 1, "B": 1} | {
    prefix + suffix: base**power
    for suffix, base in (("B", 1000), ("iB", 1024))
    for power, prefix in enumerate("KMGT", start=1)
}


def parse_bytes(size: int | str) -> int:
    """Return a size in bytes: an int as it is, text such as `8GiB`, `1.5 GiB`, `512MiB` or `20GB` converted.

    Raises:
        ValueError: not a size, or not positive.
    """
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([A-Za-z]*)", str(size).strip())
    if isinstance(size, bool) or not match or match[2] not in SIZE_UNITS:
        raise ValueError(f"{size!r} is not a size; write bytes as an integer, or for example 8GiB or 512MiB")
    size_bytes = int(float(match[1]) * SIZE_UNITS[match[2]]) if match[2] else int(float(match[1]))
    if size_bytes <= 0:
        raise ValueError(f"a size must be positive, not {size!r}")
    return size_bytes


def require(condition: bool, path: str, allowed: str, value: Any) -> None:
    """Raise ConfigError naming the key, what it allows and what it got, unless `condition` holds."""
    if not condition:
        raise ConfigError(f"{path} must be {allowed}, not {value!r}")


def require_size(value: int | str, path: str, words: tuple[str, ...]) -> None:
    """Raise ConfigError unless the value is one of `words` or a size that `parse_bytes` reads."""
    try:
        if value not in words:
            parse_bytes(value)
    except ValueError as error:
        raise ConfigError(f"{path} must be {', '.join(words)} or a size: {error}") from error


def check_types(group: Any, name: str) -> None:
    """Raise ConfigError for the first field of a dataclass whose value does not fit its annotation."""
    for f in fields(group):
        value = getattr(group, f.name)
        require(_conforms(value, f.type), f"{name}.{f.name}", _spelled(f.type), value)


def _conforms(value: Any, expected: Any) -> bool:
    origin, args = typing.get_origin(expected), typing.get_args(expected)
    if origin in (typing.Union, types.UnionType):
        return any(_conforms(value, option) for option in args)
    if origin is Literal:
        return isinstance(value, str) and value in args
    if origin is tuple:
        return isinstance(value, tuple) and all(_conforms(item, args[0]) for item in value)
    if origin is dict:
        return isinstance(value, dict) and all(
            _conforms(k, args[0]) and _conforms(v, args[1]) for k, v in value.items()
        )
    if expected is Any:
        return True
    if expected is float:
        return isinstance(value, int | float) and not isinstance(value, bool)
    return type(value) is expected


def _spelled(expected: Any) -> str:
    origin, args = typing.get_origin(expected), typing.get_args(expected)
    if origin in (typing.Union, types.UnionType):
        return " or ".join(_spelled(option) for option in args)
    if origin is Literal:
        return f"one of {', '.join(args)}" if len(args) > 1 else str(args[0])
    if origin is tuple:
        return f"a list, each item {_spelled(args[0])}"
    if origin is dict and args[0] is int:
        return "pairs of integers"
    names = {
        int: "an integer",
        float: "a number",
        bool: "true or false",
        str: "text",
        dict: "a group of keys",
        types.NoneType: "null",
    }
    return names[origin or expected]
