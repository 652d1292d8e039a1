"""Text to token ids and back, through the `tokenizers` JSON of a model folder: 0.1 s to load, no torch."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import tokenizers
from tokenizers.decoders import DecodeStream

from cluster.config import BaseLMConfig
from cluster.errors import ModelError
from models.model_files import TOKENIZER_FILE, resolve_model


class Tokenizer:
    """A model's tokenizer. Pickles as its path, so that handing it to a worker costs nothing.

    No special tokens are added, and the names of special tokens inside a text are read as ordinary text: a
    document that quotes `<|im_end|>` must not end anybody's turn. Decoding gives the text back exactly.
    """

    def __init__(self, path: Path) -> None:
        """Open a `tokenizer.json`.

        Raises:
            ModelError: the file is missing or no tokenizer.
        """
        # One thread a tokenizer: workers are the unit of parallelism here, and the library's own pool would
        # take every core of the machine and warn after each fork. A setting of the user's stands.
        os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
        self.path = path
        try:
            raw = path.read_bytes()
            self._backend: Any = tokenizers.Tokenizer.from_str(raw.decode("utf-8"))
            canonical = json.dumps(json.loads(raw), sort_keys=True, ensure_ascii=False)
        except FileNotFoundError as error:
            raise ModelError(
                f"{path.parent} holds no {TOKENIZER_FILE}; save the model's fast tokenizer there "
                "(transformers: AutoTokenizer.from_pretrained(...).save_pretrained(folder))"
            ) from error
        except Exception as error:  # tokenizers raises plain Exception
            raise ModelError(f"{path} is no tokenizer: {error}") from error
        self._backend.encode_special_tokens = True
        self._backend.no_truncation()
        self._backend.no_padding()
        self._digest = hashlib.sha256(canonical.encode()).hexdigest()

    @classmethod
    def load(cls, config: BaseLMConfig) -> Tokenizer:
        """The tokenizer of `config.source`.

        Raises:
            ModelError: the model is missing or has no `tokenizer.json`.
        """
        return cls(resolve_model(config).folder / TOKENIZER_FILE)

    def __reduce__(self) -> tuple[type[Tokenizer], tuple[Path]]:
        return Tokenizer, (self.path,)

    @property
    def digest(self) -> str:
        """sha256 hex of the JSON, whatever its white space and key order."""
        return self._digest

    @property
    def vocab_size(self) -> int:
        """Number of ids, special tokens included. A model's embedding may have more rows."""
        return self._backend.get_vocab_size(with_added_tokens=True)

    def encode(self, text: str) -> np.ndarray:
        """Token ids of a text, (num_tokens,) uint32.

        Raises:
            UnicodeEncodeError: the text holds lone surrogates, which no UTF-8 text can.
        """
        return self.encode_batch([text])[0]

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        """Token ids of each text, (num_tokens,) uint32. Raises like `encode`."""
        try:
            encodings = self._backend.encode_batch_fast(list(texts), add_special_tokens=False)
        except TypeError:
            for text in texts:
                text.encode("utf-8")  # names the surrogate and its place
            raise
        return [np.asarray(encoding.ids, dtype=np.uint32) for encoding in encodings]

    def encode_markup(self, text: str) -> np.ndarray:
        """As `encode`, but names of special tokens become those tokens: for a chat template's text, not a user's."""
        self._backend.encode_special_tokens = False
        try:
            return self.encode(text)
        finally:
            self._backend.encode_special_tokens = True

    def decode(self, ids: Iterable[int] | np.ndarray) -> str:
        """The text of token ids, special tokens by name. A character cut in two shows as U+FFFD."""
        listed = ids.tolist() if isinstance(ids, np.ndarray) else [int(i) for i in ids]
        return self._backend.decode(listed, skip_special_tokens=False)

    def decode_stream(self) -> Callable[[int], str]:
        """A function from each next token of a text to the characters it completes, special tokens left out."""
        stream = DecodeStream(skip_special_tokens=True)
        return lambda token: stream.step(self._backend, token) or ""

    def decode_batch(self, pieces: Sequence[np.ndarray]) -> list[str]:
        """`decode` of each."""
        return [self.decode(ids) for ids in pieces]
