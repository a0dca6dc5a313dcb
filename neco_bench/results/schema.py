"""The Result: one JSON document per (model, task, protocol, seed). Each field says what it holds.

Metrics in percent are fractions in [0, 1] here; others are in their unit (`Result.metric`).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from neco_bench.core.errors import NecoBenchError, NumericalError
from neco_bench.core.metric import Metric, metric_named

if TYPE_CHECKING:
    from neco_bench.core.task import Outcome

# 2: units, drawn; ci95 is that of metrics.intervals. In 1 it is a percentile bootstrap over images or pairs.
SCHEMA_VERSION = 2


Value = Annotated[float, Field(ge=-1e12, le=1e12, allow_inf_nan=False)]  # of a metric; its own range is checked too


Count = Annotated[int, Field(ge=0, le=10**15)]


Measured = Annotated[float, Field(ge=0, le=1e12, allow_inf_nan=False)]  # seconds, or MiB


class _DatasetFacts(BaseModel):
    name: str


class _EncoderFacts(BaseModel):
    parameters: Count = 0


class _ProvenanceFacts(BaseModel):
    """The entries of `provenance` that tables and comparisons read; others are free."""

    weights_id: str | None = None
    protocol_hash: str | None = None
    encoder: _EncoderFacts = _EncoderFacts()
    dataset: dict[str, _DatasetFacts] = {}
    features: dict[str, Any] | None = None
    training: dict[str, Any] | None = None
    settings: dict[str, Any] = {}
    arguments: dict[str, Any] = {}


class Drawn(BaseModel):
    """What the interval of the primary metric rests on.

    unit: what was drawn (`core.sampling`). units: how many independent ones there are; of frames, the blocks. groups:
    drives that frames are of; None where units are independent. repeats: seeds or draws of the training set whose
    spread is in the interval, 1 where there is none. method: how it was made. notes: what it does not cover.
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
        """The same in words."""
        if self.method.startswith("moving blocks"):
            name = "blocks of frames" if self.units != 1 else "block of frames"
        else:
            name = self.unit + ("" if self.units == 1 else "s")
        parts = [f"{self.units} {name}"] + ([f"{self.repeats} seeds or draws"] if self.repeats > 1 else [])
        return " and ".join(parts) + (f" ({'; '.join(self.notes)})" if self.notes else "")


class Result(BaseModel):
    """Result of one run of one task. The per-image sufficient statistics are in `<same name>.npz` beside it."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    schema_version: int = SCHEMA_VERSION
    key: str  # content key (hex): what the number depends on; resume looks results up by it
    model: str  # model spec as given, with "[layers=...]" where inner layers were requested
    task: str  # task name, e.g. "ade20k_ic"
    family: str  # task family, e.g. "in_context"; one leaderboard table each
    protocol: str  # protocol id, with "*" appended where --set changed a constant
    primary_metric: str  # the key of `metrics` that stands in the leaderboard
    metrics: dict[str, Value]
    per_class: dict[str, dict[str, Value | None]]  # metric -> class name -> value; None: undefined (absent class)
    ci95: dict[str, tuple[Value, Value]]  # metric -> 95 % interval, see `drawn`
    units: dict[str, Metric] = {}  # of metrics that core.metric does not know by name, and that are no fractions
    drawn: Drawn | None = None  # what the interval rests on; None: not known (plug-ins, results of schema 1)
    n_images: Count  # evaluated items: images, or pairs
    seed: Count
    status: Literal["ok", "failed"]
    error: str | None = None  # the message, where status is "failed"
    error_code: int | None = None  # the exit code of that error
    subset: dict[str, dict[str, Count]] | None = None  # split -> {"found", "expected"} where a split is not whole
    limit: Count | None = None  # --limit; such a result is never ranked
    changed: dict[str, Any] = {}  # what --set changed, key -> value
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
        """Unit, direction and range of one of its metrics, or of the primary one."""
        name = name or self.primary_metric
        return self.units.get(name.removesuffix("_std")) or metric_named(name)

    @classmethod
    def ok(cls, fields: Mapping[str, Any], outcome: Outcome, **measured: Any) -> Result:
        """Make the result of a run that ended well.

        Args:
            fields: those that do not depend on how it went (`Job.result_fields`).
            outcome: what the family returned.
            measured: `provenance`, `timing` and `peak_memory_mb`.

        Raises:
            NumericalError: for metrics outside their range, such as NaN.
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
        """Make the result of a run that ended in an error; arguments as for `ok`."""
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
        """Column in tables: task@protocol, with what --set changed, the limit, and the counts of a part of the data."""
        notes = [f"{key}={value}" for key, value in sorted(self.changed.items())]
        notes += [f"limit {self.limit}"] if self.limit is not None else []
        notes += self.subset_notes
        return f"{self.task}@{self.protocol}" + (f" [{', '.join(notes)}]" if notes else "")

    @property
    def subset_notes(self) -> list[str]:
        """`split found/expected` of each split that is not whole."""
        subset = sorted((self.subset or {}).items())
        return [f"{split} {counts.get('found', '?')}/{counts.get('expected', '?')}" for split, counts in subset]

    @property
    def drawn_text(self) -> str:
        """What its interval rests on, as in "80 images" or "7 blocks of frames (frames of one drive: ...)"."""
        return self.drawn.text if self.drawn is not None else ""

    @property
    def has_old_interval(self) -> bool:
        """Whether its interval is one of schema 1 that could not be made again, as its counts are not stored."""
        return self.schema_version < SCHEMA_VERSION and self.drawn is None and bool(self.ci95)

    @property
    def rankable(self) -> bool:
        """Whether it may stand in a ranked table: of the whole data set, with an unchanged protocol."""
        return self.status == "ok" and not (self.subset or self.is_changed)

    @property
    def is_changed(self) -> bool:
        """Whether --limit or --set changed the protocol."""
        return self.limit is not None or bool(self.changed) or self.protocol.endswith("*")
