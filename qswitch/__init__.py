"""qswitch: distil a large language model into a small one on one consumer GPU, with the SWITCH method.

Importing the package costs nothing: no torch, no transformers. Each stage of the journey is a folder; see
docs/architecture.md.
"""

__version__ = "0.1.0"
