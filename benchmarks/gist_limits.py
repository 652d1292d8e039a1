"""What holds a gist back: what it could hold, or what the frozen model reads of it? No ratio, a question of its own.

    python -m benchmarks.gist_limits --store data/store --contexts code-held_out prose-held_out

Eight gists stand for the 256 tokens before a horizon of 64, and nothing else does. Beside them stand, for the same
places, raw tokens of the same text: the newest, the rarest, and those that hindsight says will come again. Then the
vectors themselves are moved, each down the NLL of its block behind it alone, until they hold far more of it than a
net's, and read again; and down the NLL of every other token of the horizon, which asks what they could say at best.
"""

from __future__ import annotations

import argparse
import contextlib
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from cluster.environment import quiet_environment

quiet_environment()  # before anything imports torch

import numpy as np  # noqa: E402
import torch  # noqa: E402
from jaxtyping import Float, Float32, Int64  # noqa: E402
from torch import Tensor  # noqa: E402

from cluster.config import TOKENS_PER_BLOCK as K  # noqa: E402
from cluster.config import BaseLMConfig, GistNetConfig  # noqa: E402
from cluster.errors import ConfigError, MegaContextError  # noqa: E402
from cluster.tables import Table  # noqa: E402
from models.base_lm import IGNORED_TARGET, BaseLM  # noqa: E402
from models.gistnet.build import build_gistnet, packaged_gistnet  # noqa: E402
from models.positions import Positions  # noqa: E402
from models.training.dense_pass import DensePass  # noqa: E402
from storage.store import Store  # noqa: E402
from storage.tree.reader import ContextReader  # noqa: E402

BEFORE, HISTORY, HORIZON = 256, 256, 64
"""Tokens of a place: seen by the GistNet alone, stood for, and predicted."""
BLOCKS = HISTORY // K
COUNTED_BLOCKS = 65_536
"""Of a context, to know which tokens are rare."""
NUM_WORDS = (8, 32)
PLACES_A_PASS = 8


@dataclass
class Samples:
    """NLL of the horizons, nats, every condition's a row a place; and of blocks behind their own vectors."""

    horizon: dict[str, list[Float32[Tensor, "B S"]]] = field(default_factory=dict)
    blocks: dict[str, list[Float32[Tensor, " B"]]] = field(default_factory=dict)

    def add(self, condition: str, nll: Float32[Tensor, "B S"], blocks: Float32[Tensor, " B"] | None = None) -> None:
        """What was measured of some places."""
        self.horizon.setdefault(condition, []).append(nll.detach())
        if blocks is not None:
            self.blocks.setdefault(condition, []).append(blocks.detach())


class Reader:
    """The frozen model behind whatever stands for a history."""

    def __init__(self, lm: BaseLM) -> None:
        self._lm = lm

    def horizon(
        self, ids: Int64[Tensor, "B T"], rows: Float[Tensor, "B R D"], centres: Int64[Tensor, "B R"]
    ) -> Float32[Tensor, "B S"]:
        """NLL of every token of the horizon but the first.

        Args:
            ids: of places, the horizon last.
            rows: what stands before it.
            centres: of those rows, in half tokens from the history's beginning.
        """
        tokens, num_rows = ids[:, -HORIZON:], rows.shape[1]
        embeds = torch.cat((rows.to(self._lm.dtype), self._lm.embed(tokens)), dim=1)
        behind = 2 * torch.arange(HISTORY, HISTORY + HORIZON).expand(len(ids), -1)
        places = torch.cat((centres, behind), dim=1)
        targets = torch.full(embeds.shape[:2], IGNORED_TARGET)
        targets[:, num_rows:-1] = tokens[:, 1:]
        return self._lm.nll(embeds, targets, positions=Positions(places), start=num_rows)[:, :-1]

    def raw(self, ids: Int64[Tensor, "B T"], chosen: Int64[Tensor, "B R"]) -> Float32[Tensor, "B S"]:
        """The same behind raw tokens of the history, by their number in it, where they stand."""
        chosen = chosen.sort(dim=1).values
        return self.horizon(ids, self._lm.embed(history(ids).gather(1, chosen)), 2 * chosen)

    def again(self, vectors: Float32[Tensor, "B n D"], blocks: Int64[Tensor, "B n K"]) -> Float32[Tensor, "B n"]:
        """NLL of each block behind its own vector alone, nats a token."""
        tokens = blocks.flatten(0, 1)
        embeds = torch.cat((vectors.flatten(0, 1)[:, None].to(self._lm.dtype), self._lm.embed(tokens[:, :-1])), dim=1)
        places = torch.cat((torch.tensor([K - 1]), 2 * torch.arange(K, 2 * K - 1))).expand(len(tokens), -1)
        return self._lm.nll(embeds, tokens, positions=Positions(places)).mean(dim=1).unflatten(0, blocks.shape[:2])


def history(ids: Int64[Tensor, "B T"]) -> Int64[Tensor, "B H"]:
    """What is stood for."""
    return ids[:, BEFORE:-HORIZON]


def moved(
    start: Float32[Tensor, "B n D"], loss: Callable[[Tensor], Tensor], steps: int, rate: float
) -> Float32[Tensor, "B n D"]:
    """Vectors after steps of Adam down a loss of their own."""
    vectors = start.detach().clone().requires_grad_(True)
    optimiser = torch.optim.Adam([vectors], lr=rate)
    for _ in range(steps):
        optimiser.zero_grad()
        loss(vectors).backward()
        optimiser.step()
    return vectors.detach()


class Measurement:
    """All conditions of some places at a time."""

    def __init__(self, lm: BaseLM, dense: DensePass, rarity: Float32[Tensor, " V"], steps: int, rate: float) -> None:
        """Args: `rarity` is -log of each token's share of the text; vectors are `moved` by half the steps, twice."""
        self._lm, self._dense, self._rarity = lm, dense, rarity
        self._steps, self._rate = steps, rate
        self._reader = Reader(lm)
        self._centres = 2 * K * torch.arange(BLOCKS) + K - 1
        self.samples = Samples()

    def add(self, ids: Int64[Tensor, "B T"]) -> None:
        """Measure some more places, at least two."""
        with torch.no_grad():
            self._add_raw(ids)
        windows = self._dense.read(ids[:, :-HORIZON], teacher=False)
        with torch.no_grad():
            own = self._dense.gists(windows).blocks[:, -BLOCKS:, 0]
        self._add_vectors("gists", ids, own)
        blocks = history(ids).unflatten(1, (BLOCKS, K))
        held, half = own, self._steps // 2
        for part in (1, 2):
            held = moved(held, lambda vectors: self._reader.again(vectors, blocks).sum(), half, self._rate)
            self._add_vectors(f"gists moved to hold their block, {part * half} steps", ids, held)
        told = own
        for part in (1, 2):
            told = moved(told, lambda v: self._horizon(ids, v)[:, 0::2].sum(), half, self._rate)
            self._add_vectors(f"gists moved by half of what comes, {part * half} steps", ids, told)

    def _horizon(self, ids: Int64[Tensor, "B T"], vectors: Float32[Tensor, "B n D"]) -> Float32[Tensor, "B S"]:
        return self._reader.horizon(ids, vectors, self._centres.expand(len(ids), -1))

    @torch.no_grad()
    def _add_vectors(self, name: str, ids: Int64[Tensor, "B T"], vectors: Float32[Tensor, "B n D"]) -> None:
        blocks = history(ids).unflatten(1, (BLOCKS, K))
        held = self._reader.again(vectors, blocks).mean(dim=1)
        self.samples.add(name, self._horizon(ids, vectors), held)
        self.samples.add(another(name), self._horizon(ids, vectors.roll(1, dims=0)))

    def _add_raw(self, ids: Int64[Tensor, "B T"]) -> None:
        reader, samples = self._reader, self.samples
        everything = torch.arange(HISTORY).expand(len(ids), -1)
        samples.add("nothing", reader.raw(ids, everything[:, :0]))
        samples.add("the whole history", reader.raw(ids, everything))
        rarity = self._rarity[history(ids)]
        seen_before = history(ids)[:, :, None] == history(ids)[:, None]
        repeats = seen_before.tril(-1).any(dim=2)
        comes = torch.stack(
            [torch.isin(past, to_come[1:]) for past, to_come in zip(history(ids), ids[:, -HORIZON:], strict=True)]
        )
        for count in NUM_WORDS:
            samples.add(f"the newest {count} tokens", reader.raw(ids, everything[:, -count:]))
            rarest = rarity.masked_fill(repeats, -1.0)
            samples.add(f"the {count} rarest tokens", reader.raw(ids, rarest.topk(count, dim=1).indices))
            coming = rarest + comes * self._rarity.max()
            samples.add(f"the {count} rarest that come again", reader.raw(ids, coming.topk(count, dim=1).indices))


def another(name: str) -> str:
    """The condition in which another place's vectors stand."""
    return f"{name}, another's"


def tables(samples: Samples) -> list[Table]:
    """What everything is worth over nothing; and on the tokens that nothing was moved by."""
    nothing = torch.cat(samples.horizon["nothing"])
    gists = torch.cat(samples.horizon["gists"])
    rows, halves = [], []
    for name, parts in samples.horizon.items():
        if name.endswith(another("")):
            continue
        nll = torch.cat(parts)
        others = torch.cat(samples.horizon[another(name)]) if another(name) in samples.horizon else None
        held = samples.blocks.get(name)
        is_told = "half of what comes" in name
        if not is_told:
            rows.append(
                {
                    "before the horizon": name,
                    "NLL": f"{nll.mean():.3f}",
                    "gain over nothing": _estimate(nothing - nll),
                    "gain over gists": "" if name == "gists" else _estimate(gists - nll),
                    "content_nats": "" if others is None else _estimate(others - nll),
                    "its block alone": "" if held is None else f"{torch.cat(held).mean():.3f}",
                }
            )
        if is_told or name in {"gists", "the whole history"}:
            scored = nll[:, 1::2]
            halves.append(
                {
                    "before the horizon": name,
                    "NLL": f"{scored.mean():.3f}",
                    "gain over gists": "" if name == "gists" else _estimate(gists[:, 1::2] - scored),
                    "content_nats": "" if others is None else _estimate(others[:, 1::2] - scored),
                }
            )
    where = f"{len(nothing)} places, each of a document of its own; nats a token"
    return [
        Table(rows, f"{BLOCKS} vectors for {HISTORY} tokens: {where}"),
        Table(halves, f"Every other token, which nothing was moved by: {where}"),
    ]


def _estimate(gains: Float32[Tensor, "P S"]) -> str:
    each = gains.mean(dim=1)
    return f"{each.mean():+.3f} ± {each.std() / len(each) ** 0.5:.3f}"


def chosen_places(reader: ContextReader, count: int, seed: int) -> Int64[np.ndarray, "P T"]:
    """Tokens of places, one a document, from a block on drawn by seed.

    Raises:
        ConfigError: too few documents are long enough.
    """
    size = BEFORE + HISTORY + HORIZON
    documents = [one for one in reader.documents() if one.num_tokens >= size]
    if len(documents) < count:
        raise ConfigError(
            f"context {reader.version.context!r} has {len(documents)} documents of {size} tokens and more; "
            f"{count} places need as many"
        )
    rng = np.random.default_rng(seed)
    found = []
    for index in sorted(rng.choice(len(documents), count, replace=False).tolist()):
        document = documents[index]
        first = document.first_block + int(rng.integers((document.num_tokens - size) // K + 1))
        reader.require_whole(first, size // K, "a place")
        tokens, _ = reader.tokens(first, size // K)
        found.append(tokens.reshape(-1))
    return np.array(found, np.int64)


def token_counts(reader: ContextReader, vocab_size: int) -> Float32[Tensor, " V"]:
    """How often each token comes up in a context's first blocks."""
    tokens, counts = reader.tokens(0, min(reader.version.num_blocks, COUNTED_BLOCKS))
    real = tokens[np.arange(K) < counts[:, None]]
    return torch.from_numpy(np.bincount(real, minlength=vocab_size)).float()


def main(arguments: Sequence[str] | None = None) -> int:
    """Choose places, measure, print."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gist_limits", description=__doc__)
    parser.add_argument("--store", type=Path, required=True, help="the store")
    parser.add_argument("--contexts", nargs="+", required=True, help="contexts of text that the net has not seen")
    parser.add_argument("--gistnet", default="auto", help="folder of a GistNet; auto: the one that comes along")
    parser.add_argument("--num_places", type=int, default=24, help="places of each context")
    parser.add_argument("--steps", type=int, default=40, help="that vectors are moved")
    parser.add_argument("--rate", type=float, default=0.01, help="of Adam; embeddings of SmolLM2 have an rms of 0.13")
    parser.add_argument("--seed", type=int, default=0, help="of the places")
    parser.add_argument("--threads", type=int, default=0, help="torch threads; 0: all cores")
    parser.add_argument("--lm", default="smollm2-135m", help="the contexts' language model")
    parser.add_argument("--cache_dir", type=Path, default=BaseLMConfig().cache_dir, help="where models are kept")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="bfloat16")
    options = parser.parse_args(arguments)
    if options.threads:
        torch.set_num_threads(options.threads)
    try:
        if min(options.num_places, options.steps) < 2:
            raise ConfigError(
                "--num_places and --steps must be at least 2: another place's vectors stand beside its own"
            )
        config = BaseLMConfig(source=options.lm, dtype=options.dtype, device="cpu", cache_dir=options.cache_dir)
        lm = BaseLM.load(config)
        path = packaged_gistnet(lm) if options.gistnet == "auto" else options.gistnet
        if path is None:
            raise ConfigError(f"no GistNet comes along for {lm.model_id}; name a folder with --gistnet")
        gistnet = build_gistnet(GistNetConfig(path=str(path)), lm)
        if gistnet.num_vectors != 1:
            raise ConfigError(f"{path} makes {gistnet.num_vectors} vectors a block; give a net that makes one")
        dense = DensePass(lm, gistnet)
        counts, places = torch.ones(lm.vocab_size), []
        for name in options.contexts:
            with contextlib.closing(Store(options.store).open_reader(name)) as reader:
                places.append(chosen_places(reader, options.num_places, options.seed))
                counts += token_counts(reader, lm.vocab_size)
        measurement = Measurement(lm, dense, -(counts / counts.sum()).log(), options.steps, options.rate)
        ids = torch.from_numpy(np.concatenate(places))
        started = time.monotonic()
        for part in ids.chunk(max(1, len(ids) // PLACES_A_PASS)):
            measurement.add(part)
            done = sum(map(len, measurement.samples.horizon["nothing"]))
            left_s = (time.monotonic() - started) / done * (len(ids) - done)
            print(f"measured {done} of {len(ids)} places, {left_s:.0f} s left", file=sys.stderr)
    except MegaContextError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    for table in tables(measurement.samples):
        table.show()
    return 0


if __name__ == "__main__":
    sys.exit(main())
