"""What a metric is: its unit, which direction is better, and the values it can have. Imports no torch.

The contract of task families: a metric is known by its name.
One that is a fraction, printed in percent, of which more is better needs nothing. For any other, add a line to
METRICS; a plug-in gives `Outcome(units={name: Metric(...)})`. Tables, ranks, comparisons, pages and `published.csv`
read unit and direction from here and nowhere else.
"""

from __future__ import annotations

import math
import re
from typing import Literal

from pydantic import BaseModel, ConfigDict

Unit = Literal["percent", "metres", "degrees", "ratio", "images/s", "GFLOP", "million"]

# Digits after the point, and what stands behind a number where the unit is not named beside it.
_DIGITS = {"percent": 1, "metres": 3, "degrees": 1, "ratio": 3, "images/s": 1, "GFLOP": 2, "million": 2}
_SIGNS = {
    "percent": "%",
    "metres": "m",
    "degrees": "°",
    "ratio": "",
    "images/s": "images/s",
    "GFLOP": "GFLOP",
    "million": "million",
}


class Metric(BaseModel):
    """Unit, direction and range of a metric.

    unit: "percent" is stored as a fraction and printed times 100; the others are printed as they are stored. low, high:
    the smallest and the largest possible value, as stored; None: there is none.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    unit: Unit = "percent"
    lower_is_better: bool = False
    low: float | None = 0.0
    high: float | None = 1.0

    @property
    def direction(self) -> Literal["higher", "lower"]:
        """Which values are better."""
        return "lower" if self.lower_is_better else "higher"

    @property
    def sign(self) -> int:
        """1 where more is better, else -1: `sign * value` is better the larger it is."""
        return -1 if self.lower_is_better else 1

    @property
    def scale(self) -> int:
        """What a stored value is printed times."""
        return 100 if self.unit == "percent" else 1

    @property
    def digits(self) -> int:
        """Digits after the point in tables."""
        return _DIGITS[self.unit]

    @property
    def legend(self) -> str:
        """What stands beside the name of a metric that is not percent, higher is better; else nothing."""
        notes = [_SIGNS[self.unit]] if self.unit not in ("percent", "ratio") else []
        return ", ".join([*notes, "lower is better"] if self.lower_is_better else notes)

    def text(self, value: float | None, plus: bool = False) -> str:
        """Write a stored value as all tables print it, "" where there is none; plus: with its sign.

        >>> Metric().text(0.4567), Metric(unit="metres", lower_is_better=True, high=None).text(0.4031)
        ('45.7', '0.403')
        """
        if value is None or math.isnan(value):
            return ""
        number = round(self.scale * value, self.digits) + 0.0
        return f"{number:{'+' if plus else ''}.{self.digits}f}"

    def interval(self, low: float | None, high: float | None, plus: bool = False) -> str:
        """Write an interval, "" where there is none."""
        ends = self.text(low, plus), self.text(high, plus)
        return f"[{ends[0]}, {ends[1]}]" if all(ends) else ""

    def problem(self, value: float) -> str | None:
        """Say what is wrong with a value that is outside the range; None where nothing is."""
        if self.low is not None and value < self.low - ROUNDING:
            return f"Input should be greater than or equal to {self.low:g}"
        if self.high is not None and value > self.high + ROUNDING:
            return f"Input should be less than or equal to {self.high:g}"
        return None


ROUNDING = 1e-6  # by which a mean of values may leave their range


_RATIO = Metric(unit="ratio", lower_is_better=True, high=None)

# By name: the first pattern that is the whole name, without "_std" and what follows a "/".
METRICS: dict[str, Metric] = {
    r"(?i)((mean|median|rmse)[-_ ])?(angle|angular[-_ ]error)": Metric(
        unit="degrees", lower_is_better=True, high=180.0
    ),
    r"(?i)si[-_ ]?rmse|rmse[-_ ]?log|log_?10|silog|abs[-_ ]?rel|sq[-_ ]?rel|rmse x10": _RATIO,
    r"(?i)rmse( m|_\w+)?|mae( m|_m)?": Metric(unit="metres", lower_is_better=True, high=None),
    r"[JF][ _]decay": Metric(lower_is_better=True, low=-1.0),
    r"images_per_second": Metric(unit="images/s", high=None),
    r"gflops_per_image": Metric(unit="GFLOP", lower_is_better=True, high=None),
    r"million_parameters": Metric(unit="million", lower_is_better=True, high=None),
}


def metric_named(name: str) -> Metric:
    """Find the metric of a name; one that no line of METRICS names is a fraction of which more is better.

    >>> metric_named("rmse").legend, metric_named("J_decay").direction, metric_named("mIoU").direction
    ('m, lower is better', 'lower', 'higher')
    """
    stem = name.partition("/")[0].removesuffix("_std")
    return next((metric for pattern, metric in METRICS.items() if re.fullmatch(pattern, stem)), Metric())
