"""What only the tree in memory promises."""

from __future__ import annotations

import torch

from cluster.config import TOKENS_PER_BLOCK as K
from storage.contract import SpanWrite
from storage.memory_tree import MemoryTree
from tests.storage.support import Text, encoding_of

ENCODING = encoding_of()


def test_gradients_flow_from_what_is_read_to_what_was_appended() -> None:
    tree = MemoryTree(ENCODING)
    text = Text("doc", 40 * K)
    gists = torch.randn(40, 4, requires_grad=True)
    upper = torch.randn(1, 4, requires_grad=True)
    span = text.span(ENCODING)
    tree.append([SpanWrite(**{**vars(span), "arrays": {"gists": gists}})])
    tree.put_nodes(2, 0, {"gists": upper})
    reader = tree.reader()
    loss = (3 * reader.read("gists", 1, [7, 7, 9])).sum() + reader.read_node("gists", 2, 0).sum()
    loss.backward()
    expected = torch.zeros(40, 4)
    expected[7], expected[9] = 6, 3
    assert gists.grad is not None
    assert upper.grad is not None
    assert torch.equal(gists.grad, expected)
    assert torch.equal(upper.grad, torch.ones(1, 4))


def test_tensors_are_kept_as_they_are() -> None:
    span = Text("doc", 3 * K).span(ENCODING)
    for number, dtype in enumerate((torch.float64, torch.bfloat16)):
        values = torch.randn(3, 4).to(dtype)
        tree = MemoryTree(ENCODING, f"tree{number}")
        tree.append([SpanWrite(**{**vars(span), "arrays": {"gists": values}})])
        read = tree.reader().read("gists", 1, [0, 1, 2])
        assert read.dtype == dtype
        assert torch.equal(read[:, 0], values)
