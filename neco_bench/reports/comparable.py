"""Define which results can be compared, for leaderboards and for `compare`.

Results that differ in an entry of MUST measure different things: `compare` refuses them, and leaderboards show them in
separate columns. Results that differ in an entry of `conditions` measure the same under other conditions: `compare` and
leaderboards mark them.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Sequence

from neco_bench.core.files import digest
from neco_bench.results.schema import Result

# Provenance in which results must agree, and its name in column titles.
MUST = {"protocol_hash": "hash", "card_hash": "card", "dataset_fingerprint": "data"}

# Packages that can change a number. A result of an older neco-bench is stale.
PACKAGES = ("neco-bench", "torch", "torchvision", "timm", "numpy", "faiss-gpu", "faiss-cpu", "scikit-learn", "pillow")


def fact(result: Result, name: str) -> str | None:
    """Return an entry of MUST as text; None if it was not recorded."""
    value = result.provenance.get(name)
    if not value:
        return None
    return value if isinstance(value, str) else digest(value)


def conditions(result: Result) -> dict[str, str]:
    """Return the conditions of a result by name, as text; those that were not recorded are left out.

    size: pixels per side, if they are not the multiple of the stride that is nearest to the card's size, which is what
    every encoder gets by default.
    """
    provenance = result.provenance
    features, encoder = provenance.get("features") or {}, provenance.get("encoder") or {}
    values = {"precision": provenance.get("precision"), "stored features": features.get("dtype")}
    requested, used, stride = features.get("input_size"), features.get("used_size"), encoder.get("stride")
    if isinstance(requested, int) and isinstance(used, int):
        tolerance = stride if isinstance(stride, int) else 16
        values["size"] = "as requested" if abs(used - requested) < tolerance else f"{used} px"
    packages = provenance.get("packages")
    if isinstance(packages, dict):
        values |= {name: packages.get(name) for name in PACKAGES}
    return {name: str(value) for name, value in values.items() if value is not None}


def differences(first: Result, second: Result) -> list[str]:
    """Return texts on the conditions in which two comparable results differ."""
    one, other = conditions(first), conditions(second)
    return [f"{name} {one[name]} / {other[name]}" for name in one if name in other and one[name] != other[name]]


def marks(results: Sequence[Result]) -> list[list[str]]:
    """Return, for each result of a column, in which conditions it differs from the majority; stale ones by version."""
    known = [conditions(result) for result in results]
    usual: dict[str, str] = {}
    for name in dict.fromkeys(name for own in known for name in own):
        counts = Counter(own[name] for own in known if name in own)
        usual[name] = max(counts, key=lambda value: (counts[value], version(value), value))
    versions = [own["neco-bench"] for own in known if "neco-bench" in own]
    newest = max(versions, key=version, default="")
    values = []
    for own, result in zip(known, results, strict=True):
        notes = [
            f"{name} {value}, others {usual[name]}"
            for name, value in own.items()
            if name != "neco-bench" and value != usual[name]
        ]
        if newest and version(own.get("neco-bench", newest)) < version(newest):
            notes.append(f"stale: neco-bench {own['neco-bench']}, newest {newest}")
        if result.has_old_interval:
            notes.append(
                "interval of an earlier version: a percentile bootstrap; no counts are stored to compute it again"
            )
        values.append(notes)
    return values


def version(text: str) -> tuple[int, ...]:
    """Return the numbers of a version, for sorting."""
    return tuple(map(int, re.findall(r"\d+", text)))


def with_ids(names: Iterable[str], word: str, ids: Iterable[str | None]) -> list[str]:
    """Return names with the start of an id, such as "voc_ic@hbird-2 (data 1a2b3c4d)"."""
    return [
        f"{name} ({word} {identity[:8] if identity else 'unknown'})" for name, identity in zip(names, ids, strict=True)
    ]
