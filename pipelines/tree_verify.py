"""tree verify: checks every byte of a context, and on request whether its gists are what the net makes of its tokens.

Starts no cluster.
"""

from __future__ import annotations

import json
import sys
from dataclasses import asdict
from typing import Any

from actors.gist_check import LevelCheck, check_gists
from actors.gist_maker import GistMaker, load_gist_maker
from cluster.config import TOKENS_PER_BLOCK as K
from cluster.config import TreeVerifyJob
from cluster.errors import CorruptTreeError
from cluster.progress import Progress
from cluster.tables import Table
from pipelines.tree_report import human_bytes
from storage.check import check_context
from storage.store import Store
from storage.tree.verify import VerifyReport

SHOWN_PROBLEMS = 20


def run(job: TreeVerifyJob) -> None:
    """Check every byte and relation of a context, and a sample of its gists if that was asked for.

    Raises:
        CorruptTreeError: something is wrong; all of it has been printed.
        IncompatibleTreeError, ModelError: gists cannot be made with the net at hand.
    """
    name = job.store.context
    store = Store(job.store.root)
    maker = _verifying_maker(store, job)
    found = check_context(store, name)
    damage = found.problems
    # What is damaged is named already, and cannot be made anew.
    checks = _check_gists(store, job, maker) if maker is not None and not damage else []
    wrong = [problem for check in checks for problem in check.problems]
    problems = [*damage, *wrong]
    if job.json:
        shown = {**asdict(found.tree), "problems": problems, "gists": [asdict(check) for check in checks]}
        sys.stdout.write(json.dumps({"context": name, "ok": not problems, **shown}, indent=1) + "\n")
    else:
        Table(_verify_rows(found.tree, len(problems)), f"Context {name}").show()
        if checks:
            Table([_gist_row(check) for check in checks], "Gists made anew").show()
        for problem in problems[:SHOWN_PROBLEMS]:
            sys.stdout.write(f"  {problem}\n")
    if damage:
        raise CorruptTreeError(
            f"context {name!r} has {len(problems)} problem(s); damaged nodes are not served. `tree repair` says what "
            "it can mend; restore the rest from a backup."
        )
    if wrong:
        raise CorruptTreeError(
            f"context {name!r} holds gists that its net does not make of its tokens; every byte is as it was written. "
            "Restore it from a backup of before, or make all gists anew: `tree rebuild-gists` with another "
            "--store.gist_dtype, or another net."
        )


def _verifying_maker(store: Store, job: TreeVerifyJob) -> GistMaker | None:
    """Before everything is read: a net that does not fit is refused at once."""
    if not job.gists:
        return None
    with store.open_reader(job.store.context, job.store.version) as reader:
        encoding = reader.version.encoding
    what = f"context {job.store.context!r}"
    return load_gist_maker(what, encoding, job.base_lm, job.gistnet, job.store, job.threads)


def _check_gists(store: Store, job: TreeVerifyJob, maker: GistMaker) -> list[LevelCheck]:
    with store.open_reader(job.store.context, job.store.version) as reader:
        most = sum(
            min(job.gists, -(-reader.version.num_nodes(lod) // K)) for lod in range(1, reader.version.max_lod + 1)
        )
        with Progress(most, "groups", "making gists anew") as progress:
            return check_gists(reader, maker, job.gists, job.seed, lambda: progress.advance(1))


def _gist_row(check: LevelCheck) -> dict[str, Any]:
    return {
        "level": f"LOD{check.lod}",
        "nodes": f"{check.num_nodes:,}",
        "cannot be made (no tokens)": f"{check.num_left_out:,}",
        "same bits": f"{check.num_equal:,}",
        "largest relative error": f"{check.worst_error:.1e}",
    }


def _verify_rows(report: VerifyReport, num_problems: int) -> list[dict[str, Any]]:
    return [
        {"what": "blocks", "value": f"{report.num_blocks:,}"},
        {"what": "documents", "value": f"{report.num_documents:,}"},
        {"what": "segments", "value": f"{report.num_segments:,}"},
        {"what": "journal rows", "value": f"{report.num_journal_rows:,}"},
        {"what": "bytes read", "value": human_bytes(report.num_bytes)},
        {"what": "problems", "value": f"{num_problems:,}"},
    ]
