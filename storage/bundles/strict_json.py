"""JSON of unknown origin, taken apart into known fields of known types or refused."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from typing import Any

MAX_INTEGER = 2**53 - 1
"""The largest that every JSON reader gives back as it was."""


class Unexpected(ValueError):
    """What is wrong with the text, to be put into a sentence."""


def parse(text: bytes) -> object:
    """The value that UTF-8 JSON holds; no key twice, no NaN.

    Raises:
        Unexpected: it is no such text.
    """
    try:
        return json.loads(text.decode("utf-8"), object_pairs_hook=_unique, parse_constant=_constant)
    except RecursionError as error:
        raise Unexpected("it is nested too deeply") from error
    except ValueError as error:
        raise Unexpected(str(error)) from error


def fields(value: object, types: Mapping[str, type], where: str) -> dict[str, Any]:
    """An object's fields: exactly those named, each of its type.

    Args:
        value: as parsed.
        types: `str` (no lone surrogates), `int` (0 to `MAX_INTEGER`), `float` (finite; integers are taken, too), `list`
            or `dict` by field.
        where: what the object is, for messages.

    Raises:
        Unexpected: naming the field.
    """
    if not isinstance(value, dict):
        raise Unexpected(f"{where} is no object")
    if value.keys() != types.keys():
        differing = sorted(value.keys() ^ types.keys())
        raise Unexpected(f"{where} lacks or has unknown fields: {', '.join(map(repr, differing[:5]))}")
    return {name: _typed(value[name], kind, f"{where}: {name}") for name, kind in types.items()}


def strings(values: Sequence[object], where: str) -> tuple[str, ...]:
    """A list's items, all of them strings.

    Raises:
        Unexpected: one is none.
    """
    return tuple(_typed(value, str, where) for value in values)


def _typed(value: object, kind: type, where: str) -> Any:
    # A bool is an int to isinstance.
    if kind is float and type(value) is int:
        value = float(value) if abs(value) <= MAX_INTEGER else math.inf
    if type(value) is not kind:
        raise Unexpected(f"{where} is {type(value).__name__}, expected {kind.__name__}")
    if isinstance(value, int) and not 0 <= value <= MAX_INTEGER:
        raise Unexpected(f"{where} is outside 0 to {MAX_INTEGER}")
    if isinstance(value, float) and not math.isfinite(value):
        raise Unexpected(f"{where} is not finite")
    if isinstance(value, str):
        try:
            value.encode("utf-8")
        except UnicodeEncodeError as error:
            raise Unexpected(f"{where} is no text") from error
    return value


def _unique(pairs: list[tuple[str, object]]) -> dict[str, object]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise Unexpected("an object has a field twice")
    return found


def _constant(name: str) -> object:
    raise Unexpected(f"{name} is no number")
