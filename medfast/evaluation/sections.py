"""The sections of the page that are made of numbers: curves, the comparison with predictors, collapse gauges."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape

from . import page
from .charts import Level, Line, chart, moving_mean
from .gauges import Gauge
from .reconstruction import GATE, Score
from .runlog import Row, names, series

__all__ = ["collapse", "comparison", "losses", "schedules"]

TERMS = {
    "amip": "Attentive masked image prediction: mean absolute error of the voxels the student fills in.",
    "ampd": "Attentive masked patch distillation: the student names the teacher's prototype of each hidden patch.",
    "aitd": "Attentive image distillation: [CLS] of one view agrees with the teacher's [CLS] of the other view.",
    "gitd": "Global image distillation: the mean over all patches agrees across the two views.",
    "recon": "Mean absolute error of the voxels the student fills in.",
    "patch": "The student names the teacher's prototype of each hidden patch.",
    "image": "The image token of one view agrees with the teacher's of the other view.",
}
GAUGES = {
    "rank_student": "Effective rank of the student's patch tokens: how many directions it uses.",
    "rank_teacher": "Effective rank of the teacher's patch tokens.",
    "entropy_used": "Entropy of the average prototype distribution: are all prototypes in use? Largest: ln K.",
    "entropy_each": "Average entropy of a patch's own distribution: is the teacher sure of one prototype? At ln K, the "
    "largest possible value, it says nothing yet.",
    "information": "Their difference: what a patch's prototype tells about the patch, in nats.",
    "information_within": "The part of it that is about where in its crop a patch is from: near 0 where a crop has one "
    "prototype for all its patches, though crops may have different ones.",
    "rows": "The fewest rows, patches or images, that effective ranks and prototype gauges are read of.",
    "variance_within": "Share of the variance of the encoder's tokens that is among tokens of one crop: near 0 where a "
    "crop has one token everywhere.",
    "position_similarity": "How alike the encoder's tokens at one place of different volumes are, less what all tokens "
    "share: 1 where they tell their place and nothing else.",
    "same_position": "The same of the tokens that are told from each other, on training batches.",
    "head_entropy": "How widely attention heads look, mean over all heads: 1 is everywhere alike, 0 a single token.",
    "head_entropy_spread": "How much heads differ in that: their standard deviation.",
    "teacher_norm": "Length of all the teacher's numbers together. A teacher that is updated never has the same twice.",
    "equal_views": "Share of samples whose views are the same, voxel by voxel.",
    "agreement": "Similarity of what is the same in both views, on training batches.",
    "mask_ratio": "Share of cells hidden from the student.",
}
PREDICTORS = {
    "model": ("This model", "what was trained"),
    "median_crop": ("Median of the crop", "one grey value for all, chosen knowing the hidden voxels too"),
    "median_visible": ("Median of what is visible", "one grey value for all"),
    "nearest": ("Nearest visible voxel", "copied into each hidden voxel"),
    "nearest_smoothed": ("Nearest, then blurred", "best of four widths, chosen on these crops"),
    "smoothed": ("Gaussian mean of what is visible", "best of four widths, chosen on these crops"),
}
KEYS = (
    '<p class="keys"><i class="k-raw"></i>each step<i></i>moving mean<i class="k-dots"></i>held-out crops, '
    "fixed masks</p>"
)


def losses(rows: Sequence[Row], uniform: Mapping[str, float]) -> str:
    """Loss curves, total first, then per term. uniform: what a term costs that answers "all prototypes alike"."""
    named = f" ({', '.join(name.upper() for name in uniform)})" if uniform else ""
    look = (
        f"The fill-in term should fall and keep falling slowly. A distillation term{named} at its dashed line, weight "
        "times ln K for K prototypes, answers “all alike” and says nothing yet. Once it has left the line it chases a "
        "teacher that moves, so it dips, climbs and settles; whether it says anything is told by the collapse gauges "
        "below. Held-out dots that rise while the moving mean falls would be memorised volumes."
    )
    charts = [_curve(rows, "total", "Sum of all weighted terms: what is trained.", ("total",), ("validation", "total"))]
    for name in names(rows, "loss"):
        levels = [Level("uniform, weight × ln K: says nothing yet", uniform[name])] if name in uniform else []
        text = TERMS.get(name, "Weighted loss term.")
        charts.append(_curve(rows, name, text, ("loss", name), ("validation", name), levels))
    return page.section("Losses", look, KEYS, f'<div class="charts">{"".join(charts)}</div>')


def _curve(rows: Sequence[Row], title: str, text: str, path: tuple[str, ...], held: tuple[str, ...], levels=()) -> str:
    steps, values = series(rows, *path)
    if not steps:
        return ""
    lines = [
        Line("each step", steps, values, "raw"),
        Line("mean", steps, moving_mean(values, max(1, len(steps) // 25))),
        Line("held out", *series(rows, *held), "dots"),
    ]
    return page.figure(title, escape(text), chart(title, lines, levels))


def schedules(rows: Sequence[Row]) -> str:
    """Small plots of what was set, how large gradients were, and how fast it went."""
    look = (
        "Rate: a ramp, then half a cosine. Momentum of the teacher: rising to 1. Gradient norm: no growing spikes. "
        "Waiting for data should be a small part of a step."
    )
    entries = [("Learning rate", ("lr",)), ("Weight decay", ("weight_decay",)), ("Teacher momentum", ("momentum",))]
    entries += [("Gradient norm", ("grad_norm",))]
    entries += [(f"Time: {name} (s)", ("time", name)) for name in names(rows, "time")]
    charts = []
    for title, path in entries:
        steps, values = series(rows, *path)
        if steps:
            svg = chart(title, [Line(title, steps, values)], zero=path[0] == "time", small=True)
            charts.append(page.figure(title, "", svg))
    return page.section("Schedules and speed", look, f'<div class="charts small">{"".join(charts)}</div>')


def comparison(scores: Sequence[Score], window: Sequence[float] | None) -> str:
    """Masked L1 of the model beside predictors that learn nothing, a table per kind of mask."""
    look = (
        f"The model's bar should be clearly the shortest: at most {GATE:.0%} of the better median and below every "
        "interpolation. If interpolation wins, the model has learned to blur and nothing else."
    )
    parts = []
    for score in scores:
        title = "Fixed random masks" if score.mask == "fixed" else "Masks as the objective draws them"
        text = (
            f"{score.crops} views of held-out crops, {score.hidden:.0%} of the voxels hidden. Mean absolute error of "
            "hidden voxels; 1 is the whole window of grey values"
            + (f", {window[0]:g} to {window[1]:g} HU." if window else ".")
        )
        parts.append(f"<h3>{title}</h3><p><small>{text}</small></p>{_bars(score, window)}<br>")
    return page.section("Is it better than guessing?", look, *parts)


def _bars(score: Score, window: Sequence[float] | None) -> str:
    shown = {name: score.l1[name] for name in ("model", "median_crop", "median_visible", "nearest")}
    width = {}
    for family in ("nearest_smoothed", "smoothed"):
        best, shown[family] = score.best(f"{family}_")
        width[family] = best.rsplit("_", 1)[1]
    top, base = max(shown.values()) or 1.0, max(score.best("median")[1], 1e-12)
    rows = []
    for name, value in sorted(shown.items(), key=lambda pair: pair[1]):
        title, text = PREDICTORS[name]
        text += f" (sigma {width[name]} voxels)" if name in width else ""
        units = [f"{value * (window[1] - window[0]):.0f}"] if window else []
        rows.append(
            ("us" if name == "model" else "",
             [f"{title}<small>{text}</small>", f"bar:{value / top:.4f}", f"{value:.4f}", *units, f"{value / base:.0%}"])
        )  # fmt: skip
    head = ["Predictor", "", "L1", *(["HU"] if window else []), "of the better median"]
    return page.table(head, rows)


def collapse(rows: Sequence[Row], measured: Mapping[str, Gauge]) -> str:
    """Gauges over time and at the end, with what a collapsed and a random model would show."""
    look = (
        "A collapsed model gives the same answer to everything, in one of two ways: one prototype for all (entropy "
        "near 0) or all prototypes a little (both entropies at the largest value). Either way a patch's prototype says "
        "nothing about it: information is near 0, and the effective rank falls towards 1. A healthy run keeps away "
        "from the red lines. Random is the same network with its weights shuffled and its centres found anew: training "
        "should leave it behind. All lines are measured on the crops and masks of the gauges that validation logged, "
        "because rank and entropy depend on how many tokens are looked at; gauges without lines were not measured here."
    )
    logged = [_gauge_chart(rows, name, measured) for name in names(rows, "gauge")]
    table = ""
    if measured:
        cells = [
            ("", [f"{name}<small>{GAUGES.get(name, '')}</small>", *(f"{x:.2f}" for x in
                  (gauge.value, gauge.collapsed, gauge.random, gauge.ceiling))])
            for name, gauge in measured.items()
        ]  # fmt: skip
        table = page.table(["On held-out crops, now", "this model", "collapsed", "random", "largest possible"], cells)
    return page.section("Has it collapsed?", look, table, f'<br><div class="charts small">{"".join(logged)}</div>')


def _gauge_chart(rows: Sequence[Row], name: str, measured: Mapping[str, Gauge]) -> str:
    steps, values = series(rows, "gauge", name)
    text = GAUGES.get(name, "")
    if name.startswith("entropy_") and name not in GAUGES:
        text = f"Entropy of the teacher's average distribution on training batches, term {name[8:]}."
    levels = []
    if (reference := measured.get(name)) is not None:
        levels = [Level("collapsed", reference.collapsed, "bad"), Level("random", reference.random, "random")]
        if name.startswith("entropy"):
            levels.append(Level("largest possible", reference.ceiling))
    return page.figure(name, escape(text), chart(name, [Line(name, steps, values)], levels, small=True))
