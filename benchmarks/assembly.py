"""Assembly of a Working Context of 8,192 entries, against a plain gather of the same vectors out of flat files.

The rival knows every row's place beforehand, writes into a tensor it has kept, and converts as we do: it does nothing
but move vectors. We begin with the entries and a reader, and return a tensor that owns its memory and all places.
Both sides have the vectors in memory and one torch thread: copies gain little by a second one, and a barrier that waits
for a busy core costs more than a whole assembly.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.harness import BenchmarkError, Result, Setting, median_ratio, percentiles, time_in_turns
from benchmarks.synthetic import DIM, VOCABULARY, build_context, encoding
from cluster.config import BLOCKS_PER_SUPER_BLOCK, SLOTS_PER_SUPER_BLOCK
from cluster.config import TOKENS_PER_BLOCK as K
from models.focus.allocators import FocusRequest, Ranked, Uniform
from models.focus.assembly import Assembled, Assembler
from models.focus.history import History
from models.focus.working_context import Node, WorkingContext
from storage.schema import GISTS
from storage.store import Store
from storage.tree.reader import ContextReader

LM_DTYPE = torch.bfloat16
"""What the rows are wanted in; the gists are stored as float16."""

TAIL_TOKENS = 512
CHANGED_SHARE = 0.01
"""Of the entries, between a Working Context and the next."""


@dataclass(frozen=True)
class FlatLevels:
    """The same vectors for the rival: a memory-mapped array a level, and the table of the tokens."""

    levels: dict[int, np.ndarray]
    table: torch.Tensor


def assembly(setting: Setting) -> Result:
    """The worse of two Working Contexts: even detail and a raw tail, and raw blocks shown all over the timeline."""
    num_super_blocks = setting.size(1024, 64)
    num_entries = setting.size(8192, 1024)
    rounds, warm_up = setting.size((200, 20), (10, 2))
    torch_rng = torch.Generator().manual_seed(0)
    table = torch.randn((VOCABULARY, DIM), generator=torch_rng).to(LM_DTYPE)
    with setting.scratch() as root, one_thread():
        writer, _ = build_context(root, "assembly", encoding(keys=True), num_super_blocks)
        writer.close()
        with Store(root).open_reader("assembly") as reader:
            flat = FlatLevels(_flat_files(root, reader), table)
            history = History.of(reader)
            contexts = {"even": _even(history, num_entries), "scattered": _scattered(history, num_entries)}
            results = {name: _compare(wc, reader, flat, rounds, warm_up) for name, wc in contexts.items()}
    worst = max(results.values(), key=lambda result: result.value)
    detail = {
        "tokens": num_super_blocks * SLOTS_PER_SUPER_BLOCK,
        **{name: {"ratio": round(result.value, 3), **result.detail} for name, result in results.items()},
    }
    return Result(worst.value, worst.spread, worst.repeats, detail)


@contextmanager
def one_thread() -> Iterator[None]:
    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(num_threads)


# -- what is assembled -------------------------------------------------------------------------------------------------


def _even(history: History, num_entries: int) -> WorkingContext:
    """LOD1 and LOD2 gists, the newest finer, and a raw tail."""
    budget = num_entries + TAIL_TOKENS // K * (K - 1)
    return Uniform(TAIL_TOKENS).allocate(FocusRequest([history], budget, "strict"))


def _scattered(history: History, num_entries: int) -> WorkingContext:
    """One raw block among its siblings' gists in as many super-blocks as give the entries, in no order; a raw tail."""
    num_super_blocks = history.num_blocks // BLOCKS_PER_SUPER_BLOCK
    num_shown = (num_entries - num_super_blocks) // (K - 1) - 1
    rng = np.random.default_rng(0)
    # The newest one is the tail's.
    chosen = rng.permutation(num_super_blocks - 1)[:num_shown]
    blocks = chosen * BLOCKS_PER_SUPER_BLOCK + rng.integers(BLOCKS_PER_SUPER_BLOCK, size=num_shown)
    budget = num_entries + (num_shown + TAIL_TOKENS // K) * (K - 1)
    ranked = [(int(block), 0) for block in blocks]
    return Ranked(TAIL_TOKENS).allocate(FocusRequest([history], budget, "strict", ranked))


def _edited(wc: WorkingContext) -> WorkingContext:
    """Another one, of which about a hundredth is new: the newest LOD2 gists expanded, as many collapsed in exchange."""
    num_swaps = max(1, round(CHANGED_SHARE * len(wc) / (K + 1)))
    coarse = wc.index[wc.lod == 2]
    fine = wc.index[wc.lod == 1] // K
    whole = np.flatnonzero(np.bincount(fine) == K)
    if len(whole) == 0:
        # Every super-block shown in detail holds a raw block; its collapse makes room too.
        whole = np.unique(fine)
    for old in whole[:num_swaps].tolist():
        wc = wc.collapse(Node(2, old))
    for new in coarse[-num_swaps:].tolist():
        wc = wc.expand(Node(2, new))
    return wc


# -- the sides ---------------------------------------------------------------------------------------------------------


def _flat_files(root: Path, reader: ContextReader) -> dict[int, np.ndarray]:
    """Every level's gists as a plain file, mapped: `(num_nodes, 576)` float16. Read once, so that it is in memory."""
    levels = {}
    for lod, num_nodes in enumerate(reader.version.level_counts, start=1):
        path = root / f"flat{lod}"
        reader.read(GISTS, lod, np.arange(num_nodes)).numpy().tofile(path)
        levels[lod] = np.memmap(path, np.float16, mode="r", shape=(num_nodes, DIM))
        np.array(levels[lod])
    return levels


def _rival(wc: WorkingContext, reader: ContextReader, flat: FlatLevels) -> Callable[[int], torch.Tensor]:
    """Moves the vectors of a Working Context, everything else about it being known."""
    first_row = np.cumsum(wc.cost) - wc.cost
    raw = np.flatnonzero(wc.lod == 0)
    ids = torch.from_numpy(np.concatenate([reader.tokens(block, 1)[0][0] for block in wc.index[raw].tolist()])).long()
    id_rows = torch.from_numpy((first_row[raw][:, None] + np.arange(K)).reshape(-1))
    gists = [
        (flat.levels[lod], wc.index[wc.lod == lod], torch.from_numpy(first_row[wc.lod == lod]))
        for lod in np.unique(wc.lod[wc.lod > 0]).tolist()
    ]
    out = torch.empty((wc.total_cost, DIM), dtype=LM_DTYPE)

    def gather(_: int) -> torch.Tensor:
        out.index_copy_(0, id_rows, flat.table[ids])
        for level, nodes, rows in gists:
            out.index_copy_(0, rows, torch.from_numpy(level[nodes]).float().to(LM_DTYPE))
        return out

    return gather


def _compare(wc: WorkingContext, reader: ContextReader, flat: FlatLevels, rounds: int, warm_up: int) -> Result:
    def embed(ids: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.embedding(ids, flat.table)

    assembler = Assembler(embed, [reader], array=GISTS, dtype=LM_DTYPE, device=torch.device("cpu"))
    rival = _rival(wc, reader, flat)
    before = assembler.assemble(wc)
    edited = _edited(wc)
    after = assembler.assemble(edited, before)
    _check_same("a gather", before.embeds, rival(0))
    _check_same("an assembly from scratch", after.embeds, assembler.assemble(edited).embeds)
    seconds = time_in_turns(
        {
            "rival": rival,
            "subject": lambda _: assembler.assemble(wc),
            "incremental": lambda _: assembler.assemble(edited, before),
            "full": lambda _: assembler.assemble(edited),
        },
        rounds,
        warm_up,
    )
    incremental = median_ratio(seconds["incremental"], seconds["full"], "rounds", {})
    detail = {
        "entries": {f"lod{lod}": int((wc.lod == lod).sum()) for lod in np.unique(wc.lod).tolist()},
        "rows": before.num_rows,
        "subject": percentiles(seconds["subject"], 1e3, "ms"),
        "rival": percentiles(seconds["rival"], 1e3, "ms"),
        "after_an_edit": {
            **_change(before, after),
            "ratio_to_full": round(incremental.value, 3),
            "spread": [round(bound, 3) for bound in incremental.spread],
            **percentiles(seconds["incremental"], 1e3, "ms"),
        },
    }
    return median_ratio(seconds["subject"], seconds["rival"], "rounds", detail)


def _change(before: Assembled, after: Assembled) -> dict[str, Any]:
    new = set(after.wc.nodes()) - set(before.wc.nodes())
    return {"new_entries": len(new), "rows": after.num_rows, "rows_read": after.num_rows - after.num_reused}


def _check_same(what: str, found: torch.Tensor, expected: torch.Tensor) -> None:
    if not torch.equal(found, expected):
        raise BenchmarkError(f"{what} of the same entries gave other rows: nothing to compare")
