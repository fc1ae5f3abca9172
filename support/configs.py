"""JSON, read strictly, and the configurations that are made of it.

weights.py and support/layouts.py read config.json here, support/methods.py and support/adapters.py
an adapter's settings, support/tables.py its rows.
"""
import json
import sys
from collections import Counter
from dataclasses import MISSING, fields
from pathlib import Path
from typing import TypeVar

from support import foreign

Config = TypeVar("Config")


def once(entries: list[tuple[str, object]]) -> dict:
    """An object's entries. Raises: ValueError when one stands there twice: which is meant?"""
    names = dict(entries)
    if len(names) < len(entries):
        twice, _ = Counter(name for name, _ in entries).most_common(1)[0]
        raise ValueError(f"the entry {twice[:60]!r} stands there twice")
    return names


def parse_json(text: str | bytes, where: object) -> object:
    """Any JSON value. Raises: ValueError naming where the text is from."""
    try:
        return json.loads(text, object_pairs_hook=once)
    except (ValueError, RecursionError) as error:        # no JSON, no UTF-8, endless digits or [[[
        why = f"{error.msg}, column {error.colno}" if isinstance(
            error, json.JSONDecodeError) and error.lineno == 1 else error
        raise ValueError(f"{where}: not valid JSON ({why})") from None


def checked_object(value: object, where: object) -> dict:
    """A JSON value that must be an object. Raises: ValueError naming where it is from."""
    if not isinstance(value, dict):
        raise ValueError(f"{where}: expected a JSON object, found {type(value).__name__}")
    return value


def json_object(text: str | bytes, where: object) -> dict:
    """A JSON object. Raises: ValueError naming where the text is from."""
    return checked_object(parse_json(text, where), where)


def read_json(path: Path) -> dict:
    """A JSON object. Raises: FileNotFoundError; ValueError when it is no JSON object."""
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file")
    text = path.read_bytes()
    foreign.check_text(text[:512], path)
    return json_object(text, path)


def of_kind(value: object, kind: type) -> bool:
    """Whether an entry is of its field's type: counts not negative, sizes in a list not zero."""
    if kind == tuple[int, ...]:
        return (isinstance(value, tuple) and len(value) > 0
                and all(of_kind(v, int) and v > 0 for v in value))
    if kind == tuple[str, ...]:
        return isinstance(value, tuple) and all(isinstance(v, str) for v in value)
    if kind is int:
        return type(value) is int and 0 <= value < 2 ** 31       # True is no count
    if kind is float:
        return type(value) in (int, float) and abs(value) <= sys.float_info.max
    return type(value) is kind


def has_all(cls: type, values: object) -> bool:
    """Whether these are entries of a config.json, with all that a config dataclass must have."""
    return isinstance(values, dict) and all(
        entry.name in values for entry in fields(cls) if entry.default is MISSING)


def config_from(cls: type[Config], values: dict, where: str | Path, whole: bool = False) -> Config:
    """Build a config dataclass from the entries of a config.json that it has fields for.

    Lists become tuples; `whole`: there may be no further entries.
    Raises: ValueError naming an entry that is missing, unknown or of another type.
    """
    known = [entry.name for entry in fields(cls)]
    if whole and values.keys() - set(known):
        raise ValueError(f"{where}: unknown entry {min(values.keys() - set(known))!r}; "
                         f"it may hold {', '.join(known)}")
    found = {}
    for entry in fields(cls):
        if entry.name in values:
            value = values[entry.name]
            value = tuple(value) if isinstance(value, list) else value
            if not of_kind(value, entry.type):
                kind = ("a whole number from 0 up" if entry.type is int else
                        entry.type.__name__ if isinstance(entry.type, type) else entry.type)
                raise ValueError(f"{where}: {entry.name} should be {kind}, found {value!r}")
            found[entry.name] = value
        elif entry.default is MISSING:
            raise ValueError(f"{where}: has no entry {entry.name!r}")
    return cls(**found)
