import re

import pytest

from medfast.evaluation.charts import Level, Line, chart, moving_mean


def test_moving_mean_is_centred_and_ignores_what_is_not_finite():
    assert moving_mean([1.0, 2.0, 6.0], 3) == pytest.approx([1.5, 3.0, 4.0])
    assert moving_mean([1.0, float("nan"), 5.0], 3) == pytest.approx([1.0, 3.0, 5.0])


def points(svg, style):
    text = re.search(rf'class="{style}" points="([^"]*)"', svg).group(1)
    return [tuple(map(float, pair.split(","))) for pair in text.split()]


def test_a_falling_line_falls_on_the_page():
    svg = chart("loss", [Line("a", [0, 5, 10], [3.0, 2.0, 1.0])])
    x, y = zip(*points(svg, "smooth"), strict=True)
    assert list(x) == sorted(x) and list(y) == sorted(y)
    assert x[1] == pytest.approx((x[0] + x[2]) / 2, abs=0.2)


def test_long_runs_are_thinned_to_means():
    svg = chart("loss", [Line("a", range(5000), [i % 2 for i in range(5000)])])
    assert len(points(svg, "smooth")) == 500
    assert len({y for _, y in points(svg, "smooth")}) == 1


def test_levels_are_inside_the_frame():
    svg = chart("rank", [Line("a", [0, 1], [5.0, 6.0])], [Level("collapsed", 1.0, "bad")])
    y = float(re.search(r'class="level bad"><line [^>]*y1="([\d.]+)"', svg).group(1))
    assert 0 < y < 250 and "collapsed" in svg


@pytest.mark.parametrize("values", [[], [1.0], [2.0, 2.0], [0.0, 0.0], [float("nan")], [1e-9, 2e-9], [1e8, 2e8]])
def test_odd_series_draw(values):
    svg = chart("odd", [Line("a", range(len(values)), values)])
    assert "nan" not in svg and (svg == "" or svg.startswith("<svg"))
