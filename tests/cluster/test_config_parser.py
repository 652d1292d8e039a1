from __future__ import annotations

import os
from dataclasses import fields
from pathlib import Path

import pytest
import yaml

from cluster.config import (
    CompactJob,
    CorpusConfig,
    InspectJob,
    StoreConfig,
    TreeRebuildGistsJob,
    TreeVerifyJob,
    validate_sections,
)
from cluster.config_parser import build_parser, parse_job, to_yaml
from cluster.demo_config import DemoJob
from cluster.errors import ConfigError
from cluster.paper_config import PaperJob

CORPUS_KEYS = ", ".join(field.name for field in fields(CorpusConfig))
CONFIGS = Path(__file__).parents[2] / "configs"


def recipe(tmp_path: Path, text: str) -> list[str]:
    file = tmp_path / "recipe.yaml"
    file.write_text(text)
    return ["--config", str(file)]


def refusal(arguments: list[str], job_type: type = CompactJob) -> str:
    with pytest.raises(ConfigError) as caught:
        parse_job(job_type, arguments)
    return str(caught.value)


def test_sections_are_filled_from_the_recipe_and_then_from_the_line(tmp_path: Path) -> None:
    given = recipe(tmp_path, "corpus: {paths: [a, b], tags: [x]}\nstore: {context: one}\n")
    job = parse_job(CompactJob, [*given, "--store.context", "two", "--corpus.max_document_bytes=7"])
    assert job.corpus.paths == ["a", "b"]
    assert job.corpus.tags == ["x"]
    assert job.corpus.max_document_bytes == 7
    assert job.store == StoreConfig(context="two")


@pytest.mark.parametrize("source", ["line", "recipe", "inline"])
def test_an_unknown_key_of_a_section_names_the_closest_and_all_valid_ones(tmp_path: Path, source: str) -> None:
    arguments = {
        "line": ["--corpus.pathz", "[a]"],
        "recipe": recipe(tmp_path, "corpus:\n  pathz: [a]\n"),
        "inline": ["--corpus", '{"pathz": ["a"]}'],
    }[source]
    message = refusal(arguments)
    assert "unknown key 'corpus.pathz'; did you mean 'corpus.paths'?" in message
    assert f"Valid keys of 'corpus': {CORPUS_KEYS}" in message


@pytest.mark.parametrize("source", ["line", "recipe"])
def test_an_unknown_section_names_the_closest_key_and_all_sections(tmp_path: Path, source: str) -> None:
    arguments = ["--corpis.paths=[a]"] if source == "line" else recipe(tmp_path, "corpis:\n  paths: [a]\n")
    message = refusal(arguments)
    assert "unknown key 'corpis.paths'; did you mean 'corpus.paths'?" in message
    assert "Valid sections: run, ray, tracking, corpus, base_lm, gistnet, store, compaction" in message


def test_a_bare_key_is_found_in_its_section() -> None:
    assert "unknown key 'context'; did you mean 'store.context'?" in refusal(["--context", "x"])


def test_every_unknown_key_of_a_line_is_named() -> None:
    message = refusal(["--corpus.pathz", "a", "--store.contxt=b"])
    assert "'corpus.pathz'" in message
    assert "'store.contxt'" in message


def test_top_level_keys_are_listed_beside_sections() -> None:
    message = refusal(["--jsn", "true"], InspectJob)
    assert "did you mean 'json'?" in message
    assert "Valid sections: store, base_lm; valid keys: all, documents, node, json" in message


def test_keys_are_not_abbreviated() -> None:
    assert "unknown key 'corpus.path'" in refusal(["--corpus.path", "[a]"])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--corpus.format", "foo"], "corpus.format=foo does not fit: expected one of auto, text, jsonl"),
        (["--ray.num_cpus", "many"], "ray.num_cpus=many does not fit: expected a whole number"),
        (["--ray.start_timeout_s", "soon"], "ray.start_timeout_s=soon does not fit: expected a number"),
        (["--tracking.enabled", "maybe"], "tracking.enabled=maybe does not fit: expected true or false"),
        (["--corpus.paths", "docs"], "corpus.paths=docs does not fit: expected a list"),
        (["extra"], "unexpected 'extra'"),
        (["--config", "no-such.yaml"], "File does not exist"),
    ],
)
def test_a_wrong_value_says_what_would_fit(arguments: list[str], message: str) -> None:
    assert message in refusal(arguments)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("corpus: {format: foo}", "corpus.format=foo does not fit: expected one of auto"),
        ("store: {context: 3}", "store.context=3 does not fit: expected a text (in YAML, quote numbers)"),
        ("corpus:\nstore: {context: a}", "the recipe's section 'corpus' holds None instead of keys"),
        ("store: 3", "the recipe's section 'store' holds 3 instead of keys"),
        ("", "a recipe must be a mapping of sections"),
        ("- a\n- b", "a recipe must be a mapping of sections"),
        ("corpus: [", "Problems parsing config"),
    ],
)
def test_a_wrong_recipe_says_what_would_fit(tmp_path: Path, text: str, message: str) -> None:
    assert message in refusal(recipe(tmp_path, text))


@pytest.mark.parametrize("job_type", [CompactJob, DemoJob, InspectJob, TreeVerifyJob, TreeRebuildGistsJob])
def test_yaml_of_a_job_reads_back_as_the_same_job(tmp_path: Path, job_type: type) -> None:
    job = parse_job(job_type, ["--store.context", "some-where", "--store.root", "/x/y"])
    assert parse_job(job_type, recipe(tmp_path, to_yaml(job))) == job


def test_help_gives_docstring_type_and_default_of_every_field(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        parse_job(CompactJob, ["--help"])
    assert stopped.value.code == 0
    text = " ".join(capsys.readouterr().out.split())
    assert "Larger documents go to quarantine." in text
    assert "(type: int, default: 67108864)" in text
    options = build_parser(CompactJob, "compact").format_help()
    for section in fields(CompactJob):
        for field in fields(getattr(CompactJob(), section.name)):
            assert f"--{section.name}.{field.name} " in options, "a field without its option"


def test_debug_is_a_switch_and_no_key(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MEGACONTEXT_DEBUG", "")
    job = parse_job(CompactJob, ["--debug"])
    assert os.environ["MEGACONTEXT_DEBUG"] == "1"
    assert "debug" not in to_yaml(job)


@pytest.mark.parametrize(
    ("file", "job_type", "more"),
    [
        ("demo.yaml", DemoJob, []),
        ("compact.yaml", CompactJob, []),
        ("tiny.yaml", CompactJob, ["--corpus.paths", "[docs]"]),
        ("paper0.yaml", PaperJob, []),
    ],
)
def test_recipes_are_valid_and_hold_only_what_differs(
    file: str, job_type: type, more: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["--config", str(CONFIGS / file), *more]
    with pytest.raises(SystemExit) as stopped:
        parse_job(job_type, [*arguments, "--print_config"])
    assert stopped.value.code == 0
    printed = capsys.readouterr().out
    job = parse_job(job_type, recipe(tmp_path, printed))
    assert job == parse_job(job_type, arguments)
    validate_sections(job)
    defaults = build_parser(job_type, file).get_defaults()
    for section, keys in yaml.safe_load((CONFIGS / file).read_text()).items():
        named = (
            {f"{section}.{key}": value for key, value in keys.items()} if isinstance(keys, dict) else {section: keys}
        )
        for name, value in named.items():
            assert value != defaults[name], f"{file}: {name} is the default"
