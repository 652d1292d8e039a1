"""paper 0: the whole chain on this machine's scale, and the tables and figures of a paper about it.

    corpora -> (train gistnet) -> compact -> label -> train lensnet
        -> evaluate gist, evaluate focus, latency -> paper.md, figures, report.json

Every stage is a run of its own beside the paper's, by the jobs of the command line. Run it again after any
interruption: what is finished with the same configuration is read, what was begun goes on.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from actors.evaluation import rivals
from actors.evaluation.fidelity import CASES, FidelityRun, together
from actors.evaluation.headroom import Cell, FocusRun, cells_of
from actors.evaluation.latency import QUESTION_TOKENS, Latency, measure_latency
from actors.plan import plan_models
from actors.training.worker import GISTNET
from cluster.config import CompactJob, CorpusConfig, CorpusSplit, RunConfig, StoreConfig, validate_sections
from cluster.config_parser import parse_job
from cluster.environment import absolute_paths, base_folder
from cluster.errors import ConfigError
from cluster.evaluation_config import EvaluateFocusJob, FocusEvaluationConfig, RetrievalConfig
from cluster.gist_evaluation_config import EvaluateGistJob
from cluster.label_config import LabelConfig, LabelJob
from cluster.lens_training_config import LensNetConfig, TrainLensNetJob
from cluster.paper_config import PaperJob
from cluster.provenance import config_digest
from cluster.registry import tracking_uri
from cluster.run import JobRun, TrackedJob, is_finished, write_atomically
from cluster.training_config import TrainGistNetJob
from models.base_lm import BaseLM
from models.lensnet import LensNet
from models.model_files import resolve_model
from pipelines import compact, evaluate_focus, evaluate_gist, label, train_gistnet, train_lensnet
from pipelines.paper_report import BASE, Paper, paper_numbers, paper_text, plot_paper
from storage.corpus import open_corpus
from storage.store import Store

NUM_DECODED = 64
"""Tokens of an answer whose latency is measured."""

MODELS = ("base_lm", "tokenizer", "gistnet", "lensnet")
"""Whose digests are those of all stages."""

JobT = TypeVar("JobT", bound=TrackedJob)


def run(job: PaperJob) -> None:
    """Every stage that is not finished yet, then the paper."""
    job = absolute_paths(job)
    chain = Chain.of(job)
    chain.require_same_configuration()
    with JobRun.start("paper 0", job) as job_run:
        chain = chain.with_gistnet(job_run)
        for kind, path in chain.texts:
            chain.compact(kind, path, job_run)
        lensnet = chain.lensnet(job_run)
        for kind, _ in chain.texts:
            chain.evaluate(kind, lensnet, job_run)
        paper = chain.read(job_run, latency=chain.latency(job_run))
        numbers = paper_numbers(paper)
        plot_paper(paper, job_run.folder)
        tables = paper.tables()
        for table in tables:
            table.show()
        job_run.finish(numbers, tables)
        text = job_run.folder / "paper.md"
        write_atomically(text, paper_text(paper, job, job_run.folder))
        print(f"paper     {text}")
        print(f"figures   {', '.join(str(path) for path in sorted(job_run.folder.glob('*.png')))}")
        print(f"numbers   {job_run.report_path}")


@dataclass(frozen=True)
class Chain:
    """The stages, as jobs that share their models, store and name."""

    job: PaperJob
    name: str

    @classmethod
    def of(cls, job: PaperJob) -> Chain:
        """Of a configuration, every stage of which is looked at before the first one runs.

        Raises:
            ConfigError: a case or rival that there is not, a corpus or recipe that is missing, or a stage whose
                configuration is refused.
        """
        paper, chain = job.paper, cls(job, job.run.name or "paper-0")
        known = [case.name for case in CASES]
        if unknown := [name for name in paper.gist_cases if name not in known]:
            raise ConfigError(f"paper.gist_cases holds {unknown[0]!r}; there are: {', '.join(known)}")
        names = [condition.name for condition in rivals.conditions(paper.rivals, FocusEvaluationConfig().forms)]
        if BASE not in names:
            raise ConfigError(f"paper.rivals must hold {BASE}: gains are over it")
        if paper.latency_tokens:
            longest, trained = max(paper.latency_tokens), resolve_model(job.base_lm).trained_context
            if longest + QUESTION_TOKENS + NUM_DECODED > trained:
                raise ConfigError(
                    f"paper.latency_tokens holds {longest:,}; with question and answer that is beyond the {trained:,} "
                    f"tokens {job.base_lm.source} was trained for"
                )
        if paper.lensnet:
            LensNet.load(base_folder() / Path(paper.lensnet).expanduser())
        if paper.gistnet_recipe:
            chain._gistnet_job()
        for kind, path in chain.texts:
            for made in chain._compact_jobs(kind, path):
                open_corpus(made.corpus)
            chain._label_job(kind)
            chain._gist_jobs(kind)
            chain._focus_job(kind, lensnet="to be")
        return chain

    @property
    def texts(self) -> list[tuple[str, str]]:
        """Kind and path of each."""
        return [(kind, path) for kind, _, path in (text.partition("=") for text in self.job.paper.texts)]

    def require_same_configuration(self) -> None:
        """Refuse to go on with another configuration: what is finished would be of the old one.

        Raises:
            ConfigError: the run's folder, or that of a net that is to be trained first, says so.
        """
        report = self.job.run.dir / self.name / "report.json"
        if report.exists() and json.loads(report.read_text())["config_digest"] != config_digest(self.job):
            raise ConfigError(
                f"{report.parent} was begun with another configuration, and its finished stages are of that one; give "
                "the paper another run.name"
            )
        if self.job.paper.gistnet_recipe and not is_finished(self.folder("gistnet"), self._gistnet_job()):
            later = [path.name for path in self._folders() if path.exists() and path != self.folder("gistnet")]
            if later:
                raise ConfigError(
                    f"the GistNet of {self.folder('gistnet')} is not finished, or its recipe was changed, and "
                    f"{later[0]} was made by another; give the paper another run.name"
                )

    def _folders(self) -> list[Path]:
        """Of all stages."""
        jobs = [made for kind, path in self.texts for made in self._compact_jobs(kind, path)]
        names = [made.run.name for made in jobs]
        if self.job.paper.gistnet_recipe:
            names.insert(0, self.folder("gistnet").name)
        if not self.job.paper.lensnet:
            names += [self._label_job(kind).run.name for kind, _ in self.texts] + [self.folder("lensnet").name]
        for kind, _ in self.texts:
            names += [made.run.name for made in self._gist_jobs(kind)] + [self.folder(f"focus-{kind}").name]
        return [self.job.run.dir / name for name in names]

    # -- stages ----------------------------------------------------------------------------------------------------

    def with_gistnet(self, job_run: JobRun) -> Chain:
        """The chain with the net that is trained first, if one is."""
        job = self.job
        if not job.paper.gistnet_recipe:
            return self
        self._stage(train_gistnet.run, self._gistnet_job(), job_run)
        path = str(self.folder("gistnet") / GISTNET)
        return replace(self, job=replace(job, gistnet=replace(job.gistnet, path=path)))

    def compact(self, kind: str, path: str, job_run: JobRun) -> None:
        """The contexts of a kind of text: what is measured on and, if a LensNet is trained, what it learns from."""
        for made in self._compact_jobs(kind, path):
            self._stage(compact.run, made, job_run)

    def lensnet(self, job_run: JobRun) -> str:
        """Folder of the net: the one that is given, or trained on labels."""
        if self.job.paper.lensnet:
            return self.job.paper.lensnet
        for kind, _ in self.texts:
            self._stage(label.run, self._label_job(kind), job_run)
        runs = [str(self.folder(f"label-{kind}")) for kind, _ in self.texts]
        trained = TrainLensNetJob(lensnet=LensNetConfig(labels=runs, seed=self.job.paper.seed))
        self._stage(train_lensnet.run, self._named(trained, "lensnet"), job_run)
        return str(self.folder("lensnet") / train_lensnet.LENSNET)

    def evaluate(self, kind: str, lensnet: str, job_run: JobRun) -> None:
        """What gists are worth, and who focuses best, on a kind of text."""
        for made in self._gist_jobs(kind):
            self._stage(evaluate_gist.run, made, job_run)
        self._stage(evaluate_focus.run, self._focus_job(kind, lensnet), job_run)

    # -- their jobs ------------------------------------------------------------------------------------------------

    def _gistnet_job(self) -> TrainGistNetJob:
        trained = parse_job(TrainGistNetJob, ["--config", self.job.paper.gistnet_recipe])
        return self._named(replace(trained, base_lm=self.job.base_lm), "gistnet")

    def _compact_jobs(self, kind: str, path: str) -> list[CompactJob]:
        job, paper = self.job, self.job.paper
        contexts: dict[str, CorpusSplit] = {"": paper.evaluation_split}
        if not paper.lensnet:
            contexts["-labels"] = paper.label_split
        return [
            self._named(
                CompactJob(
                    corpus=CorpusConfig(paths=[path], split=split),
                    base_lm=job.base_lm,
                    gistnet=job.gistnet,
                    store=self.store(kind + suffix),
                ),
                f"compact-{kind}{suffix}",
            )
            for suffix, split in contexts.items()
        ]

    def _label_job(self, kind: str) -> LabelJob:
        job, paper = self.job, self.job.paper
        labels = LabelConfig(
            num_places=paper.label_places, history_tokens=paper.history_tokens, budget=paper.budget, seed=paper.seed
        )
        store = self.store(f"{kind}-labels")
        made = LabelJob(base_lm=job.base_lm, gistnet=job.gistnet, store=store, labels=labels)
        return self._named(made, f"label-{kind}")

    def _gist_jobs(self, kind: str) -> list[EvaluateGistJob]:
        paper = self.job.paper
        return [
            self._named(
                EvaluateGistJob(
                    base_lm=self.job.base_lm,
                    store=self.store(kind),
                    evaluation=replace(
                        case.evaluation, num_places=paper.num_places, gistnets=[], seed=paper.seed, max_per_document=4
                    ),
                ),
                f"{case.name}-{kind}",
            )
            for case in CASES
            if case.name in paper.gist_cases
        ]

    def _focus_job(self, kind: str, lensnet: str) -> EvaluateFocusJob:
        job, paper = self.job, self.job.paper
        evaluation = FocusEvaluationConfig(
            num_places=paper.num_places,
            history_tokens=paper.history_tokens,
            budgets=[paper.budget],
            rivals=paper.rivals,
            lensnet=lensnet,
            retrieval=RetrievalConfig(fusion=["bm25", "dense"]),
            seed=paper.seed,
        )
        store = self.store(kind)
        made = EvaluateFocusJob(base_lm=job.base_lm, gistnet=job.gistnet, store=store, evaluation=evaluation)
        return self._named(made, f"focus-{kind}")

    def latency(self, job_run: JobRun) -> list[Latency]:
        """A session against the model that keeps everything, on the first kind of text; kept, once it is measured."""
        paper = self.job.paper
        if not paper.latency_tokens:
            return []
        kept = job_run.folder / "latency.json"
        settings = {"tokens": paper.latency_tokens, "repeats": paper.latency_repeats, "decoded": NUM_DECODED}
        if kept.exists():
            found = json.loads(kept.read_text())
            if found["settings"] == settings:
                return [Latency(**row) for row in found["measured"]]
        plan = plan_models(self.job.base_lm, self.job.gistnet, self.job.store)
        lm = BaseLM.load(plan.base_lm)
        store = self.store(self.texts[0][0])
        size = max(paper.latency_tokens) + QUESTION_TOKENS + NUM_DECODED
        with Store(store.root).open_reader(store.context, store.version) as reader:
            num_blocks = min(reader.version.num_blocks, 2 * -(-size // 32))
            tokens, counts = reader.tokens(0, num_blocks)
        ids = tokens[np.arange(tokens.shape[1]) < counts[:, None]].astype(np.int64)
        total = 2 * paper.latency_repeats * len(paper.latency_tokens)
        store.root.mkdir(parents=True, exist_ok=True)
        with (
            tempfile.TemporaryDirectory(prefix=".latency-", dir=store.root) as folder,
            job_run.progress(total, "sessions", "latency") as progress,
        ):
            measured = measure_latency(
                plan,
                lm,
                ids,
                paper.latency_tokens,
                Path(folder),
                self.job.session,
                num_decoded=NUM_DECODED,
                repeats=paper.latency_repeats,
                on_measured=progress.advance,
            )
        rows = [vars(of) for of in measured]
        write_atomically(kept, json.dumps({"settings": settings, "measured": rows}, indent=1) + "\n")
        return measured

    # -- what came of them -----------------------------------------------------------------------------------------

    def read(self, job_run: JobRun, *, latency: Sequence[Latency]) -> Paper:
        """Everything that was measured, from the stages' samples and reports."""
        paper = self.job.paper
        cases = [case for case in CASES if case.name in paper.gist_cases]
        fidelity = {
            case.name: together(
                [FidelityRun.read(kind, self.folder(f"{case.name}-{kind}"), case) for kind, _ in self.texts]
            )
            for case in cases
        }
        cells: list[Cell] = cells_of([FocusRun.read(kind, self.folder(f"focus-{kind}")) for kind, _ in self.texts])
        reports = {
            folder.name.removeprefix(f"{self.name}-"): json.loads((folder / "report.json").read_text())
            for folder in self._folders()
        }
        digests: dict[str, str] = {}
        for stage, report in reports.items():
            for what, digest in report["digests"].items():
                digests[what if what in {"base_lm", "tokenizer", "gistnet", "lensnet"} else f"{what} ({stage})"] = (
                    digest
                )
        if paper.lensnet:
            digests["lensnet"] = LensNet.load(base_folder() / Path(paper.lensnet).expanduser()).digest()
        job_run.log_digests(digests)
        return Paper(fidelity, cells, reports.get("lensnet"), list(latency), digests, reports)

    # -- names -----------------------------------------------------------------------------------------------------

    def folder(self, stage: str) -> Path:
        """Of a stage's run."""
        return self.job.run.dir / f"{self.name}-{stage}"

    def store(self, suffix: str) -> StoreConfig:
        """The store, and a context of it."""
        return replace(self.job.store, context=f"{self.job.store.context}-{suffix}")

    def _named(self, made: Any, stage: str) -> Any:
        """A stage's job as a run beside the paper's."""
        job = self.job
        sections: dict[str, Any] = {"run": RunConfig(f"{self.name}-{stage}", job.run.dir)}
        sections["tracking"] = replace(job.tracking, uri=tracking_uri(job.tracking, job.run.dir))
        if hasattr(made, "ray"):
            sections["ray"] = job.ray
        named = replace(made, **sections)
        validate_sections(named)
        return absolute_paths(named)

    def _stage(self, stage: Callable[[JobT], object], made: JobT, job_run: JobRun) -> None:
        """Unless it was."""
        folder = made.run.dir / made.run.name
        if is_finished(folder, made):
            job_run.log.info("%s is finished", folder.name)
            return
        job_run.log.info("%s", folder.name)
        stage(made)
