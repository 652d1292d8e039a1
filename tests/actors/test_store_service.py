"""The service of a store: its rules without a cluster, then its actors on a real one."""

from __future__ import annotations

import dataclasses
import os
import shutil
import signal
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import ray
from ray.exceptions import RayError

import actors.service_client as client
import actors.store_service as store_service
from actors.compactor import Compactor
from actors.crew import Crew
from actors.curation.curator import SharedCurator, curating
from actors.curation.plan import Action, PlannedSpan
from actors.curation.work import Order, carry_out
from actors.packing import Packer, batched_windows
from actors.plan import CompactionPlan
from actors.service_client import actor_index, find_service, served_context, start_service, stop_service
from actors.store_service import Claim, StoreService, code_version
from actors.tree_store import TreeStoreSpec
from cluster.config import BaseLMConfig, RayConfig, StoreConfig
from cluster.errors import (
    ResourceError,
    ServiceMismatchError,
    StoreRestartedError,
    WriterConflictError,
    is_recoverable,
)
from cluster.ray_calls import get_or_raise
from storage.contract import BlockState, SpanWrite
from storage.store import Store
from storage.tree.verify import verify_context
from storage.tree.writer_lock import committed_epoch
from tests.actors.helpers import make_compactor, make_documents, tiny_plan


@pytest.fixture
def plan(tmp_path: Path, tiny_lm_config: BaseLMConfig) -> CompactionPlan:
    return tiny_plan(tiny_lm_config, tmp_path / "store", "last_token")


@pytest.fixture
def root(tmp_path: Path) -> Path:
    Store(tmp_path / "store", create=True)
    return tmp_path / "store"


def spec_of(
    plan: CompactionPlan, root: Path, context: str = "c", owner: str = "run 'one'", **store: Any
) -> TreeStoreSpec:
    config = StoreConfig(root=root, context=context, segment_super_blocks=4, **store)
    return TreeStoreSpec(config, plan.identity, plan.encoding, owner=owner)


def spans_of(plan: CompactionPlan, compactor: Compactor, lengths: tuple[int, ...] = (300, 40)) -> list[SpanWrite]:
    packer = Packer(plan.tokenizer, lambda keys: {})
    windows = [w for batch in batched_windows(packer.pack(make_documents(lengths)), 4, lambda _: None) for w in batch]
    return compactor.encode(windows)


# -- where a context goes --------------------------------------------------------------------------------------------


def test_contexts_are_spread_and_stay_where_they_are() -> None:
    names = [f"context-{number}" for number in range(3000)]
    three = [actor_index(name, 3) for name in names]
    assert three == [actor_index(name, 3) for name in names]
    for index in range(3):
        assert 900 < three.count(index) < 1100
    # A fourth actor takes its share, and nothing moves between the others.
    four = [actor_index(name, 4) for name in names]
    moved = [name for name, old, new in zip(names, three, four, strict=True) if old != new]
    assert 650 < len(moved) < 850
    assert all(actor_index(name, 4) == 3 for name in moved)


def test_a_store_keeps_its_id_and_another_in_its_place_has_its_own(root: Path) -> None:
    first = Store(root).store_id()
    assert Store(root).store_id() == first
    shutil.rmtree(root)
    assert Store(root, create=True).store_id() != first


def test_the_code_version_follows_the_sources(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = code_version()
    for folder in ("storage", "actors", "cluster"):
        shutil.copytree(store_service.PROJECT_ROOT / folder, tmp_path / folder)
    monkeypatch.setattr(store_service, "PROJECT_ROOT", tmp_path)
    code_version.cache_clear()
    try:
        assert code_version() == before
        source = tmp_path / "storage" / "tree" / "writer.py"
        source.write_text(source.read_text() + "\n# another\n")
        code_version.cache_clear()
        assert code_version() != before
    finally:
        code_version.cache_clear()


# -- one actor, without a cluster ------------------------------------------------------------------------------------


def test_a_context_belongs_to_one_job_until_it_lets_go_or_dies(plan: CompactionPlan, root: Path) -> None:
    alive = {"01", "02"}
    service = StoreService(root, 0, 1, is_alive=alive.__contains__)
    spans = spans_of(plan, make_compactor(plan))
    first, second = Claim("c", "t1", "01", "run 'one'"), Claim("c", "t2", "02", "run 'two'")
    version, epoch = service.attach(first, spec_of(plan, root))
    assert (version.num_blocks, epoch) == (0, 1)
    ack = service.call("c", "t1", "append", epoch, spans)
    with pytest.raises(WriterConflictError, match="run 'one' through the store's service"):
        service.attach(second, spec_of(plan, root))
    with pytest.raises(StoreRestartedError, match="does not hold context 'c'"):
        service.call("c", "t2", "append", epoch, spans)
    with pytest.raises(AttributeError, match="_opened"):
        service.call("c", "t1", "_opened")

    (row,) = service.describe()["contexts"]
    assert (row["context"], row["held_by"], row["epoch"]) == ("c", "run 'one'", 1)
    assert (row["version"], row["num_tokens"]) == (ack.version.seq, ack.version.num_tokens)
    assert row["journal_bytes"] > 0
    assert abs(row["committed_at"] - time.time()) < 60

    # Beside it another context, of another job.
    other = Claim("d", "t3", "02", "run 'two'")
    _, other_epoch = service.attach(other, spec_of(plan, root, "d"))
    assert service.call("d", "t3", "append", other_epoch, spans).new_blocks == ack.new_blocks
    service.detach("d", "t3")

    # The first job dies: the next one gets the context, with all that was acknowledged, under a newer epoch.
    alive.remove("01")
    version, epoch = service.attach(second, spec_of(plan, root))
    assert (version.seq, epoch) == (ack.version.seq, 2)
    with pytest.raises(StoreRestartedError):
        service.call("c", "t1", "append", 1, spans)
    service.detach("c", "t1")  # not its any more
    assert [row["held_by"] for row in service.describe()["contexts"]] == ["run 'two'"]
    service.detach("c", "t2")
    assert service.describe()["contexts"] == []
    Store(root).open_maintenance("c").close()  # nobody holds its lock


def test_the_sweep_closes_what_dead_jobs_left_open(plan: CompactionPlan, root: Path) -> None:
    alive = {"01"}
    service = StoreService(root, 0, 1, is_alive=alive.__contains__)
    service.attach(Claim("c", "t1", "01", ""), spec_of(plan, root))
    assert service.sweep() == 0
    with pytest.raises(WriterConflictError):
        Store(root).open_maintenance("c")
    alive.clear()
    assert service.sweep() == 1
    Store(root).open_maintenance("c").close()


def test_a_stopped_service_holds_nothing_and_takes_nobody(plan: CompactionPlan, root: Path) -> None:
    service = StoreService(root, 0, 1, is_alive=lambda _: True)
    for context in ("c", "d"):
        service.attach(Claim(context, context, "01", ""), spec_of(plan, root, context))
    assert service.stop() == ["c", "d"]
    for context in ("c", "d"):
        Store(root).open_maintenance(context).close()
    with pytest.raises(StoreRestartedError, match="being stopped"):
        service.attach(Claim("c", "t", "01", ""), spec_of(plan, root))


def order_of(root: Path, action: Action, num_blocks: int) -> Order:
    """One span at the beginning of context `c`."""
    with Store(root).open_reader("c") as reader:
        document = reader.document_at(0).meta
    span = PlannedSpan(action, 0, num_blocks, document.key, document.uri, 0.0, 9.0)
    return Order(action, [span], "main", 1, 1, retention_days=7.0, archive_days=0.0, now=time.time())


def states(root: Path, num_blocks: int) -> list[int]:
    with Store(root).open_reader("c") as reader:
        return [int(state) for state in reader.block_states(0, num_blocks)]


@pytest.mark.parametrize("bulk", [False, True], ids=["journal", "bulk"])
def test_what_a_job_writes_is_curated_between_its_calls(plan: CompactionPlan, root: Path, bulk: bool) -> None:
    service = StoreService(root, 0, 1, is_alive=lambda _: True)
    spans = spans_of(plan, make_compactor(plan), (3000, 2000))
    first_document = sum(span.num_blocks for span in spans if span.document == spans[0].document)
    half = next(n for n, span in enumerate(spans) if span.document != spans[0].document) + 1
    _, epoch = service.attach(Claim("c", "t1", "01", "run 'one'"), replace(spec_of(plan, root), bulk=bulk))
    service.call("c", "t1", "append", epoch, spans[:half])
    service.call("c", "t1", "flush", epoch)

    def curate(work: str, *arguments: Any, branch: str = "main") -> Any:
        return service.curate("c", branch, "run 'watch'", work, *arguments)

    whole = states(root, first_document)
    done = curate("carry_out", order_of(root, "archive", 40))
    assert (done.done, done.commits, done.stale) == (1, 1, [])
    assert curate("carry_out", order_of(root, "archive", 40)).there_already == 1
    # The job goes on under its epoch, and what it wrote last grows where it was.
    service.call("c", "t1", "append", epoch, spans[half:])
    assert states(root, first_document) == [BlockState.GIST_ONLY] * 40 + whole[40:]
    assert curate("collect", 0.0, time.time() + 8 * 86_400).token_bytes >= 0
    assert curate("bring_back", [(0, 40)], "restore").blocks == 40
    assert states(root, first_document) == whole
    service.call("c", "t1", "flush", epoch)
    with pytest.raises(WriterConflictError, match="run 'one' writes branch 'main'"):
        curate("bring_back", [], "restore", branch="side")
    service.call("c", "t1", "begin_rebuild", plan.encoding.__class__.from_json(plan.encoding.to_json()))
    with pytest.raises(WriterConflictError, match="run 'one' rebuilds gists"):
        curate("carry_out", order_of(root, "compact", 40))
    service.detach("c", "t1")
    assert verify_context(Store(root).folder("c"), "c").problems == []


def test_a_context_that_no_job_has_is_curated_all_the_same(plan: CompactionPlan, root: Path) -> None:
    service = StoreService(root, 0, 1, is_alive=lambda _: True)
    _, epoch = service.attach(Claim("c", "t1", "01", ""), spec_of(plan, root))
    service.call("c", "t1", "append", epoch, spans_of(plan, make_compactor(plan)))
    service.detach("c", "t1")
    order = order_of(root, "compact", 8)
    with Store(root).open_maintenance("c"), pytest.raises(WriterConflictError):
        service.curate("c", "main", "run 'watch'", "carry_out", order)
    assert service.curate("c", "main", "run 'watch'", "carry_out", order).done == 1
    assert states(root, 8) == [BlockState.GIST_ONLY] * 8
    Store(root).open_maintenance("c").close()  # nobody holds its lock
    service.stop()
    with pytest.raises(StoreRestartedError, match="being stopped"):
        service.curate("c", "main", "run 'watch'", "carry_out", order)


# -- its actors ------------------------------------------------------------------------------------------------------


@pytest.fixture
def service(ray_cluster: object, root: Path) -> Iterator[client.ServiceActors]:
    yield start_service(root, 2, 60)
    stop_service(root, 30)


def append(crew: Crew, spans: list[SpanWrite]) -> Any:
    return crew.call(crew.store.append.remote(crew.epoch, spans), "appending")


def test_two_jobs_write_two_contexts_at_once_and_one_context_never(
    service: client.ServiceActors, plan: CompactionPlan, root: Path
) -> None:
    spans = spans_of(plan, make_compactor(plan))
    assert start_service(root, 2, 60).actors.keys() == {0, 1}, "starting twice is starting once"
    with Crew(spec_of(plan, root, "c"), RayConfig()) as one, Crew(spec_of(plan, root, "d"), RayConfig()) as two:
        acks = [append(one, spans[:1]), append(two, spans[:1]), append(one, spans[1:]), append(two, spans[1:])]
        assert [ack.new_blocks for ack in acks[:2]] == [acks[0].new_blocks] * 2
        with pytest.raises(WriterConflictError, match="run 'one' through the store's service"):
            Crew(spec_of(plan, root, "c"), RayConfig())
        with pytest.raises(WriterConflictError, match="run 'one'"):
            Crew(spec_of(plan, root, "c", service="off"), RayConfig())
        held = {row["context"]: index for index in (0, 1) for row in service.describe(index)["contexts"]}
        assert held == {name: actor_index(name, 2) for name in ("c", "d")}
    for name in ("c", "d"):
        assert verify_context(Store(root).folder(name), name).problems == []
        with Store(root).open_reader(name) as reader:
            assert reader.version.num_blocks == sum(span.num_blocks for span in spans)
    Store(root).open_maintenance("c").close()  # detaching let go of the lock


def test_curation_works_through_the_service_beside_a_job(
    service: client.ServiceActors, plan: CompactionPlan, root: Path
) -> None:
    spans = spans_of(plan, make_compactor(plan))
    last = sum(span.document == spans[-1].document for span in spans)
    store = StoreConfig(root=root, context="c")
    with Crew(spec_of(plan, root, "c"), RayConfig()) as crew:
        append(crew, spans[:-last])
        order = order_of(root, "compact", 8)
        with curating(store, RayConfig(), "run 'watch'", 0.0) as curator:
            assert isinstance(curator, SharedCurator)
            assert curator.run(carry_out, order).done == 1
        told: list[float] = []
        with curating(replace(store, service="off"), RayConfig(), "run 'watch'", 0.01, told.append) as curator:
            with pytest.raises(WriterConflictError):
                curator.run(carry_out, order)
            assert told == [0.01]
        append(crew, spans[-last:])
    assert states(root, 8) == [BlockState.GIST_ONLY] * 8
    assert verify_context(Store(root).folder("c"), "c").problems == []
    with curating(store, RayConfig(), "run 'watch'", 0.0) as curator:
        # A watch of days outlives the service, and goes on by itself until there is another.
        stop_service(root, 30)
        assert curator.run(carry_out, order).there_already == 1
        start_service(root, 2, 60)
        assert curator.run(carry_out, order).there_already == 1
        stop_service(root, 30)
    with (
        pytest.raises(ResourceError, match="no service of store"),
        curating(replace(store, service="require"), RayConfig(), "run 'watch'", 0.0),
    ):
        pass


def test_calls_of_a_job_keep_their_order(service: client.ServiceActors, plan: CompactionPlan, root: Path) -> None:
    spans = spans_of(plan, make_compactor(plan), (4000,))
    assert len(spans) > 10
    with Crew(spec_of(plan, root, "c"), RayConfig()) as crew:
        # A gap would be refused; a late argument must not be overtaken.
        late = ray.remote(lambda span: (time.sleep(1), [span])[1]).remote(spans[0])
        refs = [crew.store.append.remote(crew.epoch, late)]
        refs += [crew.store.append.remote(crew.epoch, [span]) for span in spans[1:]]
        acks = [crew.call(ref, "appending") for ref in refs]
    assert sum(ack.new_blocks for ack in acks) == sum(span.num_blocks for span in spans)


def test_an_actor_that_is_killed_comes_back_with_all_that_was_acknowledged(
    service: client.ServiceActors, plan: CompactionPlan, root: Path
) -> None:
    spans = spans_of(plan, make_compactor(plan))
    index = actor_index("c", 2)
    crew = Crew(spec_of(plan, root, "c"), RayConfig())
    ack = append(crew, spans[:1])
    before = service.describe(index)
    os.kill(before["pid"], signal.SIGKILL)
    with pytest.raises((RayError, StoreRestartedError)) as lost:
        append(crew, spans[1:])
    assert is_recoverable(lost.value)
    crew._leave()
    after = describe_restarted(service, index)
    assert after["pid"] != before["pid"]
    assert (before["num_restarts"], after["num_restarts"]) == (0, 1)
    with Crew(spec_of(plan, root, "c"), RayConfig()) as again:
        assert again.epoch == crew.epoch + 1
        assert again.version.seq == ack.version.seq
        append(again, spans)
        # The lost claim is worth nothing, even in the new process.
        with pytest.raises(StoreRestartedError):
            append(crew, spans)
    assert verify_context(Store(root).folder("c"), "c").problems == []


def describe_restarted(service: client.ServiceActors, index: int) -> dict[str, Any]:
    deadline = time.monotonic() + 30
    while True:
        try:
            return service.describe(index)
        except RayError:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.2)


def test_a_job_that_dies_lets_go_of_its_context(
    service: client.ServiceActors, plan: CompactionPlan, root: Path
) -> None:
    served = served_context(spec_of(plan, root, "c"))
    assert served is not None
    # A Ray job the cluster does not have (any more).
    dead = dataclasses.replace(served, claim=dataclasses.replace(served.claim, job_id="0badbad0"))
    get_or_raise(dead.open.remote(), 30, "attaching")
    with Crew(spec_of(plan, root, "c"), RayConfig()) as crew:
        assert crew.epoch == 2


def test_a_service_of_another_store_in_the_same_place_is_refused(
    service: client.ServiceActors, plan: CompactionPlan, root: Path
) -> None:
    shutil.rmtree(root)
    Store(root, create=True)
    with pytest.raises(ServiceMismatchError, match=r"store id: the service has '\w+', this job '\w+'.*`store stop`"):
        Crew(spec_of(plan, root), RayConfig())
    with pytest.raises(ServiceMismatchError, match="store id"):
        start_service(root, 2, 60)


def test_a_service_of_other_code_or_format_or_size_is_refused(
    service: client.ServiceActors, plan: CompactionPlan, root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(store_service, "code_version", lambda: "9.9.9+other")
        patch.setattr(store_service, "FORMAT_VERSION", 99)
        with pytest.raises(ServiceMismatchError, match=r"code version: .* this job '9.9.9\+other'; format version: "):
            Crew(spec_of(plan, root), RayConfig())
    with pytest.raises(ServiceMismatchError, match="2 actors, not 3"):
        start_service(root, 3, 60)
    assert not (root / "c").exists()


def test_a_service_on_another_disk_is_refused(
    service: client.ServiceActors, plan: CompactionPlan, root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(client, "committed_epoch", lambda folder: committed_epoch(folder) + 1)
    with pytest.raises(ServiceMismatchError, match="epoch 1, its catalogue here has 2"):
        Crew(spec_of(plan, root), RayConfig())
    monkeypatch.undo()
    Crew(spec_of(plan, root), RayConfig()).close()  # the refused one let go


def test_a_link_to_the_store_leads_to_its_service(
    service: client.ServiceActors, plan: CompactionPlan, root: Path, tmp_path: Path
) -> None:
    link = tmp_path / "link"
    link.symlink_to(root)
    assert served_context(spec_of(plan, link)) is not None
    Store(tmp_path / "elsewhere", create=True)
    assert served_context(spec_of(plan, tmp_path / "elsewhere")) is None


def test_without_a_service_it_is_required_in_vain(ray_cluster: object, plan: CompactionPlan, root: Path) -> None:
    assert served_context(spec_of(plan, root)) is None
    with pytest.raises(ResourceError, match="run `store start`"):
        Crew(spec_of(plan, root, service="require"), RayConfig())


def test_stopping_closes_and_ends_everything(ray_cluster: object, plan: CompactionPlan, root: Path) -> None:
    service = start_service(root, 2, 60)
    pids = [service.describe(index)["pid"] for index in (0, 1)]
    crew = Crew(spec_of(plan, root, "c"), RayConfig())
    closed = stop_service(root, 30)
    assert sorted(closed.values()) == [[], ["c"]]
    assert find_service(root) is None
    for pid in pids:
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)
    with Crew(spec_of(plan, root, "c"), RayConfig()) as direct:
        assert direct.epoch == crew.epoch + 1
    assert stop_service(root, 30) == {}
