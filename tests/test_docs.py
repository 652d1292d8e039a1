"""The documentation says what is: its code runs, its commands parse, its links and its file tree hold."""

from __future__ import annotations

import importlib.util
import re
import shlex
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch

import ray_job
from cluster.config import BaseLMConfig, validate_sections
from cluster.config_parser import parse_job
from storage.contract import TreeReader
from storage.store import Store
from storage.tree.sealing import SEGMENT_FOLDER
from storage.tree.writer import ContextWriter
from storage.versions.branching import Branching
from storage.versions.history import History
from tests.actors.helpers import follow, ingest, make_compactor, make_documents, open_context, tiny_plan

ROOT = Path(__file__).parents[1]
PAGES = [
    ROOT / "README.md",
    ROOT / "CHANGELOG.md",
    *sorted(ROOT.glob("docs/*.md")),
    *sorted(ROOT.glob("benchmarks/*.md")),
]
SOURCE_FOLDERS = ("pipelines", "actors", "models", "storage", "cluster", "configs", "benchmarks")
SOURCE_SUFFIXES = {".py", ".yaml"}

FENCE = re.compile(r"^```(\w+)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
INLINE_CODE = re.compile(r"`([^`]+)`")
LINK = re.compile(r"\]\(([^()\s]+)\)")
TREE_LINE = re.compile(r"^(?P<indent> *)(?P<name>[\w.]+/?)  +\S")


def blocks(page: Path, language: str) -> list[str]:
    """The fenced blocks of a language, in order."""
    return [body for name, body in FENCE.findall(page.read_text(encoding="utf-8")) if name == language]


def by_page(pages: list[Path]) -> Any:
    return pytest.mark.parametrize("page", pages, ids=[page.name for page in pages])


# -- configuration ---------------------------------------------------------------------------------------------------


def generator(name: str = "generate_configuration") -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, ROOT / f"docs/{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_configuration_page_is_current() -> None:
    page = generator()
    assert page.PAGE.read_text(encoding="utf-8") == page.render(), "run: python docs/generate_configuration.py"


def test_the_page_of_recall_says_what_its_samples_say() -> None:
    page = generator("generate_recall")
    assert page.PAGE.read_text(encoding="utf-8") == page.render(page.read_runs()), "run: python docs/generate_recall.py"


# -- commands --------------------------------------------------------------------------------------------------------


def shell_lines(page: Path) -> list[str]:
    """Lines of shell blocks, continued ones joined, and inline code, which may be broken over lines."""
    text = page.read_text(encoding="utf-8")
    scripts = "\n".join(blocks(page, "bash")).replace("\\\n", " ")
    inline = [" ".join(code.split()) for code in INLINE_CODE.findall(FENCE.sub("", text))]
    return [*scripts.splitlines(), *inline]


def job_lines(page: Path) -> list[list[str]]:
    """The words after `ray_job.py` of every command line."""
    found = []
    for line in shell_lines(page):
        _, is_job, rest = line.partition("python ray_job.py ")
        if is_job:
            found.append(shlex.split(rest, comments=True))
    return found


def parse(words: list[str]) -> object:
    for job in ray_job.JOBS:
        command = job.command.split()
        if words[: len(command)] == command:
            config = parse_job(job.config_type, words[len(command) :])
            validate_sections(config)
            return config
    raise AssertionError(f"{words} names no job")


def test_every_command_line_parses_and_every_job_is_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    lines = [words for page in PAGES for words in job_lines(page)]
    for words in lines:
        parse(words)
    readme = [" ".join(words) for words in job_lines(ROOT / "README.md")]
    for job in ray_job.JOBS[1:]:  # the first is `make demo`
        assert any(line.startswith(job.command) for line in readme), f"the README does not show `{job.command}`"


def test_every_make_target_exists() -> None:
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE))
    used = {name for page in PAGES for line in shell_lines(page) for name in re.findall(r"(?:^| )make ([a-z-]+)", line)}
    assert {"demo", "test"} <= used <= targets


# -- links and files -------------------------------------------------------------------------------------------------


def anchors(page: Path) -> set[str]:
    """Names of a page's headings as links use them."""
    headings = re.findall(r"^#+ (.+)$", FENCE.sub("", page.read_text(encoding="utf-8")), re.MULTILINE)
    return {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}


@by_page(PAGES)
def test_links_resolve(page: Path) -> None:
    for target in LINK.findall(FENCE.sub("", page.read_text(encoding="utf-8"))):
        if "://" in target:
            continue
        name, _, anchor = target.partition("#")
        path = page.parent / name if name else page
        assert path.exists(), f"{page.name} links to {target}"
        assert not anchor or anchor in anchors(path), f"{page.name}: {path.name} has no heading {anchor!r}"


def named_files() -> set[str]:
    """Paths in the README's file tree; folders end in a slash."""
    tree = next(body for body in blocks(ROOT / "README.md", "text") if body.startswith("ray_job.py"))
    folders: list[str] = []
    paths: set[str] = set()
    for line in tree.splitlines():
        match = TREE_LINE.match(line)
        assert match is not None, f"no name and description: {line!r}"
        del folders[len(match["indent"]) // 2 :]
        path = "".join([*folders, match["name"]])
        assert path not in paths, f"{path} is named twice"
        paths.add(path)
        if path.endswith("/"):
            folders.append(match["name"])
    return paths


def test_the_file_tree_names_every_source_file_and_nothing_else() -> None:
    there = {
        path.relative_to(ROOT).as_posix()
        for folder in SOURCE_FOLDERS
        for path in (ROOT / folder).rglob("*")
        # A package's own file is described by its folder's line.
        if path.suffix in SOURCE_SUFFIXES and path.name != "__init__.py" and "__pycache__" not in path.parts
    }
    there |= {f"{Path(path).parent.as_posix()}/" for path in there}
    there |= {"ray_job.py", "docs/", "tests/"}
    named = named_files()
    assert sorted(there - named) == [], "not in the README's file tree"
    assert sorted(named - there) == [], "in the README's file tree only"


# -- code ------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folder_with_a_tree(tmp_path_factory: pytest.TempPathFactory, tiny_lm_config: BaseLMConfig) -> Path:
    """A folder with `data/store`, whose context `stdlib` has three levels, sealed and recent nodes."""
    folder = tmp_path_factory.mktemp("docs")
    root = folder / "data/store"
    plan = tiny_plan(tiny_lm_config, root)
    with open_context(root, plan, "stdlib") as writer:
        ingest(writer, plan, make_compactor(plan), make_documents([700, 40, 300]))
        follow(writer, plan)
    return folder


@pytest.fixture
def tree_folder(folder_with_a_tree: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Where the documentation's code runs; models are written to a home of its own, not to the user's."""
    monkeypatch.chdir(folder_with_a_tree)
    monkeypatch.setenv("HOME", str(folder_with_a_tree))
    num_threads = torch.get_num_threads()
    yield folder_with_a_tree
    torch.set_num_threads(num_threads)


@by_page([page for page in PAGES if blocks(page, "python")])
def test_code_runs(page: Path, tree_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for number, code in enumerate(blocks(page, "python"), start=1):
        exec(compile(code, f"{page.name}, block {number}", "exec"), {"__name__": "documentation"})
        assert capsys.readouterr().out, "an example shows something"


def test_the_reader_of_the_storage_page_reads_every_level(tree_folder: Path) -> None:
    names: dict[str, Any] = {}
    exec(blocks(ROOT / "docs/storage.md", "python")[-1], names)
    context = Path("data/store/stdlib")
    assert any((context / SEGMENT_FOLDER).iterdir()), "both ways of storing must be there"
    with Store(Path("data/store")).open_reader("stdlib") as reader:
        assert reader.version.max_lod == 2
        every_level_is_read(reader, names["read_level"])
    with ContextWriter(context, "stdlib") as writer:
        Branching(writer).fork("side", at_block=40)
        Branching(writer).roll_back(History(context, "stdlib").resolve("side"))
    with Store(Path("data/store")).open_reader("stdlib") as reader:
        assert reader.version.num_blocks == 40
        every_level_is_read(reader, names["read_level"])


def every_level_is_read(reader: TreeReader, read_level: Callable[[Path, int, str], np.ndarray]) -> None:
    for lod in range(1, reader.version.max_lod + 1):
        for array in reader.version.encoding.arrays:
            read = torch.from_numpy(read_level(Path("data/store/stdlib"), lod, array.name))
            assert torch.equal(read, reader.read(array.name, lod, range(reader.version.num_nodes(lod))))
