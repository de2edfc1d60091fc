"""The one random generator: Philox-4x32-10, keyed by who draws and what for, never by how often somebody drew before.

Layout (also in kernels/README.md). The 64-bit seed is the Philox key. The 128-bit counter is, word by word,

    word 0: index // 4     which block of four numbers of this draw
    word 1: sample         global slot of the sample
    word 2: step           optimizer step
    word 3: stream         role << 24 | view << 16 | layer

and number ``index`` of a draw is output word ``index % 4`` of its block. So a number depends on nothing but its own
address: not on the device, the batch split, the number of ranks, or where a run was resumed.

Source: Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011.
"""

from __future__ import annotations

from enum import IntEnum
from typing import NamedTuple

import torch
from torch import Tensor

_MASK32 = 0xFFFFFFFF
_MULTIPLIER = (0xD2511F53, 0xCD9E8D57)
_WEYL = (0x9E3779B9, 0xBB67AE85)
_ROUNDS = 10


class Role(IntEnum):
    """What a draw is for. The numbers are part of the run's definition: never renumber, only append."""

    VOLUME = 1  # which volume a slot shows
    CROP = 2  # where a view is cut
    AUGMENT = 3  # every other parameter of a view
    NOISE = 4  # noise added to voxels
    MASK = 5  # random masks of the student
    HINTS = 6  # which of the most attended tokens are shown again
    TEACHER_DROP = 7  # the noisy teacher's patch drop
    DROP_PATH = 8  # stochastic depth
    DROPOUT = 9  # attention dropout


class Key(NamedTuple):
    """Address of a family of random numbers.

    seed: 64-bit run seed. step: optimizer step, int or 0-dim int64 tensor. sample: (b,) int64, global slot of each
    sample, ``arange`` where None. stream: int or (b,) int64, ``role << 24 | view << 16 | layer``.
    """

    seed: int
    step: int | Tensor = 0
    sample: Tensor | None = None
    stream: int | Tensor = 0

    def at(self, role: int, view: int = 0, layer: int = 0) -> Key:
        """This key for one role, view and layer.

        The bits of a view set before (by ``stack`` or another ``at``) stay and ``view`` is or-ed into them: 1 on top of
        2 makes 3, which another draw may own. So give the view once, through ``stack`` or here.

        Raises ValueError for a layer or view that does not fit its bits.
        """
        if not 0 <= layer < 1 << 16 or not 0 <= view < 1 << 8:
            raise ValueError(f"layer must be in [0, 65536) and view in [0, 256), got layer={layer}, view={view}")
        kept = self.stream & 0x00FF0000
        return self._replace(stream=kept | (int(role) << 24 | view << 16 | layer))

    def stack(self, views: int) -> Key:
        """Key of ``views`` batches concatenated along the batch axis, view by view: sample repeats, view counts up."""
        if self.sample is None:
            raise ValueError("Key.stack needs key.sample, the global slot of each sample; it is None")
        index = torch.arange(views, device=self.sample.device).reshape(-1, 1).expand(-1, len(self.sample)).reshape(-1)
        return self._replace(sample=self.sample.repeat(views), stream=self.stream | index << 16)


def address(key: Key, device: torch.device | None = None) -> Tensor:
    """Counter words 1 to 3 of each sample, (b, 3) int64 in [0, 2**32), on ``device`` (that of key.sample if None).

    An int is filled in on the device: copying it there would stop the host until the device has caught up.
    """
    if key.sample is None:
        raise ValueError("this draw needs key.sample, a (b,) int64 tensor of global slots; it is None")
    sample = key.sample.to(device=device, dtype=torch.int64).reshape(-1)

    def word(value: int | Tensor) -> Tensor:
        if isinstance(value, Tensor):
            return value.to(device=sample.device, dtype=torch.int64).reshape(-1).expand(sample.shape)
        return torch.full(sample.shape, value, dtype=torch.int64, device=sample.device)

    return torch.stack((sample, word(key.step), word(key.stream)), dim=1) & _MASK32


def signed(seed: int) -> int:
    """The 64 bits of a seed as the signed integer that an operator takes."""
    return (int(seed) + 2**63) % 2**64 - 2**63


def philox_words(key: Key, count: int, *, device: torch.device | None = None) -> Tensor:
    """The first ``count`` 32-bit numbers of each sample's draw, (b, count) int64 in [0, 2**32)."""
    words = address(key, device)
    blocks = -(-count // 4)
    seed = int(key.seed)
    block = torch.arange(blocks, dtype=torch.int64, device=words.device).expand(len(words), blocks)
    counter = [block, *[words[:, i : i + 1].expand(block.shape) for i in range(3)]]
    key0, key1 = seed & _MASK32, seed >> 32 & _MASK32
    for _ in range(_ROUNDS):
        # int64 products wrap modulo 2**64, which keeps both halves of the unsigned product exact
        product0, product1 = counter[0] * _MULTIPLIER[0], counter[2] * _MULTIPLIER[1]
        high0, high1 = product0 >> 32 & _MASK32, product1 >> 32 & _MASK32
        counter = [
            high1 ^ counter[1] ^ key0,
            product1 & _MASK32,
            high0 ^ counter[3] ^ key1,
            product0 & _MASK32,
        ]
        key0, key1 = key0 + _WEYL[0] & _MASK32, key1 + _WEYL[1] & _MASK32
    return torch.stack(counter, dim=-1).reshape(len(words), 4 * blocks)[:, :count]
