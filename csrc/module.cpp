// What is no operator, for Python: how the library was built, and the plan of windows that its CPU kernels compute with.
// A module of one Python version beside a library of none: it is built where pybind11 is, and may be missing.
#include <algorithm>
#include <cstdint>
#include <vector>

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "window_plan.h"

namespace py = pybind11;
using Sizes = std::vector<int64_t>;

namespace {

py::object facts() { return py::module_::import("json").attr("loads")(MEDFAST_FACTS); }

void check(const Sizes& grid, const Sizes& window, const Sizes& shift) {
  if (grid.size() < 2 || grid.size() > 3 || window.size() != grid.size() || shift.size() != grid.size())
    throw py::value_error("grid, window and shift need one entry for each of 2 or 3 axes");
  for (size_t i = 0; i < grid.size(); ++i)
    if (grid[i] < 1 || window[i] < 1 || shift[i] < 0 || shift[i] >= window[i])
      throw py::value_error("grid and window must be at least 1 and 0 <= shift < window on every axis");
}

py::dict window_plan(const Sizes& grid, Sizes window, Sizes shift, bool live_pads, int64_t batch, int64_t heads,
                     bool clip) {
  check(grid, window, shift);
  std::vector<bool> clips;
  for (size_t i = 0; i < grid.size(); ++i) {
    clips.push_back(clip && grid[i] <= window[i]);
    if (clips.back()) window[i] = grid[i], shift[i] = 0;
  }
  const Axes axes = three_axes(grid, window, shift);
  const Plan plan = make_plan(axes, live_pads);
  Sizes counts, padded;
  for (size_t i = axes.size() - grid.size(); i < axes.size(); ++i) {
    counts.push_back(axes[i].padded / axes[i].window);
    padded.push_back(axes[i].padded);
  }
  py::dict shown;
  shown["clips"] = clips;
  shown["padded"] = padded;
  shown["counts"] = counts;
  shown["windows"] = plan.windows;
  shown["tokens"] = plan.tokens;
  shown["pads"] = std::count(plan.source.begin(), plan.source.end(), -1);
  shown["source"] = plan.source;
  shown["region"] = plan.region;
  shown["masked"] = std::vector<bool>(plan.masked.begin(), plan.masked.end());
  shown["launch"] = Sizes{plan.chunks(batch, heads), heads};
  return shown;
}

}  // namespace

PYBIND11_MODULE(_facts, m) {
  using namespace py::literals;
  m.doc() = "Build facts of the C++ library and the plan of windows that its CPU kernels compute with.";
  m.def("facts", &facts, "How the library was built: compiler, flags, instruction sets, architectures, ABI, sources.");
  m.def("window_plan", &window_plan, "grid"_a, "window"_a, "shift"_a, "live_pads"_a = true, "batch"_a = 1, "heads"_a = 1,
        "clip"_a = false,
        "The plan of one sample. clips: which axes got a window of their own length and no shift, because clip is set "
        "and they are no longer than theirs. padded, counts: per axis. windows, tokens: of a "
        "sample and of a window. pads: places that hold no token. source, region: windows x tokens, row by row: the "
        "token of the grid, -1 for padding, and who sees whom. masked: windows with more than one region. launch: "
        "chunks of windows that threads share, times heads.");
}
