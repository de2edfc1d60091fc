"""Operators of 3D transformers, each with a definition in plain PyTorch and faster backends beside it."""

from . import modules, reference, swin
from ._dispatch import backend
from .augmentation import augment
from .class_token import class_attention
from .contrast import token_contrast
from .key import Key, Role
from .masking import attention_mask, nan_seen
from .random import philox_words, random_ids, random_keep, random_normal, random_uniform
from .tokens import drop_tokens, restore_tokens
from .window import window_attention

__all__ = [
    "Key", "Role", "attention_mask", "augment", "backend", "class_attention", "drop_tokens", "modules", "nan_seen",
    "philox_words", "random_ids", "random_keep", "random_normal", "random_uniform", "reference", "restore_tokens",
    "swin", "token_contrast", "window_attention",
]  # fmt: skip
