"""A folder of results: one JSON document per result, and `<same name>.npz` with its per-image statistics.

A result is identified by the content key in its document; files may be renamed. A bad file does not affect the others.
"""

from __future__ import annotations

import functools
import io
import json
import logging
import os
import stat
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import ValidationError

from neco_bench.core.errors import BadInputError, MissingError, NecoBenchError, NumericalError
from neco_bench.core.files import clear_leftovers, slug, write_whole
from neco_bench.results.schema import SCHEMA_VERSION, Result

if TYPE_CHECKING:
    import numpy as np

MAX_DEPTH = 32  # maximum nesting of a document; valid ones have 7


log = logging.getLogger(__name__)


class ResultStore:
    """Store results in a folder, and load them from it and its subfolders.

    problems: messages on the files that the last `load_all` could not use.
    """

    def __init__(self, folder: Path | str) -> None:
        self.folder = Path(folder)
        self.problems: list[str] = []
        self._paths: dict[str, Path] = {}  # documents that `load_all` returned, by key

    def save(self, result: Result, statistics: dict[str, np.ndarray] | None = None) -> Path:
        """Write a result and its statistics, each file atomically, and return the path of the JSON document.

        A stored result with the same key is overwritten, even if its file was renamed. The arrays are written first, so
        that a document never exists without them.

        Raises:
            NumericalError: if values are NaN or infinite.
            NecoBenchError: if the folder cannot be written.
        """
        try:
            text = json.dumps(result.model_dump(), indent=2, ensure_ascii=False, allow_nan=False, default=_to_json)
        except ValueError as error:
            raise NumericalError(
                f"The result of {result.model} on {result.task}@{result.protocol} contains NaN or infinite values."
            ) from error
        stored = self._with_key(result.key)
        path = stored[0][0] if stored else self._default_path(result)
        if statistics is not None:
            import numpy as np

            buffer = io.BytesIO()
            np.savez_compressed(buffer, **dict[str, Any](statistics))
            write_whole(path.with_suffix(".npz"), buffer.getvalue())
        write_whole(path, text.encode() + b"\n")
        if statistics is None:
            path.with_suffix(".npz").unlink(missing_ok=True)
        return path

    @property
    def is_empty(self) -> bool:
        """Return whether the folder has no documents, readable or not."""
        return next(self.folder.rglob("*.json"), None) is None

    def check_writable(self) -> None:
        """Check that results can be written, and delete temporary files of killed processes.

        Raises:
            NecoBenchError: if they cannot.
        """
        place = next(path for path in (self.folder, *self.folder.absolute().parents) if path.exists())
        if not place.is_dir() or not os.access(place, os.W_OK | os.X_OK):
            fault = "is read-only" if place.is_dir() else "is not a folder"
            raise NecoBenchError(f"{self.folder}: cannot be written: {place} {fault}. Choose another --out.")
        try:
            with tempfile.TemporaryFile(dir=place):
                pass
        except OSError as error:  # of a file system that has no files of users, or is full
            raise NecoBenchError(
                f"{self.folder}: cannot be written ({error.strerror or error}). Choose another --out."
            ) from error
        for folder in {path.parent for path in self.folder.rglob(".*.tmp")}:
            clear_leftovers(folder)

    def find(self, key: str) -> Result | None:
        """Return the successful result with this content key; None if there is none."""
        return next((result for _, result in self._with_key(key) if result.status == "ok"), None)

    def load_all(self) -> list[Result]:
        """Load every readable result, ordered by path; one per key, where a successful result replaces a failed one.

        If statistics are stored, the primary metric and the intervals of schema 1 are computed again from them. Files
        that cannot be used are named in `problems`.

        Raises:
            MissingError: if the folder does not exist.
        """
        if not self.folder.is_dir():
            raise MissingError(
                f"{self.folder}: no such results folder. `neco-bench run --out {self.folder}` creates it."
            )
        self.problems = []
        by_key: dict[str, tuple[Path, Result]] = {}
        for path in self._documents():
            try:
                result = _verified(path, _parse(path, path.read_bytes()))
            except NecoBenchError as error:
                self.problems.append(str(error))
                continue
            except OSError as error:
                self.problems.append(f"{path}: could not be read ({error.strerror or error}).")
                continue
            first_path, first = by_key.setdefault(result.key, (path, result))
            if first_path == path:
                continue
            unused = path
            if first.status != "ok" and result.status == "ok":
                by_key[result.key], unused = (path, result), first_path
            self.problems.append(
                f"{unused}: is not used, because {by_key[result.key][0]} has the same key. Delete one of the two."
            )
        self._paths = {key: path for key, (path, _) in by_key.items()}
        return [result for _, result in sorted(by_key.values(), key=lambda item: item[0])]

    def path(self, result: Result) -> Path:
        """Return the path of a result: the document that `load_all` read, else the path that `save` would use."""
        return self._paths.get(result.key, self._default_path(result))

    def statistics(self, result: Result) -> dict[str, np.ndarray]:
        """Load the per-image arrays of a result, by name.

        Raises:
            MissingError: if none are stored.
            BadInputError: if the file is damaged, or its arrays do not belong to this result.
        """
        path = self._paths.get(result.key)
        if path is None or not path.exists():
            stored = self._with_key(result.key)
            path = stored[0][0] if stored else self._default_path(result)
        return _read_statistics(path.with_suffix(".npz"), result)

    def _default_path(self, result: Result) -> Path:
        name = f"{slug(result.model)}@{slug(result.protocol)}_seed{result.seed}_{slug(result.key)[:8]}.json"
        return self.folder / slug(result.family) / slug(result.task) / name

    def _documents(self) -> list[Path]:
        return sorted(path for path in self.folder.rglob("*.json") if not _may_block(path))

    def _with_key(self, key: str) -> list[tuple[Path, Result]]:
        """Return the documents with this key, successful ones first, then by path; unreadable ones are ignored."""
        matching = []
        for path in self._documents():
            try:
                content = path.read_bytes()
                if key.encode() not in content:
                    continue
                result = _verified(path, _parse(path, content))
            except OSError:
                continue
            except NecoBenchError as error:
                _warn_once(f"A stored result is not used: {error}")
                continue
            if result.key == key:
                matching.append((path, result))
        return sorted(matching, key=lambda item: (item[1].status != "ok", item[0]))


@functools.cache
def _warn_once(text: str) -> None:
    log.warning(text)


def _may_block(path: Path) -> bool:
    """Return whether reading might block forever, as for a pipe or a device."""
    try:
        mode = path.stat().st_mode
    except OSError:
        return False  # reading it gives the error message
    return not (stat.S_ISREG(mode) or stat.S_ISDIR(mode))


def _read_statistics(path: Path, result: Result) -> dict[str, np.ndarray]:
    """Return the arrays of a file. Raises MissingError and BadInputError."""
    import numpy as np

    try:
        with np.load(path, allow_pickle=False) as arrays:
            statistics = {name: arrays[name] for name in arrays.files}
            _check_statistics(result, statistics)
            return statistics
    except FileNotFoundError as error:
        raise MissingError(
            f"{path}: no statistics are stored for {result.model} on {result.task}@{result.protocol}. "
            f"Run the task again with --overwrite."
        ) from error
    except Exception as error:  # numpy and zipfile raise many kinds of errors for damaged files
        raise BadInputError(
            f"{path}: the stored statistics cannot be read ({type(error).__name__}: {error}). Run the task again "
            f"with --overwrite."
        ) from error


def _verified(path: Path, result: Result) -> Result:
    """Check the primary metric of a result against its statistics, and return the result with intervals of this schema.

    Statistics that cannot be read, or have an unknown form, are ignored here; code that needs them raises the error.

    Raises:
        BadInputError: if the two do not agree.
    """
    if result.status != "ok" or not path.with_suffix(".npz").is_file():
        return result
    from neco_bench.results.statistics import check_primary, known_sums, with_intervals  # imports numpy

    try:
        arrays = _read_statistics(path.with_suffix(".npz"), result)
        sums = known_sums(result, arrays)
    except (NecoBenchError, ValueError, TypeError, AttributeError, KeyError, IndexError):
        return result
    try:
        check_primary(result, sums)
    except BadInputError as error:
        raise BadInputError(f"{path}: {error}") from error
    return with_intervals(result, arrays, sums) if result.schema_version < SCHEMA_VERSION else result


def _check_statistics(result: Result, arrays: dict[str, np.ndarray]) -> None:
    """Raise ValueError if shapes or values of the statistics cannot belong to this result."""
    import numpy as np

    for name, array in arrays.items():
        if array.dtype.kind == "f" and not np.isfinite(array).all():
            raise ValueError(f"{name} contains NaN or infinite values")
        if name in ("confusion", "hits", "totals") and (array.dtype.kind not in "iuf" or (array < 0).any()):
            raise ValueError(f"{name} does not contain counts")
        by_item = ("image_id", "pair_id", "item_id", "group", "weight", "category", "totals", "hits", "images")
        last = name.startswith(("score/", "square/"))
        if (last or name in by_item) and (array.ndim == 0 or array.shape[-1 if last else 0] != result.n_images):
            raise ValueError(f"{name} has the shape {array.shape} for {result.n_images} items")
    if "confusion" in arrays:
        shape = arrays["confusion"].shape
        names = len(next(iter(result.per_class.values()), ())) or shape[-1]
        if len(shape) < 3 or shape[-3] != result.n_images or not shape[-2] == shape[-1] == names:
            raise ValueError(f"confusion has the shape {shape} for {result.n_images} items and {names} classes")
    if "hits" in arrays:
        hits, totals = arrays["hits"], arrays["totals"]
        if hits.ndim != 2 or totals.ndim != 1 or (totals == 0).any() or (hits > totals[:, None]).any():
            raise ValueError("hits and totals do not match")


def _parse(path: Path, content: bytes) -> Result:
    """Parse a document. Raises BadInputError, whose message names the file and the fix."""
    try:
        document = json.loads(content, parse_constant=_reject_constant)
    except (ValueError, RecursionError) as error:
        raise BadInputError(
            f"{path}: is not a complete JSON document ({error}). Delete it and run its task again."
        ) from error
    version = document.get("schema_version") if isinstance(document, dict) else None
    if not isinstance(version, int) or isinstance(version, bool) or version < 1:
        raise BadInputError(
            f"{path}: is not a neco-bench result (no schema_version from 1 on). Move it out of this folder."
        )
    if version > SCHEMA_VERSION:
        raise BadInputError(
            f"{path}: has schema_version {version}; this neco-bench reads up to {SCHEMA_VERSION}. Upgrade neco-bench."
        )
    try:
        result = Result.model_validate(document)
        # Tables and pages write it as text, which must not fail on infinite numbers, deep nesting or lone surrogates.
        if _depth(document) > MAX_DEPTH:
            raise ValueError(f"it has more than {MAX_DEPTH} levels of nesting")
        json.dumps(result.model_dump(), ensure_ascii=False, allow_nan=False).encode()
    except ValidationError as error:
        item = error.errors()[0]
        where = ".".join(map(str, item["loc"])) or "document"
        raise BadInputError(
            f"{path}: is not a valid result ({where}: {item['msg']}). Delete it and run its task again."
        ) from error
    except (ValueError, RecursionError) as error:
        raise BadInputError(f"{path}: is not a valid result ({error}). Delete it and run its task again.") from error
    return result


def _depth(value: Any) -> int:
    inner = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return 1 + max(map(_depth, inner), default=0)


def _reject_constant(constant: str) -> None:
    raise ValueError(f"it contains {constant}")


def _to_json(value: Any) -> Any:
    """Convert values for JSON: numpy scalars and arrays to numbers and lists, others (paths, dtypes) to text."""
    return value.tolist() if hasattr(value, "tolist") else str(value)
