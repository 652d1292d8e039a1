"""The tiny model for tests that measure with it."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from cluster.config import BaseLMConfig
from models.base_lm import BaseLM


@pytest.fixture(scope="session")
def lm(tiny_lm_config: BaseLMConfig) -> BaseLM:
    """Random weights, float32, trained context 2,048."""
    return BaseLM.load(tiny_lm_config)


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> Iterator[None]:
    """torch's threads spin while they wait: on a busy machine two take ten times as long as one."""
    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(num_threads)
