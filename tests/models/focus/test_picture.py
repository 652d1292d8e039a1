from __future__ import annotations

from cluster.config import TOKENS_PER_BLOCK as K
from models.focus.filling import Filling, show_newest
from models.focus.history import History
from models.focus.picture import picture
from tests.models.focus.trees import make_tree


def test_each_column_is_the_finest_level_in_it() -> None:
    long, short = History.of(make_tree([96 * K]).reader()), History.of(make_tree([8 * K], tail=5).reader())
    filling = Filling("overlay", 500, [long, short])
    assert filling.show(40, 0)
    show_newest(filling, 2 * K)
    # 96 blocks are three nodes of LOD2, 9 with the tail are 7 blocks of LOD1, one raw and the tail.
    assert picture(filling.finish(), 105) == "▒" * 40 + "█" + "▒" * 55 + "|" + "▓" * 7 + "██"
    # Of 19 columns block 40 lies in two.
    assert picture(filling.finish(), 21) == "▒" * 7 + "██" + "▒" * 10 + "|" + "▓█"


def test_a_history_of_nothing_is_left_out() -> None:
    empty, one = History.of(make_tree([]).reader()), History.of(make_tree([K]).reader())
    assert picture(Filling("strict", 9, [empty, one]).finish(), 10) == "▓" * 10
