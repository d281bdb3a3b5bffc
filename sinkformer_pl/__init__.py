"""Attention whose normalization is a plug-in: softmax, Sinkhorn and your own, trained and compared with Lightning."""

from importlib.metadata import version

__version__ = version("sinkformer_pl")
