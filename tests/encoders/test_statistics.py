"""Statistics follow the weights: which are used, that they can be given, and that people are message."""

from __future__ import annotations

from pathlib import Path

import pytest
import timm
import torch
from safetensors.torch import save_file

from neco_bench.core.errors import UsageError
from neco_bench.encoders import check_encoder, content_id, load_encoder
from neco_bench.runner.execute import encoder_facts

TINY = "timm:vit_tiny_patch16_224"
SATELLITE = ((0.430, 0.411, 0.296), (0.213, 0.156, 0.143))


@pytest.fixture
def file(tmp_path: Path) -> Path:
    model = timm.create_model("vit_tiny_patch16_224", num_classes=0)
    save_file(model.state_dict(), tmp_path / "w.safetensors")
    return tmp_path / "w.safetensors"


def test_a_file_from_elsewhere_says_how_images_are_normalised(file: Path, caplog: pytest.LogCaptureFixture) -> None:
    encoder = load_encoder(TINY, weights=file)
    assert (encoder.mean, encoder.std) == ((0.5,) * 3, (0.5,) * 3)
    assert encoder.statistics == "timm's for vit_tiny_patch16_224.augreg_in21k_ft_in1k"
    (message,) = [record.message for record in caplog.records if "normalised" in record.message]
    assert str(file) in message
    assert "mean=0.5,0.5,0.5 std=0.5,0.5,0.5" in message
    assert "?mean=R,G,B&std=R,G,B" in message
    caplog.clear()
    load_encoder(f"{TINY}?pretrained=false")
    assert not caplog.records


def test_statistics_in_a_spec(file: Path, caplog: pytest.LogCaptureFixture) -> None:
    spec = f"{TINY}?mean=0.485,0.456,0.406&std=0.229,0.224,0.225"
    given, plain = load_encoder(spec, weights=file), load_encoder(TINY, weights=file)
    assert given.mean == (0.485, 0.456, 0.406)
    assert given.std == (0.229, 0.224, 0.225)
    assert given.statistics == "given in the spec"
    assert sum("normalised" in record.message for record in caplog.records) == 1  # of the plain one
    images = torch.rand(1, 3, 64, 64)
    expected = plain.encode(images, mean=given.mean, std=given.std).map
    assert torch.equal(given.encode(images).map, expected)
    assert not torch.allclose(plain.encode(images).map, expected)
    assert content_id(spec, file) != content_id(TINY, file)
    half = load_encoder(f"{TINY}?pretrained=false&mean=0.1,0.2,0.3")
    assert (half.mean, half.std) == ((0.1, 0.2, 0.3), (0.5, 0.5, 0.5))
    assert half.statistics.startswith("given in the spec; std: timm's for")


@pytest.mark.parametrize(
    "option", ["mean=1,2", "mean=a,b,c", "mean=123,116,103", "std=0,0.1,0.1", "std=nan,1,1", "mean="]
)
def test_statistics_that_are_none(option: str) -> None:
    with pytest.raises(UsageError, match=r"three numbers .* such as 0\.\d+"):
        load_encoder(f"{TINY}?pretrained=false&{option}")


def test_satellite_weights(file: Path) -> None:
    renamed = file.rename(file.with_name("dinov3_vitx_pretrain_sat493m-0123.safetensors"))
    encoder = load_encoder(TINY, weights=renamed)
    assert (encoder.mean, encoder.std) == SATELLITE
    assert "SAT-493M" in encoder.statistics
    known = timm.get_pretrained_cfg("vit_large_patch16_dinov3.sat493m")
    assert known is not None
    assert (known.mean, known.std) == SATELLITE
    assert load_encoder(f"{TINY}?mean=0.5,0.5,0.5&std=0.5,0.5,0.5", weights=renamed).mean == (0.5, 0.5, 0.5)


@pytest.mark.slow
def test_results_and_check_say_what_is_fed(file: Path) -> None:
    facts = encoder_facts(load_encoder(TINY, weights=file))["encoder"]
    assert tuple(facts["mean"]) == (0.5, 0.5, 0.5)
    assert facts["statistics"].startswith("timm's for")
    lines = {line.name: line.detail for line in check_encoder(load_encoder(f"{TINY}?pretrained=false"))}
    assert lines["input"] == (
        "multiples of 16 pixels; mean=0.5,0.5,0.5 std=0.5,0.5,0.5 (timm's for "
        "vit_tiny_patch16_224.augreg_in21k_ft_in1k); values from -1.00 to 1.00"
    )
