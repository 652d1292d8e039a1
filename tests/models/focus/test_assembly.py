"""Rows are those of a plain loop over the entries; after edits nothing that stays is read again."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cluster.config import TOKENS_PER_BLOCK as K
from cluster.errors import FocusError
from models.focus import assembly
from models.focus.assembly import Assembled, Assembler
from models.focus.filling import Filling
from models.focus.history import EntryState, History, TreeReader
from models.focus.working_context import WorkingContext, smallest_budget
from storage.contract import DocumentMeta
from storage.schema import GISTS
from tests.models.focus.test_working_context import MODES
from tests.models.focus.trees import DIM, histories, make_tree, with_states

TABLE = torch.arange(256 * DIM, dtype=torch.float32).reshape(256, DIM)


def embed(ids: torch.Tensor) -> torch.Tensor:
    return TABLE[ids]


def assembler(*readers: TreeReader) -> Assembler:
    return Assembler(embed, readers, array=GISTS, dtype=torch.float32, device=torch.device("cpu"))


def by_hand(wc: WorkingContext, reader: TreeReader) -> tuple[torch.Tensor, list[int]]:
    rows, places = [], []
    for node, first, count in zip(wc.nodes(), wc.first_token.tolist(), wc.num_tokens.tolist(), strict=True):
        if node.lod > 0:
            vectors = reader.read(GISTS, node.lod, [node.index])[0]
            rows += list(vectors)
            places += [2 * first + count - 1] * len(vectors)
            continue
        if node.index == wc.histories[0].stop_block:
            tail = reader.tail()
            assert tail is not None
            tokens = tail.tokens
        else:
            tokens = reader.tokens(node.index, 1)[0][0][:count]
        rows += list(TABLE[torch.from_numpy(tokens.astype(np.int64))])
        places += [2 * (first + i) for i in range(count)]
    return torch.stack(rows) if rows else torch.empty(0, DIM), places


def assert_same(assembled: Assembled, reader: TreeReader) -> None:
    rows, places = by_hand(assembled.wc, reader)
    assert torch.equal(assembled.embeds, rows)
    assert assembled.half_tokens.tolist() == places
    assert assembled.num_rows == assembled.wc.total_cost == assembled.row_of_entry[-1]


@given(histories(max_blocks=1200), st.sampled_from(MODES), st.data())
@settings(deadline=None, max_examples=60)
def test_rows_of_any_context_and_after_any_edit(tree, mode, data: st.DataObject) -> None:
    reader, history = tree
    budget = smallest_budget([history]) + 500
    previous: Assembled | None = None
    for _ in range(3):
        filling = Filling(mode, budget, [history])
        for block in data.draw(st.lists(st.integers(0, max(0, history.num_blocks - 1)), max_size=6)):
            if history.num_blocks:
                filling.show(history.first_block + block)
        previous = assembler(reader).assemble(filling.finish(), previous)
        assert_same(previous, reader)


class CountingReader:
    """A reader that counts what is read through it."""

    def __init__(self, reader: TreeReader) -> None:
        self._reader = reader
        self.blocks = 0
        self.nodes = 0

    def __getattr__(self, name: str):
        return getattr(self._reader, name)

    def tokens(self, first_block: int, num_blocks: int):
        self.blocks += num_blocks
        return self._reader.tokens(first_block, num_blocks)

    def read(self, name: str, lod: int, indices):
        self.nodes += len(indices)
        return self._reader.read(name, lod, indices)


def test_only_what_changed_is_read() -> None:
    reader = make_tree([4 * K * K]).reader()
    history = History.of(reader)
    filling = Filling("overlay", 500, [history])
    for block in (3, 4, 60, 127):
        assert filling.show(block)
    before = assembler(reader).assemble(filling.finish())
    assert filling.show(61)
    counting = CountingReader(reader)
    after = assembler(counting).assemble(filling.finish(), before)  # type: ignore[arg-type]
    assert_same(after, reader)
    assert (counting.blocks, counting.nodes) == (1, 0)
    assert after.num_reused == after.num_rows - K


@pytest.mark.parametrize("places", [np.arange(10, 40), np.r_[0:7, 12, 20:44]], ids=["one run", "many"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_rows_are_converted_as_torch_does_and_pass_gradients(
    places: np.ndarray, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(assembly, "PIECE_ROWS", 8)
    # Every finite half: rounding in two steps must not differ from rounding in one.
    halves = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(torch.float16)
    halves = halves[torch.isfinite(halves)]
    values = halves[: len(halves) // len(places) * len(places)].reshape(len(places), -1).clone().requires_grad_()
    embeds = torch.zeros(50, values.shape[1], dtype=dtype)
    assembly._place(embeds, places, values)
    expected = torch.zeros(50, values.shape[1], dtype=dtype)
    expected[torch.from_numpy(places)] = values.detach().to(dtype)
    assert torch.equal(embeds.detach(), expected)
    embeds[int(places[9])].sum().backward()
    assert values.grad is not None
    assert values.grad.sum(1).nonzero().flatten().tolist() == [9]


def test_a_grown_tail_is_read_again() -> None:
    tree = make_tree([100], tail=3)
    reader = tree.reader()
    before = assembler(reader).assemble(WorkingContext.coarsest("strict", 99, [History.of(reader)]))
    tree.append_tail(DocumentMeta("open", "file:///open"), 3, np.array([250, 251], np.uint32))
    reader = tree.reader()
    after = assembler(reader).assemble(WorkingContext.coarsest("strict", 99, [History.of(reader)]), before)
    assert_same(after, reader)
    assert after.num_rows == before.num_rows + 2
    assert after.num_reused == 4


def test_what_another_version_may_have_replaced_is_read_again() -> None:
    tree = make_tree([4 * K * K])
    gist_only, speculative = EntryState.GIST_ONLY, EntryState.SPECULATIVE

    def assemble(states: dict[EntryState, list[int]], previous: Assembled | None = None) -> tuple[Assembled, list[int]]:
        reader = CountingReader(with_states(tree.reader(), states))
        filling = Filling("strict", 10**4, [History.of(reader)])  # type: ignore[arg-type]
        assert filling.show(2)
        assert filling.show(70)
        assembled = assembler(reader).assemble(filling.finish(), previous)  # type: ignore[arg-type]
        assert_same(assembled, tree.reader())
        return assembled, [reader.blocks, reader.nodes]

    before, read = assemble({speculative: [70, 127], gist_only: [0, 1, 40]})
    assert read == [2, 31 + 1 + 31 + 1]
    # The same version: nothing can have changed.
    assert assemble({speculative: [70, 127], gist_only: [0, 1, 40]}, before)[1] == [0, 0]
    tree.append_tail(DocumentMeta("open", "file:///open"), 0, np.arange(3, dtype=np.uint32))
    # The tail; speculative block 70; the gists over block 127, which is speculative no more, and of block 1, written.
    after, read = assemble({speculative: [70], gist_only: [0, 40]}, before)
    assert read == [1, 2]
    assert after.num_reused == before.num_rows - K - 2


def test_a_reader_of_another_version_is_refused() -> None:
    tree = make_tree([100])
    history = History.of(tree.reader())
    tree.append_tail(DocumentMeta("open", "file:///open"), 0, np.arange(3, dtype=np.uint32))
    wc = WorkingContext.coarsest("strict", 99, [history])
    with pytest.raises(FocusError, match="pinned"):
        assembler(tree.reader()).assemble(wc)
    with pytest.raises(FocusError, match="as many readers"):
        assembler().assemble(wc)
