"""Every operator in plain PyTorch: differentiable, fp64 too, any device. The definition the backends are held to."""

from .augmentation import augment
from .class_token import class_attention
from .contrast import token_contrast
from .masking import attention_mask
from .random import philox_words, random_ids, random_keep, random_normal, random_uniform
from .tokens import drop_tokens, restore_tokens
from .window import window_attention, window_attention_weights

__all__ = [
    "attention_mask", "augment", "class_attention", "drop_tokens", "philox_words", "random_ids", "random_keep",
    "random_normal", "random_uniform", "restore_tokens", "token_contrast", "window_attention",
    "window_attention_weights",
]  # fmt: skip
