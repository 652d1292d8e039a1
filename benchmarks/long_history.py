"""A Working Context of 10 M tokens, against one of 64 k: deciding on its entries and assembling them.

The history itself is known on both sides, as it is between two refocuses. Every allocator in both modes at several
budgets is also built and assembled once from the long history, the smallest budget that can hold it among them.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from benchmarks.assembly import one_thread
from benchmarks.harness import BenchmarkError, Result, Setting, median_ratio, percentiles, time_in_turns
from benchmarks.synthetic import DIM, VOCABULARY, build_context, encoding
from cluster.config import SLOTS_PER_SUPER_BLOCK
from models.focus.allocators import Allocator, FocusRequest, Ranked, Recency, Uniform
from models.focus.assembly import Assembler
from models.focus.history import History
from models.focus.working_context import Mode, WorkingContext, smallest_budget
from storage.schema import GISTS
from storage.store import Store
from storage.tree.reader import ContextReader

BUDGET = 512
TAIL_TOKENS = 128
NUM_FOUND = 8
MODES: tuple[Mode, ...] = ("strict", "overlay")


def long_history(setting: Setting) -> Result:
    """Ratio of the p50 of allocating and assembling 512 slots in an overlay, 8 blocks found by retrieval among them."""
    sizes = {"long": setting.size(9766, 2048), "short": setting.size(64, 64)}
    rounds, warm_up = setting.size((200, 20), (10, 2))
    table = torch.randn((VOCABULARY, DIM), generator=torch.Generator().manual_seed(0))
    with setting.scratch() as root, one_thread():
        readers: dict[str, ContextReader] = {}
        for name, num_super_blocks in sizes.items():
            build_context(root, name, encoding(keys=False), num_super_blocks)[0].close()
            readers[name] = Store(root).open_reader(name)
        try:
            started = time.perf_counter()
            histories = {name: History.of(reader) for name, reader in readers.items()}
            history_ms = 1e3 * (time.perf_counter() - started)
            built = _build_all(histories["long"], readers["long"], table)
            sides = {name: _refocus(histories[name], readers[name], table) for name in sizes}
            seconds = time_in_turns(sides, rounds, warm_up)
        finally:
            for reader in readers.values():
                reader.close()
    detail: dict[str, Any] = {
        "tokens": sizes["long"] * SLOTS_PER_SUPER_BLOCK,
        "smallest_budget": smallest_budget([histories["long"]]),
        "built": built,
        "both_histories_ms": round(history_ms, 1),
        **{name: percentiles(seconds[name], 1e3, "ms") for name in sizes},
    }
    return median_ratio(seconds["long"], seconds["short"], "rounds", detail)


def _assembler(reader: ContextReader, table: torch.Tensor) -> Assembler:
    def embed(ids: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.embedding(ids, table)

    return Assembler(embed, [reader], array=GISTS, dtype=torch.float32, device=torch.device("cpu"))


def _found(history: History) -> list[tuple[int, int]]:
    blocks = np.random.default_rng(0).choice(history.num_blocks - TAIL_TOKENS, NUM_FOUND, replace=False)
    return [(int(block), 0) for block in blocks]


def _refocus(history: History, reader: ContextReader, table: torch.Tensor) -> Callable[[int], object]:
    assembler, found = _assembler(reader, table), _found(history)
    request = FocusRequest([history], BUDGET, "overlay", found)
    allocator = Ranked(TAIL_TOKENS, NUM_FOUND)
    shown = set(allocator.allocate(request).raw_blocks().tolist())
    if not shown.issuperset(block for block, _ in found):
        raise BenchmarkError("a block that was found is not shown: nothing to compare")
    return lambda _: assembler.assemble(allocator.allocate(request))


def _build_all(history: History, reader: ContextReader, table: torch.Tensor) -> int:
    """Build and assemble every kind of Working Context once; returns how many."""
    assembler, found = _assembler(reader, table), _found(history)
    allocators: list[Allocator] = [Recency(), Uniform(TAIL_TOKENS), Ranked(TAIL_TOKENS, NUM_FOUND)]
    smallest = smallest_budget([history])
    built = 0
    for mode in MODES:
        for budget in (smallest, BUDGET, 8192):
            if budget < smallest:
                continue
            for allocator in allocators:
                wc: WorkingContext = allocator.allocate(FocusRequest([history], budget, mode, found))
                rows = assembler.assemble(wc).num_rows
                if not rows == wc.total_cost <= budget:
                    raise BenchmarkError(f"{allocator} in {mode} gave {rows} rows within a budget of {budget}")
                built += 1
    return built
