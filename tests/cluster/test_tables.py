from __future__ import annotations

import io

from cluster.tables import Table, format_value

TABLE = Table([{"lod": 0, "nodes": 12345, "rate": 0.123456}, {"lod": 1, "name": "a|b"}], "Levels")


def test_markdown() -> None:
    assert TABLE.markdown() == (
        "## Levels\n\n"
        "| lod | nodes | rate | name |\n"
        "| ---: | ---: | ---: | :--- |\n"
        "| 0 | 12,345 | 0.1235 |  |\n"
        "| 1 |  |  | a\\|b |"
    )


def test_terminal_keeps_long_values_whole() -> None:
    stream = io.StringIO()
    path = "/a/long/path" * 8
    Table([{"what": "report", "where": path}]).show(stream)
    assert path in stream.getvalue()
    TABLE.show(stream)
    assert "Levels" in stream.getvalue()
    assert "12,345" in stream.getvalue()


def test_values() -> None:
    values = [None, True, 1234567, 1234567.8, 3.14159, 0.0000123456, float("nan"), "text"]
    assert [format_value(value) for value in values] == [
        "",
        "yes",
        "1,234,567",
        "1,234,568",
        "3.142",
        "1.235e-05",
        "nan",
        "text",
    ]
