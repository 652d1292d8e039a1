"""Writes `configuration.md` from the configuration's dataclasses: `python docs/generate_configuration.py`."""

from __future__ import annotations

import ast
import inspect
import json
from dataclasses import MISSING, Field, fields, is_dataclass
from pathlib import Path
from typing import Any, Literal, get_args, get_origin, get_type_hints

import ray_job
from cluster.cli import Job

PAGE = Path(__file__).with_name("configuration.md")

INTRODUCTION = """\
# Configuration

<!-- Written by docs/generate_configuration.py from the docstrings in cluster/*config.py. Edit those. -->

Every job is configured by one tree of typed values. What is not set has the default below. Three ways to set a value,
the later on the line winning:

```bash
python ray_job.py compact --config configs/compact.yaml                                # a YAML recipe
python ray_job.py compact --config configs/compact.yaml --store.context notes          # then a key
python ray_job.py compact --config configs/compact.yaml --config configs/tiny.yaml --corpus.paths '[docs]'
```

- `--print_config` prints the whole tree as a recipe and does nothing else; `--help` explains a job's keys.
- Lists are YAML: `--corpus.paths '[notes, "src/**/*.py"]'`.
- An unknown key, a value of the wrong type or one that cannot work ends the job with exit code 2 before anything is
  started; the message names the valid keys or values.
- The configuration a run really had, defaults included, is in `<run.dir>/<name>/config.yaml`, which `--config` reads.
- `--debug` (or `MEGACONTEXT_DEBUG=1`) shows the traceback of an error. It is no key of the tree.

Environment variables: `MEGACONTEXT_HOME` is where relative `run.dir`, `store.root` and `base_lm.cache_dir` start;
`MEGACONTEXT_GIT_REVISION` names the revision where there is no `.git`; `RAY_ADDRESS`, `RAY_AUTH_MODE`,
`RAY_AUTH_TOKEN_PATH` and `RAY_TMPDIR` mean what they mean to Ray.
"""


def render() -> str:
    """The page."""
    parts = [INTRODUCTION, "## Jobs\n", *map(_job, ray_job.JOBS)]
    headings: dict[str, tuple[str, Any]] = {}
    for job in ray_job.JOBS:
        headings |= {_heading(job, name): (name, section) for name, section in _sections(job).items()}
    for heading, (name, section) in headings.items():
        parts.append(f"## {heading}\n\n{inspect.cleandoc(section.__doc__ or '')}\n\n{_table(section, f'{name}.')}\n")
    return "\n".join(parts)


def _sections(job: Job) -> dict[str, Any]:
    return {name: hint for name, hint in get_type_hints(job.config_type).items() if is_dataclass(hint)}


def _heading(job: Job, name: str) -> str:
    """A section's heading; it names the job where the same key holds other sections in other jobs."""
    meanings = {_sections(other)[name] for other in ray_job.JOBS if name in _sections(other)}
    return f"`{name}`" if len(meanings) == 1 else f"`{name}` of `{job.command}`"


def _anchor(heading: str) -> str:
    return heading.replace("`", "").replace(" ", "-")


def _job(job: Job) -> str:
    """What a job takes: its sections, and the keys that stand in none."""
    hints, texts = get_type_hints(job.config_type), _field_docstrings(job.config_type)
    lines = [f"### `{job.command}`", "", job.summary, ""]
    lines += [f"- [`{name}`](#{_anchor(_heading(job, name))}): {texts[name]}" for name in _sections(job)]
    own = [] if all(map(is_dataclass, hints.values())) else ["", _table(job.config_type)]
    return "\n".join([*lines, *own, ""])


def _table(owner: type, prefix: str = "") -> str:
    """One row a key that is no section."""
    return "\n".join(["| key | values | default | meaning |", "| :--- | :--- | :--- | :--- |", *_rows(owner, prefix)])


def _rows(owner: type, prefix: str) -> list[str]:
    hints, texts = get_type_hints(owner), _field_docstrings(owner)
    rows: list[str] = []
    for field in fields(owner):
        hint = hints[field.name]
        if not is_dataclass(hint):
            meaning = texts[field.name].replace("|", "\\|")
            rows.append(f"| `{prefix}{field.name}` | {_values(hint)} | `{_default(field)}` | {meaning} |")
        elif prefix:  # sections of a job have tables of their own
            assert isinstance(hint, type)
            rows += _rows(hint, f"{prefix}{field.name}.")
    return rows


def _field_docstrings(owner: type) -> dict[str, str]:
    """The string under each field, of the base classes too; Python itself drops it."""
    texts: dict[str, str] = {}
    for base in reversed(owner.__mro__):
        if not base.__module__.startswith("cluster."):
            continue
        body = ast.parse(inspect.getsource(base)).body[0]
        assert isinstance(body, ast.ClassDef)
        for statement, following in zip(body.body, body.body[1:], strict=False):
            if isinstance(statement, ast.AnnAssign) and isinstance(statement.target, ast.Name):
                assert isinstance(following, ast.Expr), f"{statement.target.id} has no docstring"
                texts[statement.target.id] = " ".join(ast.literal_eval(following.value).split())
    return texts


def _values(hint: Any) -> str:
    if get_origin(hint) is Literal:
        return ", ".join(f"`{choice}`" for choice in get_args(hint))
    if get_origin(hint) is list and (get_origin(get_args(hint)[0]) is Literal or get_args(hint)[0] is bool):
        return f"list of {_values(get_args(hint)[0])}"
    words = {bool: "true, false", int: "integer", float: "number", str: "text", Path: "path", list[str]: "texts"}
    words |= {list[int]: "integers", list[float]: "numbers"}
    if get_origin(hint) is dict:
        return "mapping"
    return words[hint]


def _default(field: Field[Any]) -> str:
    value = field.default if field.default is not MISSING else field.default_factory()  # type: ignore[misc]
    if isinstance(value, Path):
        return str(value)
    return value if isinstance(value, str) and value else json.dumps(value)


if __name__ == "__main__":
    PAGE.write_text(render(), encoding="utf-8")
