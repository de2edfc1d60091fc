"""Operators of 3D transformers, each with a definition in plain PyTorch and faster backends beside it."""

from . import reference
from ._dispatch import backend
from .class_token import class_attention
from .key import Key, Role, philox_words
from .masking import attention_mask
from .random import random_ids, random_keep, random_normal, random_uniform
from .window import window_attention

__all__ = [
    "Key", "Role", "attention_mask", "backend", "class_attention", "philox_words", "random_ids", "random_keep",
    "random_normal", "random_uniform", "reference", "window_attention",
]  # fmt: skip
