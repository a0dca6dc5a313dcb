"""Recall of matched points, the share within a distance of the true position: by pair, object and bin of rotation."""

from __future__ import annotations

import itertools

import numpy as np
from neco_bench.tasks.geometric_correspondence.settings import Settings

from neco_bench.core import distributed
from neco_bench.core.errors import NumericalError
from neco_bench.core.task import Context, Outcome
from neco_bench.data.views import ViewDataset, ViewPair


class MatchScore:
    """Hits of the matches of each pair at each threshold; several processes divide the objects."""

    def __init__(self, dataset: ViewDataset, settings: Settings, context: Context) -> None:
        self.dataset, self.settings, self.context = dataset, settings, context
        self._hits: dict[str, tuple[np.ndarray, int]] = {}

    def add(self, pair: ViewPair, errors: np.ndarray, pixels: np.ndarray) -> None:
        """Count one pair: errors (M,) of its matches in metres and in pixels of a crop of 512."""
        limits = [(errors, value) for value in (*self.settings.distances, self.settings.bin_distance)]
        limits += [(pixels, value) for value in self.settings.pixels]
        self._hits[pair.id] = np.array([int((values < limit).sum()) for values, limit in limits]), len(errors)

    def outcome(self, *, used_size: int) -> Outcome:
        """Return the outcome: recall over all pairs, by object, and by bin of rotation; intervals are over objects.

        Raises NumericalError if no pair has a match.
        """
        for hits_of_process in distributed.gather(self._hits):
            self._hits |= hits_of_process
        pairs, settings = self.dataset.pairs, self.settings
        hits = np.stack([self._hits[pair.id][0] for pair in pairs]).astype(np.float64)
        matches = np.array([self._hits[pair.id][1] for pair in pairs])
        if not matches.any():
            raise NumericalError(f"No pair of {self.dataset.name!r} has a point to match.")
        rates = hits / np.maximum(matches, 1)[:, None]
        in_metres = len(settings.distances)
        at_bin, rates = rates[:, in_metres], np.delete(rates, in_metres, axis=1)
        names = [f"recall@{100 * value:g}cm" for value in settings.distances]
        names += [f"recall@{value:g}px" for value in settings.pixels]
        scores = dict(zip(names, rates.T, strict=True))
        scores = {"recall": rates[:, :in_metres].mean(1), **scores}
        weight = matches if settings.average == "matches" else (matches > 0).astype(int)
        objects, group = np.unique([pair.object for pair in pairs], return_inverse=True)
        totals = np.bincount(group, weight)
        by_object = {
            name: np.bincount(group, values * weight) / np.maximum(totals, 1) for name, values in scores.items()
        }
        metrics = {name: float(np.average(values, weights=weight)) for name, values in scores.items()}
        per_class: dict[str, dict[str, float | None]] = {
            name: {
                object_: float(value) if total else None
                for object_, value, total in zip(objects.tolist(), values, totals, strict=True)
            }
            for name, values in by_object.items()
        }
        angles = np.array([pair.angle for pair in pairs])
        key = f"recall@{100 * settings.bin_distance:g}cm"
        bins = np.digitize(angles, settings.bins) - 1
        turned: dict[str, float | None] = {}
        for number, (low, high) in enumerate(itertools.pairwise(settings.bins)):
            name = f"{low:g}-{high:g}"
            own = (bins == number) & (matches > 0)
            turned[name] = float(at_bin[own].mean()) if own.any() else None
            if own.any():
                metrics[f"{key}/rotation={name}"] = float(at_bin[own].mean())
        per_class[f"{key} by rotation"] = turned
        self.context.note(
            pairs=len(pairs),
            matches=int(matches.sum()),
            pairs_with_fewer_matches=int((matches < settings.matches).sum()),
            pair_list=getattr(self.dataset, "pair_list", None),
        )
        return Outcome(
            metrics=metrics,
            per_class=per_class,
            ci95={},
            n_images=len(pairs),
            statistics={
                **{f"score/{name}": values for name, values in scores.items()},
                "weight": weight,
                "group": objects[group],
                "angle": angles,
                "item_id": np.array([pair.id for pair in pairs]),
            },
            features={
                "input_size": settings.input_size,
                "used_size": used_size,
                "resize": settings.geometry,
                "final_norm": settings.final_norm,
            },
        )
