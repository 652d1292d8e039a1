"""What was used, what a policy makes of it, and a plan that is carried out, interrupted and stale."""

from __future__ import annotations

import contextlib
import errno
import sqlite3
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from actors.curation.apply import Applied, apply_plan
from actors.curation.curator import Curator
from actors.curation.plan import CurationPlan, make_plan
from actors.curation.usage import DAY_S, Usage, expected_uses, measure_usage
from cluster.config import TOKENS_PER_BLOCK as K
from cluster.config import StoreConfig
from cluster.curation_config import CurationPace, CurationPolicy
from cluster.errors import ConfigError, DiskFullError, WriterConflictError
from storage import row_checksums
from storage.contract import BlockState, DocumentInfo
from storage.focus.events import FocusEvent, FocusEventLog
from storage.store import Store
from storage.tree.catalogue import CATALOGUE_FILE
from storage.versions.branching import Branching
from tests.storage.support import CONTEXT, Text, encoding_of, new_store, open_context
from tests.storage.version_support import holds, write, write_and_seal

ENCODING = encoding_of("float16")
NOW = float(int(time.time()))
PACE = CurationPace(spans_per_commit=2, pause_s=0.0, wait_s=0.0)
POLICY = CurationPolicy(
    half_life_days=30.0,
    document_days=0.0,
    min_age_days=10.0,
    keep_utility=0.4,
    restore_utility=1.0,
    protected_documents=["*/none/*"],
)
"""Spans by their own uses alone."""
WATCHED = (1 - 0.5 ** (100 / 30)) * 30 / np.log(2)
"""Days that uses of a span of 100 days were counted in."""
TEXTS = [Text(f"doc{i}", 64 * K) for i in range(6)]
"""Two spans each."""


def curator(root: Path, wait_s: float = 0.0, on_wait: Callable[[float], None] | None = None) -> Curator:
    return Curator(StoreConfig(root=root, context=CONTEXT), "test", wait_s, on_wait)


def applied(plan: CurationPlan, root: Path, **told: Any) -> Applied:
    return apply_plan(plan, curator(root), PACE, now=NOW, **told)


@pytest.fixture
def root(tmp_path: Path) -> Path:
    new_store(tmp_path, ENCODING)
    with open_context(tmp_path, segment_super_blocks=2) as writer:
        for text in TEXTS[:5]:
            write_and_seal(writer, text)
        old = writer.version().seq
        write_and_seal(writer, TEXTS[5])
    with contextlib.closing(sqlite3.connect(tmp_path / CONTEXT / CATALOGUE_FILE)) as db, db:
        row_checksums.register(db)
        db.execute("UPDATE commits SET created_at = ?", (NOW - 100 * DAY_S,))
        db.execute("UPDATE commits SET created_at = ? WHERE seq > ?", (NOW - 5 * DAY_S, old))
    return tmp_path


def event(number: int, days_ago: float, **columns) -> FocusEvent:
    plain = {
        "reason": "question",
        "policy": "{}",
        "num_tokens": 0,
        "budget": 0,
        "cost": 0,
        "entries": [],
        "num_aged": 0,
    }
    nothing = {"scores": {}, "found": [], "pinned": [], "added": [], "dropped": [], "contexts": [(CONTEXT, 1)]}
    return FocusEvent(session="s", number=number, time=NOW - days_ago * DAY_S, **{**plain, **nothing, **columns})


def log(root: Path, *events: FocusEvent) -> None:
    log = FocusEventLog(root / CONTEXT)
    for one in events:
        log.add(one)
    log.flush()


def look(root: Path) -> tuple[Usage, list[DocumentInfo], CurationPlan]:
    with Store(root).open_reader(CONTEXT) as reader:
        documents = reader.documents()
        usage = measure_usage(reader, documents, POLICY, now=NOW)
        return usage, documents, make_plan(reader.version, documents, usage, POLICY, now=NOW)


def test_uses_count_once_an_event_and_half_after_a_half_life(root: Path) -> None:
    log(
        root,
        event(0, 30.0, added=[(3, 0), (4, 0)], found=[(3, 0), (4, 0), (40, 0)]),
        event(1, 0.0, found=[(70, 0)], scores={(70, 0): 0.5, (100, 0): 0.6, (130, 0): 0.4}),
        # Nothing was shown, so whatever promised anything would have been; of another context, or later: nothing.
        event(2, 0.0, scores={(130, 0): 0.1, (160, 0): -0.1}),
        event(3, 0.0, found=[(0, 0), (130, 1)], contexts=[("other", 7), (CONTEXT, 7)]),
        event(4, -1.0, found=[(0, 0)]),
        event(5, 0.0, pinned=[(10**6, 0)]),
    )
    usage, _, _ = look(root)
    expected = np.zeros(12)
    expected[[0, 1, 2, 3, 4]] = [0.5, 0.5, 1.0, 1.0, 2.0]
    np.testing.assert_allclose(usage.uses, expected)
    np.testing.assert_allclose(usage.utility[:10], 30 * expected[:10] / WATCHED)
    assert usage.last_used[0] == NOW - 30 * DAY_S
    assert usage.last_used[6] == usage.stored_at[6] == NOW - 100 * DAY_S
    assert (usage.stored_at[10:] == NOW - 5 * DAY_S).all()
    assert usage.document.tolist() == np.repeat(np.arange(6), 2).tolist()


def test_sessions_of_other_contexts_that_read_this_one_count(root: Path, tmp_path: Path) -> None:
    own = tmp_path / "of-a-session"
    events = FocusEventLog(own)
    events.add(event(0, 0.0, found=[(40, 1)], contexts=[("of-a-session", 3), (CONTEXT, 1)]))
    events.flush()
    log(root, event(0, 0.0, found=[(0, 0)]))
    with Store(root).open_reader(CONTEXT) as reader:
        folders = [reader.folder, own]
        found = measure_usage(reader, reader.documents(), POLICY, now=NOW, event_folders=folders)
    assert found.uses.tolist() == [1.0, 1.0, *[0.0] * 10]


def watched(age_days: float, half_life_days: float) -> float:
    """Days with the weights of uses, summed day by day."""
    days = np.arange(0.0, age_days, 0.001) + 0.0005
    return float((0.5 ** (days / half_life_days)).sum() * 0.001)


def test_uses_are_a_rate_over_the_time_a_span_was_there() -> None:
    uses, document = np.array([1.0, 1.0, 1.0, 0.0]), np.arange(4)
    utility = expected_uses(uses, np.array([14.0, 100.0, 1000.0, 14.0]), document, POLICY)
    np.testing.assert_allclose(utility, [*(30 / watched(age, 30.0) for age in (14.0, 100.0, 1000.0)), 0.0], rtol=1e-5)
    # Less than a week is no time to know a rate by.
    fresh = expected_uses(uses[:3], np.array([0.0, 0.01, 7.0]), document[:3], POLICY)
    np.testing.assert_allclose(fresh, 30 / watched(7.0, 30.0), rtol=1e-5)


def test_a_span_is_judged_with_its_document() -> None:
    policy = replace(POLICY, document_days=60.0, storing_uses=0.0)
    uses, age = np.array([6.0, 0.0, 0.0, 0.0, 2.0]), np.full(5, 100.0)
    utility = expected_uses(uses, age, np.array([3, 3, 3, 0, 7]), policy)
    days = watched(100.0, 30.0)
    mean = 6.0 / (3 * days)
    np.testing.assert_allclose(utility[0], 30 * (6 + 60 * mean) / (days + 60), rtol=1e-5)
    np.testing.assert_allclose(utility[1:3], 30 * 60 * mean / (days + 60), rtol=1e-5)
    assert utility[3] == 0.0
    # Alone in its document it is its own mean.
    np.testing.assert_allclose(utility[4], 30 * 2 / days, rtol=1e-5)
    assert expected_uses(uses[:0], age[:0], np.zeros(0, np.int64), policy).shape == (0,)


def test_storing_a_document_counts_as_uses_of_it_for_a_while() -> None:
    policy = replace(POLICY, document_days=60.0, storing_uses=0.4)
    utility = expected_uses(np.zeros(4), np.array([8.0, 8.0, 8.0, 300.0]), np.array([0, 1, 1, 2]), policy)
    credit = 0.4 * 0.5 ** (8 / 30)
    days = watched(8.0, 30.0)
    np.testing.assert_allclose(utility[0], 30 * 60 * credit / days / (days + 60), rtol=1e-5)
    np.testing.assert_allclose(utility[1:3], utility[0] / 2)
    assert 0 < utility[3] < 1e-3


def test_what_is_pruned_comes_back_with_its_document_and_the_new_stays(root: Path) -> None:
    _, _, plan = look(root)
    applied(plan, root)
    log(root, *(event(n, 0.1, found=[(0, 0)]) for n in range(8)))
    alone = replace(POLICY, min_age_days=0.0)
    with_document = replace(alone, document_days=60.0, storing_uses=0.8)
    with Store(root).open_reader(CONTEXT) as reader:
        documents = reader.documents()
        plans = [
            make_plan(reader.version, documents, measure_usage(reader, documents, policy, now=NOW), policy, now=NOW)
            for policy in (alone, with_document)
        ]
    # Of document 0 the first span was asked for; document 5 is of five days ago, and nobody used it.
    assert [[(s.action, s.first_block) for s in plan.spans] for plan in plans] == [
        [("restore", 0), ("archive", 320), ("archive", 352)],
        [("restore", 0), ("restore", 32)],
    ]


def test_a_plan_keeps_what_is_used_young_protected_or_growing(root: Path) -> None:
    with open_context(root) as writer:
        growing = Text("growing", 64 * K)
        writer.append([growing.span(ENCODING, 0, 40)])
    log(root, event(0, 20.0, found=[(65, 0)]), event(1, 50.0, found=[(97, 0)]))
    usage, documents, plan = look(root)
    assert {span.first_block for span in plan.of("archive")} == {0, 32, *range(96, 320, 32)}
    assert plan.kept == {"pruned already": 0, "protected": 0, "still growing": 1, "young": 2, "useful": 1}
    assert plan.saved_bytes == 9 * 4096
    policy = replace(POLICY, protected_documents=[TEXTS[0].meta.uri], compact_utility=0.2)
    with Store(root).open_reader(CONTEXT) as reader:
        version = reader.version
    plan = make_plan(version, documents, usage, policy, now=NOW)
    assert plan.kept["protected"] == 2
    assert {span.first_block for span in plan.of("archive")} == {96}
    assert {span.first_block for span in plan.of("compact")} == set(range(128, 320, 32))
    gone = replace(policy, delete_days=60.0, compact_utility=0.0)
    plan = make_plan(version, documents, usage, gone, now=NOW)
    # Document 1 was used 20 and 50 days ago.
    assert {span.first_block for span in plan.of("delete")} == set(range(128, 320, 32))
    assert {span.uri for span in plan.of("delete")} == {text.meta.uri for text in TEXTS[2:5]}
    full = replace(POLICY, keep_utility=0.0, quota_mb=5 * 4096 / 1e6)
    plan = make_plan(version, documents, usage, full, now=NOW)
    # 13 spans, three of them young or growing: eight of the others go, the least useful first.
    assert len(plan.of("archive")) == 8
    assert 64 not in {span.first_block for span in plan.of("archive")}


def test_a_plan_is_written_read_edited_and_refused(root: Path, tmp_path: Path) -> None:
    _, _, plan = look(root)
    path = tmp_path / "plan.json"
    plan.write(path)
    assert CurationPlan.read(path) == plan
    lines = path.read_text().splitlines()
    path.write_text("\n".join(line for line in lines if '"first_block": 64,' not in line))
    assert len(CurationPlan.read(path).spans) == len(plan.spans) - 1
    for text, match in (
        ("{}", "is no plan"),
        ("[1", "is no plan"),
        (path.read_text().replace('"format": 1', '"format": 9'), "format 9"),
        (path.read_text().replace('"archive"', '"burn"'), "action 'burn'"),
    ):
        path.write_text(text)
        with pytest.raises(ConfigError, match=match):
            CurationPlan.read(path)
    with pytest.raises(ConfigError, match="cannot be read"):
        CurationPlan.read(tmp_path / "none.json")


def test_a_plan_goes_on_after_a_stop_and_does_nothing_twice(root: Path) -> None:
    _, _, plan = look(root)
    assert len(plan.spans) == 10
    stops = iter([False, False, True])
    first = applied(plan, root, stopping=lambda: next(stops))
    assert (first.done["archive"], first.commits) == (4, 2)
    seen: list[int] = []
    second = applied(plan, root, on_progress=seen.append)
    assert (second.done["archive"], second.there_already, second.commits) == (6, 4, 3)
    assert sum(seen) == 10
    again = applied(plan, root)
    assert (sum(again.done.values()), again.there_already, again.commits) == (0, 10, 0)
    with Store(root).open_reader(CONTEXT) as reader:
        states = reader.block_states(0, 384)
        assert (states[:320] == BlockState.GIST_ONLY).all()
        assert (states[320:] == BlockState.WHOLE).all()


def test_what_is_asked_for_again_comes_back(root: Path) -> None:
    _, _, plan = look(root)
    applied(plan, root)
    with open_context(root) as writer:
        assert Store(root).collect(writer, keep_s=0.0, now=NOW + 8 * DAY_S).token_bytes == 10 * 4096
    log(root, *(event(n, 0.0, scores={(70, 0): 0.3}) for n in range(2)), event(9, 1.0, scores={(7, 0): 0.3}))
    _, _, plan = look(root)
    assert [(span.action, span.first_block) for span in plan.spans] == [("restore", 64)]
    assert applied(plan, root).done["restore"] == 1
    with Store(root).open_reader(CONTEXT) as reader:
        np.testing.assert_array_equal(reader.tokens(64, 32)[0], TEXTS[1].packed(0, 32)[0])


def test_a_full_disk_stops_a_restore_and_does_not_count_as_lost(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise OSError(errno.ENOSPC, "no space")

    _, _, plan = look(root)
    applied(plan, root)
    with open_context(root) as writer:
        Store(root).collect(writer, keep_s=0.0, now=NOW + 8 * DAY_S)
    back = replace(plan, spans=[replace(span, action="restore") for span in plan.spans[:4]])
    with monkeypatch.context() as patch:
        patch.setattr("storage.tree.sealing.write_segment", refuse)
        with pytest.raises(DiskFullError):
            applied(back, root)
    done = applied(back, root)
    assert (done.done["restore"], done.lost) == (4, [])


def test_spans_that_changed_since_the_plan_are_left_alone(root: Path) -> None:
    _, _, plan = look(root)
    moved = replace(plan, spans=[replace(plan.spans[0], document="doc9"), replace(plan.spans[1], first_block=10**6)])
    done = applied(moved, root)
    assert (sum(done.done.values()), done.stale) == (0, [0, 10**6])
    holds(root, *TEXTS)
    with open_context(root) as writer:
        first = writer.version().seq
        write(writer, Text("more", 40 * K))
        Branching(writer).roll_back(first)
    with pytest.raises(ConfigError, match="rolled back"):
        applied(plan, root)


def test_a_living_writer_is_waited_for(root: Path) -> None:
    _, _, plan = look(root)
    told: list[float] = []
    with open_context(root), pytest.raises(WriterConflictError):
        apply_plan(plan, curator(root, 0.01, told.append), PACE, now=NOW)
    assert told == [0.01]
    waiting = curator(root, 30.0)
    writer = open_context(root)
    threading.Timer(0.2, writer.close).start()
    assert apply_plan(plan, waiting, PACE, now=NOW).commits == 5
    assert 0.1 < waiting.waited_s < 30.0
