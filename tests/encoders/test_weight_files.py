"""Files are what their first bytes say, read without running code of theirs; what cannot be read is named."""

from __future__ import annotations

import argparse
import gzip
import io
import json
import logging
import pathlib
import pickle
import sys
import tarfile
import types
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from neco_bench.core.errors import BadInputError, MissingError
from neco_bench.encoders.weight_files import files_of, read_tensors
from neco_bench.encoders.weights import select, strip_wrappers

STATE = {"blocks.0.weight": torch.arange(6.0).view(2, 3), "norm.weight": torch.ones(3)}


def same(read: dict[str, Tensor]) -> bool:
    return read.keys() == STATE.keys() and all(torch.equal(read[key], value) for key, value in STATE.items())


@contextmanager
def packages(**classes: type) -> Iterator[None]:
    """Classes of packages that are there while a file is written, and gone when it is read: `a__b` for `a.b`."""
    made: dict[str, types.ModuleType] = {}
    for name, kind in classes.items():
        module = types.ModuleType(name.replace("__", "."))
        made |= {module.__name__.partition(".")[0]: types.ModuleType("parent"), module.__name__: module}
        kind.__module__, kind.__qualname__ = module.__name__, kind.__name__
        setattr(module, kind.__name__, kind)
    sys.modules.update(made)
    try:
        yield
    finally:
        for name in made:
            del sys.modules[name]


class ReadOnlyList(list):
    pass


class CfgNode(dict):
    pass


class DictConfig:
    pass


class Slots:
    __slots__ = ("a",)


def test_hyper_parameters_of_other_packages(tmp_path: Path) -> None:
    """sacred's lists, yacs' and omegaconf's configurations, numpy's numbers, paths, dates: none keeps a file unread."""
    node, config, slots = CfgNode(a=1), DictConfig(), Slots()
    node.frozen, config.parent, config.values, slots.a = True, config, {"lr": 1.0}, 3  # type: ignore[attr-defined]
    facts = {
        "crops": ReadOnlyList([1, ReadOnlyList([2])]),
        "node": node,
        "config": config,
        "slots": slots,
        "path": pathlib.PurePosixPath("/a/b"),
        "lr": np.float64(0.1),
        "step": np.int64(3),
        "rng": np.random.RandomState(0).get_state(),
        "args": argparse.Namespace(arch="vit", out=pathlib.PurePosixPath("out")),
    }
    with packages(sacred__custom=ReadOnlyList, yacs__config=CfgNode, omegaconf__node=DictConfig, other__slots=Slots):
        for kind in ("zip", "old"):
            content = {"state_dict": STATE, "hyper_parameters": facts}
            torch.save(content, tmp_path / kind, _use_new_zipfile_serialization=kind == "zip")
    for kind in ("zip", "old"):
        read = read_tensors(tmp_path / kind)
        assert same({key.removeprefix("state_dict."): value for key, value in read.items()})


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(2))
        self.register_buffer("count", torch.zeros(1))


def test_a_module_saved_whole(tmp_path: Path) -> None:
    model = nn.Sequential(Block(), nn.Linear(2, 3), nn.BatchNorm1d(3))
    with packages(research__models=Block):
        torch.save({"model": model}, tmp_path / "m.pth")
    names = {f"model.{key}" for key in model.state_dict()}
    read = strip_wrappers(read_tensors(tmp_path / "m.pth"), names)
    assert read.keys() == names
    assert all(torch.equal(read[f"model.{key}"], value) for key, value in model.state_dict().items())


class Attack:
    def __init__(self, call: Any, *args: Any) -> None:
        self.call, self.args = call, args

    def __reduce__(self) -> Any:
        return self.call, self.args


@pytest.mark.parametrize(
    ("call", "argument", "message"),
    [
        (Path.touch, Path("attacked"), r"builtins\.getattr"),
        (eval, "open('attacked', 'w')", r"builtins\.eval"),
        (sys.modules["os"].system, "touch attacked", r"(posix|nt)\.system"),
        (sys.modules["subprocess"].getoutput, "touch attacked", r"subprocess\.getoutput"),
    ],
)
@pytest.mark.parametrize("form", ["zip", "old", "pickle"])
def test_code_is_refused_by_name(
    call: Any, argument: Any, message: str, form: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    content = {"args": Attack(call, argument), **STATE}
    if form == "pickle":
        Path("bad.pth").write_bytes(pickle.dumps(content, protocol=2))
    else:
        torch.save(content, "bad.pth", _use_new_zipfile_serialization=form == "zip")
    with pytest.raises(BadInputError, match=rf"bad\.pth would run code when it is read \({message}\)"):
        read_tensors(Path("bad.pth"))
    assert not Path("attacked").exists()


def test_functions_of_other_packages_do_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    torch.save({"hook": Attack(save_file, {"a": torch.ones(1)}, "attacked"), **STATE}, tmp_path / "w.pth")
    assert same(read_tensors(tmp_path / "w.pth"))
    assert not Path("attacked").exists()


def zipped(**members: bytes) -> bytes:
    with zipfile.ZipFile(buffer := io.BytesIO(), "w") as archive:
        for name, content in members.items():
            archive.writestr(name.replace("__", "."), content)
    return buffer.getvalue()


def tarred() -> bytes:
    with tarfile.open(fileobj=(buffer := io.BytesIO()), mode="w") as archive:
        archive.addfile(tarfile.TarInfo("w.pth"))
    return buffer.getvalue()


def npz() -> bytes:
    np.savez(buffer := io.BytesIO(), a=np.ones(2))
    return buffer.getvalue()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "git-lfs pointer.*git lfs pull"),
        (b"<!DOCTYPE html><html></html>", "a web page"),
        (b"\n<html><body>Sign in</body></html>", "a web page"),
        (b'<?xml version="1.0"?><Error>AccessDenied</Error>', "a web page"),
        (gzip.compress(b"weights", mtime=0), "compressed with gzip"),
        (b"BZh91AY", "compressed with bzip2"),
        (b"\xfd7zXZ\x00", "compressed with xz"),
        (zipped(w__pth=b"1", readme__txt=b"2"), r"a zip archive of w\.pth, readme\.txt"),
        (npz(), r"a NumPy archive \(\.npz\)"),
        (tarred(), "a tar archive"),
        (b"\x89HDF\r\n\x1a\n", "an HDF5 file"),
        (b'{"a": 1}', "a JSON document"),
        (b"", "empty"),
        (b"\x00\x01\x02 something", r"neither safetensors nor a PyTorch checkpoint.* begins with b'\\x00"),
        (pickle.dumps(STATE, protocol=4), "protocol 4"),
    ],
    ids=lambda value: value if isinstance(value, str) else "file",  # pickles name storages by their address
)
@pytest.mark.parametrize("name", ["w.pth", "w.safetensors"])
def test_other_files_are_named_for_what_they_are(content: bytes, message: str, name: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(BadInputError, match=rf"(?s){name} .*{message}") as caught:
        read_tensors(tmp_path / name)
    assert "truncated" not in str(caught.value) or "begins with" in str(caught.value)


@pytest.mark.parametrize("name", ["W.SAFETENSORS", "w.Pth", "w", "w.pth"])
def test_the_suffix_does_not_matter(name: str, tmp_path: Path) -> None:
    for write in (torch.save, save_file):
        write(STATE, tmp_path / name)
        assert same(read_tensors(tmp_path / name))


def sharded(folder: Path, kind: str = "model.safetensors") -> Path:
    names = {}
    for i, (key, value) in enumerate(STATE.items(), 1):
        names[key] = f"model-0000{i}-of-00002.safetensors"
        save_file({key: value}, folder / names[key])
    (folder / f"{kind}.index.json").write_text(json.dumps({"metadata": {}, "weight_map": names}))
    return folder / f"{kind}.index.json"


def test_shards_and_folders(tmp_path: Path) -> None:
    index = sharded(tmp_path)
    assert [file.name for file in files_of(index)] == [
        index.name,
        *(f"model-0000{i}-of-00002.safetensors" for i in (1, 2)),
    ]
    assert same(read_tensors(index))
    assert same(read_tensors(tmp_path))
    save_file({"x": torch.ones(1)}, tmp_path / "model-00002-of-00002.safetensors")
    with pytest.raises(BadInputError, match=r"lack norm\.weight"):
        read_tensors(index)
    (tmp_path / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(MissingError, match=r"model-00002-of-00002\.safetensors"):
        read_tensors(tmp_path)
    for text in (
        "{",
        "[]",
        '{"weight_map": {}}',
        '{"weight_map": {"a": "../w.pth"}}',
        '{"weight_map": {"a": 3}}',
        "\ud800",
    ):
        index.write_bytes(text.encode("utf-8", "surrogatepass"))
        with pytest.raises(BadInputError, match="not an index of shards"):
            read_tensors(index)


def test_folders_with_and_without_a_choice(tmp_path: Path) -> None:
    with pytest.raises(BadInputError, match="contains no weights file"):
        read_tensors(tmp_path)
    torch.save(STATE, tmp_path / "last.PTH")
    assert same(read_tensors(tmp_path))
    torch.save(STATE, tmp_path / "best.ckpt")
    with pytest.raises(BadInputError, match=r"several weights files \(best\.ckpt, last\.PTH\)"):
        read_tensors(tmp_path)
    (tmp_path / "encoder.json").write_text("{}")
    with pytest.raises(BadInputError, match="use it as the model"):
        read_tensors(tmp_path)


NAMES = ["cls_token", "blocks.0.attn.qkv.weight", "blocks.0.attn.proj.weight", "norm.weight"]


def copies(**prefixes: float) -> dict[str, Tensor]:
    """One copy of a model per prefix, in which all numbers are the same."""
    return {f"{p.replace('__', '.')}.{name}": torch.full((2,), v) for p, v in prefixes.items() for name in NAMES}


@pytest.mark.parametrize(
    ("prefixes", "used", "other"),
    [
        (("state_dict", "state_dict_ema"), 1, "state_dict"),  # timm
        (("model", "model_ema"), 1, "model"),  # DeiT
        (
            ("state_dict__module__base_encoder", "state_dict__module__momentum_encoder"),
            0,
            "momentum_encoder",
        ),  # MoCo v3
        (("state_dict__backbone", "state_dict__momentum_backbone"), 0, "momentum_backbone"),  # solo-learn
        (("ema__online_model", "ema__ema_model"), 1, "online_model"),
        (("model", "ema__online_model", "ema__ema_model"), 2, "ema.online_model"),
        (("encoder", "decoder"), 0, "decoder"),
        (("encoder__module", "target_encoder__module"), 0, "target_encoder"),  # I-JEPA
        (("student__backbone", "teacher__backbone"), 1, "student"),
        (("state_dict__model", "state_dict__teacher"), 0, "teacher"),  # Lightning
    ],
)
def test_copies_of_a_model_in_one_file(
    prefixes: tuple[str, ...], used: int, other: str, caplog: pytest.LogCaptureFixture
) -> None:
    tensors = strip_wrappers(copies(**{prefix: float(i) for i, prefix in enumerate(prefixes)}), NAMES)
    with caplog.at_level(logging.WARNING, "neco_bench"):
        inside, outside = select(tensors, NAMES, Path("f"))
    assert inside.keys() == set(NAMES)
    assert {float(value[0]) for value in inside.values()} == {used}
    assert len(outside) == len(prefixes) - 1
    assert "several copies" in caplog.text
    inside, _ = select(tensors, NAMES, Path("f"), other)
    assert {float(value[0]) for value in inside.values()} == {prefixes.index(_spelled(prefixes, other))}
    with pytest.raises(BadInputError, match=r"no nothing branch\. Set \?branch= to one of: ") as caught:
        select(tensors, NAMES, Path("f"), "nothing")
    assert other in str(caught.value)


def _spelled(prefixes: tuple[str, ...], other: str) -> str:
    return next(p for p in prefixes if f".{other}." in f".{p.replace('__', '.')}.")


def test_the_top_level_is_a_copy_too() -> None:
    tensors = {name: torch.zeros(2) for name in NAMES} | copies(shadow=1.0)
    with pytest.raises(BadInputError, match=r"several copies of the model\. Set \?branch= to one of: \., shadow\."):
        select(tensors, NAMES, Path("f"))
    for branch, value in ((".", 0.0), ("shadow", 1.0)):
        inside, _ = select(tensors, NAMES, Path("f"), branch)
        assert all(float(inside[name][0]) == value for name in NAMES)


@pytest.mark.parametrize(
    "rename",
    [
        lambda name: name.replace("blocks.0.", "blocks.0._orig_mod."),
        lambda name: f"module.{name.replace('attn.', 'attn._orig_mod.')}",
        lambda name: f"_orig_mod.module.{name}",
        lambda name: f"model._forward_module.{name.replace('blocks.0.', 'blocks.0._fsdp_wrapped_module.')}",
        lambda name: name.replace("blocks.0.", "blocks.0._checkpoint_wrapped_module."),
    ],
)
def test_wrappers_anywhere_in_a_name(rename: Callable[[str], str]) -> None:
    tensors = {rename(name): torch.ones(2) for name in NAMES}
    inside, outside = select(strip_wrappers(tensors, NAMES), NAMES, Path("f"))
    assert inside.keys() == set(NAMES)
    assert outside == ()


def test_a_model_s_own_parts_are_no_wrappers() -> None:
    names = ["module.weight", "weight"]
    tensors = {name: torch.ones(1) for name in names}
    assert strip_wrappers(tensors, names).keys() == set(names)
    assert strip_wrappers(tensors, ["weight"]).keys() == set(names)  # two tensors never become one
