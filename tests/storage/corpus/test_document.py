import hashlib
import pickle

from storage.corpus.document import Document


def test_a_document_hashes_its_raw_bytes_and_not_its_text() -> None:
    raw = b"\xef\xbb\xbfhello\r\n"
    document = Document.from_raw("src/a.txt", "hello\r\n", raw, 12.5, ("demo",))
    assert document.content_sha256 == hashlib.sha256(raw).hexdigest()
    assert document.size_bytes == 10
    assert (document.modified_at, document.tags) == (12.5, ("demo",))


def test_the_key_tells_texts_and_uris_apart_and_nothing_else() -> None:
    first = Document.from_raw("a", "x", b"x", 1.0)
    assert first.key == f"a@{first.content_sha256[:16]}"
    assert first.key == Document.from_raw("a", "x", b"x", 2.0, ("tag",)).key
    assert len({first.key, Document.from_raw("b", "x", b"x").key, Document.from_raw("a", "y", b"y").key}) == 3


def test_documents_pickle() -> None:
    document = Document.from_raw("a", "x", b"x")
    assert pickle.loads(pickle.dumps(document)) == document
