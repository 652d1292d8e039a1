"""Nets that come with the program."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from cluster.config import BaseLMConfig
from models.gistnet import GistNet
from models.gistnet.build import check_fits, packaged_gistnet
from models.model_files import resolve_model

ROOT = Path(__file__).parents[2]
PACKAGED = sorted((ROOT / "models" / "packaged").glob("gistnet-*"))
MOST_BYTES = 24 * 2**20


@pytest.mark.parametrize("folder", PACKAGED, ids=lambda folder: folder.name)
def test_a_packaged_net_is_small_fits_its_model_and_says_what_it_is(folder: Path) -> None:
    net = GistNet.load(folder)
    check_fits(net, resolve_model(BaseLMConfig()))
    assert sum(path.stat().st_size for path in folder.iterdir()) <= MOST_BYTES
    card = (folder / "README.md").read_text()
    assert net.digest() in card
    assert "content_nats" in card


def test_the_demo_uses_one() -> None:
    demo = yaml.safe_load((ROOT / "configs" / "demo.yaml").read_text())
    # What it says nothing of is left to the model, and for the default one there is a net.
    assert "gistnet" not in demo
    assert "base_lm" not in demo
    assert packaged_gistnet(resolve_model(BaseLMConfig())) in PACKAGED
