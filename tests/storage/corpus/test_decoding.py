import codecs

import pytest
from hypothesis import given
from hypothesis import strategies as st

from storage.corpus.decoding import Refusal, decode_text, refuse_text

TEXT = "déjà vu, 試験 \N{GRINNING FACE}\r\nsecond\rthird\n"


@pytest.mark.parametrize(
    ("mark", "encoding"),
    [
        (b"", "utf-8"),
        (codecs.BOM_UTF8, "utf-8"),
        (codecs.BOM_UTF16_LE, "utf-16-le"),
        (codecs.BOM_UTF16_BE, "utf-16-be"),
        (codecs.BOM_UTF32_LE, "utf-32-le"),
        (codecs.BOM_UTF32_BE, "utf-32-be"),
    ],
)
def test_unicode_with_and_without_a_byte_order_mark_keeps_its_line_ends(mark: bytes, encoding: str) -> None:
    assert decode_text(mark + TEXT.encode(encoding)) == TEXT


def test_a_python_source_is_read_by_its_cookie_and_other_files_are_not() -> None:
    raw = "# -*- coding: latin-1 -*-\nname = 'café'\n".encode("latin-1")
    assert decode_text(raw, is_python=True) == "# -*- coding: latin-1 -*-\nname = 'café'\n"
    refusal = decode_text(raw)
    assert isinstance(refusal, Refusal)
    assert refusal.reason == "undecodable"
    assert f"offset {raw.index(0xE9)}" in refusal.detail


@pytest.mark.parametrize(
    "raw",
    [
        b"# coding: no-such-codec\nx = 1\n",
        b"# coding: rot13\nk = 1\n",  # a codec that does not make text
        b"# coding: unicode_escape\nx = '\\ud800'\n",  # a codec that makes half of a surrogate pair
        b"x = '\xff'\n",
        b"# coding: utf-8\nx = 1\n\n\ny = '\xff'\n",
    ],
)
def test_a_python_source_that_contradicts_itself_is_undecodable(raw: bytes) -> None:
    refusal = decode_text(raw, is_python=True)
    assert isinstance(refusal, Refusal)
    assert refusal.reason == "undecodable"
    assert refusal.detail


@pytest.mark.parametrize("raw", [codecs.BOM_UTF8 + b"ab\xff", codecs.BOM_UTF16_LE + b"a\0b"])
def test_offsets_count_from_the_start_of_the_file(raw: bytes) -> None:
    refusal = decode_text(raw)
    assert isinstance(refusal, Refusal)
    assert f"offset {len(raw) - 1}:" in refusal.detail


@pytest.mark.parametrize(
    "raw",
    [
        b"text with a \0 byte",
        b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR",
        bytes(range(1, 32)) * 4,
        bytes(range(1, 200)),  # not UTF-8 either: binary says more
        codecs.BOM_UTF16_LE + "a\0b".encode("utf-16-le"),
    ],
)
def test_binary(raw: bytes) -> None:
    refusal = decode_text(raw)
    assert isinstance(refusal, Refusal)
    assert refusal.reason == "binary"


@pytest.mark.parametrize("raw", [b"", b" \t\r\n\f", codecs.BOM_UTF8, codecs.BOM_UTF16_BE, "\u2003\n".encode()])
def test_empty(raw: bytes) -> None:
    refusal = decode_text(raw)
    assert isinstance(refusal, Refusal)
    assert refusal.reason == "empty"


def test_a_few_control_characters_do_not_make_a_text_binary() -> None:
    manual_page = "N\bNA\bAM\bME\bE\n\x1b[1mls\x1b[0m - list\f\n" * 20
    assert decode_text(manual_page.encode()) == manual_page
    assert decode_text(b"bell \x07 once in a while, in a longer line\n") == (
        "bell \x07 once in a while, in a longer line\n"
    )


@given(st.binary(max_size=200), st.booleans())
def test_any_bytes_give_text_that_can_be_encoded_or_a_refusal(raw: bytes, is_python: bool) -> None:
    text = decode_text(raw, is_python=is_python)
    if isinstance(text, Refusal):
        assert text.detail
    else:
        assert text.strip()
        assert "\0" not in text
        text.encode()


@given(st.text(st.characters(exclude_categories=["Cs", "Cc"]), min_size=1).filter(str.strip))
def test_any_printable_text_survives(text: str) -> None:
    assert refuse_text(text) is None
    encoded = codecs.BOM_UTF16_LE + text.encode("utf-16-le")
    assert decode_text(encoded) == text
