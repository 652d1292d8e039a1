from __future__ import annotations

import hashlib
import json
import pickle
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch.nn import functional as F

from cluster.config import GistNetKind
from cluster.errors import ModelError
from models.gistnet import BlockGistNet, GistNet, GistNetSpec, WindowedGistNet
from models.gistnet.base import ADDED_LATER, last_of_sub_spans, masked, rms_normalised
from tests.models.gistnet.nets import DIM, KINDS, NUM_VECTORS, blocks, children, make

every_net = pytest.mark.parametrize("num_vectors", NUM_VECTORS)
every_kind = pytest.mark.parametrize("kind", KINDS)


@every_net
@every_kind
def test_shapes_and_finiteness_at_every_level(kind: GistNetKind, num_vectors: int) -> None:
    net = make(kind, num_vectors, perturbed=True)
    embeddings, hidden = blocks(4)
    output = net.forward_tokens(embeddings, torch.tensor([32, 1, 17, 0]), hidden)
    assert output.gists.shape == (4, num_vectors, DIM)
    assert output.keys.shape == (4, net.key_dim)
    assert output.gists.isfinite().all()
    assert output.keys.isfinite().all()
    assert torch.allclose(output.keys[:3].norm(dim=-1), torch.ones(3), atol=1e-5)
    for lod in (2, 3, 9, 10, 30):
        nodes = net.forward_nodes(*children(num_vectors), lod)
        assert nodes.gists.shape == (3, num_vectors, DIM)
        assert nodes.keys.shape == (3, net.key_dim)
        assert nodes.gists.isfinite().all()


@every_net
@every_kind
@pytest.mark.parametrize("garbage", [1e4, float("nan"), float("inf")])
def test_what_stands_in_padding_changes_nothing(kind: GistNetKind, num_vectors: int, garbage: float) -> None:
    net = make(kind, num_vectors, perturbed=True)
    embeddings, hidden = blocks(6)
    lengths = torch.tensor([32, 31, 16, 5, 2, 1])
    padding = torch.arange(32) >= lengths[:, None]
    clean = net.forward_tokens(embeddings, lengths, hidden)
    embeddings[padding], hidden[padding] = garbage, garbage
    dirty = net.forward_tokens(embeddings, lengths, hidden)
    assert torch.equal(clean.gists, dirty.gists)
    assert torch.equal(clean.keys, dirty.keys)


@every_kind
def test_real_tokens_do_matter(kind: GistNetKind) -> None:
    net = make(kind, perturbed=True)
    embeddings, hidden = blocks(2)
    lengths = torch.tensor([20, 20])
    before = net.forward_tokens(embeddings, lengths, hidden)
    embeddings[:, 19] *= -1
    hidden[:, 19] *= -1
    after = net.forward_tokens(embeddings, lengths, hidden)
    assert torch.equal(before.gists, after.gists) == (kind == "constant")
    assert not torch.equal(before.keys, after.keys)


@every_kind
def test_bfloat16_inputs_are_worked_on_in_float32(kind: GistNetKind) -> None:
    net = make(kind, perturbed=True)
    embeddings, hidden = (x.bfloat16() for x in blocks(2))
    lengths = torch.tensor([32, 9])
    output = net.forward_tokens(embeddings, lengths, hidden)
    assert output.gists.dtype == output.keys.dtype == torch.float32
    assert torch.equal(output.gists, net.forward_tokens(embeddings.float(), lengths, hidden.float()).gists)


def test_keys_are_the_mean_of_centred_states_with_every_token_alike() -> None:
    embeddings, hidden = blocks(2)
    hidden[:, 0] *= 100  # an attention sink
    lengths = torch.tensor([32, 7])
    windowed, block = make("windowed"), make("block")
    with torch.no_grad():
        windowed.hidden_mean.fill_(0.2)
        block.embedding_mean.fill_(-0.1)
    for net, states, mean in ((windowed, hidden, 0.2), (block, embeddings, -0.1)):
        expected = []
        for g in range(2):
            real = states[g, : lengths[g]]
            unit = real / real.square().mean(-1, keepdim=True).sqrt()
            expected.append(F.normalize((unit - mean).mean(0), dim=0))
        keys = net.forward_tokens(embeddings, lengths, hidden).keys
        assert torch.allclose(keys, torch.stack(expected), atol=1e-4)


@every_net
def test_keys_of_a_layer_of_their_own_are_made_of_its_states_alone(num_vectors: int) -> None:
    net, lengths = make("windowed", num_vectors, key_layer=2, perturbed=True), torch.tensor([32, 7, 1])
    assert (net.key_layer, net.lm_layer, net.lm_layers) == (2, 3, [2, 3])
    embeddings, hidden = blocks(3)
    _, key_states = blocks(3, seed=1)
    found = net.forward_tokens(embeddings, lengths, hidden, key_states)
    with torch.no_grad():
        for g, length in enumerate(lengths.tolist()):
            real = key_states[g, :length]
            unit = real / real.square().mean(-1, keepdim=True).sqrt()
            expected = F.normalize((unit - net.own_key_mean).mean(0), dim=0)
            assert torch.allclose(found.keys[g], expected, atol=1e-4)
    # Neither what the net reads nor padding is in a key, nor the key's states in a gist.
    other_text = net.forward_tokens(-embeddings, lengths, 2 * hidden.roll(1, 1), key_states)
    assert torch.equal(other_text.keys, found.keys)
    assert not torch.equal(other_text.gists, found.gists)
    key_states[torch.arange(32) >= lengths[:, None]] = float("nan")
    assert torch.equal(net.forward_tokens(embeddings, lengths, hidden, key_states).keys, found.keys)
    other_keys = net.forward_tokens(embeddings, lengths, hidden, hidden)
    assert torch.equal(other_keys.gists, found.gists)
    assert not torch.equal(other_keys.keys, found.keys)


def test_without_a_key_layer_keys_are_of_what_the_net_reads() -> None:
    embeddings, hidden = blocks(2)
    _, ignored = blocks(2, seed=1)
    lengths = torch.tensor([32, 5])
    windowed, block = make("windowed"), make("block")
    assert (windowed.spec.key_layer, windowed.key_layer, windowed.lm_layers) == (None, 3, [3])
    assert windowed.key_mean is windowed.hidden_mean
    assert (block.spec.key_layer, block.key_layer, block.lm_layers) == (None, None, [])
    assert block.key_mean is block.embedding_mean
    for net in (windowed, block):
        assert "own_key_mean" not in net.state_dict()
        plain = net.forward_tokens(embeddings, lengths, hidden)
        assert torch.equal(net.forward_tokens(embeddings, lengths, hidden, ignored).keys, plain.keys)


@every_kind
def test_a_parents_key_is_the_mean_of_its_childrens(kind: GistNetKind) -> None:
    gists, keys = children(1)
    made = make(kind).forward_nodes(gists, keys, 2).keys
    assert torch.allclose(made, F.normalize(keys.mean(1), dim=-1), atol=1e-6)


@given(length=st.integers(1, 32), num_vectors=st.sampled_from(NUM_VECTORS))
def test_sub_spans_are_equal_and_end_with_the_block(length: int, num_vectors: int) -> None:
    last = last_of_sub_spans(torch.tensor([length]), num_vectors)[0].tolist()
    assert last[-1] == length - 1
    assert all(0 <= i < length for i in last)
    sizes = [b - a for a, b in zip([-1, *last], last, strict=False)]
    assert max(sizes) - min(sizes) <= 1
    assert sum(sizes) == length


def test_masking_and_scaling_helpers() -> None:
    x = torch.tensor([[[3.0, 4.0], [float("nan"), 1.0]]])
    assert torch.equal(masked(x, torch.tensor([[True, False]])), torch.tensor([[[3.0, 4.0], [0.0, 0.0]]]))
    assert torch.allclose(rms_normalised(x[:, :1]).square().mean(), torch.tensor(1.0))
    assert torch.equal(rms_normalised(torch.zeros(2, 3)), torch.zeros(2, 3))


@every_net
@every_kind
def test_a_saved_net_comes_back_the_same(kind: GistNetKind, num_vectors: int, tmp_path: Path) -> None:
    net = make(kind, num_vectors, perturbed=True)
    net.save(tmp_path / "net")
    assert sorted(p.name for p in (tmp_path / "net").iterdir()) == ["config.json", "model.safetensors"]
    again = GistNet.load(tmp_path / "net")
    assert type(again) is type(net)
    assert (again.spec, again.net_id, again.digest()) == (net.spec, net.net_id, net.digest())
    assert [p.requires_grad for p in again.parameters()] == [p.requires_grad for p in net.parameters()]
    embeddings, hidden = blocks(3)
    lengths = torch.tensor([32, 8, 1])
    expected = net.forward_tokens(embeddings, lengths, hidden)
    assert torch.equal(again.forward_tokens(embeddings, lengths, hidden).gists, expected.gists)
    assert pickle.loads(pickle.dumps(net)).digest() == net.digest()


def test_digests_tell_nets_apart() -> None:
    nets = [make(kind, m) for kind in KINDS for m in NUM_VECTORS]
    nets += [make("windowed", seed=1), make("windowed", perturbed=True)]
    centred = make("windowed")
    centred.hidden_mean += 1e-3
    nets += [make("windowed", key_layer=1), make("windowed", key_layer=2), make("windowed", key_layer=2)]
    with torch.no_grad():
        nets[-1].own_key_mean += 1e-3
    digests = [net.digest() for net in [*nets, centred]]
    assert len(set(digests)) == len(digests)


def test_digests_outlive_what_nets_did_not_have() -> None:
    """Trees name the net that made them: of those made before nets had parts, the names must not change."""
    assert make("mean").digest() == "273fbd24b13f7f8869c81f5544bb5c018cac33db8819984ee2dded7d9458ec70"
    assert make("block", perturbed=True).digest() == older_digest(make("block", perturbed=True))
    assert make("windowed").digest() == older_digest(make("windowed"))
    keyed = make("windowed", key_layer=2)
    assert keyed.digest() != older_digest(keyed)


def older_digest(net: GistNet) -> str:
    """As it was defined before there were key layers and keywords."""
    spec = {name: value for name, value in vars(net.spec).items() if name not in ADDED_LATER}
    digest = hashlib.sha256(json.dumps(spec, sort_keys=True).encode())
    for name, tensor in sorted(net.state_dict().items()):
        digest.update(f"{name} {tuple(tensor.shape)}".encode())
        digest.update(tensor.numpy().tobytes())
    return digest.hexdigest()


@every_kind
def test_projected_keys_are_narrow_and_other_weights_the_same(kind: GistNetKind) -> None:
    net = make(kind, key_dim=8)
    assert net.key_head is not None
    others = {name: weight for name, weight in net.state_dict().items() if not name.startswith("key_head.")}
    assert others.keys() == make(kind).state_dict().keys()
    assert all(torch.equal(weight, make(kind).state_dict()[name]) for name, weight in others.items())
    projection = net.key_head.projection
    assert torch.allclose(projection.T @ projection, torch.eye(8), atol=1e-5)
    embeddings, hidden = blocks(3)
    lengths = torch.tensor([32, 7, 1])
    with torch.no_grad():
        net.key_head.query.normal_(std=5)
        keys = net.forward_tokens(embeddings, lengths, hidden).keys
    assert keys.shape == (3, 8)
    states = (hidden if kind == "windowed" else embeddings)[1, :7]
    centred = states / states.square().mean(-1, keepdim=True).sqrt()
    weights = (centred @ net.key_head.query * DIM**-0.5).softmax(dim=0)
    expected = weights @ centred @ projection
    assert torch.allclose(keys[1], expected / expected.norm(), atol=1e-4)


def test_in_half_the_size_a_net_comes_back_rounded(tmp_path: Path) -> None:
    net = make("windowed", 2, num_keywords=2, key_dim=8, perturbed=True)
    net.save(tmp_path / "whole")
    net.save(tmp_path / "half", torch.bfloat16)
    sizes = [(tmp_path / name / "model.safetensors").stat().st_size for name in ("whole", "half")]
    assert sizes[1] < 0.55 * sizes[0]
    whole, half = (GistNet.load(tmp_path / name) for name in ("whole", "half"))
    assert whole.digest() == net.digest() != half.digest()
    for name, weight in net.state_dict().items():
        assert torch.equal(half.state_dict()[name], weight.bfloat16().float())


def test_a_net_with_a_key_layer_comes_back_the_same(tmp_path: Path) -> None:
    net = make("windowed", 2, key_layer=1, perturbed=True)
    net.save(tmp_path / "net")
    again = GistNet.load(tmp_path / "net")
    assert (again.spec, again.digest(), again.key_layer) == (net.spec, net.digest(), 1)
    assert torch.equal(again.key_mean, net.own_key_mean)
    # Files that know no key layer are still read.
    make("windowed", perturbed=True).save(tmp_path / "old")
    config = json.loads((tmp_path / "old" / "config.json").read_text())
    del config["key_layer"]
    (tmp_path / "old" / "config.json").write_text(json.dumps(config))
    assert GistNet.load(tmp_path / "old").digest() == make("windowed", perturbed=True).digest()


def test_digests_are_the_same_in_another_process(tmp_path: Path) -> None:
    net = make("windowed", 2, perturbed=True)
    net.save(tmp_path)
    program = (
        "from models.gistnet import GistNet; from tests.models.gistnet.nets import make;"
        f"print(GistNet.load({str(tmp_path)!r}).digest(), make('block').digest())"
    )
    printed = subprocess.check_output([sys.executable, "-c", program], text=True).split()
    assert printed == [net.digest(), make("block").digest()]


def test_net_ids_are_readable() -> None:
    assert make("windowed").net_id == "windowed-m1-l3"
    assert make("block", 2).net_id == "block-m2"
    assert make("constant", 4).net_id == "constant-m4"


def rewrite(folder: Path, **changes: object) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **changes}))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"kind": "oracle"}, "kind 'oracle' is unknown.*windowed"),
        ({"format_version": 2}, "version 2; this program reads"),
        ({"format": "something"}, "'something'"),
        ({"rank": 8}, "no GistNet configuration.*rank"),
        ({"dim": 48}, "does not fit"),
        ({"num_vectors": 3}, "num_vectors=3; it is 1, 2 or 4"),
        ({"dim": "24"}, "dim='24'; it is an integer"),
        ({"hidden_dim": 10**6}, "does not fit"),
        ({"hidden_dim": 10**12}, "hidden_dim=1000000000000"),
        ({"num_heads": 0}, "needs pooling heads"),
        ({"lm_layer": None}, "names no lm_layer"),
        ({"key_layer": 3}, "key_layer=3; it is an integer from 0 to 2"),
        ({"key_layer": -1}, "key_layer=-1"),
        ({"key_layer": 2}, "does not fit.*own_key_mean"),
    ],
)
def test_configs_that_do_not_fit_are_refused(changes: dict[str, object], message: str, tmp_path: Path) -> None:
    make("windowed").save(tmp_path)
    rewrite(tmp_path, **changes)
    with pytest.raises(ModelError, match=message):
        GistNet.load(tmp_path)


def test_broken_files_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="there is no GistNet at"):
        GistNet.load(tmp_path)
    make("windowed").save(tmp_path)
    with pytest.raises(ModelError, match="not a BlockGistNet"):
        BlockGistNet.load(tmp_path)
    assert isinstance(WindowedGistNet.load(tmp_path), WindowedGistNet)

    weights = load_file(tmp_path / "model.safetensors")
    save_file({**weights, "block_constant": weights["block_constant"] * float("nan")}, tmp_path / "model.safetensors")
    with pytest.raises(ModelError, match="'block_constant' is not finite"):
        GistNet.load(tmp_path)
    del weights["hidden_mean"]
    save_file(weights, tmp_path / "model.safetensors")
    with pytest.raises(ModelError, match=r"does not fit.*hidden_mean"):
        GistNet.load(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"torn")
    with pytest.raises(ModelError, match="does not fit"):
        GistNet.load(tmp_path)
    (tmp_path / "config.json").write_text("[]")
    with pytest.raises(ModelError, match="cannot be read"):
        GistNet.load(tmp_path)


def test_inputs_that_do_not_fit_are_refused() -> None:
    net = make("windowed", 2)
    embeddings, hidden = blocks(2)
    lengths = torch.tensor([32, 32])
    gists, keys = children(2)
    with pytest.raises(ModelError, match="needs the LM's states after 3 layers"):
        net.forward_tokens(embeddings, lengths)
    with pytest.raises(ModelError, match="embeddings of shape"):
        net.forward_tokens(embeddings[:, :16], lengths, hidden)
    with pytest.raises(ModelError, match="hidden of shape"):
        net.forward_tokens(embeddings, lengths, hidden[..., :12])
    with pytest.raises(ModelError, match="lengths"):
        net.forward_tokens(embeddings, lengths[:1], hidden)
    keyed = make("windowed", 2, key_layer=2)
    with pytest.raises(ModelError, match="needs the LM's states after 2 layers, for routing keys"):
        keyed.forward_tokens(embeddings, lengths, hidden)
    with pytest.raises(ModelError, match="key_states of shape"):
        keyed.forward_tokens(embeddings, lengths, hidden, hidden[:, :16])
    with pytest.raises(ModelError, match="LOD 2 and above"):
        net.forward_nodes(gists, keys, 1)
    with pytest.raises(ModelError, match="child_gists of shape"):
        net.forward_nodes(gists[:, :, :1], keys, 2)
    with pytest.raises(ModelError, match="child_keys of shape"):
        net.forward_nodes(gists, keys[:, :31], 2)


def test_impossible_sizes_are_refused() -> None:
    with pytest.raises(ModelError, match="no GistNet can have"):
        GistNetSpec(kind="mean", dim=0, num_vectors=1)
    with pytest.raises(ModelError, match="no GistNet can have"):
        GistNetSpec(kind="windowed", dim=8, num_vectors=1, num_heads=-1)
