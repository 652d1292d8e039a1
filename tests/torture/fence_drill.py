"""The node of an ingest's tree store is lost, and its store goes on calling.

A head and two nodes on this machine. The store of a real `compact` is on the first node, in a process of its own
(`orphan.py`). With a batch in that process's hands the node is removed without a word, and the file lock is gone with
it. The job must go on with a store on the second node and make what an undisturbed one makes, byte for byte, while the
orphan is refused, by the epoch.

    python -m tests.torture.fence_drill FOLDER FEED [--unchecked]

prints what happened as JSON. A process of its own, because a process has one Ray cluster.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from cluster.environment import PROJECT_ROOT, quiet_environment
from tests.torture.ingest_drill import make_corpus
from tests.torture.orphan import DONE_FILE, HELD_FILE, PATIENCE_S, STOP_FILE, UNCHECKED_FILE, accepted, refused

TIMEOUT_S = 240.0
NODE = {"num_cpus": 1, "object_store_memory": 80 * 2**20, "node_ip_address": "127.0.0.1"}


@dataclass
class Fencing:
    """What became of one ingest whose store was orphaned."""

    first: str = ""
    """The outcome of the call that the store held when its node was lost."""
    outcomes: dict[str, int] = field(default_factory=dict)
    """Of all the orphan's calls."""
    restarts: int = 0
    error: str = ""
    """What the job ended with, if it did not finish."""
    problems: list[str] = field(default_factory=list)
    """What `verify` found."""
    lost_blocks: int = 0
    doubled_blocks: int = 0
    differing_bytes: int = 0

    @property
    def refused(self) -> int:
        """Calls the epoch refused."""
        return refused(self.outcomes)

    @property
    def accepted(self) -> int:
        """Calls that wrote."""
        return accepted(self.outcomes)

    @property
    def damaged(self) -> bool:
        """Whether the job or its context took harm."""
        return bool(self.error or self.problems or self.differing_bytes)

    @property
    def ok(self) -> bool:
        """The epoch refused the orphan every time, from the first call on, and the job did not notice it."""
        return self.first == "StaleWriterError" and not self.accepted and not self.damaged and self.restarts > 0


def table(fencings: Sequence[Fencing]) -> str:
    """One line a count, over all of them."""
    rows = [
        ("stores cut off", len(fencings)),
        ("  first call refused", sum(fencing.first == "StaleWriterError" for fencing in fencings)),
        ("calls of orphans", sum(sum(fencing.outcomes.values()) for fencing in fencings)),
        ("  refused by the epoch", sum(fencing.refused for fencing in fencings)),
        ("  accepted", sum(fencing.accepted for fencing in fencings)),
        ("jobs finished", sum(not fencing.error for fencing in fencings)),
        ("lost blocks", sum(fencing.lost_blocks for fencing in fencings)),
        ("doubled blocks", sum(fencing.doubled_blocks for fencing in fencings)),
        ("differing bytes", sum(fencing.differing_bytes for fencing in fencings)),
    ]
    return "\n".join(f"{name:<26}{count:>11,}" for name, count in rows)


def run(folder: Path, feed: str, *, unchecked: bool = False) -> Fencing:
    """Run the drill in a process of its own; `unchecked` leaves the look at the epoch out of the orphan."""
    words = [sys.executable, "-m", "tests.torture.fence_drill", str(folder), feed]
    words += ["--unchecked"] if unchecked else []
    with tempfile.TemporaryDirectory(prefix="mt-", dir="/tmp") as ray_folder:  # short, for the paths of sockets
        token = Path(ray_folder) / "token"
        token.touch(mode=0o600)
        token.write_text(os.urandom(32).hex())
        environment = {k: v for k, v in os.environ.items() if not k.startswith(("RAY_AUTH", "RAY_ADDRESS"))}
        environment |= {
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN_PATH": str(token),
            "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",
            "RAY_TMPDIR": ray_folder,
            "OMP_NUM_THREADS": "1",
            "PYTHONPATH": os.pathsep.join(filter(None, [str(PROJECT_ROOT), os.environ.get("PYTHONPATH", "")])),
        }
        done = subprocess.run(
            words, cwd=PROJECT_ROOT, env=environment, capture_output=True, text=True, timeout=TIMEOUT_S
        )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    return Fencing(**json.loads(done.stdout.splitlines()[-1]))


def _main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("feed")
    parser.add_argument("--unchecked", action="store_true")
    options = parser.parse_args()
    quiet_environment()
    options.folder.mkdir(parents=True, exist_ok=True)
    if options.unchecked:
        (options.folder / UNCHECKED_FILE).touch()
    fencing = _drill(options.folder, options.feed)
    print(json.dumps(asdict(fencing)), flush=True)


def _drill(folder: Path, feed: str) -> Fencing:
    import ray
    from ray.cluster_utils import Cluster
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    import actors.crew
    import pipelines.compact
    from cluster.config import (
        BaseLMConfig,
        CompactionConfig,
        CompactJob,
        CorpusConfig,
        GistNetConfig,
        RunConfig,
        StoreConfig,
        TrackingConfig,
    )
    from cluster.ray_runtime import NAMESPACE
    from storage.tree.verify import verify_context
    from tests.torture.contents import difference, read_contents
    from tests.torture.orphan import OrphanedStore
    from tests.torture.small_blocks import cut_small

    cut_small()
    make_corpus(folder / "corpus", 40)

    def job(name: str) -> CompactJob:
        return CompactJob(
            run=RunConfig(name=name, dir=folder / "runs"),
            tracking=TrackingConfig(enabled=False),
            corpus=CorpusConfig(paths=[str(folder / "corpus")]),
            base_lm=BaseLMConfig(source="tiny", dtype="float32", device="cpu", cache_dir=folder / "models"),
            gistnet=GistNetConfig(lm_layers=1),
            store=StoreConfig(root=folder / "store", context=name, segment_super_blocks=2),
            compaction=CompactionConfig(feed=feed, threads_per_compactor=1, windows_per_batch=2),  # type: ignore[arg-type]
        )

    cluster = Cluster(initialize_head=True, head_node_args={**NODE, "include_dashboard": False})
    nodes = [cluster.add_node(**NODE) for _ in range(2)]
    ray.init(address=cluster.address, namespace=NAMESPACE, logging_level=logging.ERROR)
    fencing = Fencing()
    try:
        pipelines.compact.run(job("undisturbed"))

        # A job puts its store beside its driver, which here is on the head; the first node stands in for that place.
        places = [node.node_id for node in nodes]

        def placed(_: str, soft: bool) -> NodeAffinitySchedulingStrategy:
            return NodeAffinitySchedulingStrategy(places[0], soft=soft)

        actors.crew.NodeAffinitySchedulingStrategy = placed  # type: ignore[assignment]
        actors.crew.TreeStore = OrphanedStore  # type: ignore[misc]

        def lose_the_node() -> None:
            give_up = time.monotonic() + PATIENCE_S
            while not (folder / HELD_FILE).exists() and time.monotonic() < give_up:
                time.sleep(0.05)
            places.pop(0)
            cluster.remove_node(nodes[0], allow_graceful=False)

        loss = threading.Thread(target=lose_the_node)
        loss.start()
        try:
            pipelines.compact.run(job("orphaned"))
            report = json.loads((folder / "runs/orphaned/report.json").read_text())
            fencing.restarts = report["restarts"]
        except Exception as error:
            fencing.error = f"{type(error).__name__}: {error}"
        loss.join()
    finally:
        ray.shutdown()
        cluster.shutdown()
    outcome = orphan_outcome(folder)
    fencing.first, fencing.outcomes = outcome["first"], outcome["outcomes"]
    store = folder / "store"
    fencing.problems = verify_context(store / "orphaned", "orphaned").problems
    if not fencing.problems:
        found, wanted = (read_contents(store / name, name) for name in ("orphaned", "undisturbed"))
        apart = difference(found, wanted)
        fencing.lost_blocks, fencing.doubled_blocks = apart.lost_blocks, apart.doubled_blocks
        fencing.differing_bytes = apart.num_bytes
    return fencing


def orphan_outcome(folder: Path) -> dict[str, Any]:
    """Tell the orphan to stop, and hear what it did."""
    (folder / STOP_FILE).touch()
    give_up = time.monotonic() + PATIENCE_S
    while not (folder / DONE_FILE).exists():
        assert time.monotonic() < give_up, f"the orphan did not end: {(folder / 'orphan.log').read_text()[-2000:]}"
        time.sleep(0.05)
    return json.loads((folder / DONE_FILE).read_text())


if __name__ == "__main__":
    _main()
