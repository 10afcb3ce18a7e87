"""Analytic theory of hybrid language models (HLM), as pure array functions.

One room a topic; every function takes numpy arrays and torch tensors alike. Nothing here imports
torch, transformers or matplotlib, opens a file, or prints.
"""

__version__ = "0.1.0"
