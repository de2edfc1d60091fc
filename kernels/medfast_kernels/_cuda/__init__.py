"""Operators in CUDA C++ (``csrc/cuda``): fake implementations, autograd, and the way there from a checked call."""
