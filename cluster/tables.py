"""One table, two looks: Markdown for reports, boxes for the terminal."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TextIO

from rich.console import Console
from rich.table import Table as RichTable


@dataclass(frozen=True)
class Table:
    """Rows of named values."""

    rows: Sequence[Mapping[str, Any]]
    """One mapping a row, column name to value; a column that a row lacks stays empty there."""

    title: str = ""
    """Heading; empty for none."""

    def markdown(self) -> str:
        """A pipe table, numbers to the right, below a heading of the second level."""
        columns = self._columns()
        rule = ["---:" if self._holds_numbers(column) else ":---" for column in columns]
        lines = [[_escape(name) for name in columns], rule]
        lines += [[_escape(cell) for cell in self._cells(row)] for row in self.rows]
        table = "\n".join(f"| {' | '.join(line)} |" for line in lines)
        return f"## {self.title}\n\n{table}" if self.title else table

    def show(self, stream: TextIO | None = None) -> None:
        """Print it, to standard output by default."""
        table = RichTable(title=self.title or None, title_justify="left", header_style="bold")
        for column in self._columns():
            table.add_column(column, justify="right" if self._holds_numbers(column) else "left", overflow="fold")
        for row in self.rows:
            table.add_row(*self._cells(row))
        # Off a terminal rich assumes 80 columns and would break paths apart.
        width = None if (stream or sys.stdout).isatty() else 160
        Console(file=stream, width=width, markup=False, highlight=False).print(table)

    def _columns(self) -> list[str]:
        return list(dict.fromkeys(name for row in self.rows for name in row))

    def _cells(self, row: Mapping[str, Any]) -> list[str]:
        return [format_value(row.get(column)) for column in self._columns()]

    def _holds_numbers(self, column: str) -> bool:
        return any(isinstance(row.get(column), int | float) for row in self.rows)


def format_value(value: Any) -> str:
    """Whole numbers with thousands separators, others with four significant digits, None as nothing."""
    if value is None:
        return ""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, float):
        return f"{value:,.0f}" if 1e4 <= abs(value) < 1e15 else f"{value:.4g}"
    return str(value)


def _escape(cell: str) -> str:
    return cell.replace("|", "\\|").replace("\n", " ")
