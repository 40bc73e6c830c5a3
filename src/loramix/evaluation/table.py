"""The table of an evaluation in a terminal: rows are models, columns are groups of text."""

from __future__ import annotations

from collections.abc import Mapping

from rich.table import Table
from rich.text import Text

from loramix.evaluation.scores import MIXTURE, ORACLE, UNIFORM


def scores_table(title: str, rows: Mapping[str, Mapping[str, float]], names: Mapping[str, str]) -> Table:
    """A table of one figure; the best of each column (the oracle's aside) is bold and starred.

    Args:
        title: what the figure is.
        rows: the figure by row and by column; lower is better.
        names: what to call rows that are not called by their own name.
    """
    columns = list(next(iter(rows.values())))
    best = {column: min(row[column] for name, row in rows.items() if name != ORACLE) for column in columns}
    table = Table(title=f"{title}: lower is better, * is best", title_justify="left")
    table.add_column("", no_wrap=True)
    for column in columns:
        table.add_column(Text(column), justify="right", no_wrap=True)
    for name, row in rows.items():
        if name in (UNIFORM, ORACLE):
            table.add_section()
        cells = [_figure(row[column], name != ORACLE and row[column] == best[column]) for column in columns]
        table.add_row(Text(names.get(name, name), style="bold" if name == MIXTURE else ""), *cells)
    return table


def _figure(value: float, best: bool) -> Text:
    return Text(f"{value:.3f}{'*' if best else ' '}", style="bold" if best else "")
