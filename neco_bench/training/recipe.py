"""Recipes: all settings of a training run in one frozen object. `recipes/*.toml` are the built-in recipes.

A recipe file contains only the differences from the defaults below, or from another recipe that it `extends`: a
built-in one, or a .toml file whose path is relative to the folder of the file. Defaults are the values shared by all
configurations of the official code (Pariza et al., ICLR 2025; github.com/vpariza/NeCo, branch main).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator

from neco_bench.core import config
from neco_bench.core.errors import BadInputError, MissingError, UsageError, did_you_mean, problem_text
from neco_bench.training.views import ViewSettings

FOLDER = Path(__file__).with_name("recipes")

# Settings that --resume may change if the command line gives them: weights, optimizer state, queue and the order of the
# images do not depend on them.
CHANGEABLE = (
    "precision", "epochs", "steps", "accumulate", "student_steepness", "teacher_steepness", "momentum",
    "final_momentum", "drop_path", "lr_backbone", "lr_head", "final_lr", "warmup_steps", "weight_decay",
    "final_weight_decay", "clip_norm", "max_unreadable",
)  # fmt: skip

MAX_COUNT = 2**31 - 1  # fits 32 bits

Count = Annotated[int, Field(ge=0, le=MAX_COUNT)]
Positive = Annotated[int, Field(ge=1, le=MAX_COUNT)]
Share = Annotated[float, Field(ge=0, le=1)]
Rate = Annotated[float, Field(gt=0, allow_inf_nan=False)]
NotNegative = Annotated[float, Field(ge=0, allow_inf_nan=False)]
# TOML has lists, not tuples.
Range = Annotated[tuple[Rate, Rate], BeforeValidator(lambda value: tuple(value) if isinstance(value, list) else value)]


class Recipe(BaseModel):
    """Sizes in pixels, learning rates per step of the whole batch, scales as shares of an image's area.

    objective: "neco", or "mim" (masked image modelling) for training from random weights, without a teacher.
    base: the model spec to start from.
    epochs, steps: length of the run; `steps` has priority. batch_size: images per optimizer step, over all processes
    and over `accumulate` parts. Gradients of the parts are averaged, but each part is a separate batch: NeCo draws
    references from the part (a queue also contains the previous parts), and a masked loss is the mean of the parts'
    means. This is therefore not equal to training with the whole batch at once; the number of processes makes no such
    difference. head_*: the projection head, an MLP with `head_layers` linear layers. same_heads: the teacher's head
    starts as a copy of the student's; the official code draws two heads, which affects short runs but not long ones.
    cells: a shared region is aligned to cells x cells vectors. references: number of vectors to compare each with.
    queue_length: teacher tokens stored per global view as references, to which each image of a batch adds
    `queue_per_image`; 0 uses references from the batch. loss_mask: "fg" and "bg" train on the cells that the teacher's
    class token attends to, or on the others. use_teacher: false uses the student's own targets. shuffle_teacher: a
    control experiment with targets of other patches, from which nothing can be learned. hidden_share: share of patches
    that "mim" hides and predicts. hidden_target: their pixels, or histograms of their gradients and mean colours.
    predict_all: also predict the visible patches. momentum, final_momentum: momentum of the teacher, which is a moving
    average of the student. drop_path: rate of the student's last block, growing linearly from 0. trainable_blocks: null
    trains everything, n trains the blocks from n on, a list trains only these blocks; in the latter cases, all other
    parts are frozen. lr_*, weight_decay: cosine from the first to the `final_*` value, per step, after `warmup_steps`
    of linear growth. clip_norm: maximum gradient norm, null for none. max_unreadable: share of images that may be
    unusable.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    objective: Literal["neco", "mim"] = "neco"
    base: str = "dinov2_vits14_reg?pos_interp=scale_offset"
    seed: Annotated[int, Field(ge=0, lt=2**63)] = 400
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"

    epochs: Positive = 25
    steps: Positive | None = None
    batch_size: Positive = 64
    accumulate: Positive = 1

    global_size: Positive = ViewSettings.global_size
    local_size: Positive = ViewSettings.local_size
    locals: Count = ViewSettings.locals
    global_scale: Range = ViewSettings.global_scale
    local_scale: Range = ViewSettings.local_scale
    aspect: Range = ViewSettings.aspect
    min_overlap: Share = ViewSettings.min_overlap
    jitter_probability: Share = ViewSettings.jitter_probability
    jitter_strength: NotNegative = ViewSettings.jitter_strength
    gray_probability: Share = ViewSettings.gray_probability
    blur_probability: Share = ViewSettings.blur_probability
    blur_strength: NotNegative = ViewSettings.blur_strength

    head_hidden: Positive = 2048
    head_dim: Positive = 256
    head_layers: Positive = 3
    same_heads: bool = False

    cells: Positive = 7
    references: Annotated[int, Field(ge=2, le=MAX_COUNT)] = 49
    similarity: Literal["cosine", "euclidean"] = "cosine"
    network: Literal["bitonic", "odd_even"] = "bitonic"
    student_steepness: Rate = 100.0
    teacher_steepness: Rate = 100.0
    loss_mask: Literal["all", "fg", "bg"] = "all"
    use_teacher: bool = True
    shuffle_teacher: bool = False
    queue_length: Count = 0
    queue_per_image: Positive = 10

    hidden_share: Annotated[float, Field(gt=0, lt=1)] = 0.6
    hidden_target: Literal["pixels", "gradients"] = "pixels"
    predict_all: bool = False

    momentum: Share = 0.9995
    final_momentum: Share = 1.0

    drop_path: Annotated[float, Field(ge=0, lt=1)] = 0.1
    trainable_blocks: int | list[int] | None = None

    lr_backbone: NotNegative = 1e-5
    lr_head: NotNegative = 1e-4
    final_lr: NotNegative = 0.0
    warmup_steps: Count = 0
    weight_decay: NotNegative = 0.04
    final_weight_decay: NotNegative = 0.5
    clip_norm: Rate | None = None

    max_unreadable: Share = 0.01

    @model_validator(mode="after")
    def _consistent(self) -> Recipe:
        for name in ("global_scale", "local_scale", "aspect"):
            low, high = getattr(self, name)
            if low > high or (name != "aspect" and high > 1):
                raise ValueError(f"{name} must be two numbers, the smaller first, and shares at most 1")
        if self.objective == "mim" and (self.use_teacher or self.loss_mask != "all" or self.shuffle_teacher):
            raise ValueError("objective mim has no teacher: it needs use_teacher=false and no loss_mask")
        if self.global_size < self.local_size:
            raise ValueError("global_size must not be smaller than local_size")
        return self

    def total_steps(self, images: int) -> int:
        """Return the number of optimizer steps of the run, without the last partial batch of each epoch.

        Raises UsageError if there are none, or fewer than warm-up steps.
        """
        per_epoch = images // self.batch_size
        if not per_epoch:
            raise UsageError(
                f"batch_size={self.batch_size} is more than the {images} images. Use a smaller batch_size."
            )
        steps = self.steps or self.epochs * per_epoch
        if self.warmup_steps > steps:
            raise UsageError(
                f"warmup_steps={self.warmup_steps} is more than the {steps} steps of the run, so that lr_backbone and "
                f"lr_head would never be reached. Use --set warmup_steps={steps // 10}, or train longer."
            )
        return steps


def shipped() -> list[str]:
    """List the recipes in this package."""
    return sorted(path.stem for path in FOLDER.glob("*.toml"))


def load_recipe(name: str, changes: Mapping[str, Any] | None = None) -> Recipe:
    """Load a built-in recipe by name, or a recipe from a TOML file, and apply `changes`.

    Raises UsageError (unknown name, or a change with an unknown key or a wrong value), MissingError and BadInputError
    (a missing or wrong file); messages name the file and the key.
    """
    values = _read(name, ())
    unknown = [key for key in changes or {} if key not in Recipe.model_fields]
    if unknown:
        near = did_you_mean(unknown[0], Recipe.model_fields)
        raise UsageError(f"--set {unknown[0]}: recipes have no such key.{near}")
    try:
        return Recipe(**{**values, **(changes or {})})
    except ValidationError as error:
        raise UsageError(f"recipe {name!r} with --set: {problem_text(error, Recipe.model_fields)}") from error


def parse_changes(pairs: Sequence[str]) -> dict[str, Any]:
    """Read KEY=VALUE texts; "null" stands for none. Raises UsageError."""
    return {key: None if value == "null" else value for key, value in config.parse_changes(pairs).items()}


def _read(name: str, above: tuple[str, ...]) -> dict[str, Any]:
    """Read a recipe and those that it extends; each file is checked separately. above: recipes that extend this one."""
    path = Path(name) if name.endswith(".toml") else FOLDER / f"{name}.toml"
    if not path.is_file():
        if name.endswith(".toml"):
            raise MissingError(f"Recipe file {path} does not exist.")
        raise UsageError(f"unknown recipe {name!r}.{did_you_mean(name, shipped())} Known: {', '.join(shipped())}.")
    if name in above:
        raise BadInputError(f"{path}: recipes extend each other in a circle ({' -> '.join((*above, name))}).")
    own = config.read_toml(path)
    parent = own.pop("extends", "")
    if not isinstance(parent, str):
        raise BadInputError(f"{path}: extends must be a text, the name of a recipe or of a .toml file, got {parent!r}.")
    try:
        file = str(path.parent / parent) if parent.endswith(".toml") else parent  # relative to this recipe
        values = {**(_read(file, (*above, name)) if parent else {}), **own}
    except (UsageError, MissingError) as error:
        raise BadInputError(f"{path}: extends = {parent!r}: {error}") from error
    for key in own:
        if key not in Recipe.model_fields:
            raise BadInputError(f"{path}: unknown key {key!r}.{did_you_mean(key, Recipe.model_fields)}")
    try:
        Recipe(**values)
    except ValidationError as error:
        raise BadInputError(f"{path}: {problem_text(error, Recipe.model_fields)}") from error
    return values
