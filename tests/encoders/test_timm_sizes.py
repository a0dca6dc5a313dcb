"""Sizes and levels of timm architectures: the table in docs/pages/encoders.md holds, and what is behind it is right."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from neco_bench.core.errors import UsageError
from neco_bench.core.protocol import find_tasks
from neco_bench.encoders import check_encoder, load_encoder
from neco_bench.encoders.adapters.timm_sizes import create, measure
from neco_bench.runner.api import run
from neco_bench.runner.execute import check_size, settings_for
from neco_bench.runner.job import job_of

from .timm_table import row_of, rows

ROWS = rows()
# One of each behaviour: any size, multiples of the deepest stride or of a block, built for each size, one size.
QUICK = ["resnet18", "mobilevitv2_050", "mixer_s32_224", "pit_ti_224", "levit_128s", "vit_relpos_small_patch16_224"]


def level(name: str, index: int = -1) -> Any:
    with torch.device("meta"):
        model = create(name, 0, num_classes=0)
    return measure(model, index % len(model.feature_info), name)


def test_the_table_is_wide() -> None:
    assert len(ROWS) >= 100
    assert sum("not supported" not in row for row in ROWS.values()) >= 100
    assert set(QUICK) <= ROWS.keys()


@pytest.mark.parametrize("name", [n if n in QUICK else pytest.param(n, marks=pytest.mark.slow) for n in ROWS])
def test_architectures(name: str) -> None:
    assert row_of(name) == ROWS[name]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "index", "stride", "multiple", "padding"),
    [
        ("hrnet_w18_small", 1, 4, 32, 0),
        ("dla34", 2, 4, 32, 0),
        ("lambda_resnet26t", 2, 8, 32, 0),
        ("resnetaa34d", 1, 4, 32, 0),
        ("tresnet_m", 0, 4, 32, 0),  # timm says 2
        ("mobilevitv2_050", -1, 32, 64, 0),
        ("legacy_xception", 1, 4, 4, 3),
        pytest.param("inception_v4", 2, 8, 8, 19, marks=pytest.mark.slow),
    ],
)
def test_inner_levels(name: str, index: int, stride: int, multiple: int, padding: int) -> None:
    actual = level(name, index)
    assert (actual.stride, actual.multiple, actual.padding, actual.size) == (stride, multiple, padding, None)


def test_a_level_of_no_whole_stride() -> None:
    with pytest.raises(UsageError, match="27x27 cells for 224x224"):
        level("pit_ti_224", 0)


@pytest.mark.slow
def test_the_last_norm_and_the_last_convolution() -> None:
    """What timm's `forward_features` gives is what is read."""
    for name in ("coat_lite_tiny", "fastvit_t8"):
        encoder: Any = load_encoder(f"timm:{name}?pretrained=false")
        images = torch.rand(1, 3, 224, 224)
        mean, std = (torch.tensor(values).view(3, 1, 1) for values in (encoder.mean, encoder.std))
        with torch.inference_mode():
            expected = encoder.model.forward_features((images - mean) / std)
        if expected.ndim == 3:
            expected = expected[:, 1:].transpose(1, 2).unflatten(2, (7, 7))
        torch.testing.assert_close(encoder.encode(images).map, expected, rtol=1e-4, atol=1e-4)
        assert encoder.has_final_norm == (name == "coat_lite_tiny")


@pytest.mark.slow
def test_padding_keeps_cells_in_place() -> None:
    encoder = load_encoder("timm:inception_v4?pretrained=false", layers=2)
    passed = {line.name: line.passed for line in check_encoder(encoder)}
    assert passed["shape and stride"]
    assert passed["locality"]


@pytest.mark.slow
def test_models_built_for_each_size_are_those_of_timm() -> None:
    name = "vit_relpos_small_patch16_224"
    encoder: Any = load_encoder(f"timm:{name}?pretrained=false")
    own, wide = torch.rand(1, 3, 224, 224), torch.rand(1, 3, 128, 192)
    before = encoder.encode(own).map
    names, identity = list(encoder.state_dict()), encoder.weights_id
    actual = encoder.encode(wide).map
    expected = create(name, 0, num_classes=0).eval()
    expected.load_state_dict(encoder.model.state_dict())
    expected.set_input_size(img_size=(128, 192))
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (encoder.mean, encoder.std))
    with torch.inference_mode():
        (reference,) = expected.forward_intermediates(
            (wide - mean) / std, indices=1, norm=True, intermediates_only=True
        )
    torch.testing.assert_close(actual, reference, rtol=1e-4, atol=1e-4)
    assert torch.equal(encoder.encode(own).map, before)  # the original is as it was
    assert (list(encoder.state_dict()), encoder.weights_id) == (names, identity)
    with pytest.raises(UsageError, match="cannot be trained at 128x192"):
        encoder._encode(wide, final_norm=True, attention=False)


ONE_SIZE = "timm:mixer_s32_224?pretrained=false"


OWN = """
import torch
from neco_bench import DenseFeatures, Encoder

class Pool(Encoder):
    embed_dim, stride, only_size = 3, 8, 96

    def _encode(self, images, *, final_norm, attention):
        return DenseFeatures(torch.nn.functional.avg_pool2d(images, 8), 8, final_norm=False)
"""


def test_one_size_is_another_condition(tmp_path: Path) -> None:
    (tmp_path / "own.py").write_text(OWN)
    model = f"{tmp_path}/own.py:Pool"
    result = run(model, "shapes_cluster_gt", out=tmp_path, limit=2)
    features = result.provenance["features"]
    assert result.model == f"{model}[input=96]"
    assert (features["input_size"], features["used_size"], features["tokens"]) == (224, 96, 144)
    assert (features["only_size"], features["size_multiple"]) == (96, 8)
    assert job_of(result).model == model
    again = run(model, "shapes_cluster_gt", out=tmp_path, limit=2)
    assert (again.model, again.key) == (result.model, result.key)


def test_sizes_that_are_asked_for_and_not_to_be_had() -> None:
    encoder = load_encoder(ONE_SIZE)
    with pytest.raises(UsageError, match="224x224 only"):
        encoder.encode(torch.rand(1, 3, 256, 256))
    (task,) = find_tasks(["shapes_cluster_gt"], {"input_size": 256})
    with pytest.raises(UsageError, match="takes inputs of 224x224 only"):
        check_size(task, encoder)
    (task,) = find_tasks(["shapes_cluster_gt"], {"tokens_per_side": 8})
    with pytest.raises(UsageError, match="the nearest size is 224x224"):
        settings_for(task, encoder)


def test_multiples_that_are_larger_than_the_stride() -> None:
    encoder = load_encoder("timm:dla34?pretrained=false", layers=2)
    assert (encoder.stride, encoder.size_multiple) == (4, 32)
    assert [encoder.nearest_size(size) for size in (1, 448, 518, 528, 530)] == [32, 448, 512, 544, 544]
    assert encoder.encode(torch.rand(1, 3, 64, 96)).map.shape == (1, 64, 16, 24)
    with pytest.raises(UsageError, match="not a multiple of 32"):
        encoder.encode(torch.rand(1, 3, 68, 64))
    (task,) = find_tasks(["shapes_cluster_gt"], {"input_size": 100})
    assert settings_for(task, encoder).input_size == 96
    with pytest.raises(UsageError, match="Use 96 or 128"):
        check_size(task, encoder)
