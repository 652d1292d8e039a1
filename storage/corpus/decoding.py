"""Bytes to text, or the reason why not. Standard library only."""

from __future__ import annotations

import codecs
import io
import tokenize
from typing import NamedTuple

from storage.corpus.document import QuarantineReason

# UTF-32 first: its little-endian mark begins with UTF-16's.
_BYTE_ORDER_MARKS = (
    (codecs.BOM_UTF8, "utf-8"),
    (codecs.BOM_UTF32_LE, "utf-32-le"),
    (codecs.BOM_UTF32_BE, "utf-32-be"),
    (codecs.BOM_UTF16_LE, "utf-16-le"),
    (codecs.BOM_UTF16_BE, "utf-16-be"),
)

# Control characters that text files do hold: white space, backspace (manual pages), escape (colours).
_CONTROLS_OF_TEXT = b"\t\n\v\f\r\b\x1b"
_CONTROLS = bytes(c for c in (*range(32), 127) if c not in _CONTROLS_OF_TEXT)
_SAMPLE_CHARS = 64 * 2**10
MAX_CONTROL_SHARE = 0.1
"""Above this share of control characters in its first 64 Ki characters a text counts as binary."""


class Refusal(NamedTuple):
    """Why some bytes or a string do not make a document."""

    reason: QuarantineReason
    detail: str


def decode_text(raw: bytes, *, is_python: bool = False) -> str | Refusal:
    """Decode a whole file.

    A byte-order mark decides (UTF-8, UTF-16, UTF-32) and is dropped; Python sources may name their encoding
    in a comment (PEP 263); everything else must be UTF-8. Line ends are not touched.
    """
    for mark, encoding in _BYTE_ORDER_MARKS:
        if raw.startswith(mark):
            return _decode(raw, encoding, len(mark))
    if (position := raw.find(0)) >= 0:
        return Refusal("binary", f"NUL byte at offset {position}")
    encoding = "utf-8"
    if is_python:
        try:
            encoding, _ = tokenize.detect_encoding(io.BytesIO(raw).readline)
        except SyntaxError as error:  # names an unknown codec, or does not start as UTF-8
            return _binary_or(Refusal("undecodable", str(error)), raw)
    return _decode(raw, encoding, 0)


def _decode(raw: bytes, encoding: str, start: int) -> str | Refusal:
    try:
        text = str(memoryview(raw)[start:], encoding)
        if not encoding.startswith("utf"):
            text.encode()  # codecs such as unicode_escape can make lone surrogates, which no tokenizer takes
    except UnicodeDecodeError as error:
        offset = start + error.start
        refusal = Refusal("undecodable", f"not {encoding} at offset {offset}: {error.reason}")
        return refusal if start else _binary_or(refusal, raw)  # a byte-order mark says it means to be text
    except (UnicodeError, LookupError) as error:  # LookupError: a codec that does not make text
        return Refusal("undecodable", f"cannot be read as {encoding}: {error}")
    return refuse_text(text) or text


def _binary_or(refusal: Refusal, raw: bytes) -> Refusal:
    return _refuse_controls(raw[:_SAMPLE_CHARS]) or refusal


def refuse_text(text: str) -> Refusal | None:
    """Whether decoded text is nothing to read: white space only, or binary data in disguise."""
    if not text or text.isspace():
        return Refusal("empty", "no text" if not text else f"only white space ({len(text)} characters)")
    if (position := text.find("\0")) >= 0:
        return Refusal("binary", f"NUL character at position {position}")
    return _refuse_controls(text[:_SAMPLE_CHARS].encode("utf-8", "replace"))


def _refuse_controls(sample: bytes) -> Refusal | None:
    share = 1 - len(sample.translate(None, _CONTROLS)) / max(1, len(sample))
    if share > MAX_CONTROL_SHARE:
        return Refusal("binary", f"{share:.0%} control characters")
    return None
