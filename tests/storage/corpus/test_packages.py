import os
import shutil
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import yaml

from cluster.config import CorpusConfig
from cluster.errors import ConfigError, CorpusError
from storage.corpus.packages import CORPORA_FILE, PackageSpec, fetch, read_corpora
from storage.corpus.source import CorpusSource, open_corpus, read_corpus
from tests.storage.corpus.archives import MODIFIED_AT, sha256, write_index, write_sdist, write_wheel
from tests.storage.corpus.support import documents, uris, write_tree

ROOT = CORPORA_FILE.parents[1]
TOOL = {
    "src/tool/__init__.py": "from tool.core import run\n",
    "src/tool/core.py": "def run():\n    return 1\n",
    "src/tool/data.bin": b"\x00\x01",
    "docs/index.md": "# Tool\n",
    "docs/deep/more.md": "More.\n",
    "tests/test_core.py": "assert True\n",
    # Building it, or only asking for its metadata as `pip download` does, would leave a trace.
    "setup.py": "import os, pathlib\npathlib.Path(os.environ['TRACE']).write_text('ran')\n",
}


@pytest.fixture
def links(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of archives, which is all that pip knows of."""
    folder = tmp_path / "links"
    folder.mkdir()
    for name in [name for name in os.environ if name.startswith("PIP_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    monkeypatch.setenv("TRACE", str(tmp_path / "trace"))
    return folder


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    return tmp_path / "cache"


@pytest.fixture
def tool(links: Path) -> PackageSpec:
    return spec_of(write_sdist(links, "tool", "1.2", TOOL), "src/*.py", "docs/*.md")


def spec_of(archive: Path, *include: str, **fields) -> PackageSpec:
    name, version = archive.name.removesuffix(".tar.gz").removesuffix(".whl").split("-")[:2]
    return PackageSpec(name, version, archive.name, sha256(archive), include, **fields)


def place(cache: Path, *archives: Path) -> None:
    """Put archives into the cache by hand, which saves half a second of pip each."""
    (cache / "archives").mkdir(parents=True, exist_ok=True)
    for archive in archives:
        shutil.copy(archive, cache / "archives")


def tree(folder: Path) -> dict[str, bytes]:
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def leftovers(cache: Path) -> list[str]:
    return [path.name for path in cache.rglob(".new-*")]


def write_corpora(path: Path, **corpora: list[PackageSpec]) -> Path:
    def entry(spec: PackageSpec) -> dict[str, object]:
        values = {name: getattr(spec, name) for name in ("package", "version", "archive", "sha256")}
        return {**values, "include": list(spec.include), "exclude": list(spec.exclude)}

    path.write_text(yaml.safe_dump({name: [entry(spec) for spec in specs] for name, specs in corpora.items()}))
    return path


# -- fetching --------------------------------------------------------------------------------------------------------


def test_the_selected_files_of_a_source_distribution_are_there_and_nothing_was_run(
    tool: PackageSpec, cache: Path, tmp_path: Path
) -> None:
    folder = fetch(tool, cache)
    wanted = ("src/tool/__init__.py", "src/tool/core.py", "docs/index.md", "docs/deep/more.md")
    assert tree(folder) == {name: str(TOOL[name]).encode() for name in wanted}
    assert {path.stat().st_mtime for path in folder.rglob("*.*")} == {MODIFIED_AT}
    assert not (tmp_path / "trace").exists()
    assert leftovers(cache) == []


def test_a_wheel_comes_from_an_index(links: Path, cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "files").mkdir()
    wheel = write_wheel(tmp_path / "files", "tool", "2.0", {"tool/core.py": "x = 1\n", "tool-2.0.dist-info/RECORD": ""})
    monkeypatch.delenv("PIP_NO_INDEX")
    monkeypatch.setenv("PIP_INDEX_URL", write_index(tmp_path / "simple", wheel))
    monkeypatch.setenv("PIP_NO_BINARY", ":all:")  # about what is installed; this is not
    assert tree(fetch(spec_of(wheel, "*.py"), cache)) == {"tool/core.py": b"x = 1\n"}


def test_excluded_globs_win(tool: PackageSpec, links: Path, cache: Path) -> None:
    place(cache, links / tool.archive)
    spec = spec_of(links / tool.archive, "*.py", "*.md", exclude=("docs/*", "*/test_*", "setup.py"))
    assert sorted(tree(fetch(spec, cache))) == ["src/tool/__init__.py", "src/tool/core.py"]


def test_the_second_call_is_quick_and_needs_neither_index_nor_archive(
    tool: PackageSpec, links: Path, cache: Path
) -> None:
    place(cache, links / tool.archive)
    first = fetch(tool, cache)
    shutil.rmtree(links)
    shutil.rmtree(cache / "archives")
    start = time.perf_counter()
    assert fetch(tool, cache) == first
    assert time.perf_counter() - start < 0.05


def test_other_globs_of_a_fetched_archive_need_no_index(tool: PackageSpec, links: Path, cache: Path) -> None:
    place(cache, links / tool.archive)
    first = fetch(tool, cache)
    other = spec_of(links / tool.archive, "tests/*")
    shutil.rmtree(links)
    assert sorted(tree(fetch(other, cache))) == ["tests/test_core.py"]
    assert fetch(tool, cache) == first


def test_tampered_bytes_are_refused_with_both_hashes_and_not_kept(tool: PackageSpec, links: Path, cache: Path) -> None:
    archive = links / tool.archive
    archive.write_bytes(archive.read_bytes() + b"\0")
    message = f"tool-1.2.tar.gz has sha256 {sha256(archive)}, but {tool.sha256} was expected"
    with pytest.raises(CorpusError, match=message):
        fetch(tool, cache)
    assert tree(cache / "texts") == {}
    assert not (cache / "archives" / tool.archive).exists()
    assert leftovers(cache) == []


def test_an_archive_that_was_changed_in_the_cache_is_refused(tool: PackageSpec, links: Path, cache: Path) -> None:
    place(cache, links / tool.archive)
    shutil.rmtree(fetch(tool, cache))
    kept = cache / "archives" / tool.archive
    write_sdist(kept.parent, "tool", "1.2", {"src/evil.py": "evil = 1\n"})
    with pytest.raises(CorpusError, match=f"{sha256(kept)}, but {tool.sha256} was expected. Delete {kept}"):
        fetch(tool, cache)
    assert tree(cache / "texts") == {}
    kept.unlink()
    assert "src/tool/core.py" in tree(fetch(tool, cache))


def test_what_the_index_does_not_have_is_an_error_that_says_what_to_do(
    tool: PackageSpec, links: Path, cache: Path
) -> None:
    archive = links / tool.archive
    away = archive.rename(links.parent / archive.name)
    write_sdist(links, "tool", "1.3", TOOL)
    with pytest.raises(CorpusError, match=r"cannot be fetched: .*has, among others, tool-1\.3\.tar\.gz") as caught:
        fetch(tool, cache)
    by_hand = cache / "archives" / tool.archive
    assert f"put the file at {by_hand}" in str(caught.value)
    shutil.copy(away, by_hand)
    assert "src/tool/core.py" in tree(fetch(tool, cache))


def test_an_index_that_cannot_be_reached(
    tool: PackageSpec, links: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (links / tool.archive).unlink()
    monkeypatch.delenv("PIP_NO_INDEX")
    monkeypatch.setenv("PIP_INDEX_URL", "http://user:secret@127.0.0.1:9/simple")
    monkeypatch.setenv("PIP_RETRIES", "0")
    with pytest.raises(CorpusError, match=r"cannot be fetched: .*connection error.*Check the network") as caught:
        fetch(tool, cache)
    assert "secret" not in str(caught.value)


def test_without_pip_the_error_says_so(tool: PackageSpec, cache: Path, tmp_path: Path, monkeypatch) -> None:
    write_tree(tmp_path / "shadow", {"pip/__init__.py": "raise ModuleNotFoundError(\"No module named 'pip'\")\n"})
    monkeypatch.setenv("PYTHONPATH", str(tmp_path / "shadow"))
    with pytest.raises(CorpusError, match="cannot be fetched: ModuleNotFoundError: No module named 'pip'"):
        fetch(tool, cache)


def test_an_archive_that_fails_half_way_leaves_nothing(links: Path, cache: Path) -> None:
    files = {f"{number}.txt": os.urandom(2000) for number in range(20)}
    archive = write_sdist(links, "torn", "1", files)
    archive.write_bytes(archive.read_bytes()[:30_000])
    place(cache, archive)
    with pytest.raises(CorpusError, match=r"torn-1\.tar\.gz is damaged"):
        fetch(spec_of(archive, "*"), cache)
    assert tree(cache / "texts") == {}
    assert leftovers(cache) == []


def test_globs_that_select_nothing_are_refused(tool: PackageSpec, links: Path, cache: Path) -> None:
    place(cache, links / tool.archive)
    with pytest.raises(CorpusError, match=r"no file of .*tool-1\.2\.tar\.gz is selected by include=\('\*\.rst',\)"):
        fetch(spec_of(links / tool.archive, "*.rst"), cache)


def test_a_cache_that_cannot_be_written_is_refused(tool: PackageSpec, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(CorpusError, match=r"corpus\.cache_dir=.*file/cache cannot be written: Not a directory"):
        fetch(tool, tmp_path / "file" / "cache")


def test_processes_that_fetch_at_once_get_the_same_whole_folder(tool: PackageSpec, cache: Path, tmp_path: Path) -> None:
    corpora = write_corpora(tmp_path / "corpora.yaml", tools=[tool])
    program = (
        "import sys; from pathlib import Path; from storage.corpus.packages import fetch, read_corpora\n"
        "folder = fetch(read_corpora(Path(sys.argv[1]))['tools'][0], Path(sys.argv[2]))\n"
        "print(folder, sum(p.is_file() for p in folder.rglob('*')))"
    )
    command = [sys.executable, "-c", program, corpora, cache]

    def run(_: int) -> str:
        return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True, timeout=60).stdout

    with ThreadPoolExecutor(4) as pool:
        answers = set(pool.map(run, range(4)))
    assert len(answers) == 1
    assert answers.pop().split()[1] == "4"
    assert leftovers(cache) == []


# -- reading ---------------------------------------------------------------------------------------------------------


def open_named(corpora: Path, cache: Path, *paths: str, **fields) -> CorpusSource:
    return open_corpus(CorpusConfig(paths=list(paths), corpora_file=str(corpora), cache_dir=cache, **fields))


def test_documents_are_named_by_package_version_and_path(
    tool: PackageSpec, links: Path, cache: Path, tmp_path: Path
) -> None:
    place(cache, links / tool.archive)
    corpora = write_corpora(tmp_path / "corpora.yaml", tools=[tool])
    notes = write_tree(tmp_path / "notes", {"a.md": "mine\n"})
    source = open_named(corpora, cache, str(notes), "package:tools", tags=["t"])
    found = documents(read_corpus(source))
    assert uris(found) == [
        "notes/a.md",
        "pkg://tool-1.2/docs/deep/more.md",
        "pkg://tool-1.2/docs/index.md",
        "pkg://tool-1.2/src/tool/__init__.py",
        "pkg://tool-1.2/src/tool/core.py",
    ]
    assert {document.modified_at for document in found[1:]} == {float(MODIFIED_AT)}
    assert found[-1].text == TOOL["src/tool/core.py"]
    assert all(document.tags == ("t",) for document in found)
    assert uris(read_corpus(open_named(corpora, cache, "package:tools", include=["*.py"]))) == uris(found)[3:]


def test_it_is_the_same_corpus_in_every_cache(tool: PackageSpec, links: Path, cache: Path, tmp_path: Path) -> None:
    corpora = write_corpora(tmp_path / "corpora.yaml", tools=[tool])
    other_cache = tmp_path / "elsewhere" / "cache"
    place(cache, links / tool.archive)
    place(other_cache, links / tool.archive)
    first = open_named(corpora, cache, "package:tools")
    second = open_named(corpora, other_cache, "package:tools")
    assert first.digest() == second.digest()
    assert list(read_corpus(first)) == list(read_corpus(second))


def test_packages_come_in_the_order_of_the_file_and_once(tool: PackageSpec, links: Path, cache: Path) -> None:
    other = spec_of(write_sdist(links, "axe", "3", {"axe.py": "axe = 3\n"}), "axe.py")
    place(cache, *links.glob("*.tar.gz"))
    corpora = write_corpora(links / "corpora.yaml", tools=[tool, other], axes=[other])
    found = uris(read_corpus(open_named(corpora, cache, "package:tools", "package:axes", include=["*.py"])))
    assert [uri.rpartition("/")[2] for uri in found] == ["__init__.py", "core.py", "axe.py"]


def test_an_unknown_name_is_refused_with_the_valid_ones_before_anything_is_fetched(
    tool: PackageSpec, cache: Path, tmp_path: Path
) -> None:
    corpora = write_corpora(tmp_path / "corpora.yaml", tools=[tool], axes=[tool])
    with pytest.raises(ConfigError, match=r"package:tols is not in .*; valid ones are package:axes, package:tools"):
        open_named(corpora, cache, "package:tools", "package:tols")
    assert not cache.exists()


ENTRY = {"package": "p", "version": "1", "archive": "p-1.tar.gz", "sha256": "0" * 64, "include": ["*"]}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("- a\n", "must hold names of corpora"),
        ("code: []\n", "must hold names of corpora"),
        ("code: [\n", "is no YAML"),
        ({"code": ["p"]}, r"corpus 'code', entry 1 is no mapping"),
        ({"code": [ENTRY, ENTRY | {"hash": "x"}]}, r"entry 2 has the unknown key 'hash'; valid ones are package,"),
        ({"code": [ENTRY | {"version": 1.2}]}, r"version=1\.2 must be a version in quotes"),
        ({"code": [ENTRY | {"package": "-r evil"}]}, "package='-r evil' must be"),
        ({"code": [ENTRY | {"archive": "../p-1.tar.gz"}]}, "archive='../p-1.tar.gz' must be a file name"),
        ({"code": [ENTRY | {"archive": "p-1.exe"}]}, r"ends in one of \.whl"),
        ({"code": [ENTRY | {"sha256": "0" * 63}]}, "must be 64 lower-case hex digits"),
        ({"code": [{k: v for k, v in ENTRY.items() if k != "sha256"}]}, "sha256=None must be"),
        ({"code": [ENTRY | {"include": "*"}]}, r"include='\*' must be a list of globs"),
        ({"code": [ENTRY | {"include": []}]}, "include must hold at least one glob"),
        ({"code": [ENTRY | {"exclude": [1]}]}, r"exclude=\[1\] must be a list of globs"),
    ],
)
def test_a_corpora_file_that_says_something_else_is_refused(tmp_path: Path, content: object, message: str) -> None:
    path = tmp_path / "corpora.yaml"
    path.write_text(content if isinstance(content, str) else yaml.safe_dump(content))
    with pytest.raises(ConfigError, match=message):
        read_corpora(path)


def test_a_missing_corpora_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"no\.yaml cannot be read: No such file"):
        open_named(tmp_path / "no.yaml", tmp_path, "package:code")


def test_the_projects_own_corpora_are_well_formed_and_documented() -> None:
    corpora = read_corpora(CORPORA_FILE)
    assert set(corpora) >= {"code", "prose", "mixed"}
    pins = {(spec.archive, spec.package, spec.version, spec.sha256) for specs in corpora.values() for spec in specs}
    assert len({archive for archive, *_ in pins}) == len(pins), "an archive is pinned in two ways"
    page = (ROOT / "docs/corpora.md").read_text(encoding="utf-8")
    rows = {name: next(row for row in page.splitlines() if row.startswith(f"| `package:{name}`")) for name in corpora}
    for name, specs in corpora.items():
        assert all(f"{spec.package} {spec.version}" in rows[name] for spec in specs), f"docs/corpora.md: {name}"


@pytest.mark.slow
def test_a_real_package_comes_from_the_real_index(cache: Path) -> None:
    spec = next(spec for spec in read_corpora(CORPORA_FILE)["mixed"] if spec.package == "click")
    try:
        folder = fetch(spec, cache)
    except CorpusError as error:
        if "cannot be fetched" not in str(error):
            raise
        pytest.skip(f"no package index: {error}")
    assert {"src/click/core.py", "docs/index.rst"} <= set(tree(folder))
