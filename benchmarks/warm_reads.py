"""Random reads of sealed gists that are in memory already, against a memmap of a flat file of the same vectors.

Both sides return a torch tensor that owns its memory.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.harness import BenchmarkError, Result, Setting, percentiles, time_each
from benchmarks.synthetic import DIM, build_context, encoding
from cluster.config import SLOTS_PER_SUPER_BLOCK
from cluster.config import TOKENS_PER_BLOCK as K
from storage.store import Store

READS_PER_TURN = 1000
NODES_PER_BATCH = 1000

Read = Callable[[Any], torch.Tensor]


def warm_read_node(setting: Setting) -> Result:
    """One node, `(1, 576)` float16."""

    def arguments(rng: np.random.Generator, num_nodes: int, count: int) -> list[int]:
        return rng.integers(num_nodes, size=count).tolist()

    return _compare(
        setting,
        lambda reader: lambda node: reader.read_node("gists", 1, node),
        lambda flat: lambda node: torch.from_numpy(np.array(flat[node])),
        arguments,
        reads=setting.size(20_000, 2_000),
    )


def warm_read_group(setting: Setting) -> Result:
    """One sibling group, `(32, 1, 576)` float16."""

    def arguments(rng: np.random.Generator, num_nodes: int, count: int) -> list[int]:
        return rng.integers(num_nodes // K, size=count).tolist()

    return _compare(
        setting,
        lambda reader: lambda group: reader.read_group("gists", 1, group),
        lambda flat: lambda group: torch.from_numpy(np.array(flat[group * K : (group + 1) * K])),
        arguments,
        reads=setting.size(20_000, 2_000),
    )


def warm_read_batch(setting: Setting) -> Result:
    """1,000 nodes in random order, `(1000, 1, 576)` float16."""

    def arguments(rng: np.random.Generator, num_nodes: int, count: int) -> list[np.ndarray]:
        return list(rng.integers(num_nodes, size=(count, NODES_PER_BATCH)))

    return _compare(
        setting,
        lambda reader: lambda nodes: reader.read("gists", 1, nodes),
        lambda flat: lambda nodes: torch.from_numpy(flat[nodes]),
        arguments,
        reads=setting.size(200, 20),
    )


def _compare(
    setting: Setting,
    subject_of: Callable[[Any], Read],
    rival_of: Callable[[np.ndarray], Read],
    arguments: Callable[[np.random.Generator, int, int], list[Any]],
    reads: int,
) -> Result:
    """p50 of the reads of each repeat, both sides in turns of some hundred reads."""
    repeats = setting.size(7, 2)
    num_super_blocks = setting.size(1024, 64)
    level = encoding(keys=True)
    with setting.scratch() as root:
        writer, _ = build_context(root, "warm", level, num_super_blocks)
        writer.close()
        with Store(root).open_reader("warm") as reader:
            num_nodes = reader.version.num_blocks
            flat = _flat_file(root / "flat", reader.read("gists", 1, np.arange(num_nodes)))
            subject, rival = subject_of(reader), rival_of(flat)
            rng = np.random.default_rng(0)
            for argument in arguments(rng, num_nodes, 100):
                _check_same(subject(argument), rival(argument))
            ratios, mine, theirs = [], np.empty(0), np.empty(0)
            for _ in range(repeats):
                mine, theirs = _in_turns(subject, rival, arguments(rng, num_nodes, reads))
                ratios.append(float(np.median(mine) / np.median(theirs)))
    detail = {
        "tokens": num_super_blocks * SLOTS_PER_SUPER_BLOCK,
        "subject": percentiles(mine, 1e6, "us"),
        "rival": percentiles(theirs, 1e6, "us"),
    }
    return Result.of_repeats(ratios, f"{repeats} x {reads} reads a side, in turns", detail)


def _flat_file(path: Path, gists: torch.Tensor) -> np.ndarray:
    """The gists as a plain file, mapped: `(num_nodes, 1, 576)` float16. Read once, so that it is in memory."""
    gists.numpy().tofile(path)
    flat = np.memmap(path, np.float16, mode="r", shape=(len(gists), 1, DIM))
    np.array(flat)
    return flat


def _check_same(found: torch.Tensor, expected: torch.Tensor) -> None:
    if found.dtype != expected.dtype or not torch.equal(found, expected):
        raise BenchmarkError(f"the reader gave another {tuple(found.shape)} than the flat file: nothing to compare")


def _in_turns(subject: Read, rival: Read, arguments: list[Any]) -> tuple[np.ndarray, np.ndarray]:
    mine, theirs = [], []
    turn = min(READS_PER_TURN, max(1, len(arguments) // 10))
    for first in range(0, len(arguments), turn):
        part = arguments[first : first + turn]
        theirs.append(time_each(rival, part))
        mine.append(time_each(subject, part))
    return np.concatenate(mine), np.concatenate(theirs)
