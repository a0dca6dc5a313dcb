"""Parity with open-hummingbird-eval v2.0.0 on stored arrays: every step from masks and features to the mIoU."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from neco_bench.tasks.in_context.memory import choose_patches, patch_labels, read_labels, retrieve
from scipy.sparse import csr_matrix

from neco_bench.features.transforms import resize_image, resize_nearest_torch, to_tensor, upsample_argmax
from neco_bench.metrics import segmentation
from neco_bench.search.exact import ExactIndex
from tests.typed import load_segmentation

CASES = [("main", "cg"), ("main", "vit"), ("det", "cg"), ("det", "vit")]


@pytest.fixture(scope="module")
def arrays(golden: Path) -> dict[str, np.ndarray]:
    with np.load(golden / "hummingbird_small.npz") as stored:
        return dict(stored)


@pytest.mark.parametrize("case", ["main", "det"])
def test_patch_labels(arrays: dict[str, np.ndarray], case: str) -> None:
    masks = arrays[f"{case}_y_train"][:, 0]
    labels = np.stack([patch_labels(np.where(mask == 255, 0, mask), 16, 11) for mask in masks])
    np.testing.assert_array_equal(labels, arrays[f"{case}_label_dist"])


def test_sampled_patches(arrays: dict[str, np.ndarray]) -> None:
    for labels, noise, expected in zip(
        arrays["main_label_dist"], arrays["main_noise"], arrays["main_sampled_idx"], strict=True
    ):
        np.testing.assert_array_equal(choose_patches(labels, noise, 64), expected)


@pytest.mark.parametrize(("case", "encoder"), CASES)
def test_memory_rows(arrays: dict[str, np.ndarray], case: str, encoder: str) -> None:
    features = F.normalize(torch.from_numpy(arrays[f"{case}_{encoder}_f_train"]), dim=2)
    rows = arrays["main_sampled_idx"] if case == "main" else np.tile(np.arange(196), (8, 1))
    keys = torch.cat([f[torch.from_numpy(r)] for f, r in zip(features, rows, strict=True)])
    np.testing.assert_allclose(keys, arrays[f"{case}_{encoder}_mem_feat"], atol=2e-7)


@pytest.mark.parametrize(("case", "encoder"), CASES)
def test_retrieval_to_miou(arrays: dict[str, np.ndarray], case: str, encoder: str) -> None:
    key = f"{case}_{encoder}"
    memory = torch.from_numpy(arrays[f"{key}_mem_feat"])
    index = ExactIndex(memory.shape[1], torch.device("cpu"))
    index.add(memory)
    queries = torch.from_numpy(arrays[f"{key}_f_val"]).flatten(0, 1)
    scores, ids = retrieve(index, queries, 30)
    # Every row, those too whose 30th and 31st neighbour tie ("vit" has 15 or 16): rounding decides as it did there.
    np.testing.assert_array_equal(np.sort(ids.numpy()), np.sort(arrays[f"{key}_knn_ids"]))

    shares = read_labels(scores, ids, csr_matrix(arrays[f"{key}_mem_lab"]), 0.02).view(4, 196, 11)
    expected = arrays[f"{key}_pred_dist"]
    np.testing.assert_allclose(shares, expected, atol=1e-5)

    # From the reference's own neighbours on, everything must agree, also where the 30th neighbour is a tie.
    cosines = np.take_along_axis((F.normalize(queries, dim=1) @ memory.T).numpy(), arrays[f"{key}_knn_ids"], 1)
    given = read_labels(
        torch.from_numpy(cosines),
        torch.from_numpy(arrays[f"{key}_knn_ids"]),
        csr_matrix(arrays[f"{key}_mem_lab"]),
        0.02,
    ).view(4, 196, 11)
    np.testing.assert_allclose(given, expected, atol=1e-5)

    # The reference's own label distributions give its maps, counts and scores exactly.
    maps, total, official = score(torch.from_numpy(expected), arrays[f"{case}_y_val"][:, 0])
    np.testing.assert_array_equal(maps, arrays[f"{key}_pred_map"][:, 0])
    np.testing.assert_array_equal(total, arrays[f"{key}_conf_mat"])
    np.testing.assert_array_equal(segmentation.hungarian_match(total), arrays[f"{key}_hungarian_map"])
    np.testing.assert_allclose(
        np.nan_to_num(segmentation.iou_per_class(total)), arrays[f"{key}_iou_identity"], atol=1e-9
    )
    assert segmentation.mean_iou(total, absent="zero") == pytest.approx(float(arrays[f"{key}_miou_identity"]), abs=1e-9)
    assert official == pytest.approx(float(arrays[f"{key}_miou_official"]), abs=1e-9)

    # Our own distributions differ by rounding, which may move a pixel between two equal shares; for "cg" none moves.
    for predicted in (given, shares):
        own_maps, _, own = score(predicted, arrays[f"{case}_y_val"][:, 0])
        if encoder == "cg":
            np.testing.assert_array_equal(own_maps, arrays[f"{key}_pred_map"][:, 0])
        assert own == pytest.approx(float(arrays[f"{key}_miou_official"]), abs=1e-4)


def score(shares: torch.Tensor, masks: np.ndarray) -> tuple[np.ndarray, np.ndarray, float]:
    """Maps (n, 224, 224), confusion matrix and Hungarian mIoU of patch shares (n, 196, 11)."""
    confusions = segmentation.ImageConfusions(11)
    maps = np.stack([upsample_argmax(s.T.reshape(11, 14, 14), 224, 224).numpy() for s in shares])
    for mask, predicted in zip(masks, maps, strict=True):
        confusions.add(mask, predicted)
    total = confusions.total()
    merged = segmentation.merge_clusters(total, segmentation.hungarian_match(total))
    return maps, total, segmentation.mean_iou(merged, absent="zero")


def test_images_and_masks_from_files(arrays: dict[str, np.ndarray], real_data: Path) -> None:
    """The deterministic transforms equal the reference's tensors bit by bit, from the real files."""

    val = load_segmentation("camvid", "val", root=real_data)
    mean = torch.tensor([0.485, 0.456, 0.406]).view(3, 1, 1)
    std = torch.tensor([0.229, 0.224, 0.255]).view(3, 1, 1)
    compared = 0
    for row, name in enumerate(arrays["val_names"]):
        index = [i for i, item in enumerate(val.ids) if Path(item).stem == Path(name).stem]
        if not index:
            continue
        sample = val[index[0]]
        image = (resize_image(sample.image, 224, 224) - mean) / std
        np.testing.assert_array_equal(image, arrays["det_x_val"][row])
        np.testing.assert_array_equal(resize_nearest_torch(sample.mask, 224, 224), arrays["det_y_val"][row, 0])
        compared += 1
    assert compared == len(arrays["val_names"])
    assert to_tensor(sample.image).shape == (3, *sample.image.shape[:2])
