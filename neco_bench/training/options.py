"""Options of a training run that are not part of the recipe."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from neco_bench.core.errors import NecoBenchError, UsageError


@dataclass(frozen=True)
class TrainOptions:
    """Options of training on which the result does not depend, up to rounding.

    evaluate: tasks to score every `eval_every` steps and at the end. save_every: steps between checkpoints, of which
    the last two are kept, and those whose step is a multiple of keep_every. stated: names of the recipe's values given
    by this command, which may change with `resume` (`recipe.CHANGEABLE`). None means the best device, and
    `limits.default_workers`.
    """

    out: Path
    data: str
    data_root: Path | None = None
    weights: Path | None = None
    device: str | None = None
    workers: int | None = None
    resume: bool = False
    stated: tuple[str, ...] = ()
    save_every: int = 500
    keep_every: int | None = None
    evaluate: tuple[str, ...] = ()
    eval_every: int = 1000
    compiled: bool = False
    checkpointing: bool = False
    tensorboard: bool = False
    progress: bool = True

    def __post_init__(self) -> None:
        for name, value, least in (
            ("--save-every", self.save_every, 1),
            ("--keep-every", self.keep_every, 1),
            ("--eval-every", self.eval_every, 1),
            ("--workers", self.workers, 0),
        ):
            if value is not None and value < least:
                raise UsageError(f"{name} must be at least {least}, got {value}.")


class Interrupted(NecoBenchError):
    """The run was stopped by a signal, after its state was saved."""

    exit_code = 130
