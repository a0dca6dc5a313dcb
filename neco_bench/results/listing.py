"""A list of results that notebooks show as a table."""

from __future__ import annotations

from typing import TYPE_CHECKING

from neco_bench.results.schema import Result

if TYPE_CHECKING:
    import pandas as pd


class ResultList(list[Result]):
    """Results of `neco_bench.run` on several tasks or seeds, in the order of the request."""

    def to_dataframe(self) -> pd.DataFrame:
        """Return a table like that of `neco_bench.load_results`: one row per result and metric, values as stored."""
        from neco_bench.results.frame import results_frame  # pandas is slow to import

        return results_frame(self)

    def _repr_html_(self) -> str:
        """Return the primary metrics as an HTML table."""
        import pandas as pd

        rows = []
        for result in self:
            metric, name = result.metric(), result.primary_metric
            rows.append(
                {
                    "model": result.model,
                    "task": result.column,
                    "seed": result.seed,
                    "metric": name + (f" ({metric.legend})" if metric.legend else ""),
                    "value": metric.text(result.metrics[name]) if result.status == "ok" else "failed",
                    "95 % interval": metric.interval(*result.ci95.get(name, (None, None))),
                    "items": result.n_images,
                    "note": result.error or "",
                }
            )
        html: str = pd.DataFrame(rows).to_html(index=False)
        return html
