import os
import socket
import sys
from pathlib import Path

import pytest

from cluster.errors import CorpusError
from storage.corpus.document import QuarantinedItem
from storage.corpus.walk import FileRef, resolve_roots, walk_roots
from tests.storage.corpus.support import without_privileges, write_tree

TREE = {
    "src/a.py": "a",
    "src/b/c.py": "c",
    "src/b/d/e.md": "e",
    "src/b.py": "b",
    "src/.hidden/x.py": "x",
    "src/Z.md": "z",
    "other/src/a.py": "a2",
    "notes.md": "n",
    "other/notes.md": "n2",
}


def walk(
    *paths: Path | str, include: tuple[str, ...] = ("*",), exclude: tuple[str, ...] = (".*",)
) -> list[FileRef | QuarantinedItem]:
    return list(walk_roots(resolve_roots([str(path) for path in paths]), include, exclude))


def uris(*paths: Path | str, **filters) -> list[str]:
    return [entry.uri for entry in walk(*paths, **filters)]


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    return write_tree(tmp_path, TREE)


def test_a_folder_is_walked_in_sorted_order_under_its_own_name(tree: Path) -> None:
    assert uris(tree / "src") == ["src/Z.md", "src/a.py", "src/b/c.py", "src/b/d/e.md", "src/b.py"]
    entry = walk(tree / "src")[1]
    assert isinstance(entry, FileRef)
    status = (tree / "src/a.py").stat()
    assert (entry.path, entry.size_bytes, entry.modified_ns) == (
        str(tree / "src/a.py"),
        1,
        status.st_mtime_ns,
    )


def test_uris_do_not_depend_on_how_a_path_is_written(tree: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tree / "src")
    monkeypatch.setenv("HOME", str(tree))
    expected = uris(tree / "src")
    for written in ("../src", ".", "~/src", "../src/", f"{tree}/other/../src"):
        assert uris(written) == expected


def test_include_and_exclude(tree: Path) -> None:
    assert uris(tree / "src", include=("*.md",)) == ["src/Z.md", "src/b/d/e.md"]
    assert uris(tree / "src", include=("*.md", "a.*")) == ["src/Z.md", "src/a.py", "src/b/d/e.md"]
    assert uris(tree / "src", exclude=("b", ".*")) == ["src/Z.md", "src/a.py", "src/b.py"]
    assert uris(tree / "src", exclude=("*.py",)) == ["src/Z.md", "src/b/d/e.md"]
    assert uris(tree / "src" / ".hidden") == [".hidden/x.py"]  # a path that is given is not left out


def test_a_named_file_is_read_whatever_the_filters_say(tree: Path) -> None:
    assert uris(tree / "notes.md", include=("*.py",), exclude=("*.md",)) == ["notes.md"]


@pytest.mark.parametrize(
    ("pattern", "expected"),
    [
        ("src/*.py", ["src/a.py", "src/b.py"]),
        ("src/**/*.md", ["src/Z.md", "src/b/d/e.md"]),
        ("src/**", ["src/a.py", "src/b/c.py", "src/b.py"]),  # names folders: include counts
        ("src/b*", ["src/b/c.py", "src/b.py"]),
        ("**/src/a.py", ["other/src/a.py", "src/a.py"]),
        ("[no]*/*.md", ["other/notes.md"]),
        ("*/src/?.py", ["other/src/a.py"]),
        ("src/**/d", []),
        ("src/**/d/*", ["src/b/d/e.md"]),
    ],
)
def test_globs(tree: Path, pattern: str, expected: list[str]) -> None:
    fixed = "" if pattern[0] in "*[" else "src"
    prefix = "" if fixed else f"{tree.name}/"
    assert uris(tree / pattern, include=("*.py",)) == [prefix + uri for uri in expected]


def test_a_path_that_exists_is_no_glob(tmp_path: Path) -> None:
    write_tree(tmp_path, {"a[1].txt": "x", "a1.txt": "y"})
    assert uris(tmp_path / "a[1].txt") == ["a[1].txt"]


def test_paths_of_one_name_are_told_apart_and_additions_rename_nothing(tree: Path) -> None:
    given = [tree / "src", tree / "other/src", tree / "notes.md", tree / "other/notes.md"]
    assert [root.uri_prefix for root in resolve_roots([str(path) for path in given])] == [
        "src",
        "src~2",
        "notes.md",
        "notes~2.md",
    ]
    for count in range(1, len(given)):
        assert uris(*given)[: len(uris(*given[:count]))] == uris(*given[:count])
    assert len(set(uris(*given))) == len(uris(*given)) == 8


def test_globs_in_one_folder_share_its_name_and_overlaps_are_read_once(tree: Path) -> None:
    assert uris(tree / "src/*.py", tree / "src/*.md") == ["src/a.py", "src/b.py", "src/Z.md"]
    assert uris(tree / "src/b/c.py", tree / "src", tree / "src/**/*.py", include=("*.py",)) == [
        "c.py",
        "src/a.py",
        "src/b.py",
    ]
    (tree / "alias").symlink_to(tree / "src")
    assert uris(tree / "alias", tree / "src") == uris(tree / "alias")
    assert uris(tree / "alias")[0] == "alias/Z.md"


def test_links_to_files_are_followed_and_links_to_folders_are_not(tmp_path: Path) -> None:
    write_tree(tmp_path, {"root/a/real.txt": "text", "elsewhere/far.txt": "far"})
    (tmp_path / "root/a/loop").symlink_to(tmp_path / "root")
    (tmp_path / "root/self").symlink_to(tmp_path / "root/self")
    (tmp_path / "root/out").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "root/link.txt").symlink_to(tmp_path / "elsewhere/far.txt")
    (tmp_path / "root/dangling.txt").symlink_to(tmp_path / "gone")
    entries = {entry.uri: entry for entry in walk(tmp_path / "root")}
    assert list(entries) == ["root/a/real.txt", "root/dangling.txt", "root/link.txt", "root/self"]
    assert isinstance(entries["root/link.txt"], FileRef)
    for uri, said in (("root/dangling.txt", "No such file"), ("root/self", "symbolic links")):
        item = entries[uri]
        assert isinstance(item, QuarantinedItem)
        assert item.reason == "unreadable"
        assert said in item.detail


def test_pipes_and_sockets_are_set_aside_and_never_opened(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_tree(tmp_path, {"a.txt": "x"})
    os.mkfifo(tmp_path / "pipe")
    monkeypatch.chdir(tmp_path)  # a socket's path is limited to 107 bytes
    with socket.socket(socket.AF_UNIX) as server:
        server.bind("socket")
        entries = walk(tmp_path)
    assert [entry.uri for entry in entries if isinstance(entry, FileRef)] == [f"{tmp_path.name}/a.txt"]
    assert [entry.reason for entry in entries if isinstance(entry, QuarantinedItem)] == ["not_text"] * 2
    with pytest.raises(CorpusError, match="pipe, socket or device"):
        resolve_roots([str(tmp_path / "pipe")])


@pytest.mark.parametrize("given", ["", "  ", "a\0b"])
def test_what_is_no_path_is_refused(given: str) -> None:
    with pytest.raises(CorpusError, match="is no path"):
        resolve_roots([given])


def test_a_missing_path_says_how_far_it_exists(tree: Path) -> None:
    with pytest.raises(CorpusError, match="does not exist") as caught:
        resolve_roots([str(tree / "src"), str(tree / "src/b/nope/deeper.md")])
    assert f"{str(tree / 'src/b')!r} is there" in str(caught.value)
    with pytest.raises(CorpusError, match="does not exist"):
        resolve_roots([str(tree / "nope/*.md")])
    with pytest.raises(CorpusError, match="does not exist"):
        resolve_roots([str(tree / "notes.md/below")])
    with pytest.raises(CorpusError, match="is a file, not a folder"):
        resolve_roots([str(tree / "notes.md/*")])


def test_the_file_system_root_has_a_name_too() -> None:
    assert resolve_roots(["/"])[0].uri_prefix == "root"


def test_given_paths_without_permission_are_refused() -> None:
    with without_privileges() as folder:
        write_tree(folder, {"closed/a.txt": "x", "b.txt": "y"})
        (folder / "closed").chmod(0)
        (folder / "b.txt").chmod(0)
        for name in ("closed", "b.txt", "closed/*.txt", "closed/a.txt"):
            with pytest.raises(CorpusError, match=r"cannot be read: Permission denied\. Give this user access"):
                resolve_roots([str(folder / name)])


def test_folders_and_files_without_permission_met_on_the_way_are_set_aside() -> None:
    with without_privileges() as folder:
        write_tree(folder, {"r/a.txt": "x", "r/closed/b.txt": "y", "r/listed/c.txt": "z", "r/d.txt": "w"})
        (folder / "r/closed").chmod(0)
        (folder / "r/listed").chmod(0o400)  # may be listed, not entered
        entries = walk(folder / "r")
    found = {entry.uri: getattr(entry, "reason", None) for entry in entries}
    assert found == {
        "r/a.txt": None,
        "r/closed/": "unreadable",
        "r/d.txt": None,
        "r/listed/c.txt": "unreadable",
    }


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux takes any bytes as a file name")
def test_file_names_that_are_not_utf8_have_printable_uris(tmp_path: Path) -> None:
    (tmp_path / "root").mkdir()
    with open(os.fsencode(tmp_path) + b"/root/caf\xe9.txt", "w") as file:
        file.write("x")
    (entry,) = walk(tmp_path / "root")
    assert entry.uri == "root/caf\\xe9.txt"
    assert isinstance(entry, FileRef)
    assert Path(entry.path).read_text() == "x"


def test_a_tree_deeper_than_the_recursion_limit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    depth = min(1500, (4000 - len(str(tmp_path))) // 2)
    assert depth > sys.getrecursionlimit()
    root = tmp_path / "r"
    root.mkdir()
    monkeypatch.chdir(root)
    for _ in range(depth):
        os.mkdir("d")
        os.chdir("d")
    Path("leaf.txt").write_text("x")
    os.chdir(tmp_path)
    assert uris(root) == ["r/" + "d/" * depth + "leaf.txt"]
    for level in range(depth, 0, -1):  # pytest's own clean-up recurses
        path = "r/" + "d/" * level
        if level == depth:
            os.unlink(path + "leaf.txt")
        os.rmdir(path)
