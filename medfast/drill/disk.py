"""Disks that are full, read-only or wrong, and the volumes of a drill. Damage is real: bytes and mounts."""

from __future__ import annotations

import ctypes
import os
import resource
from pathlib import Path

import numpy as np

__all__ = ["Mounts", "cut", "flip", "limit_files", "replace_cut", "write_sources"]

_NEWNS, _NEWUSER = 0x20000, 0x10000000  # of unshare(2)
_RDONLY, _REMOUNT, _BIND, _REC, _PRIVATE = 0x1, 0x20, 0x1000, 0x4000, 0x40000  # of mount(2)
_EDGE, _MM = 72, 2.0


class Mounts:
    """Mounts that only this process and its children see, and that end with them. OSError where it may have none."""

    def __init__(self):
        self._libc = ctypes.CDLL(None, use_errno=True)
        user, group = os.getuid(), os.getgid()
        self._call("unshare", _NEWNS if user == 0 else _NEWNS | _NEWUSER)
        if user != 0:
            Path("/proc/self/setgroups").write_text("deny")
            Path("/proc/self/uid_map").write_text(f"{user} {user} 1")
            Path("/proc/self/gid_map").write_text(f"{group} {group} 1")
        self._mount("none", "/", None, _REC | _PRIVATE)

    def small(self, folder: Path, size: int) -> None:
        """A file system of ``size`` bytes over a folder."""
        folder.mkdir(parents=True, exist_ok=True)
        self._mount("medfast-drill", folder, "tmpfs", 0, f"size={size}")

    def grow(self, folder: Path, size: int) -> None:
        self._mount("medfast-drill", folder, "tmpfs", _REMOUNT, f"size={size}")

    def read_only(self, folder: Path) -> None:
        """The folder takes no writes any more, not even root's."""
        folder.mkdir(parents=True, exist_ok=True)
        self._mount(folder, folder, None, _BIND | _REC)
        self._mount(folder, folder, None, _BIND | _REMOUNT | _RDONLY)

    def writable(self, folder: Path) -> None:
        """Undo ``read_only``."""
        self._call("umount2", os.fsencode(folder), 2)

    def _mount(
        self, source: Path | str, target: Path | str, kind: str | None, flags: int, data: str | None = None
    ) -> None:
        texts = [None if x is None else os.fsencode(x) for x in (source, target, kind, data)]
        self._call("mount", *texts[:3], ctypes.c_ulong(flags), texts[3])

    def _call(self, name: str, *arguments: object) -> None:
        if getattr(self._libc, name)(*arguments) != 0:
            number = ctypes.get_errno()
            raise OSError(number, f"{name}: {os.strerror(number)}")


def limit_files(size: int) -> None:
    """No file of this process grows beyond ``size`` bytes: a write fails, as on a full disk."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))


def flip(file: Path, share: float = 0.5, bit: int = 0) -> None:
    """Turn one bit of the byte that lies ``share`` of the way into a file; size and time of change stay."""
    stamp, content = file.stat(), bytearray(file.read_bytes())
    content[min(int(share * len(content)), len(content) - 1)] ^= 1 << bit
    file.write_bytes(content)
    os.utime(file, ns=(stamp.st_atime_ns, stamp.st_mtime_ns))


def cut(file: Path, share: float = 0.5) -> None:
    os.truncate(file, int(share * file.stat().st_size))


def replace_cut(file: Path) -> None:
    """Half of the file takes its place: those who have it open keep the whole one, as after a broken copy."""
    half = file.with_name(".half")
    content = file.read_bytes()
    half.write_bytes(content[: len(content) // 2])
    half.replace(file)


def write_sources(folder: Path, count: int, seed: int = 0) -> list[Path]:
    """``count`` CT-like NIfTI files of 72 x 72 x 72 voxels of 2 mm: a ball of tissue in air, no two the same."""
    import nibabel

    folder.mkdir(parents=True)
    files = []
    axis = np.linspace(-1, 1, _EDGE)
    radius = np.sqrt(sum(x**2 for x in np.meshgrid(axis, axis, axis)))
    for number in range(count):
        noise = np.random.default_rng([seed, number]).normal(0, 20, radius.shape)
        volume = np.where(radius < 0.7 + 0.04 * number, 40 + noise, -1000 + 0.1 * noise).astype(np.float32)
        image = nibabel.Nifti1Image(np.rint(volume), np.diag([_MM, _MM, _MM, 1.0]))
        image.header.set_xyzt_units("mm")
        files.append(folder / f"ball_{number}.nii")
        files[-1].write_bytes(image.to_bytes())
    return files
