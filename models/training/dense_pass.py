"""A dense pass: what a frozen model predicts of a window from gists of it, everywhere at once.

    window -> one pass of the frozen LM, without gradients -> the teacher's states, and the states the GistNet reads
           -> GistNet -> gists
           -> one pass over gists and raw tokens under a mask (`Sight`) -> the student's states

Gradients flow from the student's states through the frozen LM into the gists, and so into the net.

Shapes: B windows of n blocks, T = n·K tokens, m vectors a gist, D hidden size, S = (n - 1)·K entries that predict.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float, Float32, Int64
from torch import Tensor

from cluster.config import TOKENS_PER_BLOCK as K
from cluster.errors import ModelError
from models.base_lm import BaseLM
from models.gistnet import GistNet
from models.gistnet.build import check_fits
from models.positions import Positions
from models.training.sight import Sight


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

    @property
    def targets(self) -> Int64[Tensor, "B S"]:
        """What comes after each of those entries; the last one's is unknown and repeats its own id."""
        return torch.cat((self.ids[:, K + 1 :], self.ids[:, -1:]), dim=1)


class DensePass:
    """A GistNet in front of the LM it is trained for.

    Raises:
        ModelError: a net of another hidden size or more layers than the LM has.
    """

    def __init__(self, lm: BaseLM, gistnet: GistNet) -> None:
        check_fits(gistnet, lm)
        self.lm = lm
        self.gistnet = gistnet

    def read(self, ids: Int64[Tensor, "B T"], *, teacher: bool = True) -> ReadWindows:
        """The windows raw, as teacher and as input of the net.

        Args:
            ids: windows of whole blocks.
            teacher: False: only the layers that the net reads.

        Raises:
            ModelError: windows of less than two blocks, or not of whole ones.
        """
        num_tokens = ids.shape[1]
        if num_tokens % K or num_tokens < 2 * K:
            raise ModelError(f"a window for training is at least two blocks of {K} tokens, not {num_tokens} tokens")
        with torch.no_grad():
            embeddings = self.lm.embed(ids)
            layers = self.gistnet.lm_layers
            if teacher:
                final, states = self.lm.final_states(embeddings, layers=layers)
                return ReadWindows(ids, embeddings, states, final[:, K:])
            return ReadWindows(ids, embeddings, self.lm.hidden_states(embeddings, layers) if layers else {}, None)

    def gists(self, windows: ReadWindows) -> Float32[Tensor, "B n m D"]:
        """The net's gists of every block."""
        num_rows, num_tokens, dim = windows.embeddings.shape
        num_blocks = num_tokens // K
        blocks = (num_rows * num_blocks, K, dim)
        lengths = torch.full((num_rows * num_blocks,), K, device=windows.ids.device)
        net = self.gistnet
        # Called as a module, not by `forward_tokens`: that is where DeepSpeed gathers weights it has sharded.
        gists, _ = net(
            windows.embeddings.reshape(blocks),
            lengths,
            None if net.lm_layer is None else windows.states[net.lm_layer].reshape(blocks),
            None if net.key_layer is None else windows.states[net.key_layer].reshape(blocks),
        )
        return gists.unflatten(0, (num_rows, num_blocks))

    def student(self, windows: ReadWindows, gists: Float32[Tensor, "B n m D"], sight: Sight) -> Float[Tensor, "B S D"]:
        """States before the head at the second block's first token and after, by what each block sees.

        Raises:
            ModelError: gists or a sight of other windows.
        """
        num_rows, num_blocks, num_vectors, dim = gists.shape
        if (num_rows, num_blocks * K) != tuple(windows.ids.shape) or sight.gist.shape[:2] != (num_rows, num_blocks):
            raise ModelError(
                f"gists {tuple(gists.shape)} and a sight {sight.gist.shape} are not of windows "
                f"{tuple(windows.ids.shape)}"
            )
        device = windows.ids.device
        centres = 2 * K * torch.arange(num_blocks, device=device) + K - 1
        tokens = 2 * torch.arange(K, num_blocks * K, device=device)
        places = torch.cat((centres.repeat_interleave(num_vectors), tokens))
        entries = torch.cat((gists.reshape(num_rows, -1, dim).to(self.lm.dtype), windows.embeddings[:, K:]), dim=1)
        final, _ = self.lm.final_states(
            entries,
            positions=Positions(places.expand(num_rows, -1)),
            attention_mask=sight.mask(num_vectors).to(device),
        )
        return final[:, num_blocks * num_vectors :]

    def repeat(self, windows: ReadWindows, gists: Float32[Tensor, "B n m D"]) -> Float[Tensor, "Bn K D"]:
        """States before the head that predict each block's tokens from its gist and its tokens so far, nothing else.

        The block stands where the next one would: what is asked for is to say it again.
        """
        num_vectors, dim = gists.shape[2:]
        groups = gists.reshape(-1, num_vectors, dim).to(self.lm.dtype)
        tokens = windows.embeddings.reshape(-1, K, dim)[:, :-1]
        device = windows.ids.device
        places = torch.cat(
            (torch.full((num_vectors,), K - 1, device=device), 2 * torch.arange(K, 2 * K - 1, device=device))
        )
        final, _ = self.lm.final_states(
            torch.cat((groups, tokens), dim=1), positions=Positions(places.expand(len(groups), -1))
        )
        return final[:, num_vectors - 1 :]
