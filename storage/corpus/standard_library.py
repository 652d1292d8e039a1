"""The Python standard library's own sources: a real corpus that every installation has."""

from __future__ import annotations

import sysconfig
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from cluster.config import CorpusConfig

# What is not the library itself, is made by a program, or differs between builds of one version.
_LEFT_OUT = (
    "test",
    "tests",
    "idle_test",
    "idlelib",
    "lib2to3",
    "turtledemo",
    "site-packages",
    "dist-packages",
    "lib-dynload",
    "config-*",
    "_sysconfigdata_*",
    "_sysconfig_vars_*",
    "sitecustomize.py",
    "ensurepip",
    "pydoc_data",
    "encodings",
    "__phello__",
    "__hello__.py",
)


PREFIX = "stdlib:"
"""A path of `corpus.paths` that begins so means the library of the running Python: `stdlib:` all of it,
`stdlib:asyncio` or `stdlib:argparse.py` a package or module. Recipes can name it wherever Python is installed."""


def resolve_standard_library(config: CorpusConfig) -> CorpusConfig:
    """The section with `stdlib:` paths replaced by real ones, and what is not the library itself left out.

    The same for every build of a Python version: tests, generated tables and platform files are excluded.
    """
    if not any(path.startswith(PREFIX) for path in config.paths):
        return config
    library = Path(sysconfig.get_path("stdlib"))
    return replace(
        config,
        paths=[str(library / p.removeprefix(PREFIX)) if p.startswith(PREFIX) else p for p in config.paths],
        exclude=[*config.exclude, *(glob for glob in _LEFT_OUT if glob not in config.exclude)],
    )


def standard_library_corpus(names: Sequence[str] = (), base: CorpusConfig | None = None) -> CorpusConfig:
    """The corpus section that reads the running Python's library.

    Args:
        names: packages and modules to read (`asyncio`, `argparse.py`), in this order; none given reads all.
        base: section whose other fields are kept.
    """
    paths = [f"{PREFIX}{name}" for name in names] or [PREFIX]
    return resolve_standard_library(replace(base or CorpusConfig(), paths=paths, format="text", include=["*.py"]))
