"""Which GistNet `gistnet.path=auto` comes to: the model's own, unless configuration or context says otherwise."""

from __future__ import annotations

from pathlib import Path

import pytest

from actors.plan import CompactionPlan, check_encoding, plan_models
from cluster.config import BaseLMConfig, GistNetConfig, StoreConfig
from cluster.environment import PROJECT_ROOT
from cluster.errors import IncompatibleTreeError
from models.gistnet import GistNet, packaged_gistnet
from models.model_files import resolve_model
from storage.store import Store
from tests.actors.helpers import open_context

PACKAGED = PROJECT_ROOT / "models/packaged/gistnet-smollm2-135m"


@pytest.fixture(scope="module")
def real_config() -> BaseLMConfig:
    return BaseLMConfig(source="smollm2-135m", dtype="float32", device="cpu")


@pytest.fixture(scope="module")
def packaged_digest() -> str:
    return GistNet.load(PACKAGED).digest()


def plan_of(lm: BaseLMConfig, root: Path, gistnet: GistNetConfig | None = None) -> CompactionPlan:
    return plan_models(lm, gistnet or GistNetConfig(), StoreConfig(root=root, context="c"))


def begin(root: Path, plan: CompactionPlan) -> None:
    """A context that has nothing in it yet but what made it."""
    open_context(root, plan).close()
    assert Store(root).identity("c", "main")[1] == plan.encoding


def test_a_new_context_takes_the_net_that_comes_along(
    real_config: BaseLMConfig, tmp_path: Path, packaged_digest: str
) -> None:
    plan = plan_of(real_config, tmp_path)
    assert plan.encoding.gistnet_digest == packaged_digest
    assert Path(plan.gistnet_path) == PACKAGED
    begin(tmp_path, plan)
    assert plan_of(real_config, tmp_path).encoding == plan.encoding


@pytest.mark.parametrize("asked", [GistNetConfig(path=""), GistNetConfig(seed=1), GistNetConfig(kind="mean")])
def test_what_is_asked_for_is_made(
    real_config: BaseLMConfig, tmp_path: Path, packaged_digest: str, asked: GistNetConfig
) -> None:
    plan = plan_of(real_config, tmp_path, asked)
    assert plan.gistnet_path == ""
    assert plan.gistnet.spec.kind == asked.kind
    assert plan.encoding.gistnet_digest != packaged_digest


def test_a_context_of_the_untrained_net_stays_with_it(real_config: BaseLMConfig, tmp_path: Path) -> None:
    untrained = plan_of(real_config, tmp_path, GistNetConfig(path=""))
    begin(tmp_path, untrained)
    plan = plan_of(real_config, tmp_path)
    assert plan.gistnet_path == ""
    check_encoding(plan, StoreConfig(root=tmp_path, context="c"))


def test_a_context_of_another_net_wants_that_one(real_config: BaseLMConfig, tmp_path: Path) -> None:
    begin(tmp_path, plan_of(real_config, tmp_path, GistNetConfig(path="", seed=1)))
    with pytest.raises(IncompatibleTreeError, match="Use the GistNet it was made with"):
        check_encoding(plan_of(real_config, tmp_path), StoreConfig(root=tmp_path, context="c"))


def test_other_models_have_none(tiny_lm_config: BaseLMConfig, real_config: BaseLMConfig) -> None:
    assert packaged_gistnet(resolve_model(tiny_lm_config)) is None
    assert packaged_gistnet(resolve_model(real_config)) == PACKAGED
