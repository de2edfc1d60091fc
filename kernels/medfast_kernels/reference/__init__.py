"""Every operator in plain PyTorch: differentiable, fp64 too, any device. The definition the backends are held to."""

from ..class_token import class_attention
from ..key import philox_words
from ..masking import attention_mask
from .random import random_ids, random_keep, random_normal, random_uniform
from .window import window_attention, window_attention_weights

__all__ = [
    "attention_mask", "class_attention", "philox_words", "random_ids", "random_keep", "random_normal", "random_uniform",
    "window_attention", "window_attention_weights",
]  # fmt: skip
