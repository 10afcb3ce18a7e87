"""Analytic theory of hybrid language models (HLM), as pure array functions.

One room a topic. Functions of tokens take numpy arrays and torch tensors alike, those of channels
and published numbers floats and numpy arrays. Nothing here imports torch, transformers or
matplotlib, opens a file, or prints.
"""

__version__ = "0.1.0"
