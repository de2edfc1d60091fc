"""Which volumes are trained on, which are held out, and how often those of each dataset come."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

__all__ = ["EQUAL", "chances", "pseudonym", "split_volumes"]

EQUAL = "equal"
NAMELESS = "none"  # the dataset of volumes whose list named none


def split_volumes(records: Sequence[Mapping[str, Any]], holdout: float) -> tuple[list[int], list[int]]:
    """Indices of the training and held-out volumes, by the hash of the patient (``group``), or of the id where the
    index knows no patient: a patient is on one side, and keeps it as a store grows.

    At least one patient on each side; a single one is on both.
    """
    owners = [record.get("group") or record["id"] for record in records]
    share = {owner: _share(owner) for owner in owners}
    if len(share) == 1:
        return list(range(len(owners))), list(range(len(owners)))
    order = sorted(share, key=share.__getitem__)
    count = min(max(sum(s < holdout for s in share.values()), 1), len(order) - 1)
    held = set(order[:count])
    sides = [[i for i, owner in enumerate(owners) if (owner in held) == out] for out in (False, True)]
    return sides[0], sides[1]


def _share(text: str) -> float:
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") / 2.0**64


def pseudonym(salt: bytes, name: str) -> str:
    """Tells the names of one store apart and says nothing of what they are to who has no salt."""
    return hashlib.sha256(salt + name.encode()).hexdigest()[:12]


def chances(
    weights: Mapping[str, float] | str | None, datasets: Sequence[str | None], members: Sequence[int], store: Path
) -> list[float] | None:  # fmt: skip
    """Chance of each of ``members`` in a draw, adding up to 1; None where every volume comes once an epoch.

    weights: None; "equal", every dataset as often as every other; or {dataset: share of the draws}, shares of any sum,
    0 for never, with "none" for volumes without a dataset. A dataset is called as in the list that it was prepared
    from, which needs the store's ``private/salt``, or as in the index. datasets: of each volume, as in the index;
    members: indices of the split's. ValueError names those that are unknown, and those that are left out.
    """
    if weights is None:
        return None
    names = [name or NAMELESS for name in datasets]
    shares = dict.fromkeys(names, 1.0) if weights == EQUAL else _named(weights, Counter(names), store)
    there = Counter(names[i] for i in members)
    total = sum(shares[name] for name in there)
    if not total > 0:
        raise ValueError(f"data.weights gives 0 to all datasets of this split: {_told(there)}")
    return [shares[names[i]] / total / there[names[i]] for i in members]


def _named(weights: Any, counts: Mapping[str, int], store: Path) -> dict[str, float]:
    if not isinstance(weights, Mapping) or not all(
        isinstance(x, int | float) and not isinstance(x, bool) and 0 <= x < float("inf") for x in weights.values()
    ):
        raise ValueError(f"data.weights is null, {EQUAL!r}, or {{dataset: share of the draws}}, got {weights!r}")
    salt = store / "private" / "salt"
    known = salt.read_bytes() if salt.is_file() else None
    shares: dict[str, float] = {}
    for name, share in weights.items():
        hashed = pseudonym(known, f"dataset {name}") if known else None
        found = next((x for x in (name, hashed) if x in counts), None)
        if found is None:
            hint = "" if known else " Its private/salt is not there, so datasets go by their names in the index."
            raise ValueError(f"data.weights: no volume is of a dataset {name!r}.{hint} There are {_told(counts)}")
        shares[found] = float(share)
    if left := sorted(set(counts) - set(shares)):
        raise ValueError(f"data.weights says nothing of {left}; give each a share, 0 for never. There are "
                         f"{_told(counts)}")  # fmt: skip
    return shares


def _told(counts: Mapping[str, int]) -> str:
    return ", ".join(f"{name} ({count} volumes)" for name, count in sorted(counts.items()))
