"""Breaks short runs on purpose, in every way that a cluster knows, and shows what becomes of them."""

from medfast.drill.command import drill

__all__ = ["drill"]
