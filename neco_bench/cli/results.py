"""`neco-bench leaderboard`, `compare` and `show`."""

import json
import sys
import textwrap
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from neco_bench.cli.common import DataRoot, Device, Json, Suites, Weights, app, not_negative, open_stores
from neco_bench.cli.output import (
    comparison_fractions,
    comparison_images,
    foreign_code,
    print_rows,
)
from neco_bench.core.config import split_names
from neco_bench.core.errors import MissingError, user_error

if TYPE_CHECKING:
    import numpy as np

    from neco_bench.core.suites import Suite
    from neco_bench.results.schema import Result


@app.command()
def leaderboard(
    results: Annotated[list[Path] | None, typer.Option(help="Results folder; repeatable. Default: results")] = None,
    out: Annotated[Path, typer.Option(help="Folder for the tables.")] = Path("leaderboards/local"),
    published: Annotated[Path | None, typer.Option(help="CSV of published numbers; default: the built-in one.")] = None,
    latex_intervals: Annotated[
        bool, typer.Option("--latex-intervals", help="Include 95 % intervals in the LaTeX tables.")
    ] = False,
    suite: Suites = None,
    data_root: DataRoot = None,
    pictures: Annotated[
        Path, typer.Option(help="Folder of the pages that `show` wrote; report.html links to them.")
    ] = Path("pictures"),
    run_folder: Annotated[
        list[Path] | None,
        typer.Option(help="Run folder of `train`, or its log.csv, to plot in report.html; repeatable."),
    ] = None,
    published_only: Annotated[
        bool, typer.Option("--published-only", help="Write only published.html, a page of the published numbers.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Write report.html, tables per task family and a Markdown page from stored results, with published numbers.

    The ranking of each family is printed; if there is none, the tables of results that are never ranked. The training
    curves of models that are run folders are plotted without --run-folder. With --suite, only the table of that suite
    is printed and written as CSV, Markdown, LaTeX and HTML, with published value, measured value and difference of each
    cell, in the order of the paper.

    Example: neco-bench leaderboard --results results --out leaderboards/local
    """
    import neco_bench.leaderboards
    from neco_bench.core.suites import find_suites

    shipped = Path(neco_bench.leaderboards.__file__).with_name("published.csv")
    if published_only:
        _survey(published or shipped, out, as_json)
        return
    from neco_bench.reports.extras import run_folders_of
    from neco_bench.reports.leaderboard import write_leaderboard
    from neco_bench.reports.ranking import board_of
    from neco_bench.reports.tables import tables_of

    suites = find_suites(suite or [])
    with open_stores(results) as stores:
        by_store = [(result, store) for store in stores for result in store.load_all()]
    stored, store_of = [result for result, _ in by_store], {result.key: store for result, store in by_store}
    if suites:
        _suite_tables(suites, stored, published or shipped, out, data_root, as_json)
        return
    if not stored:
        raise MissingError(f"No results in {', '.join(str(store.folder) for store in stores)}. Check --results.")

    def statistics(result: "Result") -> "dict[str, np.ndarray]":
        return store_of[result.key].statistics(result)

    board = board_of(stored, statistics)
    paths = write_leaderboard(
        board,
        out,
        published or shipped,
        latex_intervals=latex_intervals,
        pictures=pictures,
        run_folders=[*(run_folder or []), *run_folders_of(stored)],
    )
    if as_json:
        print(json.dumps({"results": len(stored), "files": [str(path) for path in paths]}))
        return
    tables = {table.name: table for table in tables_of(board)}
    rankings = [tables.get(f"{name}.ranking", table) for name, table in tables.items() if table.ranked]
    for table in rankings or [table for table in tables.values() if table.detailed is not None]:
        print(f"\n{table.title}")
        print_rows((table.frame if table.detailed is None else table.detailed).to_dict("records"), False)
    print(f"\nwrote {out / 'report.html'} and {len(paths) - 1} other files in {out}", file=sys.stderr)


def _survey(published: Path, out: Path, as_json: bool) -> None:
    """Write the page of published numbers."""
    from neco_bench.core.files import write_whole
    from neco_bench.reports.published import read_published
    from neco_bench.reports.survey import survey_page

    rows = read_published(published)
    page = out / "published.html"
    write_whole(page, survey_page(rows).encode())
    if as_json:
        print(json.dumps({"published": len(rows), "files": [str(page)]}))
        return
    print(f"wrote {page}: {len(rows)} published numbers", file=sys.stderr)


def _suite_tables(
    suites: "list[Suite]", results: "list[Result]", published: Path, out: Path, data_root: Path | None, as_json: bool
) -> None:
    """Print and write the tables of suites."""
    from neco_bench.reports.published import read_published
    from neco_bench.reports.suite_table import suite_table

    papers, paths, document = read_published(published), [], {}
    for suite in suites:
        table = suite_table(suite, suite.columns(data_root=data_root), results, papers)
        paths += table.write(out)
        rows = table.frame().to_dict("records")
        document[suite.id] = rows
        if not as_json:
            print(f"\n{suite.title}")
            print_rows(rows, False)
            for note in table.notes:
                print(note)
            if not any(measured for _, cells in table.rows for _, measured, _ in cells):
                print(
                    f"warning: suite {suite.id!r} has no stored result that can be shown. Check --results.",
                    file=sys.stderr,
                )
    if as_json:
        print(json.dumps({"suites": document, "files": [str(path) for path in paths]}, indent=2))
        return
    print("\n".join(f"wrote {path}" for path in paths), file=sys.stderr)


@app.command()
def compare(
    first: Annotated[str, typer.Argument(help="Model as named in the results, or the start of a result's key.")],
    second: Annotated[str, typer.Argument(help="Model to compare with it.")],
    task: Annotated[
        list[str] | None, typer.Option(help="Task, glob or task@protocol; repeatable and comma-separated.")
    ] = None,
    results: Annotated[list[Path] | None, typer.Option(help="Results folder; repeatable. Default: results")] = None,
    per_class: Annotated[bool, typer.Option("--per-class", help="Also compare each class of each task.")] = False,
    per_size: Annotated[
        bool, typer.Option("--per-size", help="Also compare small, medium and large regions of segmentation tasks.")
    ] = False,
    images: Annotated[
        int, typer.Option(help="Number of images per task to list of those that gain most, and that lose most.")
    ] = 0,
    as_json: Json = False,
) -> None:
    """Compare two models, second minus first, on the same items: interval, p by sign flips, and p after Holm.

    Example: neco-bench compare baseline_rgb baseline_hog --task 'shapes_*'
    """
    from neco_bench.reports import compare as comparing
    from neco_bench.reports.words import MEANING, TESTS, comparison_percent

    patterns = split_names(task or [])
    not_negative("--images", images)
    as_row = comparison_fractions if as_json else comparison_percent
    with open_stores(results) as stores:
        pairs = comparing.find_pairs(stores, first, second, patterns)
    tables: dict[str, list[dict[str, Any]]] = {"tasks": [as_row(row) for row in comparing.compare_tasks(pairs)]}
    for pair in pairs:
        if per_class:
            tables[f"{pair.name} by class"] = [as_row(row) for row in comparing.compare_classes(pair)]
        if per_size and "confusion" in pair.first_arrays:
            tables[f"{pair.name} by size"] = [as_row(row) for row in comparing.compare_sizes(pair)]
        if images > 0:
            tables[f"{pair.name} by image"] = comparison_images(comparing.compare_images(pair), images, as_json)
    if as_json:
        print(json.dumps(tables, indent=2))
        return
    for title, table in tables.items():
        print(f"{first} -> {second}" if title == "tasks" else f"\n{title}")
        print_rows(table, False)
    print("\n" + textwrap.fill(f"{TESTS} {MEANING}", 118), file=sys.stderr)  # stdout is the tables


@app.command()
def show(
    model: Annotated[str, typer.Argument(help="Model as named in the results, or the start of a result's key.")],
    task: Annotated[
        list[str] | None, typer.Option(help="Task, glob or task@protocol; repeatable and comma-separated.")
    ] = None,
    results: Annotated[list[Path] | None, typer.Option(help="Results folder; repeatable. Default: results")] = None,
    out: Annotated[Path, typer.Option(help="Folder for the pages, with one folder per result.")] = Path("pictures"),
    worst: Annotated[int, typer.Option(help="Number of images or pairs with the lowest scores.")] = 4,
    best: Annotated[int, typer.Option(help="Number of images or pairs with the highest scores.")] = 4,
    image: Annotated[list[str] | None, typer.Option(help="Ids to show instead; repeatable.")] = None,
    layers: Annotated[
        bool,
        typer.Option("--layers", help="Plot the stored scores of `run --layers all` by layer instead."),
    ] = False,
    data_root: DataRoot = None,
    weights: Weights = None,
    device: Device = None,
    as_json: Json = False,
) -> None:
    """Draw stored results as a page and a PNG: predictions and errors, nearest patches, clusters, matched points.

    The task runs again, with stored features if there are any, and its predictions are compared with the stored
    counts. With --layers, the scores of a model are plotted by layer with 95 % intervals, and nothing runs.

    Example: neco-bench show baseline_hog --task shapes_ic
    """
    from neco_bench.reports.compare import results_of, unmatched
    from neco_bench.reports.extras import picture_folder
    from neco_bench.runner.job import job_of
    from neco_bench.viz.show import show as draw

    patterns = split_names(task or [])
    not_negative("--worst", worst)
    not_negative("--best", best)
    if layers:
        _show_layers(model, patterns, results, out, as_json)
        return
    rows: list[dict[str, Any]] = []
    failure = 0
    with open_stores(results) as stores:
        matching = results_of(stores, model, patterns)
        stores[0].problems += unmatched(patterns, matching.values(), repr(model))
    for result, store in matching.values():
        folder = picture_folder(result, out)
        try:
            with foreign_code():
                job = job_of(result, data_root=data_root, weights=weights, device=device, progress=True)
                shown = draw(result, store.statistics(result), job, folder, worst=worst, best=best, named=image or [])
        except Exception as caught:
            error = user_error(caught)
            if error is None or len(matching) == 1:
                raise
            print(f"error: {result.model} on {result.column}: {error}", file=sys.stderr)
            failure = failure or error.exit_code
            continue
        if shown.differing:
            print(
                f"warning: {result.model} on {result.column}: {shown.differing} of {shown.items} items "
                f"have other counts than the stored ones; versions, weights or data have changed since.",
                file=sys.stderr,
            )
        rows.append({"task": result.column, "items": shown.items, "page": str(shown.page)})
    print_rows(rows, as_json)
    raise typer.Exit(failure)


def _show_layers(model: str, tasks: list[str], results: list[Path] | None, out: Path, as_json: bool) -> None:
    """Write the curves of a model's layers, and print the best layer of each."""
    from neco_bench.viz.layers import layer_curves, show_layers

    with open_stores(results) as stores:
        curves = layer_curves([result for store in stores for result in store.load_all()], model, tasks)
    rows = []
    for curve in curves:
        best, page = curve.best, show_layers(curve, out)
        score = best.value if as_json else curve.metric.text(best.value)
        own = {"model": curve.model} if len({other.model for other in curves}) > 1 else {}
        rows.append(
            own
            | {"task": curve.column, "layers": len(curve.scores), "best_layer": best.layer}
            | {curve.primary_metric if as_json else "score": score, "page": str(page)}
        )
    print_rows(rows, as_json)
