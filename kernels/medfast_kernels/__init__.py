from .key import Key, Role, philox_words
from .random import random_ids, random_keep, random_normal, random_uniform

__all__ = ["Key", "Role", "philox_words", "random_ids", "random_keep", "random_normal", "random_uniform"]
