"""The decisions of a simulated year without a tree: users, utilities and plans of `curation_year`, in a second or two,
so that seeds are enough to tell a policy from luck. What it says of spans is what the tree comes to."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from actors.curation.plan import make_plan
from actors.curation.usage import Usage, expected_uses
from benchmarks.curation_users import START, WEEK_S, Outcome, Record, Users, document_of, refocuses
from cluster.config import BLOCKS_PER_SUPER_BLOCK, TOKENS_PER_BLOCK
from cluster.curation_config import CurationPolicy
from storage.contract import BlockState, DocumentInfo, Version
from storage.schema import Encoding


@dataclass(frozen=True)
class Replay:
    """What a year came to."""

    outcome: Outcome
    bytes_share: float
    """Of the raw tokens, those in detail or pruned less than the retention ago. Segments keep a little more."""


def replay(num_documents: int, num_weeks: int, seed: int, exponent: float, policy: CurationPolicy) -> Replay:
    """Let users ask and a policy decide, week by week."""
    users = Users.of(num_documents, num_weeks, seed, exponent)
    sizes = users.sizes
    first = np.concatenate([[0], np.cumsum(sizes)])
    owner = np.repeat(np.arange(num_documents), sizes)
    documents = [_info(number, int(first[number]), int(sizes[number])) for number in range(num_documents)]
    record = Record.of(users, num_weeks)
    stored_at = START + record.born * WEEK_S
    uses, last_used = np.zeros(len(owner)), stored_at.copy()
    state = np.full(len(owner), BlockState.WHOLE, np.int8)
    pruned_at = np.full(len(owner), -np.inf)
    half_life_s = policy.half_life_days * 86400
    for week in range(num_weeks):
        begin, now = START + week * WEEK_S, START + (week + 1) * WEEK_S
        uses *= 0.5 ** (WEEK_S / half_life_s)
        for document, span, _, times in refocuses(record.use(users, week), week):
            uses[first[document] + span] += (0.5 ** ((now - begin - times) / half_life_s)).sum()
            last_used[first[document] + span] = begin + times[-1]
        # Documents are numbered in the order they come in.
        num, there = int((record.born <= week).sum()), int((users.born <= week).sum())
        usage = Usage(
            expected_uses(uses[:num], (now - stored_at[:num]) / 86400, owner[:num], policy),
            uses[:num],
            last_used[:num],
            stored_at[:num],
            state[:num],
            np.zeros(num, bool),
            owner[:num],
            owner[:num],
        )
        version = Version("year", "main", week, Encoding("", "", "", ()), 0, (num * BLOCKS_PER_SUPER_BLOCK,))
        for planned in make_plan(version, documents[:there], usage, policy, now=now).spans:
            span = planned.first_block // BLOCKS_PER_SUPER_BLOCK
            comes_back = planned.action == "restore"
            state[span] = BlockState.WHOLE if comes_back else BlockState.GIST_ONLY
            pruned_at[span] = -np.inf if comes_back else now
            record.restored += comes_back
        record.whole[week, :num] = state[:num] == BlockState.WHOLE
    end = START + num_weeks * WEEK_S
    left = record.whole[-1] | (end - pruned_at < policy.retention_days * 86400)
    return Replay(record.outcome(policy), float(left.mean()))


def _info(number: int, first_span: int, num_spans: int) -> DocumentInfo:
    num_blocks = num_spans * BLOCKS_PER_SUPER_BLOCK
    first_block = first_span * BLOCKS_PER_SUPER_BLOCK
    return DocumentInfo(document_of(number), first_block, num_blocks, num_blocks * TOKENS_PER_BLOCK, "complete")
