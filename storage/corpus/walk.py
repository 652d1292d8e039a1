"""From the paths a user gave to the files that are read, lazily and in one stable order.

- Order: the paths as given; below a folder, names sorted by code point, files and folders alike.
- A folder's files must match one of `include`; names that match `exclude` are left out, folders with all they
  hold. A file given by its own path is read whatever both say.
- A glob starts at its fixed leading folder; `**` stands for any number of folders. Files it matches are read
  whatever `include` says, folders it matches are walked. `exclude` holds for both.
- Links to files are followed. Links to folders found on the way are not, so loops cannot hang a walk.
- A file reached twice, by overlapping paths, is read once, at the first.

A walk holds the names of one folder a level, never a list of all files.
"""

from __future__ import annotations

import glob
import itertools
import os
import stat
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path, PurePath

from cluster.errors import CorpusError
from storage.corpus.document import QuarantinedItem


@dataclass(frozen=True, slots=True)
class FileRef:
    """A regular file to read, as it was when listed."""

    path: str
    """Absolute."""
    uri: str
    size_bytes: int
    modified_ns: int


@dataclass(frozen=True, slots=True)
class Root:
    """One given path. `uri_prefix` replaces `path` in the uris of what is below."""

    given: str
    path: str
    """Absolute path of the file, the folder, or a glob's fixed leading folder."""
    real_path: str
    """The same without links: where overlaps show."""
    uri_prefix: str
    pattern: tuple[str, ...]
    """The components of a glob after `path`; empty for a plain path."""
    is_file: bool


def os_reason(error: OSError) -> str:
    """The system's message without the path, which differs between machines and which Arrow puts first."""
    return os.strerror(error.errno) if error.errno is not None else str(error)


def resolve_roots(given_paths: Sequence[str]) -> list[Root]:
    """Check every given path and name it.

    A path's uri prefix is its own name (`/data/src` → `src`). Different paths of one name are told apart by
    the order they are given in: `src`, `src~2`, …; files keep their suffix: `notes~2.md`. So paths added at
    the end do not rename the earlier ones.

    Raises:
        CorpusError: a path is missing, cannot be opened, or is neither file nor folder.
    """
    roots: list[Root] = []
    prefixes: dict[str, str] = {}  # real path → uri prefix
    taken: set[str] = set()
    for given in given_paths:
        path, pattern = _split_glob(given)
        is_file = _check_openable(given, path)
        if is_file and pattern:
            raise CorpusError(f"corpus.paths: the glob {given!r} starts at {path}, which is a file, not a folder")
        # A link to a file keeps its own name, as it does when met on a walk.
        folder, name = os.path.split(path)
        real_path = os.path.join(os.path.realpath(folder), name) if is_file else os.path.realpath(path)
        if real_path not in prefixes:
            prefixes[real_path] = _free_name(os.path.basename(path), is_file, taken)
            taken.add(prefixes[real_path])
        roots.append(Root(given, path, real_path, prefixes[real_path], pattern, is_file))
    return roots


def _split_glob(given: str) -> tuple[str, tuple[str, ...]]:
    """Absolute path of the fixed part, and the pattern after it. What exists is never taken for a glob."""
    if not given.strip() or "\0" in given:
        raise CorpusError(f"corpus.paths holds {given!r}, which is no path; give a file, a folder or a glob")
    expanded = os.path.expanduser(given)
    if os.path.lexists(expanded) or not glob.has_magic(expanded):
        return os.path.abspath(expanded), ()
    parts = PurePath(expanded).parts
    while parts and parts[-1] == "**":  # names the folders before it, which are walked anyway
        parts = parts[:-1]
    first_magic = next((i for i, part in enumerate(parts) if glob.has_magic(part)), len(parts))
    return os.path.abspath(os.path.join("", *parts[:first_magic])), parts[first_magic:]


def _check_openable(given: str, path: str) -> bool:
    """Open a file or list a folder once; returns whether it is a file."""
    try:
        mode = os.stat(path).st_mode
        if stat.S_ISDIR(mode):
            os.scandir(path).close()
        elif stat.S_ISREG(mode):
            open(path, "rb").close()
        else:
            raise CorpusError(f"corpus.paths: {given!r} is a pipe, socket or device; give a file or a folder")
    except (FileNotFoundError, NotADirectoryError) as error:
        parent = next(p for p in Path(path).parents if os.path.isdir(p))
        raise CorpusError(
            f"corpus.paths: {given!r} does not exist (looked for {path}; {str(parent)!r} is there). "
            "Relative paths start at the folder the job is run from"
        ) from error
    except OSError as error:
        raise CorpusError(
            f"corpus.paths: {given!r} cannot be read: {os_reason(error)}. Give this user access to {path}, "
            "or leave it out"
        ) from error
    return stat.S_ISREG(mode)


def _free_name(name: str, is_file: bool, taken: set[str]) -> str:
    name = _printable(name) or "root"  # only "/" has no name
    stem, suffix = os.path.splitext(name) if is_file else (name, "")
    candidate, ordinal = name, 1
    while candidate in taken:
        ordinal += 1
        candidate = f"{stem}~{ordinal}{suffix}"
    return candidate


def _printable(name: str) -> str:
    """A file name that is not UTF-8 comes with surrogates, which no database takes; show its bytes."""
    return os.fsencode(name).decode("utf-8", "backslashreplace")


def walk_roots(
    roots: Sequence[Root], include: Sequence[str], exclude: Sequence[str]
) -> Iterator[FileRef | QuarantinedItem]:
    """Yield the files below all roots, and what could not be listed or is no regular file."""
    # Remembering files costs memory by their number, so it is done only where a file can come twice.
    seen: set[str] | None = set() if _overlap(roots) else None
    for root in roots:
        for real_path, entry in _walk_root(root, include, exclude):
            if seen is not None:
                if real_path in seen:
                    continue
                seen.add(real_path)
            yield entry


def _overlap(roots: Sequence[Root]) -> bool:
    # Sorted by components, a folder stands directly before what is below it.
    parts = sorted(PurePath(root.real_path).parts for root in roots)
    return any(below[: len(above)] == above for above, below in itertools.pairwise(parts))


def _walk_root(
    root: Root, include: Sequence[str], exclude: Sequence[str]
) -> Iterator[tuple[str, FileRef | QuarantinedItem]]:
    """Yield `(real path, entry)` in sorted order, depth first."""
    if root.is_file:
        entry = _look_at(root.path, root.uri_prefix, is_link=False)
        if entry is not None:
            yield root.real_path, entry
        return
    # An explicit stack: a tree may be deeper than Python's recursion limit.
    stack: list[_Found] = [_Found((), is_folder=True, is_link=False, wanted=_matches((), root.pattern))]
    while stack:
        found = stack.pop()
        path = os.path.join(root.path, *found.parts)
        real_path = os.path.join(root.real_path, *found.parts)
        uri = "/".join(part for part in (root.uri_prefix, *map(_printable, found.parts)) if part)
        if not found.is_folder:
            entry = _look_at(path, uri, is_link=found.is_link)
            if entry is not None:
                yield real_path, entry
            continue
        try:
            with os.scandir(path) as listing:
                entries = sorted(listing, key=lambda entry: entry.name, reverse=True)
        except OSError as error:
            yield real_path, QuarantinedItem(f"{uri}/", "unreadable", f"folder: {os_reason(error)}", 0)
            continue
        for entry in entries:
            if not any(fnmatchcase(entry.name, pattern) for pattern in exclude):
                child = _select(root, found, entry, include)
                if child is not None:
                    stack.append(child)


@dataclass(frozen=True, slots=True)
class _Found:
    """A name met on a walk. `wanted`: a folder whose files only have to match `include`."""

    parts: tuple[str, ...]
    is_folder: bool
    is_link: bool
    wanted: bool


def _select(root: Root, folder: _Found, entry: os.DirEntry[str], include: Sequence[str]) -> _Found | None:
    parts = (*folder.parts, entry.name)
    is_link = entry.is_symlink()
    is_folder = entry.is_dir(follow_symlinks=False)
    matched = bool(root.pattern) and _matches(parts, root.pattern)
    if is_folder:
        wanted = folder.wanted or matched
        return _Found(parts, True, False, wanted) if wanted or _leads_to_match(parts, root.pattern) else None
    included = folder.wanted and any(fnmatchcase(entry.name, pattern) for pattern in include)
    return _Found(parts, False, is_link, False) if included or matched else None


def _matches(parts: tuple[str, ...], pattern: tuple[str, ...]) -> bool:
    """Whether a relative path is one the pattern names; the empty pattern names the root itself."""
    if not pattern:
        return not parts
    if pattern[0] == "**":
        return any(_matches(parts[skip:], pattern[1:]) for skip in range(len(parts) + 1))
    return bool(parts) and fnmatchcase(parts[0], pattern[0]) and _matches(parts[1:], pattern[1:])


def _leads_to_match(parts: tuple[str, ...], pattern: tuple[str, ...]) -> bool:
    """Whether something below the folder `parts` can match."""
    if not pattern:
        return False
    if not parts or pattern[0] == "**":
        return True
    return fnmatchcase(parts[0], pattern[0]) and _leads_to_match(parts[1:], pattern[1:])


def _look_at(path: str, uri: str, *, is_link: bool) -> FileRef | QuarantinedItem | None:
    """A regular file, or why it is none; None for a link to a folder, which is not followed."""
    try:
        status = os.stat(path)
    except OSError as error:  # a dangling or circular link, a folder without the right to enter it
        return QuarantinedItem(uri, "unreadable", os_reason(error), 0)
    if stat.S_ISREG(status.st_mode):
        return FileRef(path, uri, status.st_size, status.st_mtime_ns)
    if is_link and stat.S_ISDIR(status.st_mode):
        return None
    return QuarantinedItem(uri, "not_text", "a pipe, socket or device, not a regular file", 0)
