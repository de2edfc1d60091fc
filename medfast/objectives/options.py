"""Checks of constructor arguments that objectives share."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from difflib import get_close_matches


def one_of(name: str, value: str, accepted: tuple[str, ...]) -> None:
    if value not in accepted:
        raise ValueError(f"{name} must be one of {', '.join(map(repr, accepted))}, got {value!r}")


def momenta(given: Sequence[float]) -> tuple[float, float]:
    """First and last momentum of an average, checked."""
    if len(given) != 2 or not 0.0 <= given[0] <= given[1] <= 1.0:
        raise ValueError(f"momentum is [first, last] with 0 <= first <= last <= 1, got {given!r}")
    return given[0], given[1]


def positive(name: str, value: float) -> float:
    if not value > 0.0:
        raise ValueError(f"{name} must be a number above 0, got {value!r}")
    return float(value)


def chosen_weights(given: Mapping[str, float] | None, default: Mapping[str, float]) -> dict[str, float]:
    """``default`` with ``given`` over it, without the losses that weigh 0. ValueError for unknown names."""
    given = {} if given is None else given
    for name, weight in given.items():
        if name not in default:
            near = get_close_matches(name, default, 1)
            hint = f" (did you mean {near[0]!r}?)" if near else ""
            raise ValueError(f"no loss called {name!r}{hint}; there are: {', '.join(default)}")
        if not isinstance(weight, int | float) or not weight >= 0.0:
            raise ValueError(f"the weight of {name} must be a number >= 0, got {weight!r}")
    weights = {name: float(weight) for name, weight in {**default, **given}.items() if weight}
    if not weights:
        raise ValueError("every loss weighs 0, nothing would be trained")
    return weights
