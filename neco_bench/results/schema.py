"""The Result: one JSON document per (model, task, protocol, seed).

Metrics in percent are stored as fractions in [0, 1]; others are stored in their unit (`Result.metric`).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from neco_bench.core.errors import NecoBenchError, NumericalError, plural
from neco_bench.core.metric import Metric, metric_named

if TYPE_CHECKING:
    from neco_bench.core.task import Outcome

# 2: units, drawn; ci95 is computed by metrics.intervals. In 1 it is a percentile bootstrap over images or pairs.
SCHEMA_VERSION = 2


Value = Annotated[float, Field(ge=-1e12, le=1e12, allow_inf_nan=False)]  # of a metric, whose own range is checked too


Count = Annotated[int, Field(ge=0, le=10**15)]


Measured = Annotated[float, Field(ge=0, le=1e12, allow_inf_nan=False)]  # seconds, or MiB


class _DatasetFacts(BaseModel):
    name: str


class _EncoderFacts(BaseModel):
    parameters: Count = 0


class _ProvenanceFacts(BaseModel):
    """The entries of `provenance` that tables and comparisons read; other entries are not checked."""

    weights_id: str | None = None
    protocol_hash: str | None = None
    encoder: _EncoderFacts = _EncoderFacts()
    dataset: dict[str, _DatasetFacts] = {}
    features: dict[str, Any] | None = None
    training: dict[str, Any] | None = None
    settings: dict[str, Any] = {}
    arguments: dict[str, Any] = {}


class Drawn(BaseModel):
    """Sampling units and method of the interval of the primary metric.

    unit: the sampling unit (`core.sampling`). units: number of independent units; for frames, the number of blocks.
    groups: number of drives of the frames; None if units are independent. repeats: number of seeds or draws of the
    training set whose spread is included, else 1. method: how the interval was computed. notes: what it does not cover.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    unit: str
    units: Count
    groups: Count | None = None
    repeats: Count = 1
    method: str
    notes: list[str] = []

    @property
    def text(self) -> str:
        """Return a short description."""
        unit = "block of frames" if self.method.startswith("moving blocks") else self.unit
        text = f"{self.units} {plural(unit, self.units)}"
        if self.repeats > 1:
            text += f" and {self.repeats} seeds or draws"
        return text + (f" ({'; '.join(self.notes)})" if self.notes else "")


class Result(BaseModel):
    """Result of one run of one task. `<same name>.npz` next to the document has the per-image sufficient statistics."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    schema_version: int = SCHEMA_VERSION
    key: str  # content key (hex): hash of everything that the number depends on; stored results are found by it
    model: str  # model spec as given, with "[layers=...]" where inner layers were requested
    task: str  # task name, e.g. "ade20k_ic"
    family: str  # task family, e.g. "in_context"; one leaderboard table each
    protocol: str  # protocol id, with "*" appended if --set changed a constant
    primary_metric: str  # the key of `metrics` that is shown in leaderboards
    metrics: dict[str, Value]
    per_class: dict[str, dict[str, Value | None]]  # metric -> class name -> value; None: undefined (absent class)
    ci95: dict[str, tuple[Value, Value]]  # metric -> 95 % interval, see `drawn`
    units: dict[str, Metric] = {}  # of metrics that are not in core.metric and are not fractions
    drawn: Drawn | None = None  # sampling units of the interval; None: unknown (plug-ins, results of schema 1)
    n_images: Count  # evaluated items: images, or pairs
    seed: Count
    status: Literal["ok", "failed"]
    error: str | None = None  # the message if status is "failed"
    error_code: int | None = None  # the exit code of that error
    subset: dict[str, dict[str, Count]] | None = None  # split -> {"found", "expected"} if a split is incomplete
    limit: Count | None = None  # --limit; such a result is never ranked
    changed: dict[str, Any] = {}  # changes of --set, key -> value
    provenance: dict[str, Any]  # leaderboards read "weights_id", "protocol_hash" and the SETTINGS of reports/grid.py
    timing: dict[str, Measured]  # seconds per phase, and "total"
    peak_memory_mb: Measured  # 0.0: not measured on this platform

    @field_validator("provenance")
    @classmethod
    def _can_be_read(cls, provenance: dict[str, Any]) -> dict[str, Any]:
        _ProvenanceFacts.model_validate(provenance)
        return provenance

    @model_validator(mode="after")
    def _primary_metric_is_there(self) -> Result:
        if self.status == "ok" and self.primary_metric not in self.metrics:
            raise ValueError(f"status is ok, but metrics lack the primary metric {self.primary_metric!r}")
        return self

    @model_validator(mode="after")
    def _within_range(self) -> Result:
        for name, value in self.metrics.items():
            self._check(name, name, value)
        for name, classes in self.per_class.items():
            for key, known in classes.items():
                self._check(name, f"{name}.{key}", known, "per_class")
        for name, ends in self.ci95.items():
            for number, end in enumerate(ends):
                self._check(name, f"{name}.{number}", end, "ci95")
        return self

    def _check(self, name: str, place: str, value: float | None, table: str = "metrics") -> None:
        problem = None if value is None else self.metric(name).problem(value)
        if problem:
            raise ValueError(f"{table}.{place}: {problem}, not {value}")

    def metric(self, name: str | None = None) -> Metric:
        """Return unit, direction and range of a metric, by default of the primary one."""
        name = name or self.primary_metric
        return self.units.get(name.removesuffix("_std")) or metric_named(name)

    @classmethod
    def ok(cls, fields: Mapping[str, Any], outcome: Outcome, **measured: Any) -> Result:
        """Return the result of a successful run.

        Args:
            fields: the fields that do not depend on the outcome (`Job.result_fields`).
            outcome: the return value of the task family.
            measured: `provenance`, `timing` and `peak_memory_mb`.

        Raises:
            NumericalError: if a metric is outside its range, such as NaN.
        """
        try:
            return cls(
                **fields,
                metrics=outcome.metrics,
                per_class=outcome.per_class,
                ci95={name: interval for name, interval in outcome.ci95.items() if interval is not None},
                units=dict(outcome.units),
                n_images=outcome.n_images,
                status="ok",
                **measured,
            )
        except ValidationError as error:
            item = error.errors()[0]
            place, message = ".".join(map(str, item["loc"])), item["msg"].removeprefix("Value error, ")
            what = f"{place} = {item['input']!r} ({message})" if place else message
            raise NumericalError(f"The task gave a result that cannot be stored: {what}.") from error

    @classmethod
    def failed(cls, fields: Mapping[str, Any], error: NecoBenchError, **measured: Any) -> Result:
        """Return the result of a run that ended in an error; arguments as for `ok`."""
        return cls(
            **fields,
            metrics={},
            per_class={},
            ci95={},
            n_images=0,
            status="failed",
            error=str(error),
            error_code=error.exit_code,
            **measured,
        )

    @property
    def column(self) -> str:
        """Column in tables: task@protocol, with the changes of --set, the limit, and counts of incomplete splits."""
        notes = [f"{key}={value}" for key, value in sorted(self.changed.items())]
        notes += [f"limit {self.limit}"] if self.limit is not None else []
        notes += self.subset_notes
        return f"{self.task}@{self.protocol}" + (f" [{', '.join(notes)}]" if notes else "")

    @property
    def subset_notes(self) -> list[str]:
        """Text `split found/expected` for each incomplete split."""
        subset = sorted((self.subset or {}).items())
        return [f"{split} {counts.get('found', '?')}/{counts.get('expected', '?')}" for split, counts in subset]

    @property
    def drawn_text(self) -> str:
        """Sampling units of the interval, such as "80 images" or "7 blocks of frames (frames of one drive: ...)"."""
        return self.drawn.text if self.drawn is not None else ""

    @property
    def has_old_interval(self) -> bool:
        """Whether the interval was stored under schema 1 and cannot be computed again, because no counts are stored."""
        return self.schema_version < SCHEMA_VERSION and self.drawn is None and bool(self.ci95)

    @property
    def rankable(self) -> bool:
        """Whether the result may be in a ranked table: whole data set and unchanged protocol."""
        return self.status == "ok" and not (self.subset or self.is_changed)

    @property
    def is_changed(self) -> bool:
        """Whether --limit or --set changed the protocol."""
        return self.limit is not None or bool(self.changed) or self.protocol.endswith("*")
