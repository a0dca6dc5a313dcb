"""Write a leaderboard folder: the tables of all families, the report page and the Markdown page."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

from neco_bench.core.errors import NecoBenchError
from neco_bench.core.files import write_whole
from neco_bench.reports.extras import curves_of, picture_links
from neco_bench.reports.grid import KINDS
from neco_bench.reports.published import read_published
from neco_bench.reports.ranking import Board, Statistics, board_of
from neco_bench.reports.render import render
from neco_bench.reports.report import report_page
from neco_bench.reports.tables import BESIDE, FULL_COLUMNS, tables_of
from neco_bench.reports.words import WORDS
from neco_bench.results.schema import Result


def write_leaderboard(
    results: Iterable[Result] | Board,
    out: Path | str,
    published: Path | str | None = None,
    *,
    latex_intervals: bool = False,
    statistics: Statistics | None = None,
    pictures: Path | None = None,
    run_folders: Sequence[Path] = (),
) -> list[Path]:
    """Write all tables as CSV, the ranked tables as LaTeX, `leaderboard.md` and `report.html`.

    Tables of an earlier call that no longer exist are removed; other files are not changed.

    Args:
        results: results of any models and tasks, or the return value of `board_of`.
        out: the folder to write to; it is created if needed.
        published: a published.csv with numbers to show next to measured ones; None: no such tables.
        latex_intervals: whether the LaTeX tables have intervals.
        statistics: returns the per-item statistics of a result, for paired tests; None: ranks come from intervals.
        pictures: the output folder of `show`; the page links to its pages for these results.
        run_folders: run folders of `train`, whose curves are plotted on the page.

    Returns:
        The paths of the written files.

    Raises:
        NecoBenchError: if the folder cannot be written.
        MissingError: if a run folder has no log.
    """
    out = Path(out)
    board = results if isinstance(results, Board) else board_of(results, statistics)
    papers = () if published is None else read_published(published)
    tables = tables_of(board, papers)
    links = {} if pictures is None else picture_links(board.runs.result, pictures, out)
    contents = {f"{table.name}.csv": table.to_csv() for table in tables}
    contents |= {f"{table.name}.tex": table.to_latex(latex_intervals) for table in tables if table.ranked}
    contents["report.html"] = report_page(board, papers, pictures=links, curves=curves_of(run_folders))
    contents["leaderboard.md"] = render(
        "leaderboard.md", tables=[t for t in tables if t.detailed is not None], words=WORDS
    )
    try:
        # Remove only families whose full table starts with our header, to which later versions add columns.
        ours = [
            path.name.removesuffix(".full.csv")
            for path in out.glob("*.full.csv")
            if path.read_bytes().startswith(",".join(FULL_COLUMNS[:12]).encode())
        ]
        for name in [f"{family}{end}" for family in ours for end in (".tex", *(f"{k}.csv" for k in (*KINDS, *BESIDE)))]:
            if name not in contents:
                (out / name).unlink(missing_ok=True)
    except OSError as error:
        raise NecoBenchError(f"{out}: old tables could not be removed ({error}). Choose another --out.") from error
    for name, content in contents.items():
        write_whole(out / name, content.encode())
    return [out / name for name in contents]
