"""Results arranged as models by columns (task@protocol), their ranks and Borda counts."""

from __future__ import annotations

import json
import statistics
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from neco_bench.results.schema import Result

# Provenance entries in which the results of one cell (the seeds) must agree; otherwise the cell reads "ambiguous".
SETTINGS = ("dataset_fingerprint", "card_hash", "features", "precision")


KINDS = {"": "", ".subset": "parts of the data sets", ".unranked": "--limit or --set, never ranked"}


def _kind(result: Result) -> str:
    if result.is_changed:
        return ".unranked"
    return ".subset" if result.subset else ""


def distinct_labels(
    names: Sequence[str], ids: Sequence[str | None], word: str, always: Sequence[bool] = ()
) -> list[str]:
    """`names`, with the start of its id added to each that stands for several ids (None: not known), or is `always`."""
    known = defaultdict(set)
    for name, identity in zip(names, ids, strict=True):
        if identity:
            known[name].add(identity)
    return [
        f"{name} ({word} {identity[:8] if identity else 'unknown'})" if len(known[name]) > 1 or marked else name
        for name, identity, marked in zip(names, ids, always or [False] * len(names), strict=True)
    ]


@dataclass(frozen=True)
class Cell:
    """The results of one model in one column; `mean` of their primary metric, None where there is no one number."""

    results: tuple[Result, ...]
    mean: float | None


@dataclass(frozen=True)
class Grid:
    """Models by columns of one family and kind (of KINDS), in the order of its table."""

    family: str
    kind: str
    models: tuple[str, ...]
    columns: tuple[str, ...]
    cells: dict[tuple[str, str], Cell]


def grids(results: Iterable[Result]) -> list[Grid]:
    """What stands in the wide tables, family by family."""
    families, names = by_family(results)
    return [grid for family, members in families for grid in family_grids(family, members, names)]


Names = dict[tuple[str, str | None], str]


def by_family(results: Iterable[Result]) -> tuple[list[tuple[str, list[Result]]], Names]:
    """Results by family, those of equal key and metrics once; and the name in all tables of (model, weights)."""
    distinct = {
        (result.key, result.status, json.dumps(result.metrics, sort_keys=True)): result
        for result in sorted(results, key=lambda result: json.dumps(result.model_dump(), sort_keys=True, default=str))
    }
    families = defaultdict(list)
    for result in distinct.values():
        families[result.family].append(result)
    official = defaultdict(set)
    for result in distinct.values():
        official[model_label(result)].add(_official(result))
    known = sorted(official, key=str)
    others = [False in official[place] and True not in official[place] for place in known]
    names = distinct_labels([model for model, _ in known], [weights for _, weights in known], "weights", others)
    return sorted(families.items()), dict(zip(known, names, strict=True))


def _official(result: Result) -> bool | None:
    """Are the weights those that a name of the zoo stands for? None where it stands for none."""
    given = "weights" in (result.provenance.get("arguments") or {})  # all that is known of earlier results
    official: bool | None = result.provenance.get("official", False if given else None)
    return official


def model_label(result: Result) -> tuple[str, str | None]:
    return result.model, result.provenance.get("weights_id")


def family_grids(family: str, members: Sequence[Result], known: Names) -> list[Grid]:
    """Equal names with other weights, or another protocol hash, are rows or columns of their own."""
    found = []
    for kind in KINDS:
        results = [result for result in members if _kind(result) == kind]
        if not results:
            continue
        models = [known[model_label(result)] for result in results]
        names = distinct_labels(
            [r.column for r in results], [r.provenance.get("protocol_hash") for r in results], "hash"
        )
        gathered = defaultdict(list)
        for result, model, column in zip(results, models, names, strict=True):
            gathered[model, column].append(result)
        cells = {place: Cell(tuple(group), mean_value(group)) for place, group in gathered.items()}
        columns, order = sorted(set(names)), sorted(set(models))
        if not kind:
            values = {place: cell.mean for place, cell in cells.items() if cell.mean is not None}
            order = _ranked(order, columns, values)
        found.append(Grid(family, kind, tuple(order), tuple(columns), cells))
    return found


def _ranked(models: Sequence[str], columns: Sequence[str], values: Mapping[tuple[str, str], float]) -> list[str]:
    """Models with all columns first, by mean rank among them; ties, and the others, by name."""
    complete = complete_models(models, columns, values)
    borda = borda_counts(complete, columns, values)
    return [*sorted(complete, key=lambda m: (-borda[m], m)), *sorted(set(models) - set(complete))]


def complete_models(
    models: Iterable[str], columns: Iterable[str], values: Mapping[tuple[str, str], float]
) -> list[str]:
    return [model for model in models if all((model, column) in values for column in columns)]


def borda_counts(
    models: Sequence[str], columns: Sequence[str], values: Mapping[tuple[str, str], float]
) -> dict[str, float]:
    """How many models each one beats, over all columns; a tie counts half."""
    return {
        model: sum(
            (values[model, c] > values[other, c]) + (values[model, c] == values[other, c]) / 2
            for c in columns
            for other in models
            if other != model
        )
        for model in models
    }


def usable(results: Iterable[Result]) -> list[Result]:
    """Those that did not fail, by seed."""
    return sorted((result for result in results if result.status == "ok"), key=lambda result: result.seed)


def _ambiguous(results: Sequence[Result]) -> bool:
    settings = {json.dumps([r.provenance.get(k) for k in SETTINGS], sort_keys=True, default=str) for r in results}
    return len(settings) > 1 or len({result.seed for result in results}) < len(results)


def mean_value(results: Iterable[Result]) -> float | None:
    """Mean of the primary metric over seeds; None where the cell has no one number."""
    found = usable(results)
    if not found or _ambiguous(found):
        return None
    return statistics.fmean(result.metrics[result.primary_metric] for result in found)


def percent(fraction: float) -> str:
    """As all tables print it."""
    return f"{100 * fraction:.1f}"
