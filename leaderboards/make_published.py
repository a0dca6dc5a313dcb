"""Make `published.csv` from a folder of `published_*.csv` files (model,arch,task,dataset,setting,metric,value,source).

    python leaderboards/make_published.py FOLDER leaderboards/published.csv

Prints how many rows were read, kept and dropped, by reason. The rules below document every choice; the README in this
folder explains them in words.
"""

from __future__ import annotations

import re
import sys
from collections import Counter
from collections.abc import Callable
from decimal import Decimal
from pathlib import Path

import pandas as pd

from neco_bench.core.metric import metric_named

Row = dict[str, str]

COLUMNS = ("model", "arch", "task", "protocol", "metric", "unit", "direction", "value", "setting", "source", "quality")

# Reason, column, pattern: the first pattern that is found drops the row.
DROPPED = (
    ("second-hand", "setting", r"quoted|quotes|original Hummingbird paper|in review|implied:|reference line"),
    ("second-hand", "setting", r"^(?!unsupervised, SD).*as collected in that table"),  # all but LDM's own rows
    ("second-hand", "source", r"second-hand|third-party pages|deep-diver|quoting"),
    ("gain, not a score", "setting", r"headline gain|gain only"),
    ("superseded table", "source", r"neco-1_x"),
    ("report in an issue or pull request", "source", r"issues? |/pull/"),
    ("data set not stated", "dataset", r"not stated"),
)

# The publication to which a source belongs, by the first pattern found. A paper and its repository are one publication.
PUBLICATIONS = {
    "hbird-1-scann": r"open-hummingbird-eval",
    "neco": r"NeCo README|vpariza/NeCo|^paper (Table|Figure)",
    "dinov3": r"DINOv3 paper|facebookresearch/dinov3",
    "dinov2": r"DINOv2 paper|facebookresearch/dinov2",
    "franca-readme": r"valeoai/Franca README",
    "franca": r"Franca paper",
    "dino": r"DINO paper",
    "dip": r"DIP paper",
    "capi": r"facebookresearch/capi",
    "radio": r"NVlabs/RADIO",
    "tips": r"google-deepmind/tips",
    "segmenter": r"rstrudel/segmenter",
    "mmseg": r"open-mmlab",
    "crw": r"videowalk",
    "cribo": r"CrIBo README",
    "leopart": r"[Ll]eopart README",
    "insid3": r"INSID3",
    "cleandift": r"cleandift|CleanDIFT",
    "ldm": r"LDM_correspondences",
    "geoaware": r"GeoAware-SC abstract",
    "hpf": r"juhongm999/hpf",
    "cats": r"Cost-Aggregation",
    "densematching": r"DenseMatching",
    "semantic-correspondence": r"Visual-AI",
}

# What was measured, by the first pattern found in the text of the task.
MEASURES = {
    "ic-depth": r"in-context depth",
    "ic": r"in-context",
    "overcluster": r"over-?clustering",
    "cluster_gt": r"clustering",
    "unsup": r"fully unsupervised",
    "knn": r"k-NN",
    "logreg": r"logistic",
    "finetune": r"fine-tuned segmentation",
    "fcn": r"FCN",
    "video": r"video",
    "correspondence": r"correspondence|matching",
    "depth": r"depth",
    "linear": r"^linear",
    "segmentation": r"^segmentation",
}

DATASETS = {
    "voc": r"Pascal ?VOC.*",
    "ade20k": r"ADE20K( val)?",
    "coco_things": r"COCO-Things",
    "coco_stuff": r"COCO-Stuff",
    "cityscapes": r"Cityscapes( val)?",
    "pascal_context": r"Pascal Context( val)?",
    "spair": r"SPair-71k",
    "nyu": r"NYUv2",
    "kitti": r"KITTI",
    "sun": r"SUN.?RGB-?D.*",
    "navi": r"NAVI",
    "davis_vos": r"DAVIS-2017( val)?",
}

# Zoo ids by the name in the paper; {} is size, patch and plus sign of the architecture.
MODELS = {
    "dino_vit{}": r"dino",
    "dinov2_vit{}": r"dinov2( \(no registers\)| \(distilled.*\))?",
    "dinov2_vit{}_reg": r"dinov2-?r|dinov2 \(reg\)",
    "dinov3_vit{}": r"dinov3( \(lvd-1689m\)| \(original features\))?",
    "mae_vit{}": r"mae",
}

# The starting points of Segmenter's models, by architecture: timm 0.4.12's weights for the names in its config.yml.
SEGMENTER = {
    "ViT-T/16": "timm:vit_tiny_patch16_384.augreg_in21k_ft_in1k",
    "ViT-S/16": "timm:vit_small_patch16_384.augreg_in21k_ft_in1k",
    "ViT-B/16": "timm:vit_base_patch16_384.augreg_in21k_ft_in1k",
    "ViT-L/16": "timm:vit_large_patch16_384.augreg_in21k_ft_in1k",
    "DeiT-B/16 distilled": "timm:deit_base_distilled_patch16_384.fb_in1k",
}

# Zoo ids of names that mean these weights only in one publication, by publication, name and architecture.
NAMED = {
    ("neco", "iBOT", "ViT-S/16"): "ibot_vits16",
    ("neco", "iBOT", "ViT-B/16"): "ibot_vitb16",
    ("neco", "CrIBo", "ViT-S/16"): "cribo_vits16",
    ("neco", "CrIBo", "ViT-B/16"): "cribo_vitb16",
    ("neco", "Leopart", "ViT-S/16"): "leopart_vits16",
    ("neco", "TimeT", "ViT-S/16"): "timet_vits16",
    ("cribo", "CrIBo (ImageNet-1k)", "ViT-S/16"): "cribo_vits16",
    ("cribo", "CrIBo (ImageNet-1k)", "ViT-B/16"): "cribo_vitb16",
    ("cribo", "CrIBo (COCO)", "ViT-S/16"): "cribo_vits16_coco",
    ("leopart", "Leopart", "ViT-S/16"): "leopart_vits16",
    ("leopart", "Leopart", "ViT-B/8"): "leopart_vitb8",
    ("capi", "CAPI (IN1k)", "ViT-L/14"): "capi_vitl14_in1k",
    ("capi", "CAPI (IN22k)", "ViT-L/14"): "capi_vitl14_in22k",
    ("capi", "CAPI (LVD-142M)", "ViT-L/14"): "capi_vitl14_lvd",
    ("capi", "CAPI (Places205)", "ViT-L/14"): "capi_vitl14_p205",
    ("dinov3", "PE spatial", "ViT-G/14"): "pe_spatial_vitg14",
    ("franca", "C-RADIOv3", "ViT-B/16"): "c_radiov3_vitb16",
    ("franca", "C-RADIOv3", "ViT-L/16"): "c_radiov3_vitl16",
    ("tips", "TIPSv2", "ViT-B/14"): "tipsv2_vitb14",
    ("tips", "TIPSv2", "ViT-L/14"): "tipsv2_vitl14",
    ("tips", "TIPSv2", "SO/14"): "tipsv2_so400m14",
    ("tips", "TIPSv2", "ViT-g/14"): "tipsv2_vitg14",
}


def first(table: dict[str, str], text: str, match: Callable[[str, str], object] = re.search) -> str:
    """Return the first name whose pattern matches a text; "" if none does."""
    return next((name for name, pattern in table.items() if match(pattern, text)), "")


def model_id(row: Row, publication: str) -> str:
    """Return the zoo id that matches name and architecture, else the name in the paper."""
    name, arch = row["model"], row["arch"]
    if named := NAMED.get((publication, name, arch)):
        return named
    if publication == "franca-readme":  # the column with the training data differs between files
        return f"Franca ({'LAION-600M' if 'LAION' in name + row['setting'] else 'IN21K'})"
    if publication == "neco" and name == "NeCo":  # its values equal those of the README's DINOv2R-XR rows
        name = "NeCo(DINOv2R-XR)"
    if publication == "segmenter" and arch in SEGMENTER and "crop 640" not in row["setting"]:
        return SEGMENTER[arch]
    neco = re.fullmatch(r"NeCo(?:\(| on )(DINOv2R-XR|DINOv2R|DINOv2|DINO|TimeT|Leopart)\)?", name)
    if neco:
        return f"neco_{neco[1].lower().replace('-', '_')}" + ("_vitb14" if arch == "ViT-B/14" else "")
    pattern = first(MODELS, name.lower(), re.fullmatch)
    vit = re.match(r"ViT-(7B|[SBLGH])(\+?)/(\d+)$", arch, re.IGNORECASE)
    if pattern and vit:
        return pattern.format(f"{vit[1].lower()}{vit[3]}{'plus' if vit[2] else ''}")
    if pattern == "dinov3_vit{}" and arch.startswith("ConvNeXt-"):
        return "dinov3_convnext_" + {"T": "tiny", "S": "small", "B": "base", "L": "large"}[arch[-1]]
    return name


def video_task(row: Row) -> str:
    """Return the task of a number on DAVIS 2017, by the size of the input, of which DINOv3 has three."""
    size = first({"_960": r": M |equals size M", "_1440": r": L "}, f": {row['setting']}")
    return f"davis_vos{size}"


def task_id(measure: str, dataset: str, row: Row) -> str:
    """Return the task id by the naming rule; empty if there is no such task."""
    if measure == "correspondence":
        return dataset if dataset in ("spair", "navi") else ""
    if measure == "video":
        return video_task(row) if dataset == "davis_vos" else ""
    if measure == "depth":
        return f"{dataset}_depth" if dataset in ("nyu", "kitti") else ""
    if measure == "finetune" and dataset in ("ade20k", "pascal_context", "cityscapes"):
        return f"{dataset}_finetune".replace("context_", "context60_")
    if (
        not dataset
        or dataset in ("nyu", "kitti")
        or measure not in ("ic", "linear", "overcluster", "cluster_gt", "unsup", "knn", "logreg")
    ):
        return ""
    if measure == "overcluster":
        clusters = re.search(r"K=(\d+)", row["setting"] + row["task"])
        return f"{dataset}_overcluster_{clusters[1]}" if clusters else ""
    fraction = re.search(r"fraction 1/(\d+)", row["setting"])
    return f"{dataset}_{measure}" + (f"_1of{fraction[1]}" if fraction and fraction[1] != "1" else "")


def depth_protocol(publication: str, task: str, row: Row) -> str:
    """Return the protocol of linear depth that gave a number; empty for other protocols."""
    if publication == "dinov3" and task == "nyu_depth":
        return "dinov3-1"
    lin1 = publication == "dinov2" and task and row["setting"] == "lin. 1"
    return "dinov2-lin1" if lin1 else ""


def video_facts(publication: str, model: str, metric: str, task: str, setting: str) -> tuple[str, str, list[str]]:
    """Return the name of the metric here, the protocol (empty for another one), and notes."""
    metric = re.sub(r" mean$", "", metric).replace(" ", "_")
    quoted = publication == "dino" and not re.match(r"DINO|Supervised ImageNet", model)
    known = publication in ("dino", "dinov3") and task and metric == "J&F" and not quoted
    notes = ["nearest upsampling, as in the released notebook, inferred"] if known and publication == "dinov3" else []
    if publication == "dinov3" and "equals size M" in setting:
        notes.append("size M inferred for all")
    return metric, f"{publication}-1" if known else "", notes


def convert(row: Row) -> tuple[Row, tuple]:
    """Return a row with COLUMNS, and its key: rows with the same key are copies of one number of one publication."""
    if "almost certainly ViT-B/14" in row["setting"]:
        row["arch"] = "ViT-B/14"
    publication = first(PUBLICATIONS, row["source"])
    measure = first(MEASURES, row["task"])
    dataset = first(DATASETS, row["dataset"], re.fullmatch)
    if not publication or not measure:
        raise SystemExit(f"no rule for {row}")
    model = model_id(row, publication)
    task = task_id(measure, dataset, row)
    ours = publication == "neco" and measure in ("linear", "overcluster", "cluster_gt")
    dinov3 = (publication, task) == ("dinov3", "ade20k_linear") and re.match(r"ViT-.*/16$", row["arch"])
    depth = depth_protocol(publication, task, row)
    protocol = f"paper:{publication}-{measure}".replace("-scann-ic", "-scann")
    protocol = "neco-1" if ours else "dinov3-1" if dinov3 else "capi-1" if publication == "capi" else protocol
    protocol = depth or protocol
    if publication == "segmenter" and "crop 640" not in row["setting"]:  # a larger input is another protocol
        decoder = "mask" if "Mask" in row["model"] else "linear"
        protocol = f"segmenter-{decoder}{'-ms' if 'multi-scale' in row['setting'] else ''}-1"
    notes = [f"{row['model']}; {row['setting']}" if model in SEGMENTER.values() else row["setting"]]
    if dinov3:
        notes.append("the released evaluator's settings inferred")
    if depth == "dinov3-1":
        notes.append("the released evaluator's settings inferred; the paper sweeps learning rate and weight decay")
    if depth == "dinov2-lin1":
        notes.append("settings as in a third party's copy of the configuration inferred")
    if ours and measure == "linear":
        notes.append("25 epochs and 100 px masks inferred")
    if ours and "K=21" in row["setting"] and dataset == "coco_things":
        notes.append("taken as the 12 classes of Table 1")
    if publication == "neco" and row["model"] == "NeCo":
        notes.append("start model DINOv2R-XR inferred")
    metric = re.sub(r" %$| \(digitised.*", "", row["metric"])
    if measure == "video":
        metric, video, inferred = video_facts(publication, row["model"], metric, task, row["setting"])
        protocol, notes = video or protocol, notes + inferred
    metric = "RMSE m" if metric == "RMSE" else re.sub(r"^(SPair|NAVI) score.*", "recall", metric)
    if metric == "RMSE m" and task:
        metric = "rmse"
    value = row["value"]
    if publication == "crw":  # printed as fractions
        value = format((100 * Decimal(value)).normalize(), "f")
    made = {
        "model": model,
        "arch": row["arch"],
        "task": task,
        "protocol": protocol,
        "metric": metric,
        "unit": metric_named(metric).unit,
        "direction": metric_named(metric).direction,
        "value": value,
        "setting": f"{row['dataset']}, {row['task']}: {'; '.join(notes)}",
        "source": f"NeCo {row['source']}" if row["source"].startswith("paper ") else row["source"],
        "quality": "digitised" if "digitised" in row["metric"] else "printed",
    }
    what = task or (dataset or row["dataset"], measure)
    return made, (publication, model, row["arch"], what, metric.split("@")[0], Decimal(value))


def main(folder: Path, out: Path) -> None:
    """Convert all files of a folder, and write the rows that no rule drops."""
    files = sorted(folder.glob("published_*.csv"))
    rows = pd.concat([pd.read_csv(path, dtype="object", keep_default_na=False) for path in files]).to_dict("records")
    reasons, converted, keys = [], [], set()
    for row in rows:
        reason = next((why for why, column, text in DROPPED if re.search(text, row[column])), None)
        if reason is None:
            made, key = convert(row)
            reason = "duplicate" if key in keys else None
            keys.add(key)
        if reason is None:
            converted.append(made)
        else:
            reasons.append(reason)
    table = pd.DataFrame(converted, columns=list(COLUMNS)).sort_values(list(COLUMNS))
    table.to_csv(out, index=False, lineterminator="\n")
    print(f"read {len(rows)}, kept {len(table)}")
    for reason, count in Counter(reasons).most_common():
        print(f"dropped {count}: {reason}")


if __name__ == "__main__":
    if len(sys.argv) != 3:
        raise SystemExit("usage: make_published.py FOLDER OUT.csv")
    main(Path(sys.argv[1]), Path(sys.argv[2]))
