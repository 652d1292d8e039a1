"""What all tests share: a quiet environment, one embedded Ray cluster, the tiny model's configuration."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from cluster.environment import quiet_environment

# Before anything imports Ray, torch or MLflow. Tests must not join, or be confused by, a cluster of their surroundings.
quiet_environment()
for name in ("RAY_ADDRESS", "RAY_JOB_CONFIG_JSON_ENV_VAR", "MEGACONTEXT_HOME", "MEGACONTEXT_DEBUG"):
    os.environ.pop(name, None)
os.environ.setdefault("OMP_NUM_THREADS", "2")

from cluster.config import BaseLMConfig, RayConfig  # noqa: E402
from cluster.ray_runtime import RaySession, ray_session  # noqa: E402


def pytest_configure(config: pytest.Config) -> None:
    import torch

    torch.set_num_threads(2)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    import torch

    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="no accelerator here"))


@pytest.fixture(scope="session")
def ray_cluster() -> Iterator[RaySession]:
    """One small embedded cluster for the whole test session; jobs started within it share it."""
    with ray_session(RayConfig(address="local", num_cpus=4, object_store_memory_mb=150)) as session:
        yield session


@pytest.fixture(scope="session")
def tiny_lm_config(tmp_path_factory: pytest.TempPathFactory) -> BaseLMConfig:
    """The small random model, in a cache that lives as long as the test session."""
    cache_dir: Path = tmp_path_factory.mktemp("model-cache")
    return BaseLMConfig(source="tiny", dtype="float32", device="cpu", cache_dir=cache_dir)
