import gzip
import io
import struct
import tarfile
import zipfile
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from cluster.errors import CorpusError
from storage.corpus.archive import SUFFIXES, ArchiveLimits, extract
from tests.storage.corpus.archives import MODIFIED_AT, tar_member, write_tar, write_wheel, write_zip

LIMITS = ArchiveLimits(total_bytes=200_000, file_bytes=50_000, num_members=50)


def take(archive: Path, folder: Path, limits: ArchiveLimits = LIMITS) -> dict[str, bytes]:
    """Everything an archive gives, by path; what `extract` says it wrote is what is there."""
    num_written = extract(archive, folder, lambda path: True, limits)
    found = {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()}
    assert len(found) == num_written
    assert not any(path.is_symlink() for path in folder.rglob("*"))
    return found


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_every_format_gives_the_same_files_and_times(tmp_path: Path, suffix: str) -> None:
    files = {"a/b.py": b"b = 1\r\n", "a/c/d.txt": b"\xff\x00", "e.md": b"", "ä/日本.txt": "ü".encode()}
    archive = tmp_path / f"p-1{suffix}"
    if suffix == ".whl":
        write_zip(archive, files.items())
    elif suffix == ".zip":
        write_zip(archive, [("p-1/", b""), *((f"p-1/{name}", content) for name, content in files.items())])
    else:
        top = tar_member("p-1", type=tarfile.DIRTYPE)
        write_tar(archive, [top, *(tar_member(f"p-1/{name}", content) for name, content in files.items())])
    assert take(archive, tmp_path / "out") == files
    assert {path.stat().st_mtime for path in (tmp_path / "out").rglob("*") if path.is_file()} == {MODIFIED_AT}


def test_only_what_is_wanted_is_written_and_only_that_must_be_small(tmp_path: Path) -> None:
    archive = write_tar(tmp_path / "p.tar.gz", [tar_member("p/a.py", b"a"), tar_member("p/b.bin", b"b" * 60_000)])
    seen: list[str] = []
    assert extract(archive, tmp_path / "out", lambda path: bool(seen.append(path)) or path == "a.py", LIMITS) == 1
    assert seen == ["a.py", "b.bin"]
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["a.py"]
    with pytest.raises(CorpusError, match=r"p\.tar\.gz is refused as too large: p/b\.bin of 60000 bytes"):
        take(archive, tmp_path / "all")


@pytest.mark.parametrize(
    "name",
    ["../evil", "p/../../evil", "p/..", "/evil", "//evil", "p\\..\\..\\evil", "C:\\evil", "C:evil", "\\\\host\\evil"],
)
@pytest.mark.parametrize("kind", ["tar.gz", "zip", "whl"])
def test_a_name_that_leads_out_is_refused(tmp_path: Path, name: str, kind: str) -> None:
    archive = tmp_path / "inner" / f"p.{kind}"
    archive.parent.mkdir()
    if kind == "tar.gz":
        write_tar(archive, [tar_member("p/good", b"x"), tar_member(name, b"x")])
    else:
        write_zip(archive, [("p/good", b"x"), (name, b"x")])
    with pytest.raises(CorpusError, match="which leads out of its folder; it is not to be trusted"):
        take(archive, tmp_path / "inner" / "out")
    assert not list(tmp_path.rglob("*evil*"))
    assert not Path("/evil").exists()


def test_links_and_devices_of_a_tar_are_never_made(tmp_path: Path) -> None:
    outside = tmp_path / "outside"
    outside.mkdir()
    members = [
        tar_member("p/link", type=tarfile.SYMTYPE, linkname=str(outside)),
        tar_member("p/link/through.txt", b"into the folder, not through the link"),
        tar_member("p/up.txt", type=tarfile.SYMTYPE, linkname="../../../secret"),
        tar_member("p/hard.txt", type=tarfile.LNKTYPE, linkname="p/link/through.txt"),
        tar_member("p/pipe", type=tarfile.FIFOTYPE),
        tar_member("p/device", type=tarfile.CHRTYPE, devmajor=1, devminor=3),
    ]
    found = take(write_tar(tmp_path / "p.tar.gz", members), tmp_path / "out")
    assert list(found) == ["link/through.txt"]
    assert not list(outside.iterdir())


def test_links_of_a_zip_are_never_made(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "p.whl", "w") as archive:
        link = zipfile.ZipInfo("p/link")
        link.external_attr = 0o120777 << 16
        archive.writestr(link, "/etc")
        archive.writestr("p/link/through.txt", "x")
    assert take(tmp_path / "p.whl", tmp_path / "out") == {"p/link/through.txt": b"x"}


@pytest.mark.parametrize("kind", ["tar.gz", "whl"])
def test_bombs_are_refused_before_they_are_unpacked(tmp_path: Path, kind: str) -> None:
    names = [f"p/{number}.txt" for number in range(10)]
    archive = tmp_path / f"p.{kind}"
    if kind == "whl":
        write_zip(archive, [(name, bytes(40_000)) for name in names])
    else:
        write_tar(archive, [tar_member(name, bytes(40_000)) for name in names])
    assert archive.stat().st_size < 5_000
    with pytest.raises(CorpusError, match=r"too large: .*200000"):
        extract(archive, tmp_path / "out", lambda path: False, LIMITS)
    with pytest.raises(CorpusError, match="too large: .* members"):
        take(archive, tmp_path / "out", ArchiveLimits(num_members=9))


def test_a_bomb_in_a_header_is_bounded_too(tmp_path: Path) -> None:
    header = tarfile.TarInfo("././@PaxHeader")
    header.type, header.size = tarfile.XHDTYPE, 50 * 2**20
    (tmp_path / "p.tar.gz").write_bytes(gzip.compress(header.tobuf() + bytes(header.size)))
    with pytest.raises(CorpusError, match="too large: more than 200000 bytes"):
        take(tmp_path / "p.tar.gz", tmp_path / "out")


def test_a_zip_cannot_lie_about_a_size(tmp_path: Path) -> None:
    archive = write_wheel(tmp_path, "p", "1", {"bomb.txt": bytes(1_000_000)})
    raw = archive.read_bytes()
    assert raw.count(struct.pack("<I", 1_000_000)) == 2  # in the member's header and in the directory
    archive.write_bytes(raw.replace(struct.pack("<I", 1_000_000), struct.pack("<I", 10)))
    with pytest.raises(CorpusError, match="is damaged"):
        take(archive, tmp_path / "out")
    assert sum(path.stat().st_size for path in (tmp_path / "out").rglob("*") if path.is_file()) <= 10


def test_a_name_that_comes_twice_is_refused(tmp_path: Path) -> None:
    twice = write_tar(tmp_path / "p.tar.gz", [tar_member("p/a.txt", b"1"), tar_member("p/./a.txt", b"2")])
    with pytest.raises(CorpusError, match=r"holds 'a\.txt' twice"):
        take(twice, tmp_path / "out")
    both = write_tar(tmp_path / "q.tar.gz", [tar_member("p/a", b"1"), tar_member("p/a/b", b"2")])
    with pytest.raises(CorpusError, match="q.tar.gz"):
        take(both, tmp_path / "out2")


@pytest.mark.parametrize("time", [-5, 2**40, 0])
def test_a_time_no_file_system_takes_becomes_zero(tmp_path: Path, time: int) -> None:
    archive = write_tar(tmp_path / "p.tar.gz", [tar_member("p/a.txt", b"1", mtime=time)])
    take(archive, tmp_path / "out")
    assert (tmp_path / "out/a.txt").stat().st_mtime == 0


def test_what_is_no_archive_is_refused(tmp_path: Path) -> None:
    for suffix in SUFFIXES:
        (tmp_path / f"p{suffix}").write_bytes(b"this is no archive at all " * 40)
        with pytest.raises(CorpusError, match=r"is damaged|cannot be unpacked"):
            take(tmp_path / f"p{suffix}", tmp_path / "out")


def _sample(kind: str) -> bytes:
    files = {f"p/{number}.txt": f"text {number}\n".encode() * (number + 1) for number in range(4)}
    buffer = io.BytesIO()
    if kind == "whl":
        with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
            for name, content in files.items():
                archive.writestr(name, content)
    else:
        with tarfile.open(fileobj=buffer, mode="w") as archive:  # compressed below, so that damage reaches the headers
            for name, content in files.items():
                archive.addfile(tar_member(name, content)[0], io.BytesIO(content))
    return buffer.getvalue()


@settings(max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(data=st.data(), kind=st.sampled_from(["whl", "tar.gz"]))
def test_damage_is_an_error_of_ours_or_harmless(tmp_path_factory: pytest.TempPathFactory, data, kind: str) -> None:
    folder = tmp_path_factory.mktemp("damaged")
    raw = bytearray(_sample(kind))
    for position in data.draw(st.lists(st.integers(0, len(raw) - 1), min_size=1, max_size=8)):
        raw[position] = data.draw(st.integers(0, 255))
    cut = data.draw(st.integers(0, len(raw)))
    raw = raw[: max(cut, len(raw) // 2)]
    archive = folder / f"p.{kind}"
    archive.write_bytes(bytes(raw) if kind == "whl" else gzip.compress(raw, 1))
    try:
        take(archive, folder / "out")
    except CorpusError:
        pass
    assert {path.name for path in folder.iterdir()} <= {archive.name, "out"}
