"""Encoders from one's own files, from plug-ins and from this package."""

from __future__ import annotations

import hashlib
import importlib.metadata
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from neco_bench.core.errors import BadInputError, MissingError, NumericalError, UsageError
from neco_bench.encoders import check_encoder, content_id, describe_models, load_encoder

SOURCE = """
import torch
from torch import nn
from neco_bench.encoders.base import DenseFeatures, Encoder

class Patches(nn.Module):
    embed_dim, stride, mean, std = 8, 16, (0.5, 0.5, 0.5), (0.5, 0.5, 0.5)
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.project = nn.Conv2d(3, 8, 16, 16)
    def forward(self, x):
        return self.project(x)

def module(): return Patches()

class Headed(Encoder):
    embed_dim, stride = 2, 16
    def __init__(self):
        super().__init__()
        self.backbone, self.head = Patches(), nn.Conv2d(8, 2, 1)
    def _encode(self, images, *, final_norm, attention):
        return DenseFeatures(self.head(self.backbone(images)), 16)
def headed(): return Headed()

class Own(Encoder):
    embed_dim, stride = 3, 8
    def _encode(self, images, *, final_norm, attention):
        return DenseFeatures(torch.nn.functional.avg_pool2d(images, 8), 8)

def own(): return Own()

class Bare(Own):
    def _encode(self, images, *, final_norm, attention):
        return images
def bare(): return Bare()

def fails(): raise RuntimeError("no such luck")
def number(): return 3
def featureless(): return nn.Linear(1, 1)
def wrong_dim():
    made = Patches(); made.embed_dim = 9
    return made
def list_out():
    made = Patches(); made.forward = lambda x: [x]
    return made
def raises_later():
    made = Patches(); made.forward = lambda x: 1 / 0
    return made
def infinite():
    made = Patches(); made.project.weight.data.fill_(float("inf"))
    return made
value = 3
"""


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "mine.py"
    path.write_text(SOURCE)
    return path


def test_a_module_and_an_encoder(file: Path) -> None:
    for name, dim in (("module", 8), ("own", 3)):
        encoder = load_encoder(f"{file}:{name}")
        assert encoder.name == f"{file}:{name}"
        assert encoder.encode(torch.rand(1, 3, 32, 48)).map.shape[:2] == (1, dim)
        assert all(line.passed for line in check_encoder(encoder))
        assert len(encoder.weights_id) == 64
    assert load_encoder(f"{file}:module").mean == (0.5, 0.5, 0.5)
    # Code without weights is known by its source file; the module's weights are what is known of it.
    assert load_encoder(f"{file}:own").weights_id == hashlib.sha256(file.read_bytes()).hexdigest()


def test_weights_for_a_module(file: Path, tmp_path: Path) -> None:
    state = {"project.weight": torch.zeros(8, 3, 16, 16), "project.bias": torch.ones(8)}
    save_file(state, tmp_path / "w.safetensors")
    encoder = load_encoder(f"{file}:module", weights=tmp_path / "w.safetensors")
    assert torch.equal(encoder.encode(torch.rand(1, 3, 16, 16)).map, torch.ones(1, 8, 1, 1))
    save_file({"project.weight": state["project.weight"]}, tmp_path / "w.safetensors")
    with pytest.raises(BadInputError, match=r"missing: project\.bias"):
        load_encoder(f"{file}:module", weights=tmp_path / "w.safetensors")
    with pytest.raises(UsageError, match="no weights to load"):
        load_encoder(f"{file}:own", weights=tmp_path / "w.safetensors")


def test_no_layer_of_one_s_own_is_taken_for_a_head_without_use(file: Path, tmp_path: Path) -> None:
    """Weights that differ there have another id, and a file must hold it."""
    state = {name: value.clone() for name, value in load_encoder(f"{file}:headed").state_dict().items()}
    ids = set()
    for scale in (1, 2):
        save_file(state | {"head.weight": state["head.weight"] * scale}, tmp_path / "w.safetensors")
        ids.add(load_encoder(f"{file}:headed", weights=tmp_path / "w.safetensors").weights_id)
    assert len(ids) == 2
    save_file({k: v for k, v in state.items() if "head" not in k}, tmp_path / "w.safetensors")
    with pytest.raises(BadInputError, match=r"2 missing: head\.bias, head\.weight"):
        load_encoder(f"{file}:headed", weights=tmp_path / "w.safetensors")


@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("absent", "module, Headed, headed, Own, own"),
        ("fails", "RuntimeError: no such luck"),
        ("number", "returned int"),
        ("featureless", "embed_dim and stride"),
        ("value", "not a function"),
    ],
)
def test_factories_at_fault(file: Path, name: str, told: str) -> None:
    with pytest.raises(BadInputError, match=told):
        load_encoder(f"{file}:{name}")


@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("wrong_dim", "expected"),
        ("list_out", "list|DenseFeatures"),
        ("raises_later", "ZeroDivision"),
        ("bare", "Dense"),
    ],
)
def test_encoders_at_fault(file: Path, name: str, told: str) -> None:
    encoder = load_encoder(f"{file}:{name}")
    with pytest.raises(BadInputError, match=told):
        encoder.encode(torch.rand(1, 3, 32, 32))
    assert not all(line.passed for line in check_encoder(encoder))


def test_infinite_features(file: Path) -> None:
    with pytest.raises(NumericalError):
        load_encoder(f"{file}:infinite").encode(torch.rand(1, 3, 32, 32))


def test_files_at_fault(tmp_path: Path) -> None:
    with pytest.raises(MissingError, match=r"absent\.py"):
        load_encoder(f"{tmp_path}/absent.py:make")
    (tmp_path / "broken.py").write_text("import nothing_of_this_name")
    with pytest.raises(BadInputError, match="nothing_of_this_name"):
        load_encoder(f"{tmp_path}/broken.py:make")
    (tmp_path / "syntax.py").write_text("def (")
    with pytest.raises(BadInputError, match="SyntaxError"):
        load_encoder(f"{tmp_path}/syntax.py:make")


def _install(monkeypatch: pytest.MonkeyPatch, **points: str) -> None:
    """Entry points as an installed package would have them."""
    made = [importlib.metadata.EntryPoint(name, value, "neco_bench.encoders") for name, value in points.items()]
    monkeypatch.setattr(
        importlib.metadata, "entry_points", lambda group: made if group == "neco_bench.encoders" else []
    )


def test_a_plugin(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(Path(__file__).parents[1] / "plugin"))
    _install(monkeypatch, plugin_grey="neco_bench_plugin_example.encoders:grey", broken="nowhere:x")
    assert {"plugin_grey", "broken"} <= {row["model"] for row in describe_models()}
    assert "neco_bench_plugin_example" not in sys.modules
    content_id("plugin_grey")
    encoder = load_encoder("plugin_grey")
    assert encoder.name == "plugin_grey"
    assert all(line.passed for line in check_encoder(encoder))
    with pytest.raises(BadInputError, match="nowhere"):
        load_encoder("broken")


def test_a_plugin_that_takes_a_zoo_name(monkeypatch: pytest.MonkeyPatch) -> None:
    _install(monkeypatch, neco_dinov2="somewhere:else")
    with pytest.raises(UsageError, match="registered by both"):
        load_encoder("baseline_rgb")


def test_baselines_look_at_each_image_alone() -> None:
    images = torch.rand(2, 3, 64, 48)
    for name in ("baseline_rgb", "baseline_hog"):
        encoder = load_encoder(name)
        torch.testing.assert_close(encoder.encode(images).map[1:], encoder.encode(images[1:]).map)
        flat = encoder.encode(torch.full((1, 3, 32, 32), 0.5)).map
        torch.testing.assert_close(flat, flat[..., :1, :1].expand_as(flat), rtol=1e-3, atol=1e-4)


def test_hog_tells_orientations_that_rgb_cannot() -> None:
    stripes = (torch.arange(64) // 4 % 2).float()
    pair = torch.stack([stripes.expand(3, 64, 64), stripes[:, None].expand(3, 64, 64)])
    centre = {name: load_encoder(name).encode(pair).map[..., 4, 4] for name in ("baseline_rgb", "baseline_hog")}
    torch.testing.assert_close(*centre["baseline_rgb"])
    assert (centre["baseline_hog"][0] - centre["baseline_hog"][1]).norm() > 0.5
