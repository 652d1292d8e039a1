"""A dense pass: what a frozen model predicts of a window from gists of it, everywhere at once.

    window -> one pass of the frozen LM, without gradients -> the teacher's states, and the states the GistNet reads
           -> GistNet -> gists, of blocks and, where a window is longer than a super-block, of LOD2 nodes
           -> one pass over gists and raw tokens under a mask (`Sight`) -> the student's states

Gradients flow from the student's states through the frozen LM into the gists, and so into the net. An adapter that the
LM has is on in the student's passes alone, and gets gradients, too.

Shapes: B windows of n blocks, T = n·K tokens, q = T / 1,024 nodes, m vectors a gist, D hidden size, S = (n - 1)·K
entries that predict.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from jaxtyping import Float, Float32, Int64
from torch import Tensor

from cluster.config import TOKENS_PER_BLOCK as K
from cluster.errors import ModelError
from models.base_lm import AnyMask, BaseLM
from models.gistnet import GistNet
from models.gistnet.build import check_fits
from models.positions import Positions
from models.training.sight import Sight
from models.window_encoder import WINDOW_TOKENS

BANDED_SHARE = 0.5
"""Of a window's tokens, the most that any token may see for a band to be cheaper than all pairs."""


@dataclass(frozen=True)
class ReadWindows:
    """Windows as the frozen LM read them whole."""

    ids: Int64[Tensor, "B T"]
    embeddings: Float[Tensor, "B T D"]
    states: dict[int, Float[Tensor, "B T D"]]
    """After the layers the net reads."""
    teacher: Float[Tensor, "B S D"] | None
    """States before the head at the second block's first token and after, everything before seen raw. None where nobody
    asked for them."""
    matched: dict[int, Float[Tensor, "B S D"]] = field(default_factory=dict)
    """The teacher's states at the same entries after lower layers, those that were asked for."""

    @property
    def targets(self) -> Int64[Tensor, "B S"]:
        """What comes after each of those entries; the last one's is unknown and repeats its own id."""
        return torch.cat((self.ids[:, K + 1 :], self.ids[:, -1:]), dim=1)


@dataclass(frozen=True)
class Gists:
    """What stands for windows."""

    blocks: Float32[Tensor, "B n m D"]
    nodes: Float32[Tensor, "B q m D"] | None = None
    """Of LOD2; None for windows of one super-block, in which nothing comes behind it."""

    def rolled(self, *, blocks: bool = True) -> Gists:
        """Every window's gists are its neighbour's; without `blocks` only those of nodes."""
        nodes = None if self.nodes is None else self.nodes.roll(1, dims=0)
        return Gists(self.blocks.roll(1, dims=0) if blocks else self.blocks, nodes)

    def averaged(self) -> Gists:
        """Every gist is the mean of its level."""
        return Gists(
            _mean(self.blocks),
            None if self.nodes is None else _mean(self.nodes),
        )


class DensePass:
    """A GistNet in front of the LM it is trained for.

    Raises:
        ModelError: a net of another hidden size or more layers than the LM has.
    """

    def __init__(self, lm: BaseLM, gistnet: GistNet) -> None:
        check_fits(gistnet, lm)
        self.lm = lm
        self.gistnet = gistnet

    def read(self, ids: Int64[Tensor, "B T"], *, teacher: bool = True, match: Sequence[int] = ()) -> ReadWindows:
        """The windows raw, as teacher and as input of the net.

        Args:
            ids: windows of whole blocks.
            teacher: False: only as many layers as somebody wants the states of.
            match: layers behind which the teacher's states are wanted, besides the last.

        Raises:
            ModelError: windows of less than two blocks, or not of whole ones; longer than a super-block and not of
                whole ones, or than the LM was trained for.
        """
        num_tokens = ids.shape[1]
        if num_tokens % K or num_tokens < 2 * K:
            raise ModelError(f"a window for training is at least two blocks of {K} tokens, not {num_tokens} tokens")
        if num_tokens > WINDOW_TOKENS and (num_tokens % WINDOW_TOKENS or num_tokens > self.lm.trained_context):
            raise ModelError(
                f"a window for training beyond {WINDOW_TOKENS} tokens is a multiple of that and at most the "
                f"{self.lm.trained_context} that {self.lm.model_id} was trained for, not {num_tokens}"
            )
        with torch.no_grad():
            embeddings = self.lm.embed(ids)
            layers = self.gistnet.lm_layers
            alone = num_tokens <= WINDOW_TOKENS
            wanted = sorted({*match, *(layers if alone else ())})
            final = None
            seen: dict[int, Tensor] = {}
            if teacher:
                final, seen = self.lm.final_states(embeddings, layers=wanted)
                final = final[:, K:]
            elif wanted:
                seen = self.lm.hidden_states(embeddings, wanted)
            matched = {n: seen[n][:, K:] for n in match}
            if layers and not alone:
                # As gists are made at compaction: a window of 1,024 tokens does not see the one before.
                pieces = embeddings.reshape(-1, WINDOW_TOKENS, embeddings.shape[-1])
                seen = {n: s.reshape(embeddings.shape) for n, s in self.lm.hidden_states(pieces, layers).items()}
            return ReadWindows(ids, embeddings, {n: seen[n] for n in layers}, final, matched)

    def gists(self, windows: ReadWindows) -> Gists:
        """The net's gists of every block, and of the nodes above them where there is more than one."""
        num_rows, num_tokens, dim = windows.embeddings.shape
        num_blocks = num_tokens // K
        blocks = (num_rows * num_blocks, K, dim)
        lengths = torch.full((num_rows * num_blocks,), K, device=windows.ids.device)
        net = self.gistnet
        # Called as a module, not by `forward_tokens`: that is where DeepSpeed gathers weights it has sharded.
        made = net(
            windows.embeddings.reshape(blocks),
            lengths,
            None if net.lm_layer is None else windows.states[net.lm_layer].reshape(blocks),
            None if net.key_layer is None else windows.states[net.key_layer].reshape(blocks),
            parents=num_tokens > WINDOW_TOKENS,
        )
        blocks_gists = made[0].unflatten(0, (num_rows, num_blocks))
        return Gists(blocks_gists, made[2].unflatten(0, (num_rows, -1)) if len(made) > 2 else None)

    def student(self, windows: ReadWindows, gists: Gists, sight: Sight) -> Float[Tensor, "B S D"]:
        """States before the head at the second block's first token and after, by what each block sees.

        Raises:
            ModelError: gists or a sight of other windows.
        """
        final, _ = self.student_states(windows, gists, sight, ())
        assert final is not None
        return final

    def student_states(
        self, windows: ReadWindows, gists: Gists, sight: Sight, layers: Sequence[int], *, whole: bool = True
    ) -> tuple[Float[Tensor, "B S D"] | None, dict[int, Float[Tensor, "B S D"]]]:
        """`student`, and its states after lower layers on the way; the pass ends after the highest one unless `whole`.

        Raises:
            ModelError: as `student`; or layers that are not there.
        """
        num_rows, num_blocks, num_vectors, _ = gists.blocks.shape
        num_nodes = 0 if gists.nodes is None else gists.nodes.shape[1]
        fits = (num_rows, num_blocks * K) == tuple(windows.ids.shape)
        if not fits or sight.gist.shape[:2] != (num_rows, num_blocks) or sight.num_nodes != num_nodes:
            raise ModelError(
                f"gists {tuple(gists.blocks.shape)} with {num_nodes} nodes and a sight {sight.gist.shape} with "
                f"{sight.num_nodes} are not of windows {tuple(windows.ids.shape)}"
            )
        device = windows.ids.device
        parts, places = [], []
        for vectors, size in ((gists.nodes, WINDOW_TOKENS), (gists.blocks, K)):
            if vectors is not None:
                parts.append(vectors.flatten(1, 2).to(self.lm.dtype))
                centres = 2 * size * torch.arange(vectors.shape[1], device=device) + size - 1
                places.append(centres.repeat_interleave(num_vectors))
        parts.append(windows.embeddings[:, K:])
        places.append(2 * torch.arange(K, num_blocks * K, device=device))
        entries = torch.cat(parts, dim=1)
        positions = Positions(torch.cat(places).expand(num_rows, -1))
        mask = self._mask(sight, num_vectors)
        final = None
        with self.lm.adapted():
            if whole:
                final, states = self.lm.final_states(entries, positions=positions, attention_mask=mask, layers=layers)
            else:
                states = self.lm.hidden_states(entries, layers, positions=positions, attention_mask=mask)
        first = (num_nodes + num_blocks) * num_vectors
        return None if final is None else final[:, first:], {n: state[:, first:] for n, state in states.items()}

    def _mask(self, sight: Sight, num_vectors: int) -> AnyMask:
        """Of all pairs, or of a band where most pairs do not see each other."""
        in_band = (sight.num_nodes + sight.num_blocks) * num_vectors + (sight.reach + 1) * K
        if is_banded(self.lm, in_band, sight.num_blocks * K):
            return sight.banded_mask(num_vectors)
        return sight.mask(num_vectors)

    def repeat(self, windows: ReadWindows, gists: Gists) -> Float[Tensor, "Bn K D"]:
        """States before the head that predict each block's tokens from its gist and its tokens so far, nothing else.

        The block stands where the next one would: what is asked for is to say it again.
        """
        num_vectors, dim = gists.blocks.shape[2:]
        groups = gists.blocks.reshape(-1, num_vectors, dim).to(self.lm.dtype)
        tokens = windows.embeddings.reshape(-1, K, dim)[:, :-1]
        device = windows.ids.device
        places = torch.cat(
            (torch.full((num_vectors,), K - 1, device=device), 2 * torch.arange(K, 2 * K - 1, device=device))
        )
        with self.lm.adapted():
            final, _ = self.lm.final_states(
                torch.cat((groups, tokens), dim=1), positions=Positions(places.expand(len(groups), -1))
            )
        return final[:, num_vectors - 1 :]


def is_banded(lm: BaseLM, in_band: int, window_tokens: int) -> bool:
    """Whether tokens that see no more entries than so many are read by a band: on CPUs alone, because it keeps weights
    and copies of its keys and values for the backward pass, which kernels on GPUs do without."""
    return lm.device.type == "cpu" and in_band <= BANDED_SHARE * window_tokens


def _mean(vectors: Float32[Tensor, "B n m D"]) -> Float32[Tensor, "B n m D"]:
    return vectors.mean(dim=(0, 1), keepdim=True).expand_as(vectors)
