"""`neco-bench tasks`, `suites`, `data`, `cache` and `doctor`."""

import json
import sys
import time
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer

from neco_bench.cli.common import DataRoot, Json, app, data_app
from neco_bench.cli.output import foreign_code, print_rows


@app.command()
def tasks(data_root: DataRoot = None, as_json: Json = False) -> None:
    """List every task: data set, protocols (the first is the default), metric, and whether its data is available.

    Example: neco-bench tasks --data-root /data
    """
    from neco_bench.core.protocol import all_cards
    from neco_bench.data.integrity import describe_datasets
    from neco_bench.data.load import base_split

    with foreign_code():
        present = {row.name: set(row.present) for row in describe_datasets(data_root)}
        cards, broken = all_cards(data_root)
    rows = [
        {
            "task": card.name,
            "family": card.family,
            "dataset": card.dataset,
            "protocols": list(card.protocols),
            "metric": card.metric,
            "data": {base_split(split) for split in card.splits.values()} <= present.get(card.dataset, set()),
            "citation": card.citation,
        }
        for card in cards.values()
    ]
    print_rows(rows, as_json)
    for name, reason in broken.items():
        print(f"warning: {name!r} is broken: {reason}", file=sys.stderr)


@app.command()
def suites(
    suite: Annotated[
        str | None, typer.Argument(help="Suite, or FILE.toml:NAME; its tasks, models and runs are listed.")
    ] = None,
    as_json: Json = False,
) -> None:
    """List the suites (tables of papers, and sets of training runs), or the content of one suite.

    Example: neco-bench suites neco_table3
    """
    from neco_bench.core.suites import all_suites, find_suite

    if suite is not None:
        found = find_suite(suite)
        if as_json:
            print(json.dumps(found.model_dump(mode="json"), indent=2))
            return
        rows = [
            {"kind": "task", "name": c.title, "is": f"{c.task.card.name}@{c.task.protocol.id}"} for c in found.columns()
        ]
        rows += [
            {"kind": "model", "name": row.title, "is": row.model or "published numbers only"} for row in found.models
        ]
        for run in found.runs:
            changes = "".join(f" {key}={value}" for key, value in run.set.items())
            rows.append({"kind": "run", "name": run.folder, "is": f"{run.recipe}{changes} on {run.data}"})
        print(f"{found.title}. {found.citation}", file=sys.stderr)
        print_rows(rows, False)
        if found.note:
            print(found.note, file=sys.stderr)
        return
    listed = [
        {
            "suite": found.id,
            "tasks": len(found.tasks),
            "models": len(found.models),
            "runs": len(found.runs),
            "published": bool(found.published),
            "title": found.title,
        }
        for found in all_suites().values()
    ]
    print_rows(listed, as_json)


@app.command()
def cache(
    clear: Annotated[
        bool, typer.Option("--clear", help="Delete stored features, except those that a process is writing.")
    ] = False,
    as_json: Json = False,
) -> None:
    """List or delete the stored features, which tasks share (at most NECO_BENCH_FEATURES_GB, 20 by default).

    Example: neco-bench cache
    """
    from datetime import datetime

    from neco_bench.features.store import remove_file, remove_leftovers, stored_files

    rows = stored_files()
    if clear:
        remove_leftovers()
        left = [row for row in rows if not remove_file(Path(row["folder"]))]
        freed = sum(row["bytes"] for row in rows) - sum(row["bytes"] for row in left)
        print(f"deleted {len(rows) - len(left)} of {len(rows)}, {freed / 1e6:.1f} MB", file=sys.stderr)
        rows = left
    for row in rows:
        row["used"] = datetime.fromtimestamp(row["used"]).isoformat(" ", "minutes")
    print_rows(rows, as_json)


@app.command()
def doctor(data_root: DataRoot = None, as_json: Json = False) -> None:
    """Show versions, devices, folders and data sets, for a bug report.

    Example: neco-bench doctor
    """
    import torch

    from neco_bench.core.paths import cache_dir
    from neco_bench.data.integrity import describe_datasets
    from neco_bench.results.provenance import environment
    from neco_bench.search.exact import ExactIndex

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    index, queries = ExactIndex(384, device), torch.randn(512, 384, device=device)
    index.add(torch.randn(16_384, 384, device=device))
    index.search(queries, 30)
    start = time.perf_counter()
    index.search(queries, 30)
    facts: dict[str, Any] = {
        **environment(),
        "device": torch.cuda.get_device_name() if device.type == "cuda" else "cpu",
        "search_seconds": {index.facts["index"]: time.perf_counter() - start},
        "cache": str(cache_dir()),
        "data": {row.name: bool(row.present) for row in describe_datasets(data_root)},
    }
    if as_json:
        print(json.dumps(facts, indent=2, default=str))
    else:
        print_rows([{"fact": name, "value": value} for name, value in facts.items()], False)


@data_app.command("list")
def data_list(data_root: DataRoot = None, as_json: Json = False) -> None:
    """List the data sets, and whether they are available under the data root.

    Example: neco-bench data list --data-root /data
    """
    from neco_bench.data.integrity import describe_datasets

    with foreign_code():
        rows = [vars(row) for row in describe_datasets(data_root)]
    if not as_json:
        for row in rows:
            del row["citation"]
    print_rows(rows, as_json)


@data_app.command("check")
def data_check(
    name: Annotated[str, typer.Argument(help="Data set; see `neco-bench data list`.")],
    data_root: DataRoot = None,
    as_json: Json = False,
) -> None:
    """Read a whole data set and report problems; exits with 4 if there is an error.

    Example: neco-bench data check voc2012 --data-root /data
    """
    from tqdm import tqdm

    from neco_bench.data.integrity import check_dataset

    with foreign_code():
        findings = check_dataset(name, data_root, progress=partial(tqdm, disable=None, leave=False))
    short = [{"level": f.level, "split": f.split, "finding": f"{f.text} {f.fix}"} for f in findings]  # long text last
    print_rows([vars(finding) for finding in findings] if as_json else short, as_json)
    if any(finding.level == "error" for finding in findings):
        raise typer.Exit(4)


@data_app.command("init")
def data_init(
    folder: Annotated[Path, typer.Argument(help="Folder with images and masks, or images and a JSON file of pairs.")],
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an existing dataset.toml.")] = False,
    as_json: Json = False,
) -> None:
    """Inspect a folder and write a draft of dataset.toml: suffixes, ids and palette of the masks, splits.

    The folder is then a data set. The names of its tasks start with the name of the folder.

    Example: neco-bench data init /data/plants
    """
    from neco_bench.data.init import init

    written = init(folder, overwrite=overwrite)
    if as_json:
        print(json.dumps({"files": [str(path) for path in written.paths], "notes": list(written.notes)}, indent=2))
        return
    print("\n".join(map(str, written.paths)))
    place = written.paths[0].parent
    for note in written.notes:
        print(note, file=sys.stderr)
    print(
        f"correct {written.paths[0].name}, then run: neco-bench data check {place.name} --data-root {place.parent}; "
        f"list its tasks: neco-bench tasks --data-root {place.parent}",
        file=sys.stderr,
    )


@data_app.command("prepare")
def data_prepare(
    name: Annotated[str, typer.Argument(help="voc_sbd, coco_panoptic, or the data set of the archive.")],
    data_root: DataRoot = None,
    source: Annotated[
        Path | None, typer.Option(help="Archive (zip, tar), the folder of SBD, or nyu_depth_v2_labeled.mat.")
    ] = None,
    into: Annotated[str, typer.Option(help="Sub-folder for an archive, such as stuffthingmaps.")] = "",
    as_json: Json = False,
) -> None:
    """Unpack an archive or convert annotations. Originals are not changed; the command can be interrupted and repeated.

    Example: neco-bench data prepare voc_sbd --source benchmark.tgz --data-root /data
    """
    from tqdm import tqdm

    from neco_bench.data.prepare import prepare

    progress = partial(tqdm, disable=None, leave=False)
    print_rows([vars(row) for row in prepare(name, data_root, source=source, into=into, progress=progress)], as_json)
