"""`posttrain-report`: compare a model before and after training on the same images, from ordinary stored results."""

from __future__ import annotations

import base64
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from neco_bench.core.errors import NecoBenchError, UsageError, error_of_code
from neco_bench.core.files import slug, write_whole
from neco_bench.core.log import Table
from neco_bench.core.own_data import own_datasets
from neco_bench.core.protocol import Task, all_cards, find_tasks
from neco_bench.encoders.load import load_encoder
from neco_bench.encoders.run_folder import RUN_FILE, is_run_folder, read_run
from neco_bench.reports import compare as comparing
from neco_bench.reports.compare import ResultKey, ResultPair, StoredResult
from neco_bench.reports.posttrain import Picture, Report, Section, comparison_section, plain_section, write_report
from neco_bench.results.schema import Result
from neco_bench.results.store import ResultStore
from neco_bench.runner.execute import run_job
from neco_bench.runner.job import Job, job_of, plan_all
from neco_bench.runner.options import RunOptions
from neco_bench.viz.show import show


@dataclass(frozen=True)
class PosttrainOptions:
    """Options for the content of a report.

    layers: inner layers to compare, None for the quarters of a ViT, () for none. layer_task: the task for the layers;
    default: the first. images: number of items per task to draw of those that gain most, and that lose most. every:
    compare the checkpoints of the run whose steps are multiples of it. base_weights, weights: files of the two models.
    """

    layers: tuple[int, ...] | None = None
    layer_task: str | None = None
    images: int = 2
    every: int | None = None
    base_weights: Path | None = None
    weights: Path | None = None

    def __post_init__(self) -> None:
        for name, value, least in (("--images", self.images, 0), ("--every", self.every, 1)):
            if value is not None and value < least:
                raise UsageError(f"{name} must be at least {least}, got {value}.")


@dataclass(frozen=True)
class PosttrainReport:
    """The written page and its content; notebooks show the table of tasks."""

    page: Path
    sections: tuple[Section, ...]
    problems: tuple[str, ...]

    def __getitem__(self, name: str) -> Any:
        """Return the table of a section ("tasks", "classes", ...) as a DataFrame."""
        return next(section.frame for section in self.sections if section.name == name)

    def _repr_html_(self) -> str:
        html: str = self["tasks"].to_html(index=False, float_format="{:.4g}".format)
        return html


def default_tasks(data_root: str | Path | None = None) -> list[str]:
    """Return quick tasks of several families on `shapes` and on every user-defined data set."""
    names = all_cards(data_root)[0]
    endings = ("ic", "knn", "cluster_gt", "correspondence")
    quick = (f"{data}_{end}" for data in ("shapes", *own_datasets(data_root)) for end in endings)
    return [name for name in quick if name in names]


def posttrain_report(
    base: str,
    tuned: str,
    tasks: str | Sequence[str] = (),
    *,
    out: str | Path = "posttrain",
    results: str | Path = "results",
    run: RunOptions | None = None,
    **options: Any,
) -> PosttrainReport:
    """Compare a model before and after training and write the report; stored results are reused.

    Args:
        base: spec of the model before training.
        tuned: run folder of `train`, which also provides the curve and the cost, or any model spec.
        tasks: names or globs; default: quick tasks on `shapes` and on user-defined data sets.
        out: folder of the report: `report.html`, `.md`, `.tex`, CSV files, pictures.
        results: results folder to read and to write.
        run: options for running the tasks.
        options: fields of `PosttrainOptions` (layers, layer_task, images, every, base_weights, weights).

    Raises:
        NecoBenchError: the error of the first failed task, if no task can be compared; see also `run`.
    """
    making = _Making(base, tuned, ResultStore(results), run or RunOptions(), PosttrainOptions(**options), Path(out))
    names = [tasks] if isinstance(tasks, str) else list(tasks)
    root = making.run.data_root
    return making.make(find_tasks(names or default_tasks(root), data_root=root))


@dataclass
class _Making:
    base: str
    tuned: str
    store: ResultStore
    run: RunOptions
    options: PosttrainOptions
    out: Path
    problems: list[str] = field(default_factory=list)
    failure: int | None = None  # the exit code of the first job that failed

    def make(self, tasks: list[Task]) -> PosttrainReport:
        report = Report(self.base, self.tuned)
        folder = Path(self.tuned.partition("?")[0]) if is_run_folder(self.tuned.partition("?")[0]) else None
        if self.options.every and folder is None:
            raise UsageError(f"--every compares the checkpoints of a run folder of `train`, which {self.tuned} is not.")
        models = ((self.base, self.options.base_weights), (self.tuned, self.options.weights))
        plans = [self.plan(model, tasks, weights=weights) for model, weights in models]  # both, before anything runs
        of_base, of_tuned = (self.run_jobs(jobs) for jobs in plans)
        pairs = comparing.pair_results(of_base, of_tuned)
        if not pairs:
            raise error_of_code(self.failure or 1, "; ".join(self.problems) or "no task has results of both models.")
        note = "p is adjusted over the rows of each task."
        report.sections = [
            comparison_section("tasks", "Tasks", [({}, comparing.compare_tasks(pairs))]),
            self.checkpoints(folder, of_base, of_tuned, tasks),
            self.layers(tasks, pairs),
            comparison_section(
                "sizes",
                "By size of the object",
                [({"task": p.name}, comparing.compare_sizes(p)) for p in pairs if "confusion" in p.first_arrays],
                f"A region is all pixels of one class in one image. {note}",
            ),
            comparison_section(
                "classes",
                "By class",
                [({"task": p.name}, rows) for p in pairs if (rows := comparing.compare_classes(p))],
                note,
            ),
            *self.training(folder, report),
            _data(pairs),
            self.items(pairs, report),
        ]
        report.sections = [section for section in report.sections if section.rows]
        report.problems = list(dict.fromkeys([*self.problems, *self.store.problems]))
        page = write_report(report, self.out)
        return PosttrainReport(page, tuple(report.sections), tuple(report.problems))

    def results(self, model: str, tasks: list[Task], **changes: Any) -> dict[ResultKey, StoredResult]:
        """Run jobs that are not stored, and return the results by `result_key`."""
        return self.run_jobs(self.plan(model, tasks, **changes))

    def plan(self, model: str, tasks: list[Task], **changes: Any) -> list[Job]:
        return plan_all([model], tasks, replace(self.run, **changes), self.store)

    def run_jobs(self, jobs: list[Job]) -> dict[ResultKey, StoredResult]:
        results: dict[ResultKey, StoredResult] = {}
        for job in jobs:
            result = run_job(job, self.store)
            if result.status == "ok":
                results[comparing.result_key(result)] = (result, self.store)
            else:
                self.problems.append(f"{job.title}: {result.error}")
                self.failure = self.failure or result.error_code
        return results

    def layers(self, tasks: list[Task], pairs: list[ResultPair]) -> Section:
        """Compare inner layers on one task; p is adjusted over them."""
        title = "Layer by layer"
        layers = self.options.layers
        if layers is None:
            indices = getattr(load_encoder(self.base, weights=self.options.base_weights, device="cpu"), "indices", None)
            depth = indices[-1] + 1 if indices else 0
            layers = tuple(sorted({depth * part // 4 - 1 for part in (1, 2, 3)} - {-1})) if depth else ()
        named = self.options.layer_task
        task = find_tasks([named], data_root=self.run.data_root)[0] if named else tasks[0]
        compared: list[ResultPair] = []
        labels: list[str] = []
        for layer in layers:
            of_base = self.results(self.base, [task], layers=str(layer), weights=self.options.base_weights)
            of_tuned = self.results(self.tuned, [task], layers=str(layer), weights=self.options.weights)
            of_layer = comparing.pair_results(of_base, of_tuned) if of_base and of_tuned else []
            compared += of_layer
            labels += [f"block {layer}"] * len(of_layer)
        if not compared:
            return plain_section("layers", title, [])
        last = [pair for pair in pairs if (pair.first.task, pair.first.protocol) == (task.card.name, task.label)]
        rows = comparing.compare_tasks([*compared, *last])
        rows = [replace(row, name=label) for row, label in zip(rows, [*labels, *["last"] * len(last)], strict=True)]
        return comparison_section("layers", f"{title}: {task.card.name}", [({}, rows)])

    def checkpoints(
        self,
        folder: Path | None,
        of_base: dict[ResultKey, StoredResult],
        of_tuned: dict[ResultKey, StoredResult],
        tasks: list[Task],
    ) -> Section:
        """Compare the stored checkpoints with the base model, and with the best checkpoint of each task."""
        every, title = self.options.every, "Checkpoints"
        if folder is None or every is None:
            return plain_section("checkpoints", title, [])
        newest = read_run(folder).step
        by_step = {newest: of_tuned}
        for file in sorted(folder.glob(f"checkpoint-*/{RUN_FILE}")):
            step = read_run(file.parent).step
            if step and step % every == 0 and step != newest:
                by_step[step] = self.results(str(file.parent), tasks)
        if len(by_step) == 1:
            self.problems.append(
                f"--every {every}: {folder} has no other checkpoint at these steps. `train --keep-every` keeps them."
            )
        rows: list[dict[str, Any]] = []
        for place in of_tuned:
            rows += _checkpoint_rows(place, of_base, by_step)
        note = (
            "Each checkpoint is compared with the base; p is adjusted over the checkpoints of a task. Best: by value; "
            "the others are compared with it too. It is selected on these images, so its value is slightly too high."
        )
        return plain_section("checkpoints", title, rows, note)

    def training(self, folder: Path | None, report: Report) -> list[Section]:
        """Return the curve and the cost of a run, from its log."""
        log = Table(folder / "log.csv").rows() if folder else None
        if folder is None or log is None or not len(log):
            return []
        numbers = {name: log[name].astype(float).to_numpy() for name in log if name != "step"}
        report.curve = (log["step"].to_numpy(), numbers["loss"])
        settings = json.loads((folder / "recipe.json").read_text(encoding="utf-8"))
        views, images = settings["recipe"]["batch_size"] * len(log), settings["images"]
        energy = np.nansum(numbers["joules"]) / 3.6e6 if "joules" in numbers else None
        facts = {
            "objective": settings["recipe"]["objective"],
            "steps": len(log),
            "hours": f"{numbers['seconds'].sum() / 3600:.4g}",
            "images": f"{images} ({views} with repetition, {views / images:.3g} passes)",
            "images per second (median)": f"{np.median(numbers['images_per_second']):.4g}",
            "peak memory (MiB)": f"{numbers['peak_memory_mb'].max():.0f}",
            "energy of one GPU (kWh)": "not measured" if energy is None else f"{energy:.4g}",
            "loss, first and last tenth": " to ".join(
                f"{part.mean():.4g}"
                for part in (np.array_split(numbers["loss"], 10)[0], numbers["loss"][-max(1, len(log) // 10) :])
            ),
            "data": settings["data"],
        }
        note = "From log.csv. Hours are those of the steps, without evaluation and checkpoints."
        scores = Table(folder / "eval.csv").rows().to_dict("records")
        return [
            plain_section("training", "Training", [{"": name, "value": value} for name, value in facts.items()], note),
            plain_section("scores", "Scores during training", scores),
        ]

    def items(self, pairs: list[ResultPair], report: Report) -> Section:
        """Return the items of each task that change most, and their pictures."""
        rows: list[dict[str, Any]] = []
        for pair in pairs:
            sign, metric = pair.first.metric().sign, pair.first.metric()
            changed = [row for row in comparing.compare_images(pair) if row[1] != row[2]]
            changed.sort(key=lambda row: (-sign * (row[2] - row[1]), row[0]))
            most = self.options.images
            shown = list(dict.fromkeys([*changed[:most], *changed[max(0, len(changed) - most) :]])) if most else []
            for name, one, other in shown:
                texts = {"base": metric.text(one), "tuned": metric.text(other)}
                rows.append(
                    {"task": pair.name, "item": name, **texts, "difference": metric.text(other - one, plus=True)}
                )
            if shown:
                try:
                    report.pictures += self.pictures(pair, shown, metric.text)
                except NecoBenchError as error:
                    self.problems.append(f"pictures of {pair.name}: {error}")
        return plain_section("items", "Items that changed most", rows, "Sorted by the score of the item.")

    def pictures(
        self, pair: ResultPair, shown: list[tuple[str, float, float]], text: Callable[[float], str]
    ) -> list[Picture]:
        """Draw items for both models, unless the pictures exist."""
        ids = [name for name, _, _ in shown]
        folders = {}
        for side, result, arrays, weights in (
            ("base", pair.first, pair.first_arrays, self.options.base_weights),
            ("tuned", pair.second, pair.second_arrays, self.options.weights),
        ):
            folder = self.out / "pictures" / slug(pair.name) / side
            drawn = json.dumps({"key": result.key, "items": ids})
            folders[side] = folder
            if not (folder / "drawn.json").is_file() or (folder / "drawn.json").read_text("utf-8") != drawn:
                job = job_of(result, data_root=self.run.data_root, weights=weights, device=self.run.device)
                show(result, dict(arrays), job, folder, worst=0, best=0, named=ids)
                write_whole(folder / "drawn.json", drawn.encode())
        pictures = []
        for number, (name, one, other) in enumerate(shown):
            tiles = [tile for side, folder in folders.items() for tile in _tiles(folder, number, side)]
            pictures.append(Picture(pair.name, name, f"{text(one)} to {text(other)}", tiles))
        return pictures


def _checkpoint_rows(
    place: ResultKey, of_base: dict[ResultKey, StoredResult], by_step: dict[int, dict[ResultKey, StoredResult]]
) -> list[dict[str, Any]]:
    """Return the checkpoints on one task: value, difference to the base, and comparison with the best."""
    stored = {step: results[place] for step, results in sorted(by_step.items()) if place in results}
    if place not in of_base:
        return []
    metric = next(iter(stored.values()))[0].metric()

    def value(result: Result) -> float:
        return result.metrics[result.primary_metric]

    best = max(stored, key=lambda step: metric.sign * value(stored[step][0]))
    steps = list(stored)
    pairs = [comparing.pair_results({place: of_base[place]}, {place: stored[step]})[0] for step in steps]
    to_base = comparing.compare_tasks(pairs)
    others = [step for step in steps if step != best]
    pairs = [comparing.pair_results({place: stored[best]}, {place: stored[step]})[0] for step in others]
    to_best = dict(zip(others, comparing.compare_tasks(pairs), strict=True))
    rows = []
    for step, row in zip(steps, to_base, strict=True):
        result, other = stored[step][0], to_best.get(step)
        ends = result.ci95.get(result.primary_metric, (None, None))
        if other is None:
            standing = "best"
        else:
            standing = f"worse than step {best}" if other.p_holm < 0.05 else f"not significantly worse than step {best}"
        rows.append(
            {
                "task": result.column,
                "step": step,
                "value": metric.text(value(result)),
                "95 % interval": metric.interval(*ends),
                "minus base": metric.text(row.difference.value, plus=True),
                "its interval": metric.interval(row.difference.low, row.difference.high, plus=True),
                "p (Holm)": "" if np.isnan(row.p_holm) else f"{row.p_holm:.4f}",
                "standing": standing,
            }
        )
    return rows


def _data(pairs: Sequence[ResultPair]) -> Section:
    """Return the training data of both models, and their overlap with the images of each task."""
    rows = []
    for pair in pairs:
        facts = [result.provenance.get("training") or {} for result in (pair.first, pair.second)]
        row = {"task": pair.name}
        for side, own in zip(("base", "tuned"), facts, strict=True):
            row[f"{side}: trained on"] = own.get("data", "") or "unknown"
            row[f"{side}: these images"] = own.get("contamination", "") or "unknown"
        rows.append(row)
    return plain_section("data", "Data and contamination", rows)


def _tiles(folder: Path, number: int, side: str) -> list[tuple[str, str]]:
    """Return the thumbnails of an item; image and ground truth, which both sides have, are included once."""
    tiles = []
    for file in sorted((folder / "pictures").glob(f"{number:03d}-*-small.*")):
        title = file.stem[4:].removesuffix("-small").replace("-", " ")
        if title in ("image", "ground truth"):
            if side == "tuned":
                continue
        else:
            title = f"{side}: {title}"
        kind = {".jpg": "jpeg"}.get(file.suffix, file.suffix[1:])
        tiles.append((title, f"data:image/{kind};base64,{base64.b64encode(file.read_bytes()).decode()}"))
    return sorted(tiles, key=lambda tile: (tile[0] not in ("image", "ground truth"), tile[0] != "image"))
