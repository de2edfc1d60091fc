"""medfast: pretraining of 3D medical transformers on CT volumes."""

__version__ = "0.1.0"
