"""Recipes under the names of their papers; ``docs/recipes.md`` has a table of all."""

from .adasap import AdaSAP
from .autosparse import AutoSparse
from .dress import DRESS
from .dynamic import DSTEE, SET, RigL, SparseMomentum
from .fish import FISHMask
from .gradual import GMP, MIRL
from .gsm import GSM
from .hesso import HESSO
from .lobster import LOBSTER
from .mask_sparsity import MaskSparsity
from .sparse_ift import SparseIFT
from .wgsef import WGSEF, wgsef_prox

__all__ = [
    "DRESS",
    "DSTEE",
    "GMP",
    "GSM",
    "HESSO",
    "LOBSTER",
    "MIRL",
    "SET",
    "WGSEF",
    "AdaSAP",
    "AutoSparse",
    "FISHMask",
    "MaskSparsity",
    "RigL",
    "SparseIFT",
    "SparseMomentum",
    "wgsef_prox",
]
