"""chat: talk with a model that remembers a context.

Type a question; `/help` lists what else there is. Lines may also be piped in. What is said stays in the context:
another run goes on where this one ended, and so does one that follows a crash.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import sys
from collections.abc import Iterator

from actors.packing import document_meta
from actors.plan import CompactionPlan, check_encoding, plan_models
from actors.session import Session, SessionSpec
from actors.session_turn import Turn
from cluster.config import CorpusConfig, StoreConfig
from cluster.errors import MegaContextError
from cluster.log import get_logger
from cluster.run import JobRun
from cluster.session_config import ChatJob
from pipelines.chat_commands import Commands, Quit, found_rows
from pipelines.session_report import draw_session, session_numbers, session_tables
from storage.corpus import QuarantinedItem, open_corpus, read_corpus
from storage.store import Store

logger = get_logger("chat")

BANNER = "{model} remembers {tokens:,} tokens in {contexts}. Ask, or /help. Ctrl-D ends."


def run(job: ChatJob) -> None:
    """Hold a conversation and leave a report of it."""
    job = dataclasses.replace(job, run=dataclasses.replace(job.run, name=job.run.name or f"chat-{job.context}"))
    store = dataclasses.replace(job.store, context=job.context)
    plan = prepare(job, store)
    with JobRun.start("chat", job) as job_run:
        job_run.log_digests(plan.digests())
        session = Session(SessionSpec(plan, store, tuple(job.reads), job.session))
        with contextlib.closing(session):
            if job.files:
                logger.info("%s", read_files(session, job.files))
            turns = converse(session, job)
        events = session.events()
        tables = session_tables(turns, events)
        if events:
            draw_session(events, job_run.folder)
        job_run.finish(session_numbers(turns, events), tables)
        if not job.json:
            sys.stdout.write(f"\nreport  {job_run.folder / 'report.md'}\n")


def prepare(job: ChatJob, store: StoreConfig) -> CompactionPlan:
    """Everything that can be refused, before a model is loaded.

    Raises:
        ContextNotFoundError, CorpusError, IncompatibleTreeError, ModelError: what was found and what to do.
    """
    if job.files:
        open_corpus(CorpusConfig(paths=job.files))
    plan = plan_models(job.base_lm, job.gistnet, store)
    check_encoding(plan, store)
    if job.reads:
        known = Store(job.store.root)
        for name in job.reads:
            known.folder(name)
    return plan


def read_files(session: Session, paths: list[str]) -> str:
    """Read files, folders or globs into the session's context, and say what became of them.

    Raises:
        CorpusError: a path is missing, or holds nothing that can be read.
    """
    before, num_known = session.memory.num_tokens, 0
    refused = []
    for item in read_corpus(open_corpus(CorpusConfig(paths=paths))):
        if isinstance(item, QuarantinedItem):
            refused.append(f"{item.uri} was passed over: {item.detail}")
        else:
            num_known += not session.read(document_meta(item), item.text)
    known = f", {num_known} of it there already" if num_known else ""
    lines = [f"read {', '.join(paths)}: {session.memory.num_tokens - before:,} new tokens{known}", *refused]
    return "\n".join(lines)


def converse(session: Session, job: ChatJob) -> list[Turn]:
    """Questions and commands until the input ends."""
    commands = Commands(session, lambda path: read_files(session, [path]))
    turns: list[Turn] = []
    is_terminal = sys.stdin.isatty() and not job.prompt and not job.json
    if is_terminal:
        with contextlib.suppress(ImportError):
            import readline  # noqa: F401  # line editing and history for `input`
        names = ", ".join([*job.reads, job.context])
        sys.stdout.write(
            BANNER.format(model=job.base_lm.source, tokens=session.memory.num_tokens, contexts=names) + "\n"
        )
    for line in [job.prompt] if job.prompt else _lines(is_terminal):
        if not line.strip():
            continue
        try:
            if line.startswith("/"):
                sys.stdout.write(commands.run(line))
            else:
                turns.append(answer(session, line, job))
                if is_terminal:
                    sys.stdout.write(f"{commands.picture()}\n")
        except Quit:
            break
        except MegaContextError as error:
            if job.prompt or not is_terminal:
                raise
            sys.stdout.write(f"error: {error}\n")
        sys.stdout.flush()
    return turns


def answer(session: Session, question: str, job: ChatJob) -> Turn:
    """One turn, printed as it comes; Ctrl-C ends the answer and keeps what was said."""
    stream = session.ask(question, job.sampling)
    turn: Turn | None = None
    said = ""
    try:
        for piece in stream:
            if isinstance(piece, Turn):
                turn = piece
                continue
            said += piece
            if not job.json:
                sys.stdout.write(piece)
                sys.stdout.flush()
    except KeyboardInterrupt:
        stream.close()
        sys.stdout.write(" (stopped)")
    turn = turn or Turn(0, 0, said, "closed", 0, 0, 0, {}, 0.0)
    if job.json:
        record = {"question": question, **dataclasses.asdict(turn), "found": found_rows(session)}
        sys.stdout.write(json.dumps(record) + "\n")
    else:
        sys.stdout.write("\n")
    return turn


def _lines(is_terminal: bool) -> Iterator[str]:
    """Lines of standard input; on a terminal with a prompt."""
    while True:
        try:
            yield input("> " if is_terminal else "")
        except EOFError:
            return
        except KeyboardInterrupt:
            sys.stdout.write("\n")
            return
