"""From command line and YAML to the dataclasses of `cluster.config`, and back to YAML.

jsonargparse does the parsing. What it says about an unknown key or a wrong value is turned into a
`ConfigError` that names the key, the closest valid one, and all valid ones of that section.
"""

from __future__ import annotations

import argparse
import difflib
import os
import re
from collections.abc import Sequence
from dataclasses import asdict, fields, is_dataclass
from typing import Any, Literal, NoReturn, TypeVar, get_args, get_origin, get_type_hints

import jsonargparse

from cluster.errors import ConfigError

JobT = TypeVar("JobT")

DEBUG_VARIABLE = "MEGACONTEXT_DEBUG"

# The forms in which jsonargparse reports what this module explains; any other text is passed on as it is.
_UNKNOWN_ARGUMENTS = re.compile(r"^unrecognized arguments: (?P<arguments>.*)$", re.DOTALL)
_UNKNOWN_IN_SECTION = re.compile(r"^Group '(?P<section>[^']+)' does not accept option '(?P<key>[^']+)'")
_UNKNOWN_OPTION = re.compile(r"^Option '(?P<key>[^']+)' is not accepted")
_WRONG_VALUE = re.compile(r"^Parser key \"(?P<key>[^\"]+)\":\s+Expected a .*Got value: (?P<value>.*)$", re.DOTALL)


class _SwitchDebugOn(argparse.Action):
    """`--debug` is the environment variable by another name: no configuration key, and workers inherit it."""

    def __init__(self, option_strings: Sequence[str], dest: str, **kwargs: Any) -> None:
        super().__init__(option_strings, argparse.SUPPRESS, nargs=0, default=argparse.SUPPRESS, **kwargs)

    def __call__(self, *_: Any) -> None:
        os.environ[DEBUG_VARIABLE] = "1"


class _JobParser(jsonargparse.ArgumentParser):
    """Raises `ConfigError` where argparse would print and exit."""

    job_type: type

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        raise ConfigError(_explain(self.job_type, message)) from ex


def build_parser(job_type: type, prog: str) -> jsonargparse.ArgumentParser:
    """The parser of one job: `--config`, `--print_config`, `--debug`, and a `--section.key` for every field.

    Args:
        job_type: a frozen dataclass of `cluster.config`, with a docstring under each field.
        prog: how the job is called, for `--help`.
    """
    jsonargparse.set_parsing_settings(docstring_parse_attribute_docstrings=True)
    parser = _JobParser(
        prog=prog,
        usage=f"{prog} [--config FILE] [--section.key value ...]",
        description=job_type.__doc__,
        allow_abbrev=False,
    )
    parser.job_type = job_type
    parser.add_argument(
        "--config", action="config", metavar="FILE", help="YAML recipe. What stands after it on the line wins."
    )
    parser.add_argument("--debug", action=_SwitchDebugOn, help="Show the traceback of an error.")
    parser.add_class_arguments(job_type)
    return parser


def parse_job(job_type: type[JobT], arguments: Sequence[str], prog: str = "ray_job.py") -> JobT:
    """Fill a job's configuration from command-line arguments and the recipes they name.

    Raises:
        ConfigError: for an unknown key, a value of the wrong type, an unreadable recipe.
        SystemExit: code 0, after `--help` or `--print_config` printed what they are for.
    """
    parser = build_parser(job_type, prog)
    parsed = parser.parse_args(list(arguments))
    sections = get_type_hints(job_type)
    for name in (field.name for field in fields(job_type)):  # type: ignore[arg-type]
        if is_dataclass(sections[name]) and not isinstance(parsed[name], jsonargparse.Namespace):
            raise ConfigError(
                f"the recipe's section {name!r} holds {parsed[name]!r} instead of keys; "
                f"leave it out for the defaults. {_valid_keys(job_type, name)}"
            )
    values = vars(parser.instantiate(parsed))
    return job_type(**{field.name: values[field.name] for field in fields(job_type)})  # type: ignore[arg-type]


def to_yaml(job: object) -> str:
    """A job's whole configuration, defaults included, as a recipe that `--config` reads back."""
    parser = build_parser(type(job), type(job).__name__)
    return parser.dump(parser.parse_object(asdict(job)))  # type: ignore[arg-type]


def _explain(job_type: type, message: str) -> str:
    if match := _UNKNOWN_ARGUMENTS.match(message):
        words = match["arguments"].split()
        keys = [word.lstrip("-").partition("=")[0] for word in words if word.startswith("-")]
        if keys:
            return "\n".join(_explain_unknown(job_type, key) for key in keys)
        return f"unexpected {match['arguments']!r}: values are given as --section.key value"
    if match := _UNKNOWN_IN_SECTION.match(message):
        return _explain_unknown(job_type, f"{match['section']}.{match['key']}")
    if match := _UNKNOWN_OPTION.match(message):
        return _explain_unknown(job_type, match["key"])
    if match := _WRONG_VALUE.match(message):
        expected = _describe(_type_of(job_type, match["key"]))
        return f"{match['key']}={match['value'].strip()} does not fit: expected {expected}"
    if message.startswith("Unexpected config:"):
        return f"a recipe must be a mapping of sections; valid are: {_valid_keys(job_type, '')}, not an empty file"
    return message.replace('Parser key "', "").replace('":', ":")


def _explain_unknown(job_type: type, key: str) -> str:
    section = key.partition(".")[0]
    known = _dotted_keys(job_type)
    # A bare or misplaced name is looked for in every section, after the spelling as a whole.
    names = {name.rpartition(".")[2]: name for name in reversed(known)}
    close = difflib.get_close_matches(key, known, n=1, cutoff=0.7)
    close = close or [names[n] for n in difflib.get_close_matches(key.rpartition(".")[2], names, n=1, cutoff=0.7)]
    hint = f"; did you mean {close[0]!r}?" if close else "."
    return f"unknown key {key!r}{hint} {_valid_keys(job_type, section)}"


def _valid_keys(job_type: type, section: str) -> str:
    keys = [name for name in _dotted_keys(job_type) if name.startswith(f"{section}.")]
    if keys:
        return f"Valid keys of {section!r}: {', '.join(key.partition('.')[2] for key in keys)}"
    hints = get_type_hints(job_type)
    sections = [field.name for field in fields(job_type) if is_dataclass(hints[field.name])]  # type: ignore[arg-type]
    plain = [name for name in _dotted_keys(job_type) if "." not in name]
    return f"Valid sections: {', '.join(sections)}" + (f"; valid keys: {', '.join(plain)}" if plain else "")


def _dotted_keys(job_type: type) -> list[str]:
    keys: list[str] = []
    for name, hint in get_type_hints(job_type).items():
        keys += [f"{name}.{field.name}" for field in fields(hint)] if is_dataclass(hint) else [name]
    return keys


def _type_of(job_type: type, key: str) -> Any:
    hint: Any = job_type
    for part in key.split("."):
        hint = get_type_hints(hint).get(part, Any) if is_dataclass(hint) else Any
    return hint


def _describe(hint: Any) -> str:
    if get_origin(hint) is Literal:
        return "one of " + ", ".join(str(choice) for choice in get_args(hint))
    if get_origin(hint) is list:
        return "a list, for example '[a, b]'"
    if get_origin(hint) is dict:
        return "a mapping, for example '{key: value}'"
    words = {int: "a whole number", float: "a number", bool: "true or false", str: "a text (in YAML, quote numbers)"}
    return words.get(hint, f"a {getattr(hint, '__name__', hint)}")
