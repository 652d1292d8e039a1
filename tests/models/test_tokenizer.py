from __future__ import annotations

import json
import os
import pickle
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cluster.config import BaseLMConfig
from cluster.errors import ModelError
from models.model_conversion import TINY_SPECIAL_TOKENS
from models.tokenizer import Tokenizer


@pytest.fixture(scope="module")
def tiny(tiny_config: BaseLMConfig) -> Tokenizer:
    return Tokenizer.load(tiny_config)


def test_tiny_ids_are_the_utf8_bytes(tiny: Tokenizer) -> None:
    ids = tiny.encode("aé\n\x00 😀")
    assert ids.dtype == np.uint32
    assert ids.tolist() == list("aé\n\x00 😀".encode())
    assert tiny.vocab_size == 256 + len(TINY_SPECIAL_TOKENS)


def test_round_trip_of_any_text(tiny: Tokenizer) -> None:
    @given(st.text())
    def check(text: str) -> None:
        assert tiny.decode(tiny.encode(text)) == text

    check()


def test_batches_equal_single_texts(tiny: Tokenizer) -> None:
    texts = ["one", "", "three three three\n" * 50]
    for ids, text in zip(tiny.encode_batch(texts), texts, strict=True):
        assert np.array_equal(ids, tiny.encode(text))


def test_names_of_special_tokens_in_a_text_are_text(tiny: Tokenizer) -> None:
    text = f"before{TINY_SPECIAL_TOKENS[0]}after"
    assert tiny.encode(text).tolist() == list(text.encode())
    assert tiny.decode([256]) == TINY_SPECIAL_TOKENS[0]


def test_decode_takes_arrays_and_lists(tiny: Tokenizer) -> None:
    assert tiny.decode(np.array([104, 105], dtype=np.uint32)) == tiny.decode([104, 105]) == "hi"


def test_lone_surrogates_are_named(tiny: Tokenizer) -> None:
    with pytest.raises(UnicodeEncodeError, match="surrogates"):
        tiny.encode("a\ud800b")


def test_pickles_as_its_path(tiny: Tokenizer) -> None:
    data = pickle.dumps(tiny)
    assert len(data) < 1000
    copy = pickle.loads(data)
    assert copy.digest == tiny.digest
    assert np.array_equal(copy.encode("same"), tiny.encode("same"))


def test_digest_is_of_the_content(tiny: Tokenizer, tmp_path: Path) -> None:
    content = json.loads(tiny.path.read_text())
    same, other = tmp_path / "same" / "tokenizer.json", tmp_path / "other" / "tokenizer.json"
    same.parent.mkdir()
    other.parent.mkdir()
    same.write_text(json.dumps(content, indent=4))
    content["added_tokens"].pop()
    other.write_text(json.dumps(content))
    assert Tokenizer(same).digest == tiny.digest
    assert Tokenizer(other).digest != tiny.digest


def test_missing_and_broken_files_say_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"holds no tokenizer\.json.*save_pretrained"):
        Tokenizer(tmp_path / "tokenizer.json")
    (tmp_path / "tokenizer.json").write_text('{"version": "1.0"}')
    with pytest.raises(ModelError, match="is no tokenizer"):
        Tokenizer(tmp_path / "tokenizer.json")


def test_its_thread_pool_stays_off_unless_asked_for(tiny: Tokenizer) -> None:
    program = (
        "import os, sys, pathlib; from models.tokenizer import Tokenizer;"
        f"Tokenizer(pathlib.Path({str(tiny.path)!r}));"
        "print(os.environ['TOKENIZERS_PARALLELISM'], 'torch' in sys.modules)"
    )

    def run(**env: str) -> list[str]:
        base = {k: v for k, v in os.environ.items() if k != "TOKENIZERS_PARALLELISM"}
        return subprocess.check_output([sys.executable, "-c", program], env=base | env, text=True).split()

    assert run() == ["false", "False"]
    assert run(TOKENIZERS_PARALLELISM="true")[0] == "true"


@pytest.mark.real_model
def test_real_tokenizer_round_trip_and_digits(real_config: BaseLMConfig) -> None:
    tokenizer = Tokenizer.load(real_config)
    assert tokenizer.vocab_size == 49_152
    source = Path(json.__file__).read_text() + "\nx =  12345 <|im_end|> é😀\n"
    assert tokenizer.decode(tokenizer.encode(source)) == source
    # Trained with every digit a word of its own: both blanks before a number stay together.
    blanks, one = tokenizer.encode("=  1")[1:]
    assert tokenizer.decode([blanks]) == "  "
    assert tokenizer.decode([one]) == "1"
