"""Every mistake of a user gives its exit code and one message that names the file or option at fault, and the fix."""

from __future__ import annotations

import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from neco_bench.core.paths import cache_dir
from neco_bench.results.store import ResultStore
from tests.command import Answer, neco

FACTORIES = """
import torch
from torch import nn

class Cells(nn.Module):
    embed_dim, stride = 8, 8
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.project = nn.Conv2d(3, 8, 8, 8)
    def forward(self, x):
        return self.project(x)

def sound(): return Cells()
def tokens():
    made = Cells(); made.forward = lambda x: made.project(x).flatten(2)
    return made
def nan():
    made = Cells(); made.forward = lambda x: made.project(x) * float("nan")
    return made
def pair():
    made = Cells(); made.forward = lambda x: (made.project(x), x)
    return made
def raises():
    made = Cells(); made.forward = lambda x: x[:, 5]
    return made

from neco_bench import Encoder
class Own(Encoder):
    embed_dim, stride = 8, 8
    def _encode(self, images, *, final_norm, attention):
        raise ValueError("my own mistake")
def own(): return Own()
"""


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A data root with the val split of a CamVid and a VOC of four images each."""
    rng = np.random.default_rng(0)
    camvid, voc = tmp_path / "data" / "camvid", tmp_path / "data" / "voc2012"
    for folder in ("val", "valannot"):
        (camvid / folder).mkdir(parents=True)
    for folder in ("JPEGImages", "SegmentationClass", "ImageSets/Segmentation"):
        (voc / folder).mkdir(parents=True)
    for i in range(4):
        image = Image.fromarray(rng.integers(0, 256, (360, 480, 3), dtype=np.uint8))
        ids = rng.integers(0, 11, (360, 480), dtype=np.uint8)
        mask = Image.fromarray(ids)
        image.save(camvid / "val" / f"f{i}.png")
        mask.save(camvid / "valannot" / f"f{i}.png")
        image.save(voc / "JPEGImages" / f"2007_00000{i}.jpg")
        ids[0] = 255
        Image.fromarray(ids).save(voc / "SegmentationClass" / f"2007_00000{i}.png")
    (camvid / "val.txt").write_text("".join(f"/x/val/f{i}.png /x/valannot/f{i}.png\n" for i in range(4)))
    (voc / "ImageSets" / "Segmentation" / "val.txt").write_text("".join(f"2007_00000{i}\n" for i in range(4)))
    return tmp_path / "data"


@pytest.fixture
def file(tmp_path: Path) -> Path:
    (tmp_path / "mine.py").write_text(FACTORIES)
    return tmp_path / "mine.py"


def run(tmp_path: Path, *arguments: object, model: object = "baseline_rgb", task: str = "shapes_ic") -> Answer:
    """A run that would be quick if it were sound. An option given twice takes its last value."""
    out = tmp_path / "results"
    return neco(
        "run",
        "--model",
        model,
        "--task",
        task,
        "--limit",
        4,
        "--workers",
        0,
        "--device",
        "cpu",
        "--out",
        out,
        *arguments,
    )


QUICK = ("--set", "input_size=32", "--set", "seeds=1", "--set", "redos=1", "--set", "iterations=2")


def assert_says(answer: Answer, code: int, *message: object) -> None:
    assert answer.code == code, answer.err
    for text in message:
        assert str(text) in answer.err
    assert "Traceback" not in answer.err


def test_the_sound_case(tmp_path: Path, root: Path, file: Path) -> None:
    """Without it, the tests below could pass for another reason."""
    for model in ("baseline_rgb", f"{file}:sound"):
        for task in ("camvid_cluster_gt", "voc_cluster_gt@clean-1"):
            assert_says(run(tmp_path, "--data-root", root, *QUICK, task=task, model=model), 0, "done")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--model", "baseline_hgo"], "Did you mean 'baseline_hog'"),
        (["--model", "timm:resnet18:x/y"], "resnet18"),
        (["--model", "vit/small"], "none of the known forms"),
        (["--model", "timm:vit_tiny_patch16_224?pretrain=false"], "'pretrained'"),
        (["--task", "shape_ic"], "Did you mean 'shapes_ic'"),
        (["--task", "shapes_ic@hbird-9"], "Did you mean 'hbird-2'"),
        (["--task", "xyz_*"], "No task matches 'xyz_*'"),
        (["--device", "tpu"], "Unknown device 'tpu'"),
        (["--device", "cuda:77"], "Device 'cuda:77' is not available here"),
        (["--precision", "fp8"], "Unknown precision 'fp8'"),
        (["--layers", "2,x"], "layers='2,x' must be whole numbers"),
        (["--layers", "3"], "has a fixed layer; leave out layers"),
        (["--batch-size", "-3"], "--batch-size must be at least 1, got -3"),
        (["--batch-size", "many"], "--batch-size"),
        (["--workers", "-1"], "--workers must be at least 0, got -1"),
        (["--limit", "0"], "--limit must be at least 1, got 0"),
        (["--seed", "-1"], "--seed must be at least 0, got -1"),
        (["--seed", "3000000000"], "--seed must be at most 1,000,000,000, got 3000000000"),
        (["--set", "temperature=1e-40"], "temperature: Input should be greater than or equal to 0.000001"),
        (["--set", "input_size=225"], "input_size=225 is not a multiple of the stride 8"),
        (["--set", "input_size=-8"], "input_size: Input should be greater than 0"),
        (["--set", "neighbors=3"], "Did you mean 'neighbours'"),
        (["--set", "neighbours"], "--set takes KEY=VALUE"),
        (["--set", "neighbours=5000"], "--set neighbours="),
        (["--no-such-option"], "--no-such-option"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_wrong_usage(tmp_path: Path, arguments: list[str], message: str) -> None:
    given = {"model": arguments[1]} if arguments[0] == "--model" else {}
    given |= {"task": arguments[1]} if arguments[0] == "--task" else {}
    rest = [] if given else arguments
    assert_says(run(tmp_path, *rest, **given), 2, message)


@pytest.mark.parametrize(("option", "message"), [("--model", "--model is empty"), ("--task", "No task is named")])
def test_a_name_that_is_empty(tmp_path: Path, option: str, message: str) -> None:
    """As a variable of a shell is that nobody set."""
    given = {option.strip("-"): ""}
    assert_says(run(tmp_path, **given), 2, message)


def test_a_list_for_a_split_that_is_not_there(tmp_path: Path) -> None:
    (tmp_path / "ids.txt").write_text("bogus")
    answer = run(tmp_path, "--split-file", tmp_path / "ids.txt", task="shapes_correspondence")
    assert_says(answer, 2, "--split-file restricts the training split, which shapes_correspondence does not have")


def test_a_leaderboard_of_nothing_leaves_the_tables_alone(tmp_path: Path) -> None:
    (tmp_path / "in_context.csv").write_text("model\n")
    (tmp_path / "empty").mkdir()
    answer = neco("leaderboard", "--results", tmp_path / "empty", "--out", tmp_path)
    assert_says(answer, 3, f"No results in {tmp_path / 'empty'}")
    assert (tmp_path / "in_context.csv").read_text() == "model\n"


def test_wrong_usage_of_other_commands(tmp_path: Path) -> None:
    assert_says(neco("check", "baseline_hgo"), 2, "Did you mean 'baseline_hog'")
    assert_says(neco("data", "check", "shapse"), 2, "Did you mean 'shapes'")
    assert_says(neco("runn"), 2, "runn")
    assert_says(neco("leaderboard", "--results", tmp_path / "absent", "--out", tmp_path), 3, tmp_path / "absent")
    assert_says(neco("data", "check", "voc2012"), 3, "--data-root")


def test_a_missing_data_root(tmp_path: Path) -> None:
    assert_says(run(tmp_path, task="voc_ic"), 3, "no data root is given", "NECO_BENCH_DATA", "JPEGImages/NAME.jpg")
    assert_says(
        run(tmp_path, "--data-root", tmp_path / "no", task="voc_ic"), 3, tmp_path / "no" / "voc2012", "data check"
    )


def test_a_missing_split_list(tmp_path: Path, root: Path) -> None:
    answer = run(tmp_path, "--data-root", root, task="voc_ic")
    assert_says(answer, 3, root / "voc2012" / "ImageSets" / "Segmentation" / "trainaug.txt")


@pytest.mark.parametrize("path", ["JPEGImages/2007_000001.jpg", "SegmentationClass/2007_000002.png"])
def test_a_missing_image_or_mask_of_a_listed_id(tmp_path: Path, root: Path, path: str) -> None:
    (root / "voc2012" / path).unlink()
    answer = run(tmp_path, "--data-root", root, *QUICK, task="voc_cluster_gt@clean-1")
    assert_says(answer, 3, root / "voc2012" / path, "Restore it")


@pytest.mark.parametrize("workers", [0, 1])
def test_a_truncated_image(tmp_path: Path, root: Path, workers: int) -> None:
    """In a worker process too: the message is the same, without the worker's traceback."""
    path = root / "voc2012" / "JPEGImages" / "2007_000001.jpg"
    path.write_bytes(path.read_bytes()[:300])
    task = "voc_cluster_gt@clean-1"
    answer = run(tmp_path, "--data-root", root, *QUICK, "--workers", workers, task=task)
    assert_says(answer, 4, path, "truncated")
    assert answer.err.count("\n") == 1


def test_masks_at_fault(tmp_path: Path, root: Path) -> None:
    path = root / "camvid" / "valannot" / "f2.png"
    for array, message in (
        (np.full((360, 480), 12, np.uint8), "holds the values 12 in 172800 pixels"),
        (np.zeros((40, 61), np.uint8), "61x40 pixels"),
        (np.zeros((360, 480, 3), np.uint8), "colour mask"),
    ):
        Image.fromarray(array).save(path)
        answer = run(tmp_path, "--data-root", root, *QUICK, task="camvid_cluster_gt")
        assert_says(answer, 4, path, message)
    answer = neco("data", "check", "camvid", "--data-root", root)
    assert answer.code == 4
    assert str(path) in answer.out


@pytest.mark.slow
@pytest.mark.parametrize(
    ("factory", "code", "message"),
    [
        ("absent", 4, "has no 'absent'. It defines: Cells, sound, tokens, nan, pair, raises, Own, own"),
        ("pair", 4, "returned tuple; its forward() must return a tensor"),
        ("tokens", 4, "(4, 8, 784) where (4, 8, 28, 28)"),
        ("raises", 4, "IndexError"),
        ("own", 4, "ValueError: my own mistake"),
        ("nan", 5, "NaN or infinite features"),
    ],
)
def test_code_at_fault(tmp_path: Path, file: Path, factory: str, code: int, message: str) -> None:
    assert_says(run(tmp_path, model=f"{file}:{factory}"), code, message, file)


def test_a_file_of_code_that_is_not_there(tmp_path: Path) -> None:
    assert_says(run(tmp_path, model=f"{tmp_path}/absent.py:make"), 3, tmp_path / "absent.py")
    (tmp_path / "mine.py").write_text("def make(): return 1\n")
    assert_says(run(tmp_path, model=f"{tmp_path}/mine.py"), 2, "names no factory", "It defines: make")


def test_weights_at_fault(tmp_path: Path, file: Path) -> None:
    weights = tmp_path / "weights.safetensors"
    answer = run(tmp_path, "--weights", weights, model=f"{file}:sound")
    assert_says(answer, 3, weights)
    save_file({"project.weight": torch.zeros(8, 3, 4, 4), "project.bias": torch.zeros(8)}, weights)
    answer = run(tmp_path, "--weights", weights, model=f"{file}:sound")
    assert_says(answer, 4, weights, "project.weight (8, 3, 4, 4) for (8, 3, 8, 8)")
    weights.write_bytes(weights.read_bytes()[:50])
    assert_says(run(tmp_path, "--weights", weights, model=f"{file}:sound"), 4, weights, "truncated")


class _Attack:
    def __reduce__(self) -> tuple[object, tuple[Path]]:
        return Path.touch, (Path("attacked"),)


@pytest.mark.parametrize("zipped", [True, False])
def test_a_pickle_that_would_run_code(
    tmp_path: Path, file: Path, monkeypatch: pytest.MonkeyPatch, zipped: bool
) -> None:
    monkeypatch.chdir(tmp_path)
    weights = tmp_path / "weights.pth"
    content = {"project.weight": _Attack(), "project.bias": torch.zeros(8)}
    if zipped:
        torch.save(content, weights)
    else:
        weights.write_bytes(pickle.dumps(content, protocol=2))
    answer = run(tmp_path, "--weights", weights, model=f"{file}:sound")
    assert_says(answer, 4, weights)
    assert not (tmp_path / "attacked").exists()


def test_weights_that_are_not_on_this_machine(tmp_path: Path) -> None:
    model = "neco_dinov2"
    answer = run(tmp_path, "--set", "input_size=28", model=model)
    assert_says(answer, 3, "https://", cache_dir() / "weights" / model, "--weights FILE")


def test_a_results_folder_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "results").write_text("a file")
    for more in ([], ["--dry-run"]):  # before anything is computed
        answer = run(tmp_path, *("--set", "input_size=64"), *more)
        assert_says(answer, 1, tmp_path / "results", "is not a folder", "--out")


@pytest.mark.skipif(not Path("/proc/self").is_dir(), reason="needs /proc, which takes no files")
def test_results_on_a_file_system_without_files_fail_before_anything_is_computed() -> None:
    answer = neco("run", "--model", "baseline_rgb", "--task", "shapes_ic", "--out", "/proc/results", "--dry-run")
    assert_says(answer, 1, "/proc/results: cannot be written", "--out")


def test_a_failure_stops_no_other_job(tmp_path: Path, root: Path, file: Path) -> None:
    """Every job has its result, the failed ones too, and the exit code is that of the first failure."""
    (root / "voc2012" / "JPEGImages" / "2007_000001.jpg").unlink()
    models = f"{file}:nan,baseline_rgb"
    tasks = "voc_cluster_gt@clean-1,camvid_cluster_gt"
    answer = run(tmp_path, "--data-root", root, *QUICK, model=models, task=tasks)
    # The data are opened before anything runs: a missing file stops the whole command early.
    assert_says(answer, 3, "2007_000001.jpg")
    assert not (tmp_path / "results").exists()

    answer = run(tmp_path, "--data-root", root, *QUICK, model=models, task="camvid_cluster_gt,camvid_overcluster_50")
    assert_says(answer, 5, "NaN or infinite")
    stored = {(r.model.rpartition(":")[2], r.task): r for r in ResultStore(tmp_path / "results").load_all()}
    assert {name: r.status for name, r in stored.items()} == {
        ("nan", "camvid_cluster_gt"): "failed",
        ("nan", "camvid_overcluster_50"): "failed",
        ("baseline_rgb", "camvid_cluster_gt"): "ok",
        ("baseline_rgb", "camvid_overcluster_50"): "ok",
    }
    again = ("--data-root", root, *QUICK, "--seed", 1)  # another seed, so that nothing is stored yet
    own = run(tmp_path, *again, model=f"{file}:own,baseline_rgb", task="camvid_cluster_gt")
    assert_says(own, 4, "my own mistake")
    assert "baseline_rgb on camvid_cluster_gt@neco-1*, seed 1: done" in own.err
    failed = stored["nan", "camvid_cluster_gt"]
    assert failed.error_code == 5
    assert failed.error is not None
    assert "NaN" in failed.error
