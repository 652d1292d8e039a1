"""The tiny model in a cache of its own, and the real one in the user's."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from cluster.config import BaseLMConfig
from models.base_lm import BaseLM
from models.sentence_encoder import SentenceEncoder


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> Iterator[None]:
    """torch's threads spin while they wait: on a busy machine two take ten times as long as one."""
    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(num_threads)


@pytest.fixture(scope="session")
def tiny_config(tmp_path_factory: pytest.TempPathFactory) -> BaseLMConfig:
    cache_dir: Path = tmp_path_factory.mktemp("model-cache")
    return BaseLMConfig(source="tiny", dtype="float32", device="cpu", cache_dir=cache_dir)


@pytest.fixture(scope="session")
def tiny_lm(tiny_config: BaseLMConfig) -> BaseLM:
    return BaseLM.load(tiny_config)


@pytest.fixture(scope="session")
def tiny_stock(tiny_lm: BaseLM) -> PreTrainedModel:
    """The same weights in untouched transformers."""
    return AutoModelForCausalLM.from_pretrained(tiny_lm.files.folder, dtype=torch.float32).eval()


@pytest.fixture(scope="session")
def real_config() -> BaseLMConfig:
    return BaseLMConfig(source="smollm2-135m", dtype="float32", device="cpu")


@pytest.fixture(scope="session")
def real_lm(real_config: BaseLMConfig) -> BaseLM:
    return BaseLM.load(real_config)


@pytest.fixture(scope="session")
def tiny_bf16_config(tiny_config: BaseLMConfig) -> BaseLMConfig:
    return dataclasses.replace(tiny_config, dtype="bfloat16")


@pytest.fixture(scope="session")
def sentence_encoder() -> SentenceEncoder:
    return SentenceEncoder.load()
