"""Metrics: unit, direction (whether higher or lower is better) and range. Imports no torch.

A task family identifies a metric by its name. A metric that is a fraction, printed in percent, for which higher is
better, needs no entry. For any other metric, add a line to METRICS; a plug-in returns
`Outcome(units={name: Metric(...)})`. Tables, ranks, comparisons, pages and `published.csv` use the unit and direction
defined here.
"""

from __future__ import annotations

import math
import re
from typing import Literal

from pydantic import BaseModel, ConfigDict

Unit = Literal["percent", "metres", "degrees", "ratio", "images/s", "GFLOP", "million"]


class Metric(BaseModel):
    """Unit, direction and range of a metric.

    unit: "percent" is stored as a fraction and printed times 100; other values are printed as stored. low, high: the
    smallest and the largest possible value, as stored; None: no limit.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    unit: Unit = "percent"
    lower_is_better: bool = False
    low: float | None = 0.0
    high: float | None = 1.0

    @property
    def direction(self) -> Literal["higher", "lower"]:
        """Whether higher or lower values are better."""
        return "lower" if self.lower_is_better else "higher"

    @property
    def sign(self) -> int:
        """1 if higher is better, else -1, so that a larger `sign * value` is better."""
        return -1 if self.lower_is_better else 1

    @property
    def scale(self) -> int:
        """Factor from the stored to the printed value."""
        return 100 if self.unit == "percent" else 1

    @property
    def digits(self) -> int:
        """Digits after the decimal point in tables."""
        return {"metres": 3, "ratio": 3, "GFLOP": 2, "million": 2}.get(self.unit, 1)

    @property
    def legend(self) -> str:
        """Text next to the name of a metric, unless it is in percent and higher is better."""
        unit = {"metres": "m", "degrees": "°"}.get(self.unit, self.unit)
        notes = [unit] if self.unit not in ("percent", "ratio") else []
        return ", ".join([*notes, "lower is better"] if self.lower_is_better else notes)

    def text(self, value: float | None, plus: bool = False) -> str:
        """Return a stored value as printed in tables, "" for None; plus: with its sign.

        >>> Metric().text(0.4567), Metric(unit="metres", lower_is_better=True, high=None).text(0.4031)
        ('45.7', '0.403')
        """
        if value is None or math.isnan(value):
            return ""
        number = round(self.scale * value, self.digits) + 0.0
        return f"{number:{'+' if plus else ''}.{self.digits}f}"

    def interval(self, low: float | None, high: float | None, plus: bool = False) -> str:
        """Return an interval as printed in tables, "" for None."""
        ends = self.text(low, plus), self.text(high, plus)
        return f"[{ends[0]}, {ends[1]}]" if all(ends) else ""

    def problem(self, value: float) -> str | None:
        """Return a message if a value is outside the range, else None."""
        if self.low is not None and value < self.low - ROUNDING:
            return f"Input should be greater than or equal to {self.low:g}"
        if self.high is not None and value > self.high + ROUNDING:
            return f"Input should be less than or equal to {self.high:g}"
        return None


ROUNDING = 1e-6  # by which a mean of values may exceed their range

# By name: the first pattern that matches the whole name, without "_std" and the part after "/".
METRICS: dict[str, Metric] = {
    r"(?i)((mean|median|rmse)[-_ ])?(angle|angular[-_ ]error)": Metric(
        unit="degrees", lower_is_better=True, high=180.0
    ),
    r"(?i)si[-_ ]?rmse|rmse[-_ ]?log|log_?10|silog|abs[-_ ]?rel|sq[-_ ]?rel|rmse x10": Metric(
        unit="ratio", lower_is_better=True, high=None
    ),
    r"(?i)rmse( m|_\w+)?|mae( m|_m)?": Metric(unit="metres", lower_is_better=True, high=None),
    r"[JF][ _]decay": Metric(lower_is_better=True, low=-1.0),
    r"images_per_second": Metric(unit="images/s", high=None),
    r"gflops_per_image": Metric(unit="GFLOP", lower_is_better=True, high=None),
    r"million_parameters": Metric(unit="million", lower_is_better=True, high=None),
}


def metric_named(name: str) -> Metric:
    """Return the metric with this name; by default, a fraction for which higher is better.

    >>> metric_named("rmse").legend, metric_named("J_decay").direction, metric_named("mIoU").direction
    ('m, lower is better', 'lower', 'higher')
    """
    stem = name.partition("/")[0].removesuffix("_std")
    return next((metric for pattern, metric in METRICS.items() if re.fullmatch(pattern, stem)), Metric())
