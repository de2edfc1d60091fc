"""Operators of 3D transformers, each with a definition in plain PyTorch and faster backends beside it."""

from . import reference
from ._dispatch import backend, reference_only
from .key import Key, Role
from .random import philox_words, random_ids, random_keep, random_normal, random_uniform
from .window import window_attention

attention_mask = reference_only(reference.attention_mask)
class_attention = reference_only(reference.class_attention)

__all__ = [
    "Key", "Role", "attention_mask", "backend", "class_attention", "philox_words", "random_ids", "random_keep",
    "random_normal", "random_uniform", "reference", "window_attention",
]  # fmt: skip
