"""The objective of routing keys: of all blocks at hand, a question's key should be nearest to that of its answer.

InfoNCE (van den Oord et al. 2018, "Representation Learning with Contrastive Predictive Coding", eq. 4) over cosines,
as dense retrievers are trained (Karpukhin et al. 2020, DPR): every other block is a negative, but for those that may
answer as well or are no choice.

Shapes: N blocks, Q questions of T tokens, D the LM's hidden size, D_key the keys' size.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from jaxtyping import Bool, Float, Float32, Int64
from torch import Tensor
from torch.nn import functional as F

from cluster.config import TOKENS_PER_BLOCK
from cluster.errors import ModelError
from models.gistnet import GistNet
from models.gistnet.key_head import KeyHead
from models.gistnet.lead_in import LeadIn

TOKEN_RATE = 20.0
"""Of the learning rate, that of the vectors that weigh tokens: their products with states are divided by the root of D.
"""

PROJECTION_STD = 0.03
"""Of a projection's weights before training. Keys are directions: its length says only how fast it learns."""


def with_key_head(net: GistNet, key_dim: int, key_layer: int | None, key_reach: int = 0) -> GistNet:
    """The same net, gists and all, with a key head that nothing has been measured or learned of.

    Args:
        net: stays as it is.
        key_dim: D_key.
        key_layer: LM layers behind the states that keys are made of, fewer than those the net reads; None: those it
            reads. Where it differs from the net's, the mean of those states is still to be measured.
        key_reach: tokens before a block that its key is made of, too.

    Raises:
        ModelError: a width or layer that the net cannot have.
    """
    if key_layer is not None and net.lm_layer is not None and key_layer >= net.lm_layer:
        raise ModelError(
            f"{net.net_id} reads the LM up to layer {net.lm_layer}; keys are made of a lower layer or that"
        )
    spec = dataclasses.replace(net.spec, key_dim=key_dim, key_layer=key_layer, key_metric="cosine", key_reach=key_reach)
    changed = GistNet.kinds[spec.kind](spec)
    old = {name: tensor for name, tensor in net.state_dict().items() if not name.startswith("key_head.")}
    changed.load_state_dict({**changed.state_dict(), **{n: t for n, t in old.items() if n in changed.state_dict()}})
    return changed.eval()


def key_head_of(net: GistNet) -> KeyHead:
    """The head that is trained.

    Raises:
        ModelError: the net has none.
    """
    if net.key_head is None:
        raise ModelError(f"{net.net_id} has no key head to train; give it one with a key_dim")
    return net.key_head


def begin(net: GistNet) -> list[dict[str, Any]]:
    """Scale the projection for training, and give the head's parameter groups for an optimiser; `share` of each says
    what part of the learning rate it learns at.

    Raises:
        ModelError: as `key_head_of`.
    """
    head = key_head_of(net)
    with torch.no_grad():
        head.projection.mul_(PROJECTION_STD / head.projection.std())
    for parameter in head.parameters():
        parameter.requires_grad_(True)
    return [
        {"params": [head.projection], "share": 1.0},
        {"params": [head.query, head.question], "share": TOKEN_RATE, "weight_decay": 0.0},
    ]


def block_keys(net: GistNet, windows: Float[Tensor, "W T D"]) -> Float32[Tensor, "W*T/32 D_key"]:
    """Keys of the blocks of windows, of length 1, as compaction makes them."""
    before = LeadIn.of(windows, net.spec.key_reach)
    states = torch.cat([before.states, windows.reshape(-1, TOKENS_PER_BLOCK, windows.shape[-1])], dim=1)
    mask = F.pad(before.mask, (0, TOKENS_PER_BLOCK), value=True)
    return F.normalize(net.key_rows(states, mask).sum(dim=1), dim=-1)


def question_keys(
    net: GistNet, states: Float[Tensor, "Q T D"], mask: Bool[Tensor, "Q T"]
) -> Float32[Tensor, "Q D_key"]:
    """Keys of questions, of length 1, as retrieval makes them of their tokens."""
    return F.normalize(net.key_rows(states, mask, asking=True).sum(dim=1), dim=-1)


def contrast(
    questions: Float32[Tensor, "Q D_key"],
    blocks: Float32[Tensor, "N D_key"],
    answers: Bool[Tensor, "Q N"],
    excluded: Bool[Tensor, "Q N"],
    temperature: float,
) -> Float32[Tensor, " Q"]:
    """Negative log-likelihood of each block of an answer among those that are wrong, nats, on average over the answer
    (Khosla et al. 2020, "Supervised Contrastive Learning", eq. 2, but that blocks of one answer do not compete).

    Args:
        answers: blocks that are to be found, at least one a question.
        excluded: blocks that are neither right nor wrong; counted as right where they are answers.
        temperature: what cosines are divided by.
    """
    scores = questions @ blocks.T / temperature
    wrong = scores.masked_fill(answers | excluded, float("-inf")).logsumexp(dim=1, keepdim=True)
    return (F.softplus(wrong - scores) * answers).sum(dim=1) / answers.sum(dim=1)


@torch.no_grad()
def ranks(
    questions: Float32[Tensor, "Q D_key"],
    blocks: Float32[Tensor, "N D_key"],
    answers: Bool[Tensor, "Q N"],
    excluded: Bool[Tensor, "Q N"],
) -> tuple[Int64[Tensor, " Q"], Int64[Tensor, " Q"]]:
    """How many blocks stand before the first and before the last block of each answer, as in `contrast`: 0 and 0 where
    an answer of one block is found first, 0 and 1 where one of two blocks has the first places."""
    scores = questions @ blocks.T
    inf = float("inf")
    best = scores.masked_fill(~answers, -inf).amax(dim=1, keepdim=True)
    worst = scores.masked_fill(~answers, inf).amin(dim=1, keepdim=True)
    choice = ~excluded | answers
    return ((scores > best) & choice).sum(dim=1), ((scores > worst) & choice).sum(dim=1)
