import ast

from cluster.config import CorpusConfig
from storage.corpus.source import open_corpus
from storage.corpus.standard_library import standard_library_corpus
from tests.storage.corpus.support import documents, read_all, reasons


def test_it_reads_the_library_without_tests_and_other_peoples_packages() -> None:
    config = standard_library_corpus()
    source = open_corpus(config)
    uris = [part.file.uri for shard in source.shards() for part in shard.parts]  # type: ignore[attr-defined]
    names = {uri.partition("/")[2] for uri in uris}
    assert {"argparse.py", "asyncio/base_events.py", "json/decoder.py"} <= names
    folders = {folder for name in names for folder in name.split("/")[:-1]}
    assert not folders & {"test", "tests", "site-packages", "dist-packages", "__pycache__", "idlelib"}
    assert all(name.endswith(".py") for name in names)
    assert len({uri.partition("/")[0] for uri in uris}) == 1
    assert source.estimated_bytes is not None
    assert source.estimated_bytes > 4e6


def test_named_packages_are_read_in_the_order_given_and_are_all_real_sources() -> None:
    config = standard_library_corpus(["json", "argparse.py"], CorpusConfig(tags=["demo"]))
    items = read_all(*config.paths, include=config.include, exclude=config.exclude, tags=config.tags)
    found = documents(items)
    assert reasons(items) == {}
    assert (found[0].uri, found[-1].uri) == ("json/__init__.py", "argparse.py")
    assert all(document.tags == ("demo",) for document in found)
    for document in found:
        ast.parse(document.text)


def test_the_base_section_is_kept() -> None:
    config = standard_library_corpus(base=CorpusConfig(max_document_bytes=123, exclude=["mine", "test"]))
    assert config.max_document_bytes == 123
    assert config.exclude[:2] == ["mine", "test"]
    assert config.exclude.count("test") == 1
