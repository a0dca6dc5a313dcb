"""When two numbers may stand side by side: one definition, for leaderboards and for `compare`.

Results that differ in one of MUST measured different things: `compare` refuses them, and a leaderboard gives them
columns of their own. Results that differ in what `conditions` names measured the same under other conditions: both say
so.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Sequence

from neco_bench.core.files import digest
from neco_bench.results.schema import Result

# Provenance in which results must agree, and the word for it in the names of columns.
MUST = {"protocol_hash": "hash", "card_hash": "card", "dataset_fingerprint": "data"}

# Packages that can move a number. An older neco-bench makes a result stale.
PACKAGES = ("neco-bench", "torch", "torchvision", "timm", "numpy", "faiss-gpu", "faiss-cpu", "scikit-learn", "pillow")


def fact(result: Result, name: str) -> str | None:
    """One of MUST as text; None where it was not recorded."""
    value = result.provenance.get(name)
    if not value:
        return None
    return value if isinstance(value, str) else digest(value)


def conditions(result: Result) -> dict[str, str]:
    """The conditions of a result by name, as text; those that were not recorded are left out.

    size: pixels a side that were used, where these are not the multiple of the stride that is nearest to what the card
    asks for, which every encoder gets.
    """
    provenance = result.provenance
    features, encoder = provenance.get("features") or {}, provenance.get("encoder") or {}
    found = {"precision": provenance.get("precision"), "stored features": features.get("dtype")}
    asked, used, stride = features.get("input_size"), features.get("used_size"), encoder.get("stride")
    if isinstance(asked, int) and isinstance(used, int):
        tolerance = stride if isinstance(stride, int) else 16
        found["size"] = "as asked" if abs(used - asked) < tolerance else f"{used} px"
    packages = provenance.get("packages")
    if isinstance(packages, dict):
        found |= {name: packages.get(name) for name in PACKAGES}
    return {name: str(value) for name, value in found.items() if value is not None}


def differences(first: Result, second: Result) -> list[str]:
    """What two results that may be compared were measured with otherwise, as texts."""
    one, other = conditions(first), conditions(second)
    return [f"{name} {one[name]} / {other[name]}" for name in one if name in other and one[name] != other[name]]


def marks(results: Sequence[Result]) -> list[list[str]]:
    """For each of the results of one column, in what it is not as most of them are; stale ones by their version."""
    known = [conditions(result) for result in results]
    usual: dict[str, str] = {}
    for name in dict.fromkeys(name for own in known for name in own):
        counts = Counter(own[name] for own in known if name in own)
        usual[name] = max(counts, key=lambda value: (counts[value], version(value), value))
    versions = [own["neco-bench"] for own in known if "neco-bench" in own]
    newest = max(versions, key=version, default="")
    found = []
    for own, result in zip(known, results, strict=True):
        notes = [
            f"{name} {value}, others {usual[name]}"
            for name, value in own.items()
            if name != "neco-bench" and value != usual[name]
        ]
        if newest and version(own.get("neco-bench", newest)) < version(newest):
            notes.append(f"stale: neco-bench {own['neco-bench']}, newest {newest}")
        if result.has_old_interval:
            notes.append("interval of an earlier version: a percentile bootstrap, its counts are not stored")
        found.append(notes)
    return found


def version(text: str) -> tuple[int, ...]:
    """The numbers of a version, to be ordered by."""
    return tuple(map(int, re.findall(r"\d+", text)))


def with_ids(names: Iterable[str], word: str, ids: Iterable[str | None]) -> list[str]:
    """Names with the start of an id, as in "voc_ic@hbird-2 (data 1a2b3c4d)"."""
    return [
        f"{name} ({word} {identity[:8] if identity else 'unknown'})" for name, identity in zip(names, ids, strict=True)
    ]
