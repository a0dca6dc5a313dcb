"""Read weights files of any format without running code in them.

The first bytes of a file determine its format: safetensors, a PyTorch checkpoint (zip or the older format), a
TorchScript archive, of which only the tensors are read, or an index of shards. Checkpoints are read with
`weights_only=True`. Objects in them that are not tensors (arguments, configurations, whole modules) are replaced by
placeholders that do nothing.
Importing this module imports no torch.
"""

from __future__ import annotations

import _compat_pickle
import builtins
import contextlib
import io
import itertools
import json
import pickle
import pickletools
import re
import sys
import zipfile
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from neco_bench.core.errors import BadInputError, MissingError, NecoBenchError, first_names

if TYPE_CHECKING:
    from torch import Tensor

SUFFIXES = (".safetensors", ".pth", ".pt", ".bin", ".ckpt")

_UNPACK = "Unpack it and pass the weights file in it."

_OTHER_FILES = (
    (b"version https://git-lfs", "a git-lfs pointer instead of the file. Download the file: git lfs pull."),
    (b"\x1f\x8b", f"compressed with gzip. {_UNPACK}"),
    (b"BZh", f"compressed with bzip2. {_UNPACK}"),
    (b"\xfd7zXZ", f"compressed with xz. {_UNPACK}"),
    (b"(\xb5/\xfd", f"compressed with zstd. {_UNPACK}"),
    (b"7z\xbc\xaf", f"a 7z archive. {_UNPACK}"),
    (b"Rar!", f"a RAR archive. {_UNPACK}"),
    (b"\x93NUMPY", "a NumPy array (.npy). Pass weights of PyTorch."),
    (b"\x89HDF", "an HDF5 file, as Keras writes. Pass weights of PyTorch."),
    (b"GGUF", "a GGUF file. Pass weights of PyTorch."),
)

# Modules of the standard library whose classes checkpoints may contain as data.
_HARMLESS = {
    *("argparse", "collections", "copyreg", "dataclasses", "datetime", "decimal", "enum", "fractions"),
    *("functools", "numbers", "pathlib", "random", "types", "typing", "uuid"),
}


def files_of(path: Path) -> list[Path]:
    """Return the weights files: one file, or an index of shards followed by its shards.

    Args:
        path: a file, an index, or a folder with one of them.

    Raises `MissingError` (a missing file) and `BadInputError` (a broken index, a folder with no or several files).
    """
    if path.is_dir():
        path = _in_folder(path)
    if not path.is_file():
        raise MissingError(f"Weights file {path} does not exist.")
    if path.suffix.lower() != ".json":
        return [path]
    try:
        names = sorted(set(json.loads(path.read_text(encoding="utf-8"))["weight_map"].values()))
        shards = [path.parent / name for name in names]
        if not names or any(Path(name).name != name for name in names):
            raise ValueError("names of shards")
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise BadInputError(
            f"{path} is not an index of shards (JSON with a weight_map). Pass the weights file."
        ) from error
    if absent := [shard.name for shard in shards if not shard.is_file()]:
        raise MissingError(f"Shards that {path} names are missing in its folder: {first_names(absent)}.")
    return [path, *shards]


def _in_folder(folder: Path) -> Path:
    """Return the only weights file or index in a folder."""
    if (folder / "encoder.json").is_file():
        raise BadInputError(f"{folder} is the folder of a training run: use it as the model, without --weights.")
    for name in ("model.safetensors", "pytorch_model.bin"):  # standard names
        for file in (folder / name, folder / f"{name}.index.json"):
            if file.is_file():
                return file
    files = sorted(file for file in folder.iterdir() if file.suffix.lower() in SUFFIXES)
    if len(files) != 1:
        content = f"several weights files ({first_names(file.name for file in files)})" if files else "no weights file"
        raise BadInputError(f"Folder {folder} contains {content}. Name the weights file.")
    return files[0]


def read_tensors(path: Path) -> dict[str, Tensor]:
    """Read all tensors of a file, an index of shards or a folder on the CPU; names of nested dictionaries are dotted.

    Raises `MissingError` (no such file) and `BadInputError` (truncated, not a weights file, or a file that would run
    code), whose messages name the file.
    """
    first, *shards = files_of(path)
    tensors: dict[str, Tensor] = {}
    for file in shards or [first]:
        tensors |= _read(file)
    if shards:
        names = json.loads(first.read_text(encoding="utf-8"))["weight_map"]
        if absent := [name for name in names if name not in tensors]:
            raise BadInputError(f"The shards of {first} lack {first_names(absent)}. Download them again.")
    if not tensors:
        raise BadInputError(f"Weights file {path} contains no named tensors.")
    return tensors


def _read(path: Path) -> dict[str, Tensor]:
    try:
        with path.open("rb") as file:
            start = file.read(512)
        if start[8:9] == b"{" and int.from_bytes(start[:8], "little") < 1 << 27:
            from safetensors.torch import load_file  # imports torch

            return load_file(path)
        if start.startswith(b"PK\x03\x04"):
            content = _read_zip(path)
        elif start.startswith(b"\x80"):
            with path.open("rb") as file:
                # The older format: five pickles, then data.
                names = set().union(*(_names_in_pickle(file) for _ in range(5)))
            content = _load(path, path, names, start[1])
        else:
            raise BadInputError(f"Weights file {path} is {_other_kind(start)}")
    except NecoBenchError:
        raise
    except Exception as error:  # readers raise many types; in all cases, this file is at fault
        reason = str(error).strip().partition("\n")[0][:200]
        raise BadInputError(
            f"Weights file {path} could not be read; it may be truncated. Download it again. "
            f"({type(error).__name__}: {reason})"
        ) from error
    return dict(_flatten(content, "", ()))


def _other_kind(start: bytes) -> str:
    """Return the kind of a file without weights, from its first bytes, and the fix."""
    if not start:
        return "empty. Download it again."
    for magic, what in _OTHER_FILES:
        if start.startswith(magic):
            return what
    if start[257:262] == b"ustar":
        return f"a tar archive. {_UNPACK}"
    if start.lstrip(b"\xef\xbb\xbf \t\r\n")[:1] == b"<":
        return "a web page, which servers send if a file does not exist or needs a login. Download it again."
    if start.lstrip()[:1] in (b"{", b"["):
        return "a JSON document. Pass the weights file; an index of shards must end in .json."
    return f"neither safetensors nor a PyTorch checkpoint: it begins with {start[:8]!r}. It may be truncated."


def _read_zip(path: Path) -> Any:
    """Return the content of a checkpoint in zip format; for a TorchScript archive, placeholders with its tensors."""
    with zipfile.ZipFile(path) as archive:
        names = archive.namelist()
        main = next((name for name in names if name.count("/") == 1 and name.endswith("/data.pkl")), None)
        if main is None:
            if all(name.endswith(".npy") for name in names):
                what = "a NumPy archive (.npz), as used for JAX models. Pass weights of PyTorch."
            else:
                what = f"a zip archive of {first_names(names)}. {_UNPACK}"
            raise BadInputError(f"Weights file {path} is {what}")
        pickled = archive.read(main)
        root = main.removesuffix("data.pkl")
        source: Path | io.BytesIO = path
        if f"{root}constants.pkl" in names:  # TorchScript: the same without its code
            source = io.BytesIO()
            with zipfile.ZipFile(source, "w") as plain:
                for name in names:
                    if re.match(r"(data\.pkl|data/[^/]+|version|byteorder)$", name.removeprefix(root)):
                        plain.writestr(name, archive.read(name))
    return _load(path, source, _names_in_pickle(io.BytesIO(pickled)), pickled[1] if len(pickled) > 1 else 2)


def _names_in_pickle(stream: Any) -> set[str]:
    """Return the functions and classes that the next pickle in a stream names, without running it."""
    names = set()
    try:
        for operation, argument, _ in pickletools.genops(stream):
            if operation.name == "GLOBAL":
                module, _, name = str(argument).partition(" ")
                module, name = _compat_pickle.NAME_MAPPING.get(
                    (module, name), (_compat_pickle.IMPORT_MAPPING.get(module, module), name)
                )
                names.add(f"{module}.{name}")
    except ValueError:  # end of the file, or damage, which torch's reader reports
        pass
    return names


class _Placeholder:
    """Replacement of an object that is not read: it accepts any arguments and any state, and does nothing."""

    def __new__(cls, *_args: Any) -> Any:
        return object.__new__(cls)

    def __init__(self, *_args: Any) -> None:
        pass

    def __setstate__(self, state: Any) -> None:
        if isinstance(state, dict):
            self.__dict__.update({key: value for key, value in state.items() if isinstance(key, str)})


class _PlaceholderList(_Placeholder):
    def __new__(cls, *_args: Any) -> Any:
        return []


class _PlaceholderDict(_Placeholder):
    def __new__(cls, *_args: Any) -> Any:
        return OrderedDict()  # torch's reader also sets a state on these


def _load(path: Path, source: Path | io.BytesIO, names: set[str], protocol: int) -> Any:
    """Call `torch.load` with placeholders for names that torch does not know.

    Whether a placeholder must be an object, a list or a dictionary is only known when torch fills it; reading then
    starts again.
    """
    import torch  # slow to import

    for name in sorted(names):
        if name.startswith("torch.distributed."):
            raise BadInputError(
                f"Weights file {path} has tensors that are split over processes ({name}). Gather them and save again."
            )
        if not _may_be_replaced(name):
            raise BadInputError(
                f"Weights file {path} would run code when it is read ({name}), and was not opened. If you trust "
                f"its source, convert it to .safetensors, or save only its state dict."
            )
    kinds: dict[str, type] = dict.fromkeys(names, _Placeholder)
    for _ in range(len(names) + 1):
        placeholders: list[Any] = [_make_class(name, kind) for name, kind in kinds.items()]
        try:
            with _open_at_start(source) as stream, torch.serialization.safe_globals(placeholders):
                return torch.load(stream, map_location="cpu", weights_only=True)
        except (pickle.UnpicklingError, TypeError) as error:
            kind, filled = _kind_of_filled(str(error))
            unsettled = [name for name, kind in kinds.items() if kind is _Placeholder and f".{name}".endswith(filled)]
            if kind and unsettled:
                kinds |= dict.fromkeys(unsettled, kind)
            elif isinstance(error, TypeError):
                raise
            elif protocol > 2:
                raise BadInputError(
                    f"Weights file {path} is a pickle of protocol {protocol}, which cannot be read safely. Save its "
                    f"state dict again with torch.save."
                ) from error
            else:
                starts = ("Unsupported", "Can only", "Trying to", "Only persistent", "unsupported")  # of torch's errors
                reason = next((line for line in str(error).splitlines() if line.startswith(starts)), str(error))
                raise BadInputError(f"Weights file {path} was not opened: {reason.strip()}") from error
    raise AssertionError("each round determines one kind, or returns")


def _kind_of_filled(message: str) -> tuple[type | None, str]:
    """Return the kind that a placeholder must have, and the last part of its name, from torch's error message."""
    if match := re.search(r"Can only (append|extend|SETITEM)\w* .*got <class '(.+?)'>", message):
        return (_PlaceholderDict if match[1] == "SETITEM" else _PlaceholderList), f".{match[2]}"
    if match := re.match(r"'(\w+)' object does not support item assignment", message):  # torch before 2.8
        return _PlaceholderDict, f".{match[1]}"
    return None, ""


def _open_at_start(source: Path | io.BytesIO) -> Any:
    """Open a stream at its start, because torch would use the suffix of a path."""
    if isinstance(source, Path):
        return source.open("rb")
    source.seek(0)
    return contextlib.nullcontext(source)


def _make_class(name: str, kind: type) -> type:
    module, _, short = name.rpartition(".")
    return type(short, (kind,), {"__module__": module, "__qualname__": short})


def _may_be_replaced(name: str) -> bool:
    """Return whether a placeholder may replace this class or function; otherwise the file would run code."""
    module, _, short = name.rpartition(".")
    root = module.partition(".")[0]
    if root == "builtins":
        return isinstance(getattr(builtins, short, None), type)
    if name == "_codecs.encode":  # used to store bytes; torch reads it
        return True
    return root in _HARMLESS or root not in sys.stdlib_module_names


def _flatten(content: Any, prefix: str, above: tuple[int, ...]) -> Iterator[tuple[str, Tensor]]:
    """Yield dotted names and tensors of nested dictionaries and placeholders; `above` prevents loops."""
    from torch import Tensor  # slow to import

    if id(content) in above:
        return
    items: Iterable[Any] = content.items() if isinstance(content, Mapping) else ()
    if isinstance(content, _Placeholder | Mapping) and hasattr(content, "__dict__"):
        items = itertools.chain(items, vars(content).items())
    for key, value in items:
        if isinstance(value, Tensor):
            yield f"{prefix}{key}", value.detach()
        elif isinstance(key, str):
            yield from _flatten(value, f"{prefix}{key}.", (*above, id(content)))
