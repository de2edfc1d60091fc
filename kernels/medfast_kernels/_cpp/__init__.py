"""The way from a checked call to the C++ operators of csrc: fake implementations, autograd, types."""
