from __future__ import annotations

from pathlib import Path

import pytest
import torch

from cluster.config import BaseLMConfig, GistNetConfig, GistNetKind
from cluster.errors import ConfigError, ModelError
from models.base_lm import BaseLM
from models.gistnet import build_gistnet
from models.model_files import resolve_model
from tests.models.gistnet.nets import KINDS, Shape, make


@pytest.mark.parametrize("kind", KINDS)
def test_the_same_seed_gives_the_same_net_and_leaves_the_random_state_alone(kind: GistNetKind) -> None:
    config = GistNetConfig(kind=kind, lm_layers=3, num_vectors=2)
    torch.manual_seed(5)
    first = build_gistnet(config, Shape())
    drawn = torch.rand(1)
    torch.manual_seed(5)
    assert torch.equal(torch.rand(1), drawn)
    assert build_gistnet(config, Shape()).digest() == first.digest()
    assert not first.training


def test_files_and_a_loaded_lm_give_the_same_net(tiny_config: BaseLMConfig, tiny_lm: BaseLM) -> None:
    config = GistNetConfig(lm_layers=2)
    from_files = build_gistnet(config, resolve_model(tiny_config))
    assert from_files.digest() == build_gistnet(config, tiny_lm).digest()
    assert from_files.dim == tiny_lm.hidden_size


def test_sizes_follow_the_config() -> None:
    spec = build_gistnet(GistNetConfig(hidden_dim=40, num_heads=2, lm_layers=1), Shape()).spec
    assert (spec.hidden_dim, spec.num_heads, spec.lm_layer) == (40, 2, 1)
    assert build_gistnet(GistNetConfig(kind="block"), Shape()).spec.hidden_dim == 24
    assert build_gistnet(GistNetConfig(kind="mean"), Shape()).spec.hidden_dim == 0


@pytest.mark.parametrize(
    ("kind", "lm_layers", "key_layer", "expected"),
    [
        ("windowed", 6, 4, (4, 4)),
        ("windowed", 5, 1, (1, 1)),
        ("windowed", 4, 4, (None, 4)),
        ("windowed", 3, 4, (None, 3)),
        ("windowed", 0, 4, (None, 0)),
        ("block", 6, 4, (None, None)),
        ("mean", 6, 4, (None, None)),
    ],
)
def test_the_key_layer_is_no_more_than_the_net_reads(
    kind: GistNetKind, lm_layers: int, key_layer: int, expected: tuple[int | None, int | None]
) -> None:
    net = build_gistnet(GistNetConfig(kind=kind, lm_layers=lm_layers, key_layer=key_layer), Shape())
    assert (net.spec.key_layer, net.key_layer) == expected
    # It draws no random number: gists are those of the net without one.
    plain = build_gistnet(GistNetConfig(kind=kind, lm_layers=lm_layers, key_layer=max(lm_layers, 1)), Shape())
    for name, tensor in plain.state_dict().items():
        assert torch.equal(net.state_dict()[name], tensor)


def test_a_key_layer_of_none_is_refused() -> None:
    with pytest.raises(ConfigError, match="gistnet.key_layer must be at least 1"):
        GistNetConfig(key_layer=0).validate()


def test_a_path_wins_over_the_kind(tmp_path: Path) -> None:
    saved = make("block", 2, perturbed=True)
    saved.save(tmp_path)
    loaded = build_gistnet(GistNetConfig(kind="windowed", path=str(tmp_path)), Shape())
    assert loaded.digest() == saved.digest()


def test_a_net_for_another_width_is_refused(tmp_path: Path) -> None:
    make("windowed").save(tmp_path)
    with pytest.raises(ModelError, match="vectors of size 24, but other has a hidden size of 64"):
        build_gistnet(GistNetConfig(path=str(tmp_path)), Shape("other", hidden_size=64))


def test_more_layers_than_the_lm_has_are_refused() -> None:
    with pytest.raises(ModelError, match=r"after 8 layers, but shape has 6; set gistnet\.lm_layers"):
        build_gistnet(GistNetConfig(), Shape())
