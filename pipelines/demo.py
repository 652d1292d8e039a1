"""demo: compact a real corpus, show the tree, let the real model read it back, and ask it something about it.

What `make demo` runs. A second run resumes: what is compacted already is not compacted again.
"""

from __future__ import annotations

import contextlib
import dataclasses
import sys
from pathlib import Path

from actors.evaluation import rivals
from actors.evaluation.focus_evaluator import FocusEvaluator, FocusEvaluatorSpec
from actors.evaluation.results import FocusResults
from actors.plan import CompactionPlan
from actors.read_back import CONDITIONS, FULL, NONE, OWN, RECENT, SHUFFLED, ReadBackResult, read_back
from actors.session import Session, SessionSpec
from actors.session_turn import Turn
from cluster import metric_names as names
from cluster.config import ReadBackConfig
from cluster.demo_config import DemoJob
from cluster.errors import ConfigError
from cluster.plots import figure
from cluster.run import JobRun
from cluster.session_config import SamplingConfig
from cluster.tables import Table
from models.base_lm import BaseLM
from pipelines.chat_commands import Commands, found_rows
from pipelines.compact import compact, compaction_tables, prepare, result_report
from pipelines.evaluate_focus import check_budgets, choose_focus_places, what_fits
from pipelines.evaluation import index_text
from pipelines.focus_report import focus_tables, plot_gains
from pipelines.session_report import draw_session
from pipelines.tree_report import encoding_rows, measure_tree, plot_growth
from storage.corpus import open_corpus
from storage.lexical.search import LexicalSearcher
from storage.store import Store

DESCRIPTIONS = {
    FULL: "the raw history",
    NONE: "nothing",
    OWN: "the history's gists",
    SHUFFLED: "another place's gists (control)",
    RECENT: "as many recent raw tokens as gists (rival)",
}


def run(job: DemoJob) -> None:
    """Compact, show, read back, report."""
    source = open_corpus(job.corpus)
    rivals.conditions(job.focus.rivals, job.focus.evaluation().forms)
    with JobRun.start("demo", job) as job_run:
        plan = prepare(job, source)
        result = compact(job, plan, source, job_run)
        tree = measure_tree(job.store)
        picture = job_run.folder / "tree.png"
        # A run that adds nothing keeps the picture of the growth.
        if result.new_tokens or not picture.exists():
            plot_growth(result.growth, tree, picture)
        tables = [
            *compaction_tables(result, tree),
            Table(encoding_rows(tree.version.encoding), "What made the gists"),
        ]
        for table in tables:
            table.show()

        lm = BaseLM.load(plan.base_lm)
        with (
            Store(job.store.root).open_reader(job.store.context, job.store.version) as reader,
            job_run.progress(job.read_back.num_samples, "places", "reading back") as progress,
        ):
            reading = read_back(lm, reader, job.read_back, on_place=progress.advance)
        trained = bool(plan.gistnet_path)
        tables.append(Table(reading_rows(reading), reading_title(job.read_back, reading, trained=trained)))
        tables[-1].show()
        plot_reading(reading, job_run.folder / "read_back.png")

        numbers = {**result_report(result, tree), **reading_numbers(reading), "gistnet_trained": trained}
        if compared := compare_focus(job, plan, lm, job_run):
            numbers["focus"] = compared.as_report()
            tables.append(focus_tables(compared)[0])
            tables[-1].show()
            plot_gains(compared, job.focus.budget, job_run.folder / "focus-gains.png")
        if job.question:
            answer, found = ask(job, plan, lm, job_run.folder)
            numbers |= {"question": job.question, "answer": answer}
            tables.append(Table(found, f"What was shown for: {job.question}"))
        job_run.finish(numbers, tables)
        where_to_look(job, job_run)


def compare_focus(job: DemoJob, plan: CompactionPlan, lm: BaseLM, job_run: JobRun) -> FocusResults | None:
    """What rivals of focus show at a few places, read by the model; None where there is too little text or none is to
    be compared."""
    if not job.focus.num_places:
        return None
    index_text(job.store, plan, job_run)
    store = Store(job.store.root)
    with store.open_reader(job.store.context, job.store.version) as reader:
        try:
            config, left_out = what_fits(job.focus.evaluation(), plan)
            places = choose_focus_places(reader, config)
            check_budgets(config, plan, reader, places)
        except ConfigError as error:
            job_run.log.info("rivals of focus are not compared: %s", error)
            return None
        if left_out:
            job_run.log.warning(left_out)
        spec = FocusEvaluatorSpec(plan.base_lm, job.store, reader.version.seq, config)
        lexical = LexicalSearcher(store.folder(job.store.context), plan.tokenizer.decode_batch)
        with contextlib.closing(lexical), job_run.progress(len(places), "places", "comparing") as progress:
            evaluator = FocusEvaluator(spec, lm, plan.gistnet, reader, lexical)
            samples = []
            for place in places:
                samples.append((place, evaluator.evaluate(place)))
                progress.advance()
    return FocusResults.of(samples)


def ask(job: DemoJob, plan: CompactionPlan, lm: BaseLM, folder: Path) -> tuple[str, list[dict[str, object]]]:
    """Ask the question in a session that reads the context and writes one of its own; the answer, and the blocks that
    were shown for it. The session's pictures go to the run's folder."""
    store = dataclasses.replace(job.store, context=f"{job.store.context}-talk")
    session = Session(SessionSpec(plan, store, (job.store.context,)), lm)
    # One paragraph: a small model says the same again in the next.
    sampling = SamplingConfig(max_new_tokens=96, do_sample=False, stop_strings=["\n\n"])
    with contextlib.closing(session):
        sys.stdout.write(f"\n> {job.question}\n")
        answer = ""
        for piece in session.ask(job.question, sampling):
            if isinstance(piece, Turn):
                answer = piece.text
            else:
                sys.stdout.write(piece)
                sys.stdout.flush()
        commands = Commands(session, str)
        sys.stdout.write(f"\n{commands.picture()}\n{commands.run('/why')}")
        found = found_rows(session)
    draw_session(session.events(), folder)
    return answer, found


def reading_title(config: ReadBackConfig, reading: ReadBackResult, *, trained: bool) -> str:
    """Says what was measured, and that untrained gists are untrained."""
    state = "trained" if trained else "UNTRAINED: little to expect"
    return (
        f"The model reads {config.horizon_tokens - 1} tokens at {len(reading.places)} places after "
        f"{config.history_tokens} tokens of history (gists: {state})"
    )


def reading_rows(reading: ReadBackResult) -> list[dict[str, object]]:
    """One row a condition."""
    rows: list[dict[str, object]] = []
    for condition in CONDITIONS:
        nll, gain = reading.estimate(condition), reading.gain(condition)
        rows.append(
            {
                "before the horizon": DESCRIPTIONS[condition],
                "NLL, nats/token": f"{nll.mean:.3f} ± {nll.standard_error:.3f}",
                "gain over nothing": "" if condition == NONE else f"{gain.mean:+.3f} ± {gain.standard_error:.3f}",
                "recovered": "" if condition == NONE else f"{reading.recovered_fraction(condition):.0%}",
            }
        )
    content = reading.content_nats
    rows.append(
        {
            "before the horizon": "content_nats (shuffled - own)",
            "NLL, nats/token": f"{content.mean:+.3f} ± {content.standard_error:.3f}",
            "gain over nothing": "",
            "recovered": "",
        }
    )
    return rows


def reading_numbers(reading: ReadBackResult) -> dict[str, float]:
    """The reading as metrics."""
    return {
        names.NLL_FULL: reading.estimate(FULL).mean,
        names.NLL_NONE: reading.estimate(NONE).mean,
        names.NLL_GISTS: reading.estimate(OWN).mean,
        "nll_shuffled_gists": reading.estimate(SHUFFLED).mean,
        "nll_recent_raw": reading.estimate(RECENT).mean,
        names.DELTA_NLL: reading.estimate(OWN).mean - reading.estimate(FULL).mean,
        names.RECOVERED_FRACTION: reading.recovered_fraction(OWN),
        "content_nats": reading.content_nats.mean,
        "content_nats_se": reading.content_nats.standard_error,
    }


def plot_reading(reading: ReadBackResult, path: Path) -> None:
    """NLL by condition with error bars."""
    estimates = [reading.estimate(condition) for condition in CONDITIONS]
    with figure(path, "What stands before the horizon", size=(9.0, 3.6)) as axes:
        axes.barh(
            [DESCRIPTIONS[condition] for condition in CONDITIONS],
            [estimate.mean for estimate in estimates],
            xerr=[estimate.standard_error for estimate in estimates],
            capsize=3,
        )
        axes.invert_yaxis()
        axes.set(xlabel="NLL of the horizon, nats a token (lower is better)")


def where_to_look(job: DemoJob, job_run: JobRun) -> None:
    """The last lines of the demo: where everything is."""
    folder = job_run.folder
    lines = [
        f"report    {folder / 'report.md'}",
        f"pictures  {', '.join(str(path) for path in sorted(folder.glob('*.png')))}",
        f"ask on    python ray_job.py chat --context {job.store.context}-talk --reads '[{job.store.context}]'"
        f" --store.root {job.store.root}",
        f"tree      python ray_job.py inspect --store.root {job.store.root} --store.context {job.store.context}",
    ]
    if job_run.mlflow_command:
        lines.append(f"MLflow    {job_run.mlflow_command}")
    sys.stdout.write("\n" + "\n".join(lines) + "\n")
