"""Planted readers against trees that were made of the replaced text, bit for bit, on every level."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from actors.compactor import Compactor
from actors.evaluation.planted import (
    PlantedNodes,
    PlantedReader,
    PlantedSuperBlock,
    encode_replacements,
    plant,
    plant_encoded,
)
from actors.packing import windows_of
from actors.plan import CompactionPlan, plan_models
from cluster.config import TOKENS_PER_BLOCK as K
from cluster.config import BaseLMConfig, GistDtype, GistNetConfig, StoreConfig
from cluster.errors import IncompatibleTreeError, InvalidWriteError, ModelError, NodeMissingError
from models.base_lm import BaseLM
from models.focus.allocators import FocusRequest, Ranked
from models.focus.assembly import Assembler
from models.focus.dense import KeyIndex, KeySpace, query_states
from models.focus.history import History
from models.gistnet import build_gistnet
from models.model_files import resolve_model
from models.node_encoder import NodeEncoder
from storage.contract import DocumentMeta, SpanWrite, TreeReader
from storage.memory_tree import MemoryTree
from storage.schema import GISTS, KEYS
from storage.tree.writer import ContextWriter
from tests.actors.helpers import assert_same_tree, follow, make_compactor, open_context
from tests.models.focus.trees import readers
from tests.models.gistnet.nets import perturb

WINDOW = 1024
VARIANTS: list[tuple[str, int, GistDtype]] = [
    ("windowed", 1, "float16"),
    ("windowed", 2, "int8"),
    ("block", 1, "bfloat16"),
    ("last_token", 4, "float32"),
]
"""Kind of net, vectors a node, stored dtype."""


def ids(num_tokens: int, seed: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, num_tokens).astype(np.uint32)


def make_plan(
    lm: BaseLMConfig, root: Path, kind: str = "windowed", num_vectors: int = 1, dtype: GistDtype = "float16"
) -> CompactionPlan:
    """A plan whose net's every weight has moved, as training would: an untrained one hears its last child alone."""
    config = GistNetConfig(kind=kind, num_vectors=num_vectors, lm_layers=1)  # type: ignore[arg-type]
    perturb(build_gistnet(config, resolve_model(lm)), 0.05).save(root / "net")
    return plan_models(lm, GistNetConfig(path=str(root / "net")), StoreConfig(root=root, context="c", gist_dtype=dtype))


def spans_of(compactor: Compactor, documents: Sequence[np.ndarray]) -> list[SpanWrite]:
    metas = [DocumentMeta(f"doc{number}", f"file:///doc{number}") for number in range(len(documents))]
    windows = [window for meta, tokens in zip(metas, documents, strict=True) for window in windows_of(meta, tokens)]
    return compactor.encode(windows)


def disk_tree(root: Path, plan: CompactionPlan, spans: Sequence[SpanWrite]) -> ContextWriter:
    writer = open_context(root, plan)
    writer.append(spans)
    writer.flush()
    follow(writer, plan)
    return writer


def memory_copy(reader: TreeReader) -> MemoryTree:
    """The same tree in memory, by way of what its reader gives."""
    version = reader.version
    tree = MemoryTree(version.encoding, version.context)
    names = [spec.name for spec in version.encoding.arrays]
    for document in reader.documents():
        blocks = np.arange(document.first_block, document.first_block + document.num_blocks)
        tokens, counts = reader.tokens(document.first_block, document.num_blocks)
        arrays = {name: reader.read(name, 1, blocks).flatten(0, 1) for name in names}
        tree.append([SpanWrite(document.meta, 0, tokens, counts, arrays, last=True)])
    for lod in range(2, version.max_lod + 1):
        nodes = np.arange(version.num_nodes(lod))
        tree.put_nodes(lod, 0, {name: reader.read(name, lod, nodes).flatten(0, 1) for name in names})
    return tree


@pytest.mark.parametrize(("kind", "num_vectors", "dtype"), VARIANTS)
def test_planting_equals_a_tree_of_the_replaced_text(
    kind: str, num_vectors: int, dtype: GistDtype, tmp_path: Path, tiny_lm_config: BaseLMConfig
) -> None:
    plan = make_plan(tiny_lm_config, tmp_path, kind, num_vectors, dtype)
    compactor = make_compactor(plan)
    # 33 windows and a bit: super-blocks and windows coincide, LOD3 is complete, the last block is short.
    text = ids(33 * WINDOW + 77, 0)
    replacements = {0: ids(WINDOW, 1), 5: ids(WINDOW, 2), 32: ids(WINDOW, 3)}
    other = text.copy()
    for index, tokens in replacements.items():
        other[index * WINDOW : (index + 1) * WINDOW] = tokens

    base = disk_tree(tmp_path / "base", plan, spans_of(compactor, [text]))
    truth_writer = disk_tree(tmp_path / "truth", plan, spans_of(compactor, [other]))
    truth = truth_writer.reader()
    assert base.version().level_counts == (33 * K + 3, 33, 1)
    for reader in (base.reader(), memory_copy(base.reader()).reader()):
        planted = plant(reader, compactor, NodeEncoder(plan.gistnet), replacements)
        assert isinstance(planted, TreeReader)
        assert_same_tree(planted, truth)
        # In two steps, one planting over another.
        first = plant(reader, compactor, NodeEncoder(plan.gistnet), {0: replacements[0]})
        rest = {index: tokens.reshape(K, K) for index, tokens in replacements.items() if index}
        assert_same_tree(plant(first, compactor, NodeEncoder(plan.gistnet), rest), truth)
        # And all of it taken back.
        original = {index: text[index * WINDOW : (index + 1) * WINDOW] for index in replacements}
        assert_same_tree(plant(planted, compactor, NodeEncoder(plan.gistnet), original), reader)
    base.close()
    truth_writer.close()


def test_what_is_not_above_a_planted_super_block_stays(tmp_path: Path, tiny_lm_config: BaseLMConfig) -> None:
    """Several documents, so that windows and super-blocks do not coincide."""
    plan = make_plan(tiny_lm_config, tmp_path)
    compactor = make_compactor(plan)
    spans = spans_of(compactor, [ids(size, size) for size in (700, 2 * WINDOW + 20, 40 * WINDOW, 31)])
    writer = disk_tree(tmp_path / "tree", plan, spans)
    reader = writer.reader()
    planted = plant(reader, compactor, NodeEncoder(plan.gistnet), {3: ids(WINDOW, 1), 33: ids(WINDOW, 2)})

    assert planted.version == reader.version
    assert planted.documents() == reader.documents()
    assert planted.document_at(100) == reader.document_at(100)
    assert planted.tail() is None
    num_blocks = reader.version.num_blocks
    before = np.arange(num_blocks + 1)
    np.testing.assert_array_equal(planted.tokens_before(before), reader.tokens_before(before))
    changed = {1: {*range(96, 128), *range(1056, 1088)}, 2: {3, 33}, 3: {0}}
    np.testing.assert_array_equal(planted.planted_blocks, sorted(changed[1]))
    tokens, old_tokens = planted.tokens(0, num_blocks)[0], reader.tokens(0, num_blocks)[0]
    assert set(np.flatnonzero((tokens != old_tokens).any(axis=1))) == changed[1]
    for lod, expected in changed.items():
        nodes = np.arange(reader.version.num_nodes(lod))
        for name in (GISTS, KEYS):
            differs = planted.read(name, lod, nodes) != reader.read(name, lod, nodes)
            assert set(np.flatnonzero(differs.flatten(1).any(dim=1).numpy())) == expected
    planted.close()
    assert reader.read(GISTS, 1, [0]).shape[0] == 1  # still open
    writer.close()


def test_encoded_once_planted_anywhere(tmp_path: Path, tiny_lm_config: BaseLMConfig) -> None:
    plan = make_plan(tiny_lm_config, tmp_path)
    compactor, encoder = make_compactor(plan), NodeEncoder(plan.gistnet)
    reader = memory_copy(
        disk_tree(tmp_path / "tree", plan, spans_of(compactor, [ids(34 * WINDOW, 0)])).reader()
    ).reader()
    needle = ids(WINDOW, 9)
    encoded = encode_replacements(reader, compactor, {0: needle})[0]
    for depth in (0, 17, 33):
        direct = plant(reader, compactor, encoder, {depth: needle})
        assert_same_tree(plant_encoded(reader, encoder, {depth: encoded}), direct)
    assert_same_tree(plant(reader, compactor, encoder, {}), reader)


def test_levels_that_lag_behind_are_left_alone(tmp_path: Path, tiny_lm_config: BaseLMConfig) -> None:
    plan = make_plan(tiny_lm_config, tmp_path)
    compactor = make_compactor(plan)
    full = memory_copy(disk_tree(tmp_path / "t", plan, spans_of(compactor, [ids(33 * WINDOW, 0)])).reader()).reader()
    lagging = MemoryTree(full.version.encoding)
    blocks = np.arange(full.version.num_blocks)
    arrays = {name: full.read(name, 1, blocks).flatten(0, 1) for name in (GISTS, KEYS)}
    lagging.append([SpanWrite(full.documents()[0].meta, 0, *full.tokens(0, len(blocks)), arrays, last=True)])
    lagging.put_nodes(2, 0, {name: full.read(name, 2, range(4)).flatten(0, 1) for name in (GISTS, KEYS)})
    replacements = {2: ids(WINDOW, 1), 4: ids(WINDOW, 2)}
    planted = plant(lagging.reader(), compactor, NodeEncoder(plan.gistnet), replacements)
    truth = plant(full, compactor, NodeEncoder(plan.gistnet), replacements)
    assert planted.version.level_counts == (33 * K, 4)
    for name in (GISTS, KEYS):
        assert torch.equal(planted.read(name, 1, blocks), truth.read(name, 1, blocks))
        assert torch.equal(planted.read(name, 2, range(4)), truth.read(name, 2, range(4)))
        with pytest.raises(NodeMissingError):
            planted.read(name, 2, [4])


def test_deep_trees(tmp_path: Path, tiny_lm_config: BaseLMConfig) -> None:
    """A million tokens, four levels: every node above is made of its children as they are served, one by one."""
    plan = make_plan(tiny_lm_config, tmp_path)
    compactor, encoder = make_compactor(plan), NodeEncoder(plan.gistnet)
    tree, generator = MemoryTree(plan.encoding), torch.Generator().manual_seed(0)
    counts = (33 * 1024, 33 * K, 33, 1)
    for lod, count in enumerate(counts, start=1):
        arrays = {name: torch.randn(count, plan.gistnet.dim, generator=generator).half() for name in (GISTS, KEYS)}
        if lod == 1:
            slots, full = np.zeros((count, K), np.uint32), np.full(count, K, np.uint8)
            tree.append([SpanWrite(DocumentMeta("long", "long"), 0, slots, full, arrays, last=True)])
        else:
            tree.put_nodes(lod, 0, arrays)
    planted = plant(tree.reader(), compactor, encoder, {31: ids(WINDOW, 1), 1023: ids(WINDOW, 2), 1055: ids(WINDOW, 3)})
    above = {2: {31, 1023, 1055}, 3: {0, 31, 32}, 4: {0}}
    for lod, expected in above.items():
        for index in expected:
            gists, keys = (planted.read_group(name, lod - 1, index).float().numpy() for name in (GISTS, KEYS))
            made = encoder.encode_nodes(gists[None], keys.transpose(1, 0, 2), lod)
            for name, values in ((GISTS, made.gists), (KEYS, made.keys)):
                assert torch.equal(planted.read_node(name, lod, index), torch.from_numpy(values).half())
        nodes = np.arange(counts[lod - 1])
        differs = (planted.read(GISTS, lod, nodes) != tree.reader().read(GISTS, lod, nodes)).flatten(1).any(dim=1)
        assert set(np.flatnonzero(differs.numpy())) == expected


@st.composite
def hand_planted(draw: st.DrawFn) -> tuple[TreeReader, PlantedReader]:
    """A random tree, and one over it with made-up nodes: level, index and -1 where a stored node has the vector."""
    reader, vectors = draw(readers(max_blocks=1200))
    num_super_blocks = reader.version.num_blocks // K
    chosen = draw(st.sets(st.integers(0, num_super_blocks - 1), max_size=4)) if num_super_blocks else set()
    replaced, ancestors = {}, []
    for index in chosen:
        tokens, counts = reader.tokens(index * K, K)
        tokens[np.arange(K) < counts[:, None]] = 1000 + index
        blocks = np.arange(index * K, (index + 1) * K)
        replaced[index] = PlantedSuperBlock(tokens, counts, {GISTS: made_up(1, blocks, vectors)})
    nodes = np.array(sorted(chosen), np.int64)
    for lod in range(2, reader.version.max_lod + 1):
        nodes = nodes[nodes < reader.version.num_nodes(lod)]
        if len(nodes):
            arrays = {GISTS: made_up(lod, nodes, vectors)}
            ancestors.append(PlantedNodes.of(reader.version.encoding, lod, nodes, arrays))
        nodes = np.unique(nodes // K)
    return reader, PlantedReader(reader, replaced, ancestors)


def made_up(lod: int, indices: np.ndarray, vectors: int) -> np.ndarray:
    values = np.ones((len(indices), vectors, 4), np.float32)
    values[..., 0], values[..., 1], values[..., 2] = lod, indices[:, None], -1
    return values.reshape(-1, 4)


@given(pair=hand_planted(), data=st.data())
@settings(max_examples=60, deadline=None)
def test_every_way_to_read_gives_the_same(pair: tuple[TreeReader, PlantedReader], data: st.DataObject) -> None:
    reader, planted = pair
    version = planted.version
    is_planted = set(planted.planted_blocks.tolist())
    first = data.draw(st.integers(0, version.num_blocks), label="first")
    count = data.draw(st.integers(0, min(100, version.num_blocks - first)), label="count")
    tokens, counts = planted.tokens(first, count)
    old_tokens, old_counts = reader.tokens(first, count)
    np.testing.assert_array_equal(counts, old_counts)
    for place, block in enumerate(range(first, first + count)):
        used = int(counts[place])
        wanted = [1000 + block // K] * used if block in is_planted else old_tokens[place, :used].tolist()
        assert tokens[place].tolist() == wanted + [0xFFFFFFFF] * (K - used)
    for lod in range(1, version.max_lod + 1):
        above = {block // K ** (lod - 1) for block in is_planted}
        indices = data.draw(st.lists(st.integers(0, version.num_nodes(lod) - 1), max_size=20), label=f"LOD{lod}")
        read = planted.read(GISTS, lod, indices)
        assert read.shape[0] == len(indices)
        for row, index in zip(read, indices, strict=True):
            assert row[0, :2].tolist() == [lod, index]
            assert (row[0, 2].item() == -1) == (index in above)
            assert torch.equal(planted.read_node(GISTS, lod, index), row)
            group = planted.read_group(GISTS, lod, index // K)
            assert torch.equal(group[index % K], row)
            assert len(group) == min(K, version.num_nodes(lod) - index // K * K)
        with pytest.raises(NodeMissingError):
            planted.read(GISTS, lod, [version.num_nodes(lod)])
    with pytest.raises(NodeMissingError):
        planted.tokens(version.num_blocks, 1)
    with pytest.raises(IncompatibleTreeError):
        planted.read(KEYS, 1, [0])


class CountingReader:
    """Passes everything on and notes each read."""

    def __init__(self, reader: TreeReader) -> None:
        self._reader = reader
        self.reads: list[tuple[str, int, int]] = []

    def __getattr__(self, name: str) -> object:
        return getattr(self._reader, name)

    def read(self, name: str, lod: int, indices: Sequence[int]) -> torch.Tensor:
        self.reads.append((name, lod, len(indices)))
        return self._reader.read(name, lod, indices)


def test_many_nodes_are_one_read_beneath(tmp_path: Path, tiny_lm_config: BaseLMConfig) -> None:
    plan = make_plan(tiny_lm_config, tmp_path, "last_token")
    compactor = make_compactor(plan)
    writer = disk_tree(tmp_path / "tree", plan, spans_of(compactor, [ids(64 * WINDOW, 0)]))
    counting = CountingReader(writer.reader())
    replacements = {index: ids(WINDOW, index) for index in (1, 2, 40)}
    planted = plant(counting, compactor, NodeEncoder(plan.gistnet), replacements)  # type: ignore[arg-type]
    # The children of three LOD2 nodes, and of two LOD3 nodes.
    assert counting.reads == [(GISTS, 1, 96), (KEYS, 1, 96), (GISTS, 2, 64), (KEYS, 2, 64)]
    counting.reads.clear()
    planted.read(GISTS, 1, np.arange(0, 2048, 3))
    assert counting.reads == [(GISTS, 1, 683)]
    writer.close()


def test_a_working_context_shows_what_is_planted(tmp_path: Path, tiny_lm_config: BaseLMConfig) -> None:
    plan = make_plan(tiny_lm_config, tmp_path)
    compactor = make_compactor(plan)
    writer = disk_tree(tmp_path / "tree", plan, spans_of(compactor, [ids(33 * WINDOW, 0)]))
    reader = writer.reader()
    needle = ids(WINDOW, 1)
    planted = plant(reader, compactor, NodeEncoder(plan.gistnet), {4: needle})
    history = History.of(planted)
    block = 4 * K + 7
    wc = Ranked(tail_tokens=64).allocate(FocusRequest([history], 160, "overlay", [(block, 0)]))

    def embed(tokens: torch.Tensor) -> torch.Tensor:
        return tokens[..., None].float().expand(*tokens.shape, plan.gistnet.dim)

    assembled = [
        Assembler(embed, [source], array=GISTS, dtype=torch.float32, device=torch.device("cpu")).assemble(wc)
        for source in (planted, reader)
    ]
    entry = int(np.flatnonzero((wc.lod == 0) & (wc.index == block))[0])
    rows = slice(*assembled[0].row_of_entry[entry : entry + 2])
    np.testing.assert_array_equal(assembled[0].embeds[rows, 0].numpy(), needle[7 * K : 8 * K])
    above = [i for i in range(len(wc)) if wc.lod[i] >= 2 and wc.index[i] == 4 // K ** (int(wc.lod[i]) - 2)]
    same = (assembled[0].embeds == assembled[1].embeds).all(dim=1).numpy()
    differing = {
        int(np.searchsorted(assembled[0].row_of_entry, row, side="right")) - 1 for row in np.flatnonzero(~same)
    }
    assert differing == {entry, *above}
    writer.close()


def test_dense_retrieval_finds_what_is_planted(tmp_path: Path, tiny_lm_config: BaseLMConfig) -> None:
    plan = make_plan(tiny_lm_config, tmp_path, "block")
    compactor = make_compactor(plan)
    writer = disk_tree(tmp_path / "tree", plan, spans_of(compactor, [ids(33 * WINDOW, 0)]))
    reader = writer.reader()
    needle = ids(WINDOW, 1)
    planted = plant(reader, compactor, NodeEncoder(plan.gistnet), {4: needle})
    space = KeySpace.of_tree(reader, array=KEYS)
    index = KeyIndex(reader, space, array=KEYS)
    query = query_states(BaseLM.load(tiny_lm_config, num_layers=0), plan.gistnet, needle[7 * K : 8 * K])
    scores = index.over(planted, planted.planted_blocks).scores(query, "pooled")
    assert int(scores.argmax()) == 4 * K + 7
    assert int(index.scores(query, "pooled").argmax()) != 4 * K + 7
    np.testing.assert_allclose(scores, KeyIndex(planted, space, array=KEYS).scores(query, "pooled"), atol=2e-6)
    writer.close()


def test_what_cannot_be_planted_is_refused(tmp_path: Path, tiny_lm_config: BaseLMConfig) -> None:
    plan = make_plan(tiny_lm_config, tmp_path)
    compactor, encoder = make_compactor(plan), NodeEncoder(plan.gistnet)
    writer = disk_tree(tmp_path / "tree", plan, spans_of(compactor, [ids(900, 0), ids(3 * WINDOW + 5, 1)]))
    reader = writer.reader()
    good = ids(WINDOW, 2)
    with pytest.raises(InvalidWriteError, match="super-block 0 cannot be replaced.* block 28 holds 4 tokens"):
        plant(reader, compactor, encoder, {0: good})
    for outside in (-1, 3, 400):
        with pytest.raises(NodeMissingError):
            plant(reader, compactor, encoder, {outside: good})
    for bad in (good[:-1], np.append(good, good[:1]), good.astype(np.float32)):
        with pytest.raises(InvalidWriteError, match="super-block 1 is replaced by 1024 token ids"):
            plant(reader, compactor, encoder, {1: bad})
    with pytest.raises(ModelError, match="outside the vocabulary"):
        plant(reader, compactor, encoder, {1: good + np.uint32(2**20)})

    planted = encode_replacements(reader, compactor, {1: good})[1]
    with pytest.raises(InvalidWriteError, match=r"nodes LOD2 \[1\], and none came"):
        PlantedReader(reader, {1: planted})
    with pytest.raises(InvalidWriteError, match="give every block as many as it has"):
        PlantedReader(reader, {0: planted})
    with pytest.raises(InvalidWriteError, match="NO_TOKEN"):
        PlantedSuperBlock(planted.tokens, planted.num_tokens - np.uint8(1), planted.arrays)
    with pytest.raises(InvalidWriteError, match="uint32"):
        PlantedSuperBlock(planted.tokens.astype(np.int64), planted.num_tokens, planted.arrays)
    with pytest.raises(InvalidWriteError, match="uint8"):
        PlantedSuperBlock(planted.tokens, planted.num_tokens[:5], planted.arrays)
    with pytest.raises(InvalidWriteError, match="'gists' is missing"):
        PlantedNodes.of(reader.version.encoding, 2, np.array([1]), {KEYS: planted.arrays[KEYS]})
    other = make_plan(tiny_lm_config, tmp_path / "other", "windowed", 1, "int8")
    with pytest.raises(IncompatibleTreeError, match="stores 'gists' as float16"):
        plant(reader, make_compactor(other), encoder, {1: good})
    writer.close()
