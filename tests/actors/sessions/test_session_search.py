"""What a session makes of what its searches found."""

from __future__ import annotations

from contextlib import closing
from dataclasses import replace

import numpy as np
import pytest

from actors.session import Session, SessionSpec
from actors.session_search import Match, leads
from models.base_lm import BaseLM
from models.focus.refocus import BlockName
from tests.actors.helpers import make_text
from tests.actors.sessions.support import CONFIG, document
from tests.actors.sessions.test_session_lens import ByWords


def first_block(name: BlockName) -> int:
    """Documents of ten blocks."""
    return name[0] // 10 * 10


def test_the_blocks_before_the_best_ones_are_worth_a_share_of_them() -> None:
    found = {(12, 0): Match(2.0, 1, 1), (11, 0): Match(0.5, None, 3), (17, 1): Match(1.0, 2), (25, 0): Match(0.4)}
    assert leads(found, 0.8, 2, first_block) == {
        (11, 0): Match(1.6, None, 3, leads_to=12),
        (16, 1): Match(0.8, leads_to=17),
    }
    assert leads(found, 0.2, 1, first_block) == {}, "it is worth more by itself"
    assert leads(found, 0.0, 2, first_block) == {}
    assert Match(1.6, None, 3, leads_to=12).why == "key #3, leads to block 12"


def test_what_belongs_to_another_document_or_is_worth_nothing_leads_nowhere() -> None:
    assert leads({(10, 0): Match(2.0), (0, 1): Match(1.0), (5, 0): Match(0.0)}, 0.8, 9, first_block) == {}


@pytest.mark.parametrize("share", [0.8, 0.0])
def test_a_session_shows_where_a_found_passage_begins(spec: SessionSpec, lm: BaseLM, share: float) -> None:
    configured = replace(spec, config=replace(CONFIG, max_blocks=2, lead_share=share))
    with closing(Session(configured, lm, ByWords())) as session:
        for number in range(2):
            text = make_text(number, 300)
            session.read(document(f"d{number}", text), text)
        reader = session.memory.readers()[0]
        wanted = session._tokenizer.decode(reader.tokens(7, 1)[0][0].astype(np.int64))
        focus = session.refocus(wanted)
        assert (7, 0) in focus.found
        assert ((6, 0) in focus.found) == (share > 0)
        if share:
            assert session.found_order[-2:] == ((6, 0), (7, 0)), "as they were read"
            assert session.matches[(6, 0)].why.endswith("leads to block 7")
