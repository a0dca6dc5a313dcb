"""--reference of bench_in_context.py, on a stand-in for the package `hbird`: the reference itself is not here."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import nn

from neco_bench.core.protocol import find_tasks
from tests.benchmarks import bench_in_context as bench
from tests.data.data_helpers import CAMVID_SIZE, image_of, save
from tests.typed import load_segmentation

# Has the arguments and calls of the reference's entry point, and returns the share of patches that are their own
# neighbours instead of mIoU.
STAND_IN = """
import torch
from torchvision.transforms.functional import InterpolationMode, resize, to_tensor

def get_dataset(*arguments):
    raise ValueError("Unknown dataset name")

def hbird_evaluation(model, d_model, patch_size, dataset_name, data_dir, batch_size=64, input_size=224,
                     augmentation_epoch=1, device="cpu", return_knn_details=False, n_neighbours=30, nn_method="scann",
                     nn_params=None, ftr_extr_fn=None, memory_size=None, num_workers=8, ignore_index=255,
                     train_fs_path=None, val_fs_path=None):
    def transform(image, mask):
        return tuple(resize(to_tensor(part), [input_size] * 2, InterpolationMode.NEAREST) for part in (image, mask))

    data, ignored = get_dataset(dataset_name, data_dir, batch_size, 0, transform, transform, train_fs_path, val_fs_path)
    assert (data.get_train_dataset_size(), data.get_num_classes(), ignored) == (2, 11, 255)
    assert (nn_method, memory_size, augmentation_epoch, d_model) == ("faiss", 8, 1, 4)
    from hbird.nn.search_faiss import NearestNeighborSearchFaiss
    with torch.no_grad():
        ((images, masks),) = data.train_dataloader()
        assert set((masks * 255).long().unique().tolist()) == {10, 255}
        keys = torch.nn.functional.normalize(ftr_extr_fn(model, images)[0].flatten(0, 1), dim=1)
        search = NearestNeighborSearchFaiss(keys, n_neighbors=n_neighbours)
        ((images, _),) = data.val_dataloader()
        queries = torch.nn.functional.normalize(ftr_extr_fn(model, images)[0].flatten(0, 1), dim=1)
    neighbours, products = search.find_nearest_neighbors(queries)
    assert neighbours.shape == products.shape == (8, 3)
    return (torch.from_numpy(neighbours[:, 0]) == torch.arange(8)).float().mean()
"""


@pytest.fixture
def checkout(tmp_path: Path) -> Iterator[Path]:
    """A checkout with the stand-in; what is imported from it is forgotten afterwards."""
    package, path, known = tmp_path / "checkout" / "hbird", list(sys.path), set(sys.modules)
    (package / "nn").mkdir(parents=True)
    (package / "hbird_eval.py").write_text(STAND_IN)
    (package / "nn" / "search_faiss.py").write_text(
        "class NearestNeighborSearchFaiss:\n    def __init__(self, *_, **__):\n        raise RuntimeError('No GPUs')\n"
    )
    yield package.parent
    sys.path[:] = path
    for name in set(sys.modules) - known:
        if name.split(".")[0] in ("hbird", "pytorch_lightning"):
            del sys.modules[name]


def test_the_reference_gets_camvid_and_an_index_on_cpus(checkout: Path, tmp_path: Path) -> None:
    for i in range(2):
        save(tmp_path / "camvid" / "train" / f"{i}.png", image_of(i, CAMVID_SIZE))
        save(tmp_path / "camvid" / "trainannot" / f"{i}.png", image_of(i, CAMVID_SIZE)[..., 0] % 2 + 10)
    (tmp_path / "camvid" / "train.txt").write_text("".join(f"/x/train/{i}.png /x/trainannot/{i}.png\n" for i in (0, 1)))
    data = load_segmentation("camvid", "train", root=tmp_path)
    net = nn.Conv2d(3, 4, 16, 16)
    net.embed_dim, net.stride = 4, 16  # type: ignore[assignment]
    changes = {"memory_size": 8, "input_size": 32, "neighbours": 3}
    settings = find_tasks(["camvid_ic@hbird-2"], changes)[0].settings()
    module = bench.import_reference(bench.arguments(["--reference", str(checkout)]).reference)
    state = torch.get_rng_state()
    assert bench.reference(module, net, {"train": data, "val": data}, settings) == 1
    torch.set_rng_state(state)


def test_a_folder_without_the_package_is_one_error(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        bench.arguments(["--reference", str(tmp_path)])
    assert ended.value.code == 2
    assert f"--reference {tmp_path}: there is no hbird/hbird_eval.py in it." in capsys.readouterr().err


@pytest.mark.parametrize("code", ["import not_installed", "def hbird_evaluation(): ..."])
def test_other_versions_of_the_package_are_one_error(checkout: Path, code: str) -> None:
    (checkout / "hbird" / "hbird_eval.py").write_text(code)
    with pytest.raises(SystemExit, match=r"--reference .*checkout: its code cannot be used: .*v2\.0\.0"):
        bench.import_reference(checkout)


def test_the_memory_is_filled_by_further_passes() -> None:
    assert bench.fill(367, 102_400, 400) == 1
    assert bench.fill(184, 102_400, 400) == 2
