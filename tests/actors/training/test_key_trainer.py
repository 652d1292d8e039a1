"""What counts as found, and what is no choice."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from actors.training.key_trainer import PAIRS, Pairs, Shard, find_answers
from cluster.config import TOKENS_PER_BLOCK as K

BLOCKS_PER_WINDOW = 4


class ByNumber:
    """Compares what the first state of each block and question says."""

    def keys_of(self, shard: Shard) -> tuple[Tensor, Tensor]:
        return shard["blocks"][:, 0].float(), shard["questions"][:, 0].float()

    def keys_of_pairs(self, shard: Shard, pairs: Pairs) -> Tensor:
        return shard["blocks"][pairs.asking, 0].float()


def shard_of(folder: Path, name: str, blocks: Tensor, asked: Tensor, **integers: list) -> Path:
    """A file with a vector a block and one a question."""
    tensors = {key: torch.tensor(value) for key, value in integers.items()}
    own = torch.ones(len(tensors["pairs"]), K, dtype=torch.bool)
    states = {"blocks": blocks[:, None].expand(-1, K, -1), "questions": asked[:, None].expand(-1, 48, -1)}
    mask = torch.ones(len(asked), 48, dtype=torch.bool)
    path = folder / f"{name}.safetensors"
    everything = {**states, "mask": mask, "pair_own": own, **tensors}
    save_file({key: value.contiguous() for key, value in everything.items()}, path)
    return path


def test_ranks_count_what_stands_before_the_answer_and_is_a_choice(tmp_path: Path) -> None:
    one, two, far = torch.eye(3)
    # Shard 1: thing 7's fact in blocks 1 to 3, the second of them nearer to its question than the answer, 1.
    first = torch.stack([far, one * 0.5, one, far, two, far, far, two * 2])
    # Shard 2: thing 7's other fact, nearest of all; thing 8's, behind one block that is no answer.
    second = torch.stack([one * 3, far, two * 0.9, far])
    paths = [
        shard_of(
            tmp_path,
            "first",
            first,
            torch.stack([one]),
            kinds=[0],
            words=[7],
            answers=[[1, 1]],
            spans=[[1, 3]],
            pairs=[[7, 4]],
        ),
        shard_of(
            tmp_path,
            "second",
            second,
            torch.stack([one, two]),
            kinds=[1, 1],
            words=[7, 8],
            answers=[[0, 0], [2, 3]],
            spans=[[0, 0], [2, 3]],
            pairs=[[3, 1]],
        ),
    ]
    found = find_answers(paths, BLOCKS_PER_WINDOW, ByNumber())
    assert found["literal"].ranks == [0]
    assert found["literal"].things == ["7"]
    assert found["literal"].last_ranks == [0]
    assert found["described"].ranks == [0, 2]  # thing 8's behind blocks 4 and 7 of the first shard
    assert found["described"].last_ranks == [0, 3]  # and its second block behind its first
    assert found["described"].things == ["7", "8"]
    # Block 7 itself and block 6 before it are no choice; block 3 of the second shard finds others as near as its own.
    assert found[PAIRS].ranks == [0, 0]
    assert found[PAIRS].things == ["0/1", "1/0"]
