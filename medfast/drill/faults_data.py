"""Faults of the store: damaged volumes, workers that die or hang, a preparation that is broken off."""

from __future__ import annotations

import fcntl
import multiprocessing
import os
import shutil
import signal
from collections.abc import Callable

from medfast.drill import disk
from medfast.drill.judge import Expected
from medfast.drill.moments import Act, Install, at_file, at_step, kill, stall
from medfast.drill.scene import Injection, Scene

__all__ = ["prepare", "volumes", "workers"]

STORE = 3  # exit code: the data cannot be trusted


def _all_volumes(change: Callable) -> Callable[[Scene], object]:
    def act(scene: Scene) -> None:
        for file in scene.volumes():
            change(file)

    return act


def _in_store(name: str, change: Callable) -> Callable[[Scene], object]:
    return lambda scene: change(scene.store / name)


def _put_back(scene: Scene) -> None:
    shutil.rmtree(scene.store)
    shutil.copytree(scene.setup.store, scene.store)


def volumes() -> list[Injection]:
    def bad(fault: str, at: str, words: str, before: Callable[[Scene], object], **more) -> Injection:
        return Injection(fault, at, Expected((STORE,), words, "again"), before=before, after=_put_back, **more)

    def half_while_it_runs(scene: Scene) -> Install:
        return at_step(0, lambda _: [disk.replace_cut(file) for file in scene.volumes()])

    return [
        bad("truncated store file", "volumes cut to half, before the run", "bytes", _all_volumes(disk.cut), quick=True),
        bad("truncated store file", "volumes cut to nothing, before the run", "bytes",
            _all_volumes(lambda file: disk.cut(file, 0.0))),
        bad("truncated store file", "volumes cut to half, after 4 steps, before the resume", "bytes",
            _all_volumes(disk.cut), begin=4, kept=4),
        Injection("truncated store file", "volumes replaced by their first half, step 0",
                  Expected((STORE,), "volume .*(bytes|cannot be read)", "again"), inject=half_while_it_runs,
                  after=_put_back),
        Injection("truncated store file", "two volumes cut to half, before the run, four may be left out",
                  Expected((0,), "left out as damaged", "said"), options=("data.skip=4",),
                  before=lambda scene: [disk.cut(file) for file in scene.volumes()[:2]]),
        bad("bit-flipped store file", "one bit of each volume's voxels, before the run", "SHA-256",
            _all_volumes(disk.flip), quick=True),
        bad("bit-flipped store file", "one bit of each volume's header, before the run", "SHA-256",
            _all_volumes(lambda file: disk.flip(file, 0.0))),
        bad("bit-flipped store file", "one bit of each volume's last voxel, after 4 steps, before the resume",
            "SHA-256", _all_volumes(lambda file: disk.flip(file, 1.0, 7)), begin=4, kept=4),
        bad("bit-flipped store file", "one bit of the index, before the run", "index.jsonl is damaged",
            _in_store("index.jsonl", disk.flip)),
        bad("missing store file", "volumes deleted, before the run", "is missing", _all_volumes(os.unlink)),
        bad("missing store file", "index deleted, before the run", "has no volumes",
            _in_store("index.jsonl", os.unlink)),
        bad("wrong recipe", "one bit of STORE.json, before the run", "STORE.json", _in_store("STORE.json", disk.flip)),
    ]  # fmt: skip


def _strike_worker(number: int) -> Act:
    return lambda *_: [os.kill(worker.pid or 0, number) for worker in multiprocessing.active_children()]


def workers() -> list[Injection]:
    patience = ("data.patience={patience}",)
    late = Expected((STORE,), "no batch came for .* has been reading", "again")

    def stuck(nth: int) -> Callable[[Scene], Install]:
        return lambda scene: at_file("/volumes/", stall, nth)

    return [
        Injection("hung worker", "the first volume opened never comes", late, inject=stuck(1), settings=patience),
        Injection("hung worker", "the tenth volume opened never comes", late, inject=stuck(10), settings=patience),
        Injection("hung worker", "SIGSTOP to the loader's process, step 1",
                  Expected((STORE,), "no batch came for", "again"),
                  inject=lambda _: at_step(1, _strike_worker(signal.SIGSTOP)), settings=patience, executor="dali"),
        Injection("bit-flipped store file", "one bit of each volume's voxels, before the run, worker processes",
                  Expected((STORE,), "SHA-256", "again"), before=_all_volumes(disk.flip), after=_put_back,
                  executor="dali"),
        Injection("bit-flipped store file", "two volumes, before the run, four may be left out, worker processes",
                  Expected((0,), "left out as damaged", "said"), options=("data.skip=4",), executor="dali",
                  before=lambda scene: [disk.flip(file) for file in scene.volumes()[:2]]),
        Injection("killed worker", "SIGKILL to the loader's process, step 1",
                  Expected((STORE,), "was killed by SIGKILL", "again"),
                  inject=lambda _: at_step(1, _strike_worker(signal.SIGKILL)), executor="dali"),
    ]  # fmt: skip


def _copied(scene: Scene) -> list:
    shutil.copytree(scene.setup.sources, scene.sources)
    return sorted(scene.sources.iterdir())


def _inf_source(scene: Scene) -> None:
    import nibabel
    import numpy as np

    file = _copied(scene)[1]
    image = nibabel.Nifti1Image.from_bytes(file.read_bytes())
    voxels = image.get_fdata(dtype=np.float32)
    voxels[36, 36, 36] = np.inf
    file.write_bytes(nibabel.Nifti1Image(voxels, image.affine, image.header).to_bytes())


def _mend_sources(scene: Scene) -> None:
    shutil.rmtree(scene.sources)
    _copied(scene)


def _empty(scene: Scene) -> None:
    shutil.rmtree(scene.store)


def _leave_lock(scene: Scene) -> None:
    (scene.store / ".lock").write_text("4194303\n")
    (scene.store / ".tmp").mkdir()
    (scene.store / ".tmp" / "0123456789ab.npy").write_bytes(b"half a volume")


def _cut_source(scene: Scene) -> None:
    disk.cut(_copied(scene)[2])


def prepare() -> list[Injection]:
    def lock(scene: Scene) -> None:
        scene.held = (scene.store / ".lock").open("w")
        fcntl.flock(scene.held, fcntl.LOCK_EX | fcntl.LOCK_NB)

    def spacing(spacing: str, words: str, before: Callable[[Scene], object]) -> Injection:
        return Injection("wrong recipe", f"prepare {spacing} on this store", Expected((2,), words, "again"),
                         before=before, options=tuple(spacing.split()), verb="prepare")  # fmt: skip

    killed = Expected((-9,), "", "again")
    return [
        Injection("Inf voxel", "in a source, before prepare",
                  Expected((STORE,), "(NaN or infinite|non-finite)", "again"),
                  before=lambda scene: (_empty(scene), _inf_source(scene)), after=_mend_sources, verb="prepare",
                  quick=True),
        Injection("truncated source", "one of five, before prepare",
                  Expected((STORE,), "20.0% of the files are bad", "again"),
                  before=lambda scene: (_empty(scene), _cut_source(scene)), after=_mend_sources, verb="prepare"),
        Injection("killed writer", "SIGKILL when prepare names its third volume", killed, before=_empty, verb="prepare",
                  inject=lambda _: at_file(r"/volumes/\w+\.npy", kill(signal.SIGKILL), 3)),
        Injection("killed writer", "SIGKILL when prepare opens the index for its second line", killed, before=_empty,
                  inject=lambda _: at_file("index.jsonl", kill(signal.SIGKILL), 4), verb="prepare"),
        Injection("stale lock", "lock and half a volume of a killed prepare, before prepare", Expected(),
                  before=_leave_lock, verb="prepare"),
        Injection("held lock", "another prepare is at work", Expected((STORE,), "another run is writing", "again"),
                  before=lock, after=lambda scene: scene.held.close(), verb="prepare"),
        spacing("--spacing 3", "prepared with spacing 2.0, now 3.0", lambda scene: None),
        spacing("--kernel area", "prepared with kernel", lambda scene: None),
    ]  # fmt: skip
