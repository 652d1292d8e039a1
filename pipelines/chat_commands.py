"""What can be asked of a session besides questions: lines that begin with a slash."""

from __future__ import annotations

import io
from collections.abc import Callable
from typing import Any

from actors.session import Session
from cluster.errors import ConfigError
from cluster.tables import Table
from models.focus.picture import picture

SNIPPET_CHARACTERS = 60

HELP = """\
/focus              what the model is shown: levels, spans, and how much of the budget they take
/why                why the spans that are shown beside the newest tokens were chosen
/show BLOCK         a block's text
/expand BLOCK       show a block from the next question on, until others are worth more
/pin BLOCK          show a block from the next question on, always; /unpin BLOCK ends it
/read PATH          read a file, a folder or a glob into the context
/help               this
/quit               end; what was said stays
A BLOCK is a number of the session's own context, or CONTEXT:NUMBER, as /focus and /why name it.
"""


class Quit(Exception):
    """The conversation is over."""


class Commands:
    """Runs them; every answer is text to print."""

    def __init__(self, session: Session, read_path: Callable[[str], str]) -> None:
        self._session = session
        self._read_path = read_path

    def run(self, line: str) -> str:
        """The answer to one line.

        Raises:
            Quit: `/quit`.
            ConfigError: no such command (the message lists them), or an argument that is missing or wrong.
            MegaContextError: what the session refuses.
        """
        name, _, argument = line[1:].strip().partition(" ")
        argument = argument.strip()
        plain = {"focus": self._focus, "why": self._why, "help": lambda: HELP}
        taking = {
            "show": self._show,
            "expand": self._expand,
            "pin": self._pin,
            "unpin": self._unpin,
            "read": self._read_path,
        }
        if name in {"quit", "exit"}:
            raise Quit
        if name in plain:
            return _line(plain[name]())
        if name not in taking:
            raise ConfigError(
                f"there is no /{name}; there are: {', '.join('/' + n for n in (*plain, *taking, 'quit'))}"
            )
        if not argument:
            raise ConfigError(f"/{name} needs an argument; see /help")
        return _line(taking[name](argument))

    def picture(self) -> str:
        """The Working Context in one line, and what it costs."""
        focus = self._session.focus
        if focus is None:
            return "nothing has been shown yet; ask something"
        wc = focus.wc
        return f"{picture(wc)} {wc.total_cost}/{self._session.config.budget}"

    def _focus(self) -> str:
        focus = self._session.focus
        if focus is None:
            return self.picture()
        wc = focus.wc
        levels = []
        for lod in sorted(set(wc.lod.tolist())):
            mine = wc.lod == lod
            levels.append(
                {
                    "level": f"LOD{lod}" + (" (raw)" if lod == 0 else ""),
                    "entries": int(mine.sum()),
                    "rows": int(wc.cost[mine].sum()),
                    "tokens they stand for": int(wc.num_tokens[mine].sum()),
                }
            )
        shown = Table(levels, f"{wc.total_tokens:,} tokens in {wc.total_cost} of {self._session.config.budget} rows")
        last = len(wc.histories) - 1
        in_tail = (wc.source == last) & (wc.lod == 0) & (wc.first_block >= focus.tail_from)
        tail = int(wc.num_tokens[in_tail].sum())
        return f"{self.picture()}\n{_text(shown)}the newest {tail:,} tokens are raw; /why says what else is, and why"

    def _why(self) -> str:
        rows = found_rows(self._session)
        warning = self._session.warning
        lines = f"{warning}\n" if warning else ""
        return lines + (_text(Table(rows)) if rows else "nothing but the newest tokens is shown raw")

    def _show(self, argument: str) -> str:
        block, source = self._block(argument)
        span = self._session.memory.span(block, source)
        return f"{span.label}:\n{self._session.memory.text(block, source)}"

    def _expand(self, argument: str) -> str:
        self._session.expand(*self._block(argument))
        return f"{argument} is shown from the next question on"

    def _pin(self, argument: str) -> str:
        self._session.pin(*self._block(argument))
        return f"{argument} is shown from the next question on, until /unpin {argument}"

    def _unpin(self, argument: str) -> str:
        done = self._session.unpin(*self._block(argument))
        return f"{argument} may go" if done else f"{argument} was not pinned"

    def _block(self, text: str) -> tuple[int, int]:
        """`(block, source)` of `NUMBER` or `CONTEXT:NUMBER`."""
        context, colon, number = text.rpartition(":")
        names = [reader.version.context for reader in self._session.memory.readers()]
        if not number.isdigit():
            raise ConfigError(f"{text!r} names no block; give its number, or CONTEXT:NUMBER")
        if colon and context not in names:
            raise ConfigError(f"there is no context {context!r} here; there are: {', '.join(names)}")
        return int(number), names.index(context) if colon else len(names) - 1


def found_rows(session: Session) -> list[dict[str, Any]]:
    """Spans that are shown raw beside the newest tokens: where they come from, and why."""
    focus = session.focus
    if focus is None:
        return []
    names = [history.context for history in focus.wc.histories]
    rows = []
    pinned = set(focus.pinned)
    for block, source in sorted({*focus.found, *pinned}, key=lambda name: (name[1], name[0])):
        match = session.matches.get((block, source))
        why = "pinned" if (block, source) in pinned else match.why if match else "shown before"
        text = " ".join(session.memory.text(block, source).split())
        rows.append(
            {
                "block": f"{names[source]}:{block}",
                "document": session.memory.span(block, source).label,
                "level": "LOD0",
                "score": round(match.score, 3) if match else 0.0,
                "why": why,
                "since": focus.since.get((block, source)),
                "text": text if len(text) <= SNIPPET_CHARACTERS else text[:SNIPPET_CHARACTERS] + "…",
            }
        )
    return rows


def _text(table: Table) -> str:
    stream = io.StringIO()
    table.show(stream)
    return stream.getvalue()


def _line(text: str) -> str:
    return text if text.endswith("\n") else text + "\n"
