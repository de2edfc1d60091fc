"""Carry out a plan with NVIDIA DALI: one graph for CPU and GPU, fed with boxes and numbers, no random operators.

Boxes come from the caller (``DaliExecutor``), or from processes that cut them ahead of time, through DALI's parallel
external source (``DaliAhead``).
"""

from __future__ import annotations

import copy
import json
import multiprocessing
import threading
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from medfast_kernels import Key

from . import orientation
from .cutter import Cutter
from .executor_torch import one_of, ring_and_noise
from .intensity import OURS
from .store import DataError
from .watch import memory

__all__ = ["DaliAhead", "DaliExecutor", "Source", "build", "require"]

CPU = torch.device("cpu")
_GRACE = 5.0  # seconds that DALI has to see that its processes are gone
_BACKENDS = {"cpu": "cpu", "cuda": "gpu"}  # PyTorch's name of a device, DALI's


def require():
    """DALI's ``fn``, ``types``, ``math`` and ``Pipeline``. ValueError with what to do where DALI is not installed."""
    try:
        from nvidia.dali import Pipeline, fn, math, types
    except ImportError as error:
        raise ValueError(
            "data.executor is 'dali', but NVIDIA DALI cannot be imported. Install medfast[dali-cu13] "
            "(medfast[dali-cu12] for older drivers), or set data.executor=torch, which gives the same views."
        ) from error
    return fn, types, math, Pipeline


def build(
    device: str, size: Sequence[int], window: tuple[float, float], zoom: bool, names: Sequence[str], box: Any = None
):  # fmt: skip
    """Graph of one view: an int16 box (d, h, w, c) to fp32 (*size, c) in [0, 1]. Call inside a pipeline definition.

    device: "cpu" or "gpu", which boxes reach as int16. zoom: boxes may have another extent than ``size``. names: the
    intensity changes present, each an input of one number per sample; blur has a second input, its window in voxels.
    box: the boxes, an input called "box" where None.
    """
    fn, types, math, _ = require()
    low, high = window
    numbers = {name: fn.external_source(name=name, device="cpu", ndim=0) for name in names if name not in OURS}
    view = fn.external_source(name="box", device="cpu", layout="DHWC", dtype=types.INT16) if box is None else box
    sigma = numbers.get("blur")  # operators of the GPU too take their arguments from the host
    if device == "gpu":
        view, numbers = view.gpu(), {name: value.gpu() for name, value in numbers.items()}
    view = fn.cast(view, dtype=types.FLOAT)
    view = math.clamp((view - low) * (1.0 / (high - low)), 0.0, 1.0)
    if zoom:
        view = fn.resize(view, size=list(size), interp_type=types.INTERP_LINEAR, antialias=False)
    if "blur" in numbers:
        width = fn.external_source(name="blur_window", device="cpu", ndim=0)
        view = fn.gaussian_blur(view, sigma=sigma, window_size=width)
    if "gain" in numbers or "shift" in numbers:
        view = math.clamp(view * numbers.get("gain", 1.0) + numbers.get("shift", 0.0), 0.0, 1.0)
    if "contrast" in numbers:
        mean = fn.reductions.mean(view, axes=[0, 1, 2], keep_dims=True)
        view = math.clamp((view - mean) * numbers["contrast"] + mean, 0.0, 1.0)
    return view ** numbers["gamma"] if "gamma" in numbers else view


def feed(pipeline: Any, names: Sequence[str], params: Mapping[str, np.ndarray]) -> None:
    """Give a pipeline of ``build`` the numbers of the next run. params: name -> (m,) float32."""
    for name in names:
        value = np.asarray(params[name], dtype=np.float32)
        if name == "blur":  # a window of one voxel is the identity; sigma itself must stay above zero
            width = np.where(value > 0, 2 * np.ceil(3 * value) + 1, 1).astype(np.int32)
            pipeline.feed_input("blur_window", [np.array(x) for x in width])
            value = np.where(value > 0, value, np.float32(1))
        pipeline.feed_input(name, [np.array(x) for x in value])


def _options(device: torch.device) -> dict[str, Any]:
    """Of a pipeline. On a GPU its outputs live on for as long as PyTorch holds them."""
    if device.type == "cpu":
        return {"device_id": None, "exec_async": False, "exec_pipelined": False}
    return {"device_id": device.index or 0, "exec_dynamic": True}


def _finished(views: Any, params: Mapping[str, np.ndarray], key: Key | None, device: torch.device) -> Tensor:
    """(m, c, *size) fp32, contiguous, with the changes of ``OURS``; from a GPU without a copy of one channel."""
    on_gpu = device.type != "cpu"
    made = torch.from_dlpack(views.as_tensor()) if on_gpu else torch.from_numpy(np.array(views.as_tensor(), copy=True))
    stacked = made.movedim(-1, 1).contiguous()
    ringing, noise = (params.get(name, np.zeros(len(stacked))) for name in OURS)
    for place in map(int, np.flatnonzero((ringing > 0) | (noise > 0))):
        own = one_of(key, place) if noise[place] else None
        ring_and_noise(stacked[place], float(ringing[place]), float(noise[place]), own)
    return stacked


def _turned(crops: Sequence[np.ndarray], turns: np.ndarray | None) -> list[np.ndarray]:
    """Boxes (c, d, h, w), turned, as (d, h, w, c), contiguous."""
    straight = crops if turns is None else [orientation.turn(*pair) for pair in zip(crops, turns, strict=True)]
    return [np.ascontiguousarray(np.moveaxis(crop, 0, -1)) for crop in straight]


class DaliExecutor:
    """The same call as ``TorchExecutor``. Holds a pipeline: one executor per thread.

    most: largest number of views of one call. device: where views are made. ValueError where DALI is missing.
    """

    def __init__(
        self, size: Sequence[int], window: tuple[float, float], *, zoom: bool, names: Sequence[str], most: int,
        device: torch.device = CPU,
    ):  # fmt: skip
        *_, pipeline = require()
        self.names, self.device = [name for name in names if name not in OURS], device
        self.pipeline = pipeline(batch_size=most, num_threads=1, prefetch_queue_depth=1, **_options(device))
        with self.pipeline:
            self.pipeline.set_outputs(build(_BACKENDS[device.type], tuple(size), window, zoom, self.names))
        self.pipeline.build()

    def __call__(
        self, crops: Sequence[np.ndarray], params: Mapping[str, np.ndarray], key: Key | None = None,
        turns: np.ndarray | None = None,
    ) -> Tensor:  # fmt: skip
        """(m, c, *size) fp32; arguments as ``TorchExecutor`` has them."""
        self.pipeline.feed_input("box", _turned(crops, turns), layout="DHWC")
        feed(self.pipeline, self.names, params)
        (views,) = self.pipeline.run()
        return _finished(views, params, key, self.device)


class Source:
    """What a process of DALI's parallel external source calls: batch number -> its boxes and a note about them.

    DALI makes a RuntimeError of whatever a process raises, so word of damaged volumes travels beside the boxes. The
    note is JSON, as bytes: {"damaged": {member: reason}} as this process knows them, so its plan can be made again, and
    "error" where one too many is damaged; the boxes are empty then.
    """

    def __init__(self, cutter: Cutter, schedule: Sequence[tuple[int, Sequence[int]]]):
        self.cutter, self.schedule = copy.copy(cutter), schedule
        self.cutter.tells = False  # who reads the notes does

    def __call__(self, number: int) -> tuple[list[np.ndarray], list[np.ndarray]]:
        """Boxes (d, h, w, c) of all views, and for each box the note, or as good as nothing after the first."""
        if number >= len(self.schedule):
            raise StopIteration
        torch.set_num_threads(1)
        step, slots = self.schedule[number]
        slots, _ = self.cutter.together(step, torch.tensor(slots))
        note: dict[str, Any] = {}
        try:
            plan, boxes = self.cutter.cut(step, slots)
            turned = _turned(boxes, plan.turned)
        except DataError as error:
            note["error"], recipe = str(error), self.cutter.recipe
            turned = [np.zeros((*recipe.size, self.cutter.store.channels), dtype=np.int16)] * len(slots) * recipe.views
        text = np.frombuffer(json.dumps({**note, "damaged": self.cutter.damaged}).encode(), dtype=np.uint8)
        return turned, [text, *[text[:1]] * (len(turned) - 1)]


class DaliAhead:
    """The batches of a schedule in its order; ``processes`` cut their boxes, up to ``depth`` batches ahead.

    most: largest number of views of one batch. threads: of DALI. processes: the ``multiprocessing.Process``es at work.
    """

    def __init__(
        self, source: Source, size: Sequence[int], window: tuple[float, float], *, zoom: bool, names: Sequence[str],
        most: int, processes: int, depth: int, device: torch.device = CPU,
    ):  # fmt: skip
        fn, types, _, pipeline = require()
        self.names, self.device = [name for name in names if name not in OURS], device
        self.pipeline = pipeline(
            batch_size=most, num_threads=processes, prefetch_queue_depth=1, py_num_workers=processes,
            py_start_method="spawn", **{**_options(device), "exec_pipelined": True},  # or the processes get no work
        )  # fmt: skip
        with self.pipeline:
            box, note = fn.external_source(
                source=source, num_outputs=2, batch=True, parallel=True, prefetch_queue_depth=depth,
                layout=["DHWC", ""], dtype=[types.INT16, types.UINT8],
            )  # fmt: skip
            self.pipeline.set_outputs(build(_BACKENDS[device.type], tuple(size), window, zoom, self.names, box), note)
        children, threads = multiprocessing.active_children(), threading.enumerate()
        try:
            self.pipeline.start_py_workers()
        except RuntimeError as error:  # DALI's only word of a process that ended before it was ready
            raise DataError(
                f"a worker process of DALI ended before it was ready, of {processes} (data.workers): "
                f"killed, or short of memory. Now {memory()}"
            ) from error
        self.processes = [process for process in multiprocessing.active_children() if process not in children]
        self._observers = [one for one in threading.enumerate() if one not in threads and one.daemon]
        self.pipeline.build()

    def next(self, params: Mapping[str, np.ndarray], key: Key) -> tuple[Tensor, dict[int, str]]:
        """Views (m, c, *size) of the next batch, and the members that were left out when it was planned, with reasons.
        params, key: as ``TorchExecutor`` has them. Raises the DataError that the process met which cut it."""
        feed(self.pipeline, self.names, params)
        views, notes = self.pipeline.run()
        note = json.loads(np.array(notes.at(0)).tobytes())
        if "error" in note:
            raise DataError(note["error"])
        damaged = {int(member): reason for member, reason in note["damaged"].items()}
        return _finished(views, params, key, self.device), damaged

    def close(self) -> None:
        """End the processes; they have nothing to lose. DALI itself would do so when the garbage collector comes, later
        than the interpreter waits for them, and would wait for one that hangs."""
        for process in self.processes:
            process.kill()
        for process in self.processes:
            process.join(_GRACE)
        for thread in self._observers:  # told to end while one of these has just died, it would wait for that one
            thread.join(_GRACE)
