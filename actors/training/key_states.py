"""States of the frozen model for the training of routing keys: made once by Ray Data actors, a file a shard.

    states-00012.safetensors
        blocks       (N, 32, D) float16   after the net's key layer, of the windows' blocks
        questions    (Q, 48, D) float16   of the questions, zero past their length
        mask         (Q, 48) bool
        kinds, words (Q,), answers, spans (Q, 2), pairs (P, 2) int64, pair_own (P, 32) bool   as `KeyExamples`
        tokens       (N, 32) int32, of the blocks; question_tokens (Q, 48) int32

The head is so small that it passes over them many times while the model reads them once.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import ray
import ray.data
import torch
from ray.data import ActorPoolStrategy
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from actors.training.key_examples import QUESTION_TOKENS, KeyExamples, make_examples
from actors.training.key_facts import KeyFact
from cluster.config import TOKENS_PER_BLOCK as K
from cluster.config import BaseLMConfig
from cluster.errors import ModelError
from cluster.ray_calls import check_resources
from cluster.ray_data import stream_in_order
from models.base_lm import BaseLM
from models.tokenizer import Tokenizer
from storage.token_windows import TokenWindows

WINDOWS_PER_PASS = 4
QUESTIONS_PER_PASS = 8


@dataclass(frozen=True)
class KeyStatesSpec:
    """Everything an actor needs but the facts."""

    base_lm: BaseLMConfig
    """With an explicit dtype."""
    key_layer: int
    """Layers of the model behind the states; 0: embeddings."""
    windows: Path
    folder: Path
    """Where the files go."""
    windows_per_shard: int
    facts_per_shard: int
    num_words: int
    """Facts in all; shard s has those from `s * facts_per_shard` on, and begins anew behind the last."""
    seed: int
    num_threads: int
    num_gpus: float
    """Of an actor; 0 reads on the CPU."""

    def path(self, shard: int) -> Path:
        """A shard's file."""
        return self.folder / f"states-{shard:05d}.safetensors"


def make_states(
    spec: KeyStatesSpec, facts: Sequence[KeyFact], surprisal: np.ndarray, num_shards: int, num_workers: int
) -> Iterator[int]:
    """Make the shards that are missing; gives the number of each when it is there, in order.

    Raises:
        ResourceError: the cluster cannot hold the workers.
    """
    spec.folder.mkdir(parents=True, exist_ok=True)
    missing = [shard for shard in range(num_shards) if not spec.path(shard).exists()]
    yield from sorted(set(range(num_shards)) - set(missing))
    if not missing:
        return
    request = {"CPU": float(spec.num_threads), **({"GPU": spec.num_gpus} if spec.num_gpus else {})}
    num_workers = min(num_workers, len(missing))
    check_resources([request] * num_workers, "reading for routing keys")
    stream_in_order()
    dataset = ray.data.from_items([{"shard": shard} for shard in missing], override_num_blocks=len(missing))
    made = dataset.map_batches(
        ReadShards,
        fn_constructor_args=(spec, [ray.put((list(facts), surprisal))]),
        batch_size=1,
        batch_format="pyarrow",
        num_cpus=spec.num_threads,
        num_gpus=spec.num_gpus or None,
        compute=ActorPoolStrategy(size=num_workers),
    )
    for table in made.iter_batches(batch_size=None, batch_format="pyarrow", prefetch_batches=0):
        shards: Any = table["shard"]
        yield from shards.to_pylist()


class ReadShards:
    """Ray Data actor: the model's lower layers over planted windows and questions."""

    def __init__(self, spec: KeyStatesSpec, facts_refs: list[Any]) -> None:
        torch.set_num_threads(spec.num_threads)
        self._spec = spec
        self._facts, self._surprisal = ray.get(facts_refs[0])
        self._tokenizer = Tokenizer.load(spec.base_lm)
        self._lm = BaseLM.load(spec.base_lm, num_layers=spec.key_layer)
        self._windows = TokenWindows(spec.windows)

    def __call__(self, batch: pa.Table) -> pa.Table:
        """Write the shards of a batch."""
        for shard in batch["shard"].to_pylist():
            self._write(shard)
        return batch

    def _write(self, shard: int) -> None:
        spec = self._spec
        # Far apart in the corpus, so that a shard's blocks are not all of one document.
        count = min(spec.windows_per_shard, len(self._windows))
        chosen = np.random.default_rng((spec.seed, shard)).choice(len(self._windows), count, replace=False)
        first = shard * spec.facts_per_shard
        numbers = np.arange(first, first + min(spec.facts_per_shard, spec.num_words)) % spec.num_words
        examples = make_examples(
            self._windows.read(np.sort(chosen)),
            [self._facts[number] for number in numbers],
            numbers.tolist(),
            self._tokenizer,
            self._surprisal,
            (spec.seed, shard),
        )
        path = spec.path(shard)
        save_file(self._states(examples), path.with_suffix(".tmp"))
        os.replace(path.with_suffix(".tmp"), path)

    def _states(self, examples: KeyExamples) -> dict[str, Tensor]:
        tokens = torch.from_numpy(examples.windows)
        blocks = torch.cat([self._read(rows) for rows in tokens.split(WINDOWS_PER_PASS)])
        questions, mask = self._question_states(examples)
        arrays = {
            name: torch.from_numpy(np.ascontiguousarray(getattr(examples, name)))
            for name in ("kinds", "words", "answers", "spans", "pairs", "pair_own")
        }
        return {
            "blocks": blocks.reshape(-1, K, blocks.shape[-1]),
            "questions": questions,
            "mask": mask,
            "tokens": tokens.reshape(-1, K).int(),
            "question_tokens": _padded(examples.questions),
            **arrays,
        }

    def _question_states(self, examples: KeyExamples) -> tuple[Tensor, Tensor]:
        lengths = [len(question) for question in examples.questions]
        states = torch.zeros(len(lengths), QUESTION_TOKENS, self._lm.hidden_size, dtype=torch.float16)
        # Like lengths together; the shorter ones have more of other text before them, and nothing is padding.
        order = sorted(range(len(lengths)), key=lengths.__getitem__)
        for at in range(0, len(order), QUESTIONS_PER_PASS):
            group = order[at : at + QUESTIONS_PER_PASS]
            size = examples.contexts.shape[1] - QUESTION_TOKENS + max(lengths[index] for index in group)
            rows = [
                np.concatenate([examples.contexts[index][-(size - lengths[index]) :], examples.questions[index]])
                for index in group
            ]
            read = self._read(torch.from_numpy(np.stack(rows)))
            for row, index in enumerate(group):
                states[index, : lengths[index]] = read[row, -lengths[index] :]
        return states, torch.arange(QUESTION_TOKENS)[None] < torch.tensor(lengths)[:, None]

    @torch.no_grad()
    def _read(self, ids: Tensor) -> Tensor:
        embeddings = self._lm.embed(ids.to(self._lm.device))
        layer = self._spec.key_layer
        states = self._lm.hidden_states(embeddings, [layer])[layer] if layer else embeddings
        return states.to("cpu", torch.float16)


def _padded(questions: Sequence[np.ndarray]) -> Tensor:
    padded = torch.zeros(len(questions), QUESTION_TOKENS, dtype=torch.int32)
    for row, question in enumerate(questions):
        padded[row, : len(question)] = torch.from_numpy(question)
    return padded


def load_shard(path: Path) -> dict[str, Tensor]:
    """What `make_states` wrote.

    Raises:
        ModelError: it is missing or damaged.
    """
    try:
        return load_file(path)
    except (OSError, SafetensorError) as error:
        raise ModelError(f"{path} cannot be read ({error}); delete it and run the same command again") from error
