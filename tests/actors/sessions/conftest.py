"""A session on a store of its own."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest

from actors.plan import CompactionPlan, plan_models
from actors.session import Session, SessionSpec
from cluster.config import BaseLMConfig, GistNetConfig, StoreConfig
from models.base_lm import BaseLM
from tests.actors.sessions.support import CONFIG


@pytest.fixture
def plan(tmp_path: Path, tiny_lm_config: BaseLMConfig) -> CompactionPlan:
    net = GistNetConfig(kind="windowed", lm_layers=2)
    return plan_models(tiny_lm_config, net, StoreConfig(root=tmp_path, context="own"))


@pytest.fixture
def spec(tmp_path: Path, plan: CompactionPlan) -> SessionSpec:
    return SessionSpec(plan, StoreConfig(root=tmp_path, context="own", segment_super_blocks=4), config=CONFIG)


@pytest.fixture
def session(spec: SessionSpec, lm: BaseLM) -> Iterator[Session]:
    with closing(Session(spec, lm)) as opened:
        yield opened
