"""Makes wheels and source distributions, honest ones and others, and package indexes of them."""

from __future__ import annotations

import bz2
import gzip
import hashlib
import io
import lzma
import tarfile
import zipfile
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

MODIFIED_AT = 1_600_000_000
"""Of every member, in unix seconds (even: zip files know only every other second)."""


def tar_member(name: str, content: bytes = b"", **fields) -> tuple[tarfile.TarInfo, bytes]:
    """A member as tarfile takes it; `fields` overwrite what its header says."""
    info = tarfile.TarInfo(name)
    info.size, info.mtime = len(content), MODIFIED_AT
    for key, value in fields.items():
        setattr(info, key, value)
    return info, content


def write_tar(path: Path, members: Iterable[tuple[tarfile.TarInfo, bytes]]) -> Path:
    compress: dict[str, Callable[..., Any]] = {".gz": gzip.open, ".tgz": gzip.open, ".bz2": bz2.open, ".xz": lzma.open}
    with compress[path.suffix](path, "wb") as stream, tarfile.open(fileobj=stream, mode="w") as archive:
        for info, content in members:
            archive.addfile(info, io.BytesIO(content))
    return path


def write_sdist(folder: Path, name: str, version: str, files: Mapping[str, str | bytes]) -> Path:
    top = f"{name}-{version}"
    files = {"PKG-INFO": f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n", **files}
    members = [tar_member(f"{top}/{path}", _bytes(content)) for path, content in files.items()]
    return write_tar(folder / f"{top}.tar.gz", members)


def write_zip(path: Path, files: Iterable[tuple[str, str | bytes]]) -> Path:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in files:
            archive.writestr(zipfile.ZipInfo(name, (2020, 9, 13, 12, 26, 40)), _bytes(content), zipfile.ZIP_DEFLATED)
    return path


def write_wheel(folder: Path, name: str, version: str, files: Mapping[str, str | bytes]) -> Path:
    return write_zip(folder / f"{name}-{version}-py3-none-any.whl", files.items())


def write_index(folder: Path, *archives: Path) -> str:
    """A static package index (PEP 503) of archives of one project each; returns its address."""
    for archive in archives:
        page = folder / archive.name.split("-")[0] / "index.html"
        page.parent.mkdir(parents=True, exist_ok=True)
        with page.open("a") as file:
            file.write(f'<a href="{archive.as_uri()}">{archive.name}</a>\n')
    return folder.as_uri()


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def _bytes(content: str | bytes) -> bytes:
    return content if isinstance(content, bytes) else content.encode()
