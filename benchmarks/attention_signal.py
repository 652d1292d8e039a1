"""Whether the frozen model's own attention foretells what showing a block is worth; no ratio, a question of its own.

    python -m benchmarks.attention_signal --labels runs/label-code --store data/store

At every labelled Working Context the model reads the whole history, of which a session has only gists, and every head's
attention of the newest tokens on each candidate is compared with what showing the candidate was worth. A signal that
even this lacks will not be had from routing keys.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from cluster.environment import quiet_environment

quiet_environment()  # before anything imports torch

import numpy as np  # noqa: E402
import torch  # noqa: E402
from jaxtyping import Float32, Float64  # noqa: E402
from transformers.cache_utils import DynamicCache  # noqa: E402

from cluster.config import BaseLMConfig  # noqa: E402
from cluster.errors import ConfigError, MegaContextError  # noqa: E402
from cluster.tables import Table  # noqa: E402
from models.lensnet import FEATURES  # noqa: E402
from models.loading import load_frozen  # noqa: E402
from models.model_files import resolve_model  # noqa: E402
from pipelines.label import LABELS  # noqa: E402
from storage.contract import TreeReader  # noqa: E402
from storage.focus.labels import LabelledContext, read_labels  # noqa: E402
from storage.store import Store  # noqa: E402

NUM_FOLDS = 5
NUM_BEST_HEADS = 10
FEWEST_BLOCKS = 4
"""A Working Context with fewer labelled blocks has no order to speak of."""
PENALTY = 1e4
"""Of the ridge regression on standardised columns; from a tenth to ten times of it nothing changes."""


@dataclass(frozen=True, eq=False)
class Measured:
    """Blocks of one Working Context that were shown alone. Columns are ranks within it, from -0.5 to 0.5."""

    document: str
    gains: Float64[np.ndarray, " n"]
    """Nats a token, the mean of both halves."""
    halves: Float64[np.ndarray, "n 2"]
    signals: Float64[np.ndarray, "n F"]
    heads: Float64[np.ndarray, "n heads"]


Columns = Callable[[Measured], Float64[np.ndarray, "n c"]]


class AttentionReader:
    """The stock model, read to the end of a history."""

    def __init__(self, config: BaseLMConfig, newest_tokens: int) -> None:
        files = resolve_model(config)
        dtype = torch.float32 if config.dtype == "float32" else torch.bfloat16
        self._model = load_frozen(files, None, dtype, torch.device("cpu"))
        self._newest = newest_tokens

    @torch.inference_mode()
    def on_blocks(
        self, tokens: np.ndarray, starts: np.ndarray, stops: np.ndarray
    ) -> Float32[np.ndarray, "heads blocks"]:
        """Attention of the newest tokens on spans of a history, the mean over these tokens, every head of every layer.

        Args:
            tokens: of the history, more than the newest.
            starts, stops: of each span.
        """
        ids = torch.from_numpy(tokens.astype(np.int64))[None]
        past = DynamicCache()
        self._model.set_attn_implementation("sdpa")
        self._model(ids[:, : -self._newest], past_key_values=past, logits_to_keep=1)
        self._model.set_attn_implementation("eager")  # the one that says what it attends to
        read = self._model(ids[:, -self._newest :], past_key_values=past, output_attentions=True, logits_to_keep=1)
        mass = torch.cat([layer[0].float().mean(dim=1) for layer in read.attentions]).cumsum(dim=1)
        mass = torch.cat([torch.zeros(len(mass), 1), mass], dim=1).numpy()
        return mass[:, stops] - mass[:, starts]


def measure(reader: TreeReader, context: LabelledContext, attention: AttentionReader) -> Measured | None:
    """What is known, and what was measured, of a labelled Working Context; None where too little was."""
    gains = {edit.added[0]: edit.gains for edit in context.edits if edit.kind == "expand one" and not edit.shown}
    if len(gains) < FEWEST_BLOCKS:
        return None
    first = context.first_block
    rows, counts = reader.tokens(first, context.stop_block - first)
    tokens = np.concatenate([row[:count] for row, count in zip(rows, counts, strict=True)])
    ends = np.cumsum(counts, dtype=np.int64)
    places = np.array(list(gains)) - first
    heads = attention.on_blocks(tokens, ends[places] - counts[places], ends[places])
    chosen = np.searchsorted(context.blocks, list(gains))
    halves = np.array(list(gains.values()))
    return Measured(context.uri, halves.mean(axis=1), halves, ranks(context.features[chosen]), ranks(heads.T))


def ranks(columns: np.ndarray) -> Float64[np.ndarray, "n c"]:
    """Of each column, from -0.5 to 0.5; equal values share the mean of theirs."""
    below = (columns[None] < columns[:, None]).sum(axis=1)
    equal = (columns[None] == columns[:, None]).sum(axis=1)
    return (below + equal / 2) / len(columns) - 0.5


def correlations(columns: Float64[np.ndarray, "n c"], gains: np.ndarray) -> Float64[np.ndarray, " c"]:
    """Spearman's with the gains, of columns of ranks; 0 where a column says nothing."""
    wanted = ranks(gains[:, None])[:, 0]
    wanted = wanted - wanted.mean()
    columns = columns - columns.mean(axis=0)
    norm = np.sqrt((columns**2).sum(axis=0) * (wanted**2).sum())
    return np.divide(wanted @ columns, norm, out=np.zeros_like(norm), where=norm > 0)


def beyond(known: Float64[np.ndarray, "n k"], column: np.ndarray, gains: np.ndarray) -> float:
    """Correlation of ranks that is left when what other columns explain is taken out of both sides."""
    design = np.column_stack([known, np.ones(len(known))])
    wanted = ranks(gains[:, None])[:, 0]
    left = [side - design @ np.linalg.lstsq(design, side, rcond=None)[0] for side in (column, wanted)]
    norm = np.sqrt((left[0] @ left[0]) * (left[1] @ left[1]))
    return float(left[0] @ left[1] / norm) if norm > 1e-9 else 0.0


def foretold(measured: Sequence[Measured], columns: Columns) -> list[np.ndarray]:
    """Every Working Context's blocks by ridge regression on those of other documents."""
    documents = sorted({each.document for each in measured})
    shuffled = np.random.default_rng(0).permutation(len(documents))
    fold = {documents[document]: place % NUM_FOLDS for place, document in enumerate(shuffled)}
    found = [np.empty(0)] * len(measured)
    for part in range(NUM_FOLDS):
        others = [each for each in measured if fold[each.document] != part]
        data = np.concatenate([columns(each) for each in others])
        wanted = np.concatenate([each.gains - each.gains.mean() for each in others])
        scale = data.std(axis=0) + 1e-9
        data = data / scale
        weights = np.linalg.solve(data.T @ data + PENALTY * np.eye(data.shape[1]), data.T @ wanted)
        for place, each in enumerate(measured):
            if fold[each.document] == part:
                found[place] = columns(each) / scale @ weights
    return found


def tables(measured: Sequence[Measured]) -> list[Table]:
    """What single signals and all together foretell."""
    names = list(FEATURES)
    age, same = names.index("log_distance"), names.index("same_document")
    heads = np.array([correlations(each.heads, each.gains) for each in measured])
    documents = sorted({each.document for each in measured})
    chosen_on = {document for place, document in enumerate(documents) if place % 2}
    chooses = np.array([each.document in chosen_on for each in measured])
    best = np.argsort(-heads[chooses].mean(axis=0))[:NUM_BEST_HEADS]
    together = [correlations(each.heads[:, best].mean(axis=1, keepdims=True), each.gains)[0] for each in measured]
    rest = [beyond(each.signals[:, [age, same]], each.heads.mean(axis=1), each.gains) for each in measured]
    newest = [correlations(-each.signals[:, [age]], each.gains)[0] for each in measured]
    own = [correlations(each.signals[:, [same]], each.gains)[0] for each in measured]
    single = [
        ("age, the newest first", newest),
        ("of the same document", own),
        ("attention, the mean over heads", heads.mean(axis=1)),
        (f"attention, the {NUM_BEST_HEADS} best heads, chosen on other documents", np.array(together)[~chooses]),
        ("attention, beyond age and document", rest),
    ]
    rows = [{"signal": name, "rank correlation with the gain": _estimate(values)} for name, values in single]
    sets: dict[str, Columns] = {
        "LensNet's signals": lambda each: each.signals,
        "attention of every head": lambda each: each.heads,
        "both": lambda each: np.concatenate([each.signals, each.heads], axis=1),
    }
    fits = []
    for name, columns in sets.items():
        scores = foretold(measured, columns)
        pairs = list(zip(scores, measured, strict=True))
        order = [correlations(ranks(score[:, None]), each.gains)[0] for score, each in pairs]
        first = [each.gains[score.argmax()] for score, each in pairs]
        fits.append(
            {"regression on": name, "rank correlation": _estimate(order), "first block, nats a token": _estimate(first)}
        )
    hindsight = [each.halves[each.halves[:, 0].argmax(), 1] for each in measured]
    fits.append({"regression on": "one half of what came", "first block, nats a token": _estimate(hindsight)})
    num_blocks = sum(len(each.gains) for each in measured)
    return [
        Table(rows, f"{len(measured)} Working Contexts of {len(documents)} documents, {num_blocks:,} blocks"),
        Table(fits, f"Every document by what others teach ({NUM_FOLDS} folds)"),
    ]


def _estimate(values: Sequence[float] | np.ndarray) -> str:
    values = np.asarray(values)
    return f"{values.mean():+.4f} ± {values.std() / np.sqrt(len(values)):.4f}"


def main(arguments: Sequence[str] | None = None) -> int:
    """Read histories, compare, print."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.attention_signal", description=__doc__)
    parser.add_argument("--labels", type=Path, required=True, help="a run of `label` on running text, or its file")
    parser.add_argument("--store", type=Path, required=True, help="the store with the labelled context")
    parser.add_argument("--num_contexts", type=int, default=130, help="Working Contexts, at most")
    parser.add_argument("--newest_tokens", type=int, default=64, help="tokens whose attention is looked at")
    parser.add_argument("--lm", default="smollm2-135m", help="the labels' language model")
    parser.add_argument("--cache_dir", type=Path, default=BaseLMConfig().cache_dir, help="where models are kept")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="bfloat16")
    options = parser.parse_args(arguments)
    try:
        path = options.labels / LABELS if options.labels.is_dir() else options.labels
        contexts = read_labels(path, list(FEATURES))[: options.num_contexts]
        lm = BaseLMConfig(source=options.lm, dtype=options.dtype, cache_dir=options.cache_dir)
        attention = AttentionReader(lm, options.newest_tokens)
        measured = []
        with Store(options.store).open_reader(contexts[0].context) as reader:
            started = time.monotonic()
            for number, context in enumerate(contexts, start=1):
                measured.append(measure(reader, context, attention))
                each_s = (time.monotonic() - started) / number
                left_s = each_s * (len(contexts) - number)
                print(f"read {number} of {len(contexts)}, {left_s:.0f} s left", file=sys.stderr)
        found = [each for each in measured if each is not None]
        if len({each.document for each in found}) < NUM_FOLDS:
            raise ConfigError(f"{path} has labels of fewer than {NUM_FOLDS} documents; label more places")
    except MegaContextError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    for table in tables(found):
        table.show()
    return 0


if __name__ == "__main__":
    sys.exit(main())
