"""train keys: routing keys that find what a question asks for, whatever words it asks with.

    corpus -> tokenised windows; WordNet -> facts about things, questions that name or describe them
        -> Ray Data actors: facts planted in windows, read by the frozen model's lower layers -> states on disk
        -> a key head trained over them -> the net with its gists as they were and keys of its own

Run it again after an interruption: what was read stays, the head (a few minutes) is trained anew.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import ray
import torch
from torch import Tensor
from torch.nn import functional as F

from actors.compactor import explicit_dtype
from actors.training.key_examples import token_surprisal
from actors.training.key_facts import KeyFact, excluded_words, training_facts, validation_facts
from actors.training.key_states import KeyStatesSpec, make_states
from actors.training.key_trainer import KeyTrainerSpec, Pairs, Placed, find_answers, start_trainer
from actors.training.sources import CorpusWindows
from actors.training.windows import prepare_windows, windows_folder
from cluster.config import BaseLMConfig
from cluster.environment import absolute_paths
from cluster.errors import ConfigError, CorpusError
from cluster.key_training_config import RoutingKeysConfig, TrainKeysJob
from cluster.provenance import config_digest
from cluster.ray_calls import CALL_TIMEOUT_S, get_or_raise, largest_node_cpus
from cluster.ray_runtime import ray_session
from cluster.run import JobRun, write_atomically
from models.base_lm import BaseLM, choose_dtype
from models.gistnet import GistNet, build_gistnet
from models.gistnet.lead_in import lead_in
from models.model_files import resolve_model
from models.sentence_encoder import SentenceEncoder
from models.tokenizer import Tokenizer
from models.training.corpus_statistics import COUNTED_TOKENS, MEAN_TOKENS, measure_key_mean, measure_keys, measure_means
from models.training.key_contrast import with_key_head
from pipelines.keys_report import FIRST, WHOLE, Found, keys_card, keys_tables, plot_training, recall, recall_of_all
from storage.corpus import open_corpus
from storage.corpus.packages import resolve_packages
from storage.corpus.wordnet import read_entries
from storage.token_windows import TokenWindows

GISTNET = "gistnet"
"""Folder of the exported net."""

STATES = "states"
"""Folder of what the model read, removed at the end."""

OF_THE_MACHINE = ("windows_folder", "num_workers", "gpus_per_worker", "registered_name")
"""Settings that say where keys were trained, not how: no part of a net's card."""

WINDOWS_PER_VALIDATION_SHARD = 64

BEGUN_TOKENS = 32_768
"""Tokens, 1,024 blocks, from which it is seen in which directions keys differ; the rest is learned."""


def run(job: TrainKeysJob) -> None:
    """Plant, read, train, export, report."""
    files = resolve_model(job.base_lm)
    tokenizer = Tokenizer.load(job.base_lm)
    net = build_gistnet(job.gistnet, files)
    layer = _key_layer(net, job.routing_keys.layer)
    if job.routing_keys.dim > net.dim:
        raise ConfigError(
            f"routing_keys.dim={job.routing_keys.dim} is more than the {net.dim} dimensions of {files.model_id}"
        )
    job = absolute_paths(job)
    source = CorpusWindows(open_corpus(job.corpus), job.base_lm)
    held_back = CorpusWindows(open_corpus(replace(job.corpus, split="dev")), job.base_lm)
    entries = read_entries(_dictionary(job), excluded_words())
    with JobRun.start("train keys", job) as job_run:
        job_run.log_digests({"base_lm": files.digest, "tokenizer": tokenizer.digest, "text": source.digest()})
        base_lm = job.base_lm
        if base_lm.dtype == "auto":
            choice = choose_dtype(base_lm)
            job_run.log.info("%s computes in %s", base_lm.source, choice)
            base_lm = explicit_dtype(base_lm, choice.dtype)
        facts = training_facts(entries, tokenizer, job.routing_keys.num_facts, job.routing_keys.seed)
        if len(facts) < job.routing_keys.num_facts:
            job_run.log.warning(
                "%d facts instead of %d: the dictionary has no more", len(facts), job.routing_keys.num_facts
            )
        with ray_session(job.ray) as session:
            windows, dev_windows = (
                prepare_windows(
                    text,
                    tokenizer,
                    windows_folder(job.routing_keys.windows_folder, text, tokenizer, job.routing_keys.window_tokens),
                    job.routing_keys.window_tokens,
                    label,
                )
                for text, label in ((source, "cutting the text"), (held_back, "cutting validation text"))
            )
            # The driver may have no GPU, and reads little.
            lm = BaseLM.load(replace(base_lm, device="cpu"), num_layers=max(net.lm_layers, default=0))
            job_run.log.info("measuring in which directions blocks differ")
            net = _begun(lm, net, job.routing_keys, layer, windows)
            workers = job.routing_keys.num_workers or max(1, int(session.resources["CPU"]))
            spec = _states_spec(job, base_lm, net, windows, facts, job_run.folder / STATES)
            validation = validation_facts(job.routing_keys.seed)
            _same_states(spec.folder.parent, spec, [*facts, *validation], files.digest, source.digest())
            num_shards = -(-len(facts) // spec.facts_per_shard)
            counts = np.bincount(windows.sample(COUNTED_TOKENS).ravel(), minlength=files.vocab_size)
            surprisal = token_surprisal(counts)
            _read(spec, facts, surprisal, num_shards, workers, "reading", job_run)
            checked = _validation_spec(spec, dev_windows, len(validation))
            num_checked = -(-job.routing_keys.num_validation_windows // checked.windows_per_shard)
            _read(checked, validation, surprisal, num_checked, workers, "reading validation text", job_run)
            trainer_spec = KeyTrainerSpec(
                job.routing_keys,
                job.routing_keys.blocks_per_window,
                tuple(spec.path(shard) for shard in range(num_shards)),
                tuple(checked.path(shard) for shard in range(num_checked)),
                num_threads=largest_node_cpus(),
            )
            job_run.log.info("reading with %s for a rival", "all-MiniLM-L6-v2")
            rival = find_answers(
                trainer_spec.validation, job.routing_keys.blocks_per_window, _Minilm(tokenizer, job.routing_keys)
            )
            losses, measured, net = _trained(trainer_spec, net, job_run)
        _finish(job_run, job, net, losses, measured, rival, len(facts), files.model_id)


def _key_layer(net: GistNet, layer: int) -> int | None:
    """As in a net's specification: None for what the net reads."""
    reads = net.lm_layer or 0
    if layer > reads:
        raise ConfigError(
            f"routing_keys.layer={layer} is beyond the {reads} layers of the language model that {net.net_id} reads; "
            "take a lower one, or 0 for what it reads"
        )
    return None if layer in {0, reads} else layer


def _dictionary(job: TrainKeysJob) -> Path:
    """The folder of WordNet's files, fetched where it is a package."""
    config, _ = resolve_packages(replace(job.corpus, paths=[job.routing_keys.dictionary]))
    folder = Path(config.paths[0]).expanduser()
    if not folder.is_dir():
        raise CorpusError(f"routing_keys.dictionary={job.routing_keys.dictionary} is no folder")
    return folder


def _begun(lm: BaseLM, net: GistNet, keys: RoutingKeysConfig, layer: int | None, windows: TokenWindows) -> GistNet:
    """The net with a head that begins with the directions in which blocks differ most."""
    begun = with_key_head(net, keys.dim, layer, keys.reach)
    sample = torch.from_numpy(windows.sample(MEAN_TOKENS).astype(np.int64))
    if any(mean.any() for mean in net.buffers()):
        measure_key_mean(lm, begun, sample)
    else:  # untrained: there are no means yet that gists could depend on
        measure_means(lm, begun, sample)
    measure_keys(lm, begun, torch.from_numpy(windows.sample(BEGUN_TOKENS).astype(np.int64)))
    return begun


def _states_spec(
    job: TrainKeysJob,
    base_lm: BaseLMConfig,
    net: GistNet,
    windows: TokenWindows,
    facts: Sequence[KeyFact],
    folder: Path,
) -> KeyStatesSpec:
    keys = job.routing_keys
    per_shard = min(keys.windows_per_shard, len(windows))
    return KeyStatesSpec(
        base_lm=base_lm,
        key_layer=net.key_layer or 0,
        windows=windows.folder,
        folder=folder / "train",
        windows_per_shard=per_shard,
        facts_per_shard=min(per_shard * keys.facts_per_window, len(facts)),
        num_words=len(facts),
        seed=keys.seed,
        num_threads=1,
        num_gpus=keys.gpus_per_worker,
    )


def _validation_spec(spec: KeyStatesSpec, windows: TokenWindows, num_facts: int) -> KeyStatesSpec:
    per_shard = min(WINDOWS_PER_VALIDATION_SHARD, len(windows))
    return replace(
        spec,
        windows=windows.folder,
        folder=spec.folder.parent / "validation",
        windows_per_shard=per_shard,
        facts_per_shard=min(num_facts, per_shard * windows.manifest.window_tokens // 128),
        num_words=num_facts,
        seed=spec.seed + 1,
    )


def _same_states(folder: Path, spec: KeyStatesSpec, facts: Sequence[KeyFact], *digests: str) -> None:
    """States that something else was read for are removed."""
    told = hashlib.sha256(json.dumps([asdict(fact) for fact in facts]).encode()).hexdigest()
    made_of = json.dumps([{k: str(v) for k, v in asdict(spec).items()}, told, *digests], sort_keys=True)
    note = folder / "made_of.json"
    if folder.exists() and (not note.exists() or note.read_text() != made_of):
        shutil.rmtree(folder)
    folder.mkdir(parents=True, exist_ok=True)
    write_atomically(note, made_of)


def _read(
    spec: KeyStatesSpec,
    facts: Sequence[KeyFact],
    surprisal: np.ndarray,
    num_shards: int,
    num_workers: int,
    label: str,
    job_run: JobRun,
) -> None:
    with job_run.progress(num_shards, "shards", label) as progress:
        for _ in make_states(spec, facts, surprisal, num_shards, num_workers):
            progress.advance()


def _trained(
    spec: KeyTrainerSpec, net: GistNet, job_run: JobRun
) -> tuple[list[dict[str, float]], list[dict[str, Any]], GistNet]:
    """Losses of every step, ranks after every epoch (0: before training), and the trained net."""
    actor = start_trainer(spec, net)

    def call(method: str) -> Any:
        return get_or_raise(getattr(actor, method).remote(), CALL_TIMEOUT_S, "training routing keys")

    losses: list[dict[str, float]] = []
    measured = [{"epoch": 0, "found": call("validate")}]
    with job_run.progress(spec.keys.num_epochs, "epochs", "training") as progress:
        for epoch in range(1, spec.keys.num_epochs + 1):
            losses += (found := call("epoch"))
            for line in found:
                values = {f"train.{name}": value for name, value in line.items() if name != "step"}
                job_run.log_metrics(_named(values), int(line["step"]))
            measured.append({"epoch": epoch, "found": (found_now := call("validate"))})
            shares = {f"validation.recall_at_1.{kind}": recall(placed, 1).mean for kind, placed in found_now.items()}
            job_run.log_metrics(_named(shares), epoch)
            progress.advance(1, loss=found[-1]["loss"])
    trained = call("trained")
    ray.kill(actor)
    return losses, measured, trained


def _named(values: Mapping[str, float]) -> dict[str, float]:
    """As MLflow wants names."""
    return {name.replace(" ", "_"): value for name, value in values.items()}


def _shares(found: Found) -> dict[str, dict[str, float]]:
    """For programs: by kind of question, how many are found among so many, and how many wholly."""
    return {
        kind: {
            **{f"recall@{k}": recall(placed, k).mean for k in FIRST},
            **{f"recall_of_all@{k}": recall_of_all(placed, k).mean for k in WHOLE},
        }
        for kind, placed in found.items()
    }


class _Minilm:
    """The packaged sentence encoder in the place of keys: it reads the text of blocks, and of what keys reach to."""

    def __init__(self, tokenizer: Tokenizer, keys: RoutingKeysConfig) -> None:
        self._encoder = SentenceEncoder.load()
        self._tokenizer = tokenizer
        self._keys = keys

    def keys_of(self, shard: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
        """Of a shard's blocks and questions."""
        tokens = shard["tokens"]
        before, there = lead_in(tokens.unflatten(0, (-1, self._keys.blocks_per_window)), self._keys.reach)
        mask = F.pad(there.flatten(0, 1), (0, tokens.shape[1]), value=True)
        blocks = self._encode(torch.cat([before.flatten(0, 1), tokens], dim=1), mask)
        return blocks, self._encode(shard["question_tokens"], shard["mask"])

    def keys_of_pairs(self, shard: Mapping[str, Tensor], pairs: Pairs) -> Tensor:
        """Of the tokens that ask."""
        return self._encode(shard["tokens"][pairs.asking], pairs.mask)

    def _encode(self, tokens: Tensor, mask: Tensor) -> Tensor:
        pieces = [row[there].numpy() for row, there in zip(tokens.long(), mask, strict=True)]
        return torch.from_numpy(self._encoder.encode(self._tokenizer.decode_batch(pieces)))


def _finish(
    job_run: JobRun,
    job: TrainKeysJob,
    net: GistNet,
    losses: list[dict[str, float]],
    measured: list[dict[str, Any]],
    rival: Mapping[str, Placed],
    num_facts: int,
    lm_id: str,
) -> None:
    exported = job_run.folder / GISTNET
    net.save(exported, getattr(torch, job.routing_keys.export_dtype))
    net = GistNet.load(exported)
    job_run.log_digests({"gistnet": net.digest()})
    tables = keys_tables(measured, rival)
    for table in tables:
        table.show()
    recipe = {name: value for name, value in asdict(job.routing_keys).items() if name not in OF_THE_MACHINE}
    recipe |= {"facts": num_facts, "config digest": config_digest(job)}
    begun = Path(job.gistnet.path).expanduser() / "README.md" if job.gistnet.path else None
    begun_card = begun.read_text() if begun is not None and begun.is_file() else ""
    write_atomically(exported / "README.md", keys_card(net, lm_id, recipe, tables, begun_card))
    plot_training(losses, measured, rival, job_run.folder / "keys.png")
    registered = ""
    if job.routing_keys.registered_name:
        registered = job_run.register_model(exported, job.routing_keys.registered_name, net.digest())
    numbers = {
        "num_facts": num_facts,
        "validation": {"before": _shares(measured[0]["found"]), "after": _shares(measured[-1]["found"])},
        "minilm": _shares(rival),
        "first_step": losses[0],
        "last_step": losses[-1],
        "registered": registered,
    }
    job_run.finish(numbers, tables)
    shutil.rmtree(job_run.folder / STATES, ignore_errors=True)
    print(f"net       {exported}")
    if registered:
        print(f"by name   --gistnet.path {registered}")
    print(f"report    {job_run.folder / 'report.md'}")
