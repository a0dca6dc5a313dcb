"""A report page with published numbers only, by protocol."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from typing import Any

from neco_bench.core.metric import metric_named
from neco_bench.reports.published import Published
from neco_bench.reports.report import page_of, source_of


def survey_page(published: Iterable[Published]) -> str:
    """Return the report page of published numbers: a family per protocol, a column per task or setting and metric."""
    groups: dict[tuple[str, str, str], list[Published]] = defaultdict(list)
    for row in published:
        groups[row.protocol, row.task or row.setting, row.metric].append(row)
    columns: list[dict[str, Any]] = []
    results: list[dict[str, Any]] = []
    orders: dict[str, list[str]] = defaultdict(list)
    for (protocol, place, metric), rows in sorted(groups.items()):
        digits = max(_digits(row) for row in rows)
        known = metric_named(metric)
        columns.append(
            {
                "name": f"{place} {metric}",
                "family": protocol,
                "dataset": rows[0].task or place.partition(",")[0],
                "protocol": protocol,
                "metric": metric,
                "unit": known.unit,
                "legend": known.legend,
                "lower": known.lower_is_better,
                "digits": digits,
                "kind": "",
                "classes": None,
                "how": None,
                "papers": [],
            }
        )
        for row, name in zip(rows, _names(rows), strict=True):
            orders[protocol].append(name)
            results.append(
                {
                    "model": name,
                    "column": len(columns) - 1,
                    "value": round(row.value * 10**digits),
                    "text": str(row.value),
                    "source": source_of(row),
                    "rank": None,
                }
            )
    content = {
        "columns": columns,
        "models": sorted({result["model"] for result in results}),
        "orders": {protocol: sorted(set(names)) for protocol, names in orders.items()},
        "results": results,
        "differences": [[] for _ in columns],
        "speeds": [],
        "provenance": [],
        "curves": [],
        "published": True,
    }
    return page_of(content)


def _digits(row: Published) -> int:
    exponent = row.value.as_tuple().exponent
    return max(0, -exponent) if isinstance(exponent, int) else 0


def _names(rows: list[Published]) -> list[str]:
    """Return model names with architecture; if a name has several numbers, with their setting or an index."""
    names = [f"{row.model}, {row.arch}" if row.arch else row.model for row in rows]
    texts = [
        name if names.count(name) == 1 else f"{name} ({row.setting.rpartition(': ')[2] or row.source})"
        for name, row in zip(names, rows, strict=True)
    ]
    return [text if texts.count(text) == 1 else f"{text} {texts[:i].count(text) + 1}" for i, text in enumerate(texts)]
