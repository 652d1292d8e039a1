"""evaluate retrieval: which settings of the searchers find the blocks that are worth showing?

Reads what `exhaustive` measured in a run of `evaluate focus`, and searches the same places with every setting of a
grid; the model predicts nothing again. Starts no cluster.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import yaml

from actors.evaluation.measured_gains import PlaceGains, check_places, read_gains, samples_file
from actors.evaluation.retrieval_tuning import RetrievalTuner, TuningResults
from actors.plan import CompactionPlan, check_encoding, plan_models
from cluster.run import JobRun, write_atomically
from cluster.tuning_config import EvaluateRetrievalJob
from models.base_lm import BaseLM
from models.focus.block_embeddings import BlockEmbeddings
from models.sentence_encoder import SentenceEncoder
from pipelines.evaluation import index_text
from pipelines.retrieval_report import plot_searcher, retrieval_tables
from storage.contract import TreeReader
from storage.lexical.search import LexicalSearcher
from storage.store import Store


def run(job: EvaluateRetrievalJob) -> None:
    """Read gains, search with every setting, report."""
    file = samples_file(job.tuning.samples)
    budget, gains = read_gains(file, job.tuning.budget)
    plan = plan_models(job.base_lm, job.gistnet, job.store)
    check_encoding(plan, job.store)
    store = Store(job.store.root)
    with store.open_reader(job.store.context, job.store.version) as reader:
        check_places([found.place for found in gains], reader, file)
        with JobRun.start("evaluate retrieval", job) as job_run:
            job_run.log_digests(plan.digests())
            job_run.log.info(
                "%d places in %d documents, %.0f blocks each, gains within a budget of %d from %s",
                len(gains),
                len({found.place.uri for found in gains}),
                sum(len(found.blocks) for found in gains) / len(gains),
                budget,
                file,
            )
            index_text(job.store, plan, job_run)
            with LexicalSearcher(store.folder(job.store.context), plan.tokenizer.decode_batch) as lexical:
                results = tune(job, plan, reader, lexical, gains, job_run)
            report(results, file, budget, job_run)


def tune(
    job: EvaluateRetrievalJob,
    plan: CompactionPlan,
    reader: TreeReader,
    lexical: LexicalSearcher,
    gains: list[PlaceGains],
    job_run: JobRun,
) -> TuningResults:
    """Search every place with every setting."""
    torch.set_num_threads(job.tuning.threads)
    embeddings = None
    if job.tuning.minilm_query_tokens:
        embeddings = BlockEmbeddings(SentenceEncoder.load(), plan.tokenizer.decode_batch, reader)
    # Queries are states of a lower layer: most of the model is not needed.
    lm = BaseLM.load(plan.base_lm, num_layers=plan.gistnet.lm_layer or 0)
    tuner = RetrievalTuner(lm, plan.gistnet, reader, lexical, plan.tokenizer, embeddings, job.tuning)
    with job_run.progress(len(gains), "places", "searching") as progress:
        for found in gains:
            tuner.search(found)
            progress.advance()
    return tuner.results()


def report(results: TuningResults, file: Path, budget: int, job_run: JobRun) -> None:
    """Tables, plots, the best settings as a recipe, report."""
    tables = retrieval_tables(results)
    for table in tables:
        table.show()
    for searcher in results.searchers:
        plot_searcher(results, searcher, job_run.folder / f"{searcher}.png")
    recipe = yaml.safe_dump({"evaluation": {"retrieval": results.winners()}}, sort_keys=False)
    write_atomically(job_run.folder / "retrieval.yaml", recipe)
    numbers: dict[str, Any] = {
        "samples": str(file),
        "budget": budget,
        "picks": results.picks,
        "num_places": len(results.gains),
        "num_documents": len(set(results.documents)),
        **results.as_report(),
    }
    job_run.finish(numbers, [*tables, f"## The best settings\n\n```yaml\n{recipe}```"])
    print(recipe)
    print(f"report    {job_run.folder / 'report.md'}")
    print(f"recipe    {job_run.folder / 'retrieval.yaml'}")
