"""Dataclass fields as the one description of a configuration: TOML tables, command-line flags and manifests. No torch.

`build` makes a dataclass from a table and names every mistake; `as_table` is its inverse; `add_flags` and `given_flags`
do the same for argparse. Values are read strictly: no number is made from a string, no string from a number.
"""

from __future__ import annotations

import argparse
import dataclasses
import datetime
import json
import math
import tomllib
import types
import typing
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol, Self, TypeVar, runtime_checkable

from pydantic import PydanticUserError, TypeAdapter, ValidationError

from duo import plugins
from duo.errors import UserError, did_you_mean
from duo.foreign import TOO_DEEP, read_text, refuse_deep

T = TypeVar("T")


@runtime_checkable
class _Tabled(Protocol):
    """A record whose table is not its fields one by one."""

    @classmethod
    def from_table(cls, table: object, where: str) -> Self: ...

    def table(self) -> dict[str, Any]: ...


@dataclasses.dataclass(frozen=True, kw_only=True)
class LeafConfig:
    """A leaf by name with its own fields, written as one flat table: `{name = "duo", beta = 20.0}`."""

    name: str
    settings: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    @classmethod
    def from_table(cls, table: object, where: str) -> Self:
        """Split `name` from the leaf's own fields, which are checked when the leaf is made."""
        if not isinstance(table, Mapping) or not isinstance(table.get("name"), str):
            raise UserError(f"{where} is {_shown(table)}, expected a table with the name of a plugin: {{name = …}}")
        return cls(name=table["name"], settings={key: value for key, value in table.items() if key != "name"})

    def table(self) -> dict[str, Any]:
        """The flat table that `from_table` reads."""
        return {"name": self.name, **self.settings}

    def make(self, kind: str, where: str, *, beside: Iterable[str] = ("name",)) -> Any:
        """Import the leaf of `kind` and build it from the settings; `beside` are the table's other fields."""
        return build_fields(plugins.load(kind, self.name), self.settings, where, beside=beside)


def build(cls: type[T], mapping: object, where: str) -> T:
    """Make the dataclass `cls` from a TOML table.

    Nested dataclasses are built from nested tables; a class with `from_table(table, where)` reads its own. `where`
    names the table in messages: `pairs`, or a file with a colon, `recipe demo:`. An unknown field, a missing one or a
    wrong type is a `UserError` of one line.
    """
    if isinstance(mapping, cls):
        return mapping
    if issubclass(cls, _Tabled):
        return cls.from_table(mapping, where)
    return build_fields(cls, mapping, where)


def build_fields(cls: type[T], mapping: object, where: str, *, beside: Iterable[str] = ()) -> T:
    """As `build`, by the fields alone: what a `from_table` calls once it has sorted its table.

    `beside` are names that the user's table may hold too: an unknown field may be one of them, mistyped.
    """
    if not isinstance(mapping, Mapping):
        raise UserError(f"{where} is {_shown(mapping)}, expected a table")
    fields = {field.name: field for field in dataclasses.fields(cls) if field.init}  # type: ignore[arg-type]
    hints = typing.get_type_hints(cls)
    for name in mapping:
        if name not in fields:
            raise UserError(f"{where.rstrip(':')} has no field {name!r}{did_you_mean(str(name), [*fields, *beside])}")
    values = {}
    for name, field in fields.items():
        if name in mapping:
            values[name] = _value(hints[name], mapping[name], _inside(where, name))
        elif field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING:
            raise UserError(f"{_inside(where, name)} is missing, expected {_described(hints[name])}")
    try:
        return cls(**values)
    except ValueError as error:
        raise UserError(f"{where.rstrip(':')}: {error}") from error


def as_table(value: Any) -> Any:
    """A configuration as JSON and TOML hold it: dataclasses become tables, tuples lists, paths strings."""
    if value is None or isinstance(value, (str, int, float)):  # nearly all, and the next question is a slow one
        return value
    if isinstance(value, _Tabled):
        return as_table(value.table())
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {field.name: as_table(getattr(value, field.name)) for field in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return {str(key): as_table(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [as_table(item) for item in value]
    return str(value) if isinstance(value, Path) else value


def as_said(value: Any) -> Any:
    """As `as_table`, but without the fields of dataclasses that have their defaults: what a record says for itself.

    A digest of it stays the same where a later version of duo has more fields.
    """
    if isinstance(value, _Tabled):
        return as_said(value.table())
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}
        defaults = {field.name: _default(field) for field in dataclasses.fields(value)}
        return {name: as_said(item) for name, item in fields.items() if item != defaults[name]}
    if isinstance(value, Mapping):
        return {str(key): as_said(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [as_said(item) for item in value]
    return as_table(value)


def at_default(value: Any) -> dict[str, Any]:
    """Of the table of a dataclass the fields that have their defaults: what a record from before there were such fields
    may lack. A later field's default has to mean what was done without it."""
    fields = dataclasses.fields(value)
    return {field.name: as_table(_default(field)) for field in fields if getattr(value, field.name) == _default(field)}


def _default(field: dataclasses.Field[Any]) -> Any:
    return field.default if field.default_factory is dataclasses.MISSING else field.default_factory()


def add_flags(
    parser: argparse.ArgumentParser | argparse._ArgumentGroup, cls: type, values: Mapping[str, Any] | None = None
) -> None:
    """One flag for each plain field of `cls`: `--learning-rate FLOAT`, `--resume/--no-resume` for a bool.

    The help tells what stands where a flag is not given: what `values`, a recipe's table, has, or else the default of
    the field. Flags that are not given leave no trace in the namespace, so that a recipe's own values stand (see
    `given_flags`).
    """
    hints = typing.get_type_hints(cls)
    for field in dataclasses.fields(cls):
        hint = hints[field.name]
        if not field.init or _nested(hint) is not None:
            continue
        flag, note = "--" + field.name.replace("_", "-"), _default_shown(field, values or {})
        if hint is bool:
            parser.add_argument(
                flag, dest=field.name, action=argparse.BooleanOptionalAction, default=argparse.SUPPRESS, help=note
            )
        else:
            parser.add_argument(
                flag,
                dest=field.name,
                type=_FlagType(flag, hint),
                default=argparse.SUPPRESS,
                metavar=_metavar(hint),
                help=note,
            )


def given_flags(namespace: argparse.Namespace, cls: type) -> dict[str, Any]:
    """The fields of `cls` that were given as flags."""
    names = [field.name for field in dataclasses.fields(cls)]
    return {name: getattr(namespace, name) for name in names if hasattr(namespace, name)}


def read_value(text: str) -> Any:
    """`text` as TOML would read it after an equals sign; a bare word is a string."""
    try:
        return tomllib.loads(f"value = {text}")["value"]
    except ValueError:  # not TOML, or a number of thousands of digits
        return text


def read_toml(path: Path) -> dict[str, Any]:
    """The tables of a TOML file, or a `UserError` that names file and line."""
    try:
        text = read_text(path)
        if any(part.count(".") > _MANY_DOTS for line in text.splitlines() for part in _names(line)):
            raise ValueError(TOO_DEEP)  # of such names tomllib takes hours
        table = tomllib.loads(text)
        refuse_deep(table)
        return table
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from error
    except (ValueError, RecursionError) as error:  # of tomllib, of UTF-8, or of a path with a NUL in it
        raise UserError(f"{path} is not valid TOML: {error}") from error


_MANY_DOTS = 1000  # in a name of a table or field


def _names(line: str) -> list[str]:
    """The parts of a line of TOML in which names can stand."""
    return [line] if line.lstrip().startswith("[") else line.split("=")[:-1]


class _FlagType:
    """Reads one flag's text by its field's type; argparse calls it."""

    def __init__(self, flag: str, hint: Any) -> None:
        self.flag, self.hint = flag, hint

    def __call__(self, text: str) -> Any:
        texts = self.hint is str or (_is_union(self.hint) and str in typing.get_args(self.hint))
        return _value(self.hint, text if texts else read_value(text), self.flag)


def _value(hint: Any, value: Any, where: str) -> Any:
    if value is None and _is_union(hint) and type(None) in typing.get_args(hint):
        return None
    nested = _nested(hint)
    if nested is not None:
        container, item = nested
        if container is None:
            return build(item, value, where)
        if container is tuple:
            if not isinstance(value, (list, tuple)):
                raise UserError(f"{where} is {_shown(value)}, expected a list of tables")
            return tuple(build(item, entry, f"{where}[{index}]") for index, entry in enumerate(value))
        if not isinstance(value, Mapping):
            raise UserError(f"{where} is {_shown(value)}, expected a table of tables")
        return {key: build(item, entry, f"{where}.{key}") for key, entry in value.items()}
    if unfit := _unfit(value):
        raise UserError(f"{where} is {unfit}, expected {_described(hint)}")
    try:
        # Strict JSON is what TOML means: an array may fill a tuple, but "1" is no number and 1 is no truth value.
        return TypeAdapter(hint).validate_json(json.dumps(as_table(value)), strict=True)
    except PydanticUserError as error:
        raise TypeError(f"{where}: the type {hint} cannot be configured") from error
    except ValidationError as error:
        inner = error.errors()[0]["loc"]
        place = where + "".join(f"[{part}]" for part in inner if isinstance(part, int))
        raise UserError(f"{place} is {_shown(value)}, expected {_described(hint)}") from error


def _unfit(value: object) -> str | None:
    """What TOML can hold and a configuration cannot, in words, at whatever depth; None where all is well."""
    if isinstance(value, Mapping):
        value = tuple(value.values())
    if isinstance(value, (list, tuple)):
        return next(filter(None, map(_unfit, value)), None)
    if isinstance(value, (datetime.date, datetime.time)):
        return "a date or a time"
    if isinstance(value, float) and not math.isfinite(value):
        return f"{value}, which is not finite"
    if isinstance(value, int) and abs(value) >= 2**63:
        return f"{_shown(value)}, which does not fit in 64 bits"
    return None


def _inside(where: str, name: str) -> str:
    return f"{where} {name}" if where.endswith(":") else f"{where}.{name}"


def _nested(hint: Any) -> tuple[type | None, Any] | None:
    """(None, cls), (tuple, cls) or (dict, cls) for a dataclass, a tuple of them or a mapping to them; else None."""
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if _is_union(hint):
        inner = [arg for arg in args if dataclasses.is_dataclass(arg)]
        return (None, inner[0]) if inner else None
    if dataclasses.is_dataclass(hint):
        return None, hint
    if origin is tuple and len(args) == 2 and args[1] is Ellipsis and dataclasses.is_dataclass(args[0]):
        return tuple, args[0]
    if origin in (dict, Mapping) and dataclasses.is_dataclass(args[1]):
        return dict, args[1]
    return None


def _is_union(hint: Any) -> bool:
    return typing.get_origin(hint) in (typing.Union, types.UnionType)


def _described(hint: Any) -> str:
    """A type in plain words."""
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if hint is type(None):
        return "nothing"
    if _is_union(hint):
        return " or ".join(_described(arg) for arg in args)
    if origin is typing.Literal:
        return "one of " + ", ".join(repr(arg) for arg in args)
    if origin in (tuple, list):
        return f"a list of {_described(args[0])}"
    if origin in (dict, Mapping) or dataclasses.is_dataclass(hint):
        return "a table"
    plain: dict[Any, str] = {int: "an integer", float: "a number", str: "a string", bool: "true or false"}
    return plain.get(hint, getattr(hint, "__name__", str(hint)))


def _metavar(hint: Any) -> str:
    """A flag's value in its help: INTEGER, NUMBER, TEXT, LIST or the choices."""
    if _is_union(hint):
        return _metavar(next(arg for arg in typing.get_args(hint) if arg is not type(None)))
    if typing.get_origin(hint) is typing.Literal:
        return "|".join(map(str, typing.get_args(hint)))
    plain: dict[Any, str] = {int: "INTEGER", float: "NUMBER", str: "TEXT"}
    return plain.get(hint, "LIST" if typing.get_origin(hint) in (tuple, list) else "VALUE")


def _default_shown(field: dataclasses.Field[Any], values: Mapping[str, Any]) -> str:
    if field.name in values:
        return f"the recipe's: {as_table(values[field.name])}".replace("%", "%%")
    if field.default is not dataclasses.MISSING:
        return f"default: {as_table(field.default)}".replace("%", "%%")
    if field.default_factory is not dataclasses.MISSING:
        return f"default: {as_table(field.default_factory())}".replace("%", "%%")
    return "required"


def _shown(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "…"


# --- what a dataclass checks of its own fields ---------------------------------------------------------


def check_above_0(of: Any, *names: str) -> None:
    """Raise `ValueError` where one of these fields is not a number above 0."""
    for name in names:
        if not getattr(of, name) > 0:
            raise ValueError(f"{name} is {getattr(of, name)}, expected a number above 0")


def check_from_0(of: Any, *names: str) -> None:
    """Raise `ValueError` where one of these fields is below 0, or no number."""
    for name in names:
        if not getattr(of, name) >= 0:
            raise ValueError(f"{name} is {getattr(of, name)}, expected 0 or more")


def check_above_0_or_none(of: Any, *names: str) -> None:
    """Raise `ValueError` where one of these fields is given, and not a number above 0."""
    for name in names:
        if getattr(of, name) is not None and not getattr(of, name) > 0:
            raise ValueError(f"{name} is {getattr(of, name)}, expected a number above 0, or none")


def check_choices(of: Any, choices: Mapping[str, Sequence[str]]) -> None:
    """Raise `ValueError` where a field is none of its `choices`."""
    for name, known in choices.items():
        if getattr(of, name) not in known:
            raise ValueError(f"{name} is {getattr(of, name)!r}, expected one of {', '.join(known)}")
