"""Checks of constructor arguments that objectives share."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from difflib import get_close_matches
from typing import Any, TypeVar, get_type_hints

from medfast.types import Backbone

Made = TypeVar("Made")


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


def distilled_stage(backbone: Backbone, stage: int | None) -> int:
    """Index, from 0, of the stage whose tokens are the cells: ``stage``, counted from 1, or where None the one that
    [CLS] attends to, else the third, or the last of fewer. ValueError where there is no such stage."""
    attended, stages = backbone.semantic_attention, len(backbone.strides)
    chosen = (attended or min(3, stages)) if stage is None else stage
    if not 1 <= chosen <= stages or attended not in (None, chosen):
        raise ValueError(
            f"stage must be one of 1..{stages} and the one whose tokens [CLS] attends to ({attended}), got {stage}"
        )
    return chosen - 1


def summary_width(backbone: Backbone) -> int:
    """Width of ``Features.summary``: [CLS] is as wide as the tokens it attends to, the mean as the last stage's."""
    attended = backbone.semantic_attention
    return backbone.channels[-1 if attended is None else attended - 1]


def token_width(backbone: Backbone) -> int:
    """Width of the mask token. ValueError for a backbone without tokens that could be hidden."""
    if not backbone.embed:
        raise ValueError(
            f"this objective hides tokens behind a mask token, and {type(backbone).__name__} has no token embedding: "
            "give it a transformer (swin, vit, nnformer), or take an objective without masks (simclr, byol, moco_v3)"
        )
    return backbone.embed


def setting(objective: type[Made], **defaults: Any) -> Callable[..., Made]:
    """A function that builds ``objective`` with other defaults: a paper that is a setting of another one.

    Its signature and annotations are the constructor's with those defaults, so a configuration is checked against it.
    """
    signature = inspect.signature(objective)

    def build(*positional: Any, **named: Any) -> Made:
        given = signature.bind_partial(*positional, **named).arguments
        return objective(**{**defaults, **given})

    build.__annotations__ = get_type_hints(objective.__init__)
    build.__signature__ = signature.replace(
        parameters=[p.replace(default=defaults.get(name, p.default)) for name, p in signature.parameters.items()]
    )
    return build
