"""LensNet scores sets: whatever their order and padding, within its bound, the same after saving."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cluster.environment import PROJECT_ROOT
from cluster.errors import ModelError
from models.lensnet import FEATURES, CandidateSet, LensNet, LensNetSpec
from models.lensnet.net import CONFIG_FILE, WEIGHTS_FILE, packaged_lensnet, padded, require_models, untrained_lensnet

KEY_DIM = 6
SPEC = LensNetSpec(key_dim=KEY_DIM, key_directions=4, hidden_dim=16, num_layers=2, num_heads=2)


def candidates(n: int, seed: int = 0) -> CandidateSet:
    rng = np.random.default_rng(seed)
    return CandidateSet(
        np.sort(rng.choice(1000, n, replace=False)).astype(np.int64),
        rng.random((n, len(FEATURES)), np.float32),
        rng.standard_normal((n, KEY_DIM)).astype(np.float32),
        rng.standard_normal(KEY_DIM).astype(np.float32),
    )


def opinionated(spec: LensNetSpec = SPEC) -> LensNet:
    """A net that does not score everything 0."""
    net = untrained_lensnet(spec)
    torch.manual_seed(1)
    with torch.no_grad():
        torch.nn.init.normal_(net.score.weight)
    return net


def test_before_training_nothing_is_worth_showing() -> None:
    assert not untrained_lensnet(SPEC).scores(candidates(5)).any()
    assert len(untrained_lensnet(SPEC).scores(candidates(0))) == 0


@given(n=st.integers(1, 12), seed=st.integers(0, 100))
@settings(max_examples=25, deadline=None)
def test_order_does_not_matter(n: int, seed: int) -> None:
    net, found = opinionated(), candidates(n, seed)
    order = np.random.default_rng(seed).permutation(n)
    moved = CandidateSet(found.blocks[order], found.features[order], found.keys[order], found.query)
    np.testing.assert_allclose(net.scores(moved), net.scores(found)[order], atol=1e-5)


def test_padding_and_other_sets_do_not_matter() -> None:
    net, sets = opinionated(), [candidates(3, 1), candidates(9, 2), candidates(1, 3)]
    features, keys, query, there = padded(sets)
    features[~there] = 7.0
    keys[~there] = -3.0
    with torch.inference_mode():
        scores = net(features, keys, query, there)
    for row, found in enumerate(sets):
        np.testing.assert_allclose(scores[row, : len(found)], net.scores(found), atol=1e-5)
        assert not scores[row, len(found) :].any()


def test_a_set_without_candidates_among_others_is_scored_0() -> None:
    net = opinionated()
    features, keys, query, there = padded([candidates(3, 1), candidates(2, 2)])
    there[1] = False
    with torch.inference_mode():
        scores = net(features, keys, query, there)
    assert scores.isfinite().all()
    assert not scores[1].any()


def test_candidates_look_at_each_other_only_with_attention() -> None:
    found = candidates(4)
    features = found.features.copy()
    features[3] += 1.0
    other = CandidateSet(found.blocks, features, found.keys, found.query)
    for layers, differs in ((1, True), (0, False)):
        net = opinionated(replace(SPEC, num_layers=layers))
        assert np.allclose(net.scores(found)[:3], net.scores(other)[:3], atol=1e-6) != differs


def test_scores_stay_within_their_bound() -> None:
    net = opinionated(replace(SPEC, max_score=0.2))
    with torch.no_grad():
        net.score.weight.mul_(1000)
    assert 0.19 < np.abs(net.scores(candidates(20))).max() <= 0.2


def test_it_is_told_only_its_features() -> None:
    told = ("lexical_score", "is_shown")
    net, found = opinionated(replace(SPEC, features=told, key_dim=0)), candidates(5)
    features = np.random.default_rng(9).random(found.features.shape).astype(np.float32)
    for name in told:
        features[:, list(FEATURES).index(name)] = found.column(name)
    other = CandidateSet(found.blocks, features, -found.keys, found.query)
    np.testing.assert_array_equal(net.scores(found), net.scores(other))


def test_features_are_standardised_by_what_was_measured() -> None:
    net = opinionated()
    features = np.random.default_rng(0).random((50, len(FEATURES))).astype(np.float32)
    features[:, 0] = 0.25
    net.measure(features)
    np.testing.assert_allclose(net.feature_mean, features.mean(axis=0), atol=1e-6)
    assert net.feature_scale[0] == 1.0, "what never changes is not blown up"
    np.testing.assert_allclose(net.feature_scale[1:], features[:, 1:].std(axis=0), atol=1e-5)


def test_another_working_context_of_the_same_candidates() -> None:
    found = candidates(3)
    shown = found.with_shown(np.array([True, False, True]))
    assert shown.column("is_shown").tolist() == [1.0, 0.0, 1.0]
    assert shown.column("lod")[0] == 0.0
    assert shown.column("lod")[1] > 0.0
    untouched = [i for i, name in enumerate(FEATURES) if name not in {"is_shown", "lod"}]
    np.testing.assert_array_equal(shown.features[:, untouched], found.features[:, untouched])


def test_it_comes_back_as_it_was(tmp_path: Path) -> None:
    net = opinionated()
    net.measure(np.random.default_rng(0).random((50, len(FEATURES))).astype(np.float32))
    net.save(tmp_path / "net")
    again = LensNet.load(tmp_path / "net")
    assert again.spec == net.spec
    assert again.digest() == net.digest()
    np.testing.assert_array_equal(again.scores(candidates(7)), net.scores(candidates(7)))
    assert opinionated(replace(SPEC, max_score=0.4)).digest() != net.digest()


def test_it_is_refused_beside_models_it_was_not_trained_with(tmp_path: Path) -> None:
    net = opinionated()
    digest = net.digest()
    net.trained_with = {"base_lm": "a" * 64, "gistnet": "b" * 64}
    assert net.digest() == digest, "the same weights are the same net"
    net.save(tmp_path)
    again = LensNet.load(tmp_path)
    require_models(again, tmp_path, {"base_lm": "a" * 64, "gistnet": "b" * 64, "tokenizer": "c" * 64}, KEY_DIM)
    with pytest.raises(ModelError, match=r"another gistnet \(bbbbbbbbbbbb\) than the context's \(dddddddddddd\)"):
        require_models(again, tmp_path, {"base_lm": "a" * 64, "gistnet": "d" * 64}, KEY_DIM)
    with pytest.raises(ModelError, match="keys of 6 dimensions, the context has 7"):
        require_models(again, tmp_path, {}, KEY_DIM + 1)


def test_the_net_that_comes_along_is_found_for_its_models_alone() -> None:
    folder = PROJECT_ROOT / "models/packaged/lensnet-smollm2-135m"
    digests = {**LensNet.load(folder).trained_with, "adapter": "e" * 64}
    assert packaged_lensnet(digests) == folder
    assert packaged_lensnet({**digests, "gistnet": "f" * 64}) is None
    assert packaged_lensnet({}) is None


def test_a_net_that_does_not_say_what_it_was_trained_with_is_taken(tmp_path: Path) -> None:
    opinionated().save(tmp_path)
    config = json.loads((tmp_path / CONFIG_FILE).read_text())
    del config["trained_with"]
    (tmp_path / CONFIG_FILE).write_text(json.dumps(config))
    require_models(LensNet.load(tmp_path), tmp_path, {"gistnet": "d" * 64}, KEY_DIM)


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        ("missing", "there is no LensNet"),
        ("json", "cannot be read"),
        ("format", "this program reads"),
        ("unknown", "is no LensNet configuration"),
        ("feature", "knows no feature 'smell'"),
        ("weights", "does not fit config.json"),
        ("other", "does not fit config.json"),
        ("nan", "is not finite float32"),
    ],
)
def test_damaged_nets_are_refused(tmp_path: Path, damage: str, said: str) -> None:
    net = opinionated()
    if damage == "nan":
        with torch.no_grad():
            net.score.bias.fill_(float("nan"))
    net.save(tmp_path)
    config = json.loads((tmp_path / CONFIG_FILE).read_text())
    match damage:
        case "missing":
            (tmp_path / CONFIG_FILE).unlink()
        case "json":
            (tmp_path / CONFIG_FILE).write_text("[1, 2]")
        case "format":
            (tmp_path / CONFIG_FILE).write_text(json.dumps(config | {"format_version": 99}))
        case "unknown":
            (tmp_path / CONFIG_FILE).write_text(json.dumps(config | {"colour": "blue"}))
        case "feature":
            (tmp_path / CONFIG_FILE).write_text(json.dumps(config | {"features": ["smell"]}))
        case "weights":
            (tmp_path / WEIGHTS_FILE).write_bytes(b"nothing")
        case "other":
            (tmp_path / CONFIG_FILE).write_text(json.dumps(config | {"hidden_dim": 32}))
    with pytest.raises(ModelError, match=said):
        LensNet.load(tmp_path)


def test_shapes_that_do_not_fit_are_refused() -> None:
    net = opinionated()
    there = torch.ones(1, 3, dtype=torch.bool)
    with pytest.raises(ModelError, match=f"is told {len(FEATURES)} features"):
        net(torch.zeros(1, 3, 2), torch.zeros(1, 3, KEY_DIM), torch.zeros(1, KEY_DIM), there)
    with pytest.raises(ModelError, match=f"keys of {KEY_DIM} dimensions, not 3"):
        net(torch.zeros(1, 3, len(FEATURES)), torch.zeros(1, 3, 3), torch.zeros(1, 3), there)


@pytest.mark.parametrize(
    "wrong",
    [
        {"features": ()},
        {"features": ("lod", "lod")},
        {"hidden_dim": 10, "num_heads": 4},
        {"max_score": 0.0},
        {"dropout": 1.0},
        {"num_layers": -1},
    ],
)
def test_specifications_that_make_no_net_are_refused(wrong: dict[str, object]) -> None:
    with pytest.raises(ModelError):
        LensNetSpec(**wrong)  # type: ignore[arg-type]
