"""The tables say what the numbers say: an untrained model learns nothing, noise is not told apart from a gain."""

import pytest

from medfast.evaluation.learning import Difference, Direction, ablations_table, learning_table


def row(case, seed, random, trained, **measures):
    return {"case": case, "seed": seed, "steps": 5, "cpu_seconds": 2.0, "random": random, "trained": trained,
            "measures": measures}  # fmt: skip


def line(table, name):
    return next(found for found in table.splitlines() if name in found)


@pytest.mark.parametrize(
    "pairs, verdict",
    [
        ([(0.4, 0.5), (0.42, 0.53), (0.38, 0.47)], "**learns**"),
        ([(0.4, 0.4)] * 3, "not above random"),  # untrained: no difference, and no error of it
        ([(0.4, 0.5), (0.42, 0.44), (0.38, 0.37)], "not above random"),
        ([(0.4, 0.3), (0.42, 0.31), (0.38, 0.29)], "**below random**"),
    ],
)
def test_verdicts(pairs, verdict):
    rows = [row("mae", seed, *pair) for seed, pair in enumerate(pairs)]
    told = line(learning_table(rows, {"mae": "vit"}, (0, 1, 2)), "`mae`")
    assert told.endswith(f"| {verdict} |")


def test_the_error_is_that_of_paired_differences():
    """Differences .1, .2, .3: mean .2, standard deviation .1, error .1 / sqrt 3."""
    gain = Difference.of([(0.1, 0.2), (0.5, 0.7), (0.0, 0.3)])
    assert (gain.mean, gain.error) == pytest.approx((0.2, 0.1 / 3**0.5)) and gain.sign == 1
    assert Difference.of([(0.1, 0.2), (0.5, 0.5)]).sign == 0


def test_what_is_missing_is_said():
    rows = [row("mae", 0, 0.4, 0.5), row("smit", 0, 0.4, 0.5), row("smit", 1, 0.41, 0.5)]
    table = learning_table(rows, {"mae": "vit", "smit": "swin", "byol": "nnformer"}, (0, 1, 2))
    assert "one seed says nothing (1 of 3 seeds)" in line(table, "`mae`")
    assert "**learns** (2 of 3 seeds)" in line(table, "`smit`")
    assert "not run" in line(table, "`byol`")


def direction(less):
    return Direction("a claim", "heads", "with", less)


@pytest.mark.parametrize("with_, told", [((0.8, 0.9, 0.8), "| yes |"), ((0.1, 0.2, 0.1), "**no, the opposite**"),
                                         ((0.5, 0.4, 0.6), "not told apart")])  # fmt: skip
def test_directions(with_, told):
    rows = [row("with", seed, 0, 0, heads=value) for seed, value in enumerate(with_)]
    rows += [row("without", seed, 0, 0, heads=0.5) for seed in range(3)]
    assert told in line(ablations_table(rows, [direction("without")], (0, 1, 2)), "a claim")
    assert told in line(ablations_table(rows, [direction(0.5)], (0, 1, 2)), "a claim")


def test_a_direction_without_its_runs_is_not_run():
    rows = [row("with", 0, 0, 0, heads=0.8), row("without", 1, 0, 0, heads=0.8), row("without", 0, 0, 0)]
    assert "not run" in line(ablations_table(rows, [direction("without")], (0, 1, 2)), "a claim")


def test_the_probe_itself_may_be_what_a_claim_is_about():
    rows = [row(case, seed, 0.1, value) for case, value in (("with", 0.4), ("without", 0.3)) for seed in (0, 1)]
    claim = Direction("a claim", "trained", "with", "without")
    assert "| 0.400 (`with`) | 0.300 (`without`) | +0.100 ± 0.000 | yes |" in ablations_table(rows, [claim], (0, 1))
