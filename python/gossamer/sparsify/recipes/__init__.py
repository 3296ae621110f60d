"""Recipes under the names of their papers; ``docs/recipes.md`` has a table of all."""

from .activation_penalty import ActivationPenalty
from .adasap import AdaSAP
from .at_initialization import RobustAtInitialization
from .autosparse import AutoSparse
from .dass import DASS, MixedOp
from .dress import DRESS
from .dynamic import DSTEE, SET, RigL, SparseMomentum
from .eau_de_qn import EauDeQN
from .fed_tiny import FedTiny, candidate_masks, select_mask
from .fish import FISHMask
from .gblr import GBLR, GBLRLinear
from .gradual import GMP, MIRL
from .growing import ContinuousSparsification
from .gsm import GSM
from .hesso import HESSO
from .lobster import LOBSTER
from .mad import MAD, pgd_attack
from .mask_sparsity import MaskSparsity
from .neural_dynamics import SparseNeuralDynamics
from .sparse_ift import SparseIFT
from .tscnc import TSCNC
from .upcycling import UpcycledMLP, sparse_upcycling
from .wgsef import WGSEF, wgsef_prox

__all__ = [
    "DASS",
    "DRESS",
    "DSTEE",
    "GBLR",
    "GMP",
    "GSM",
    "HESSO",
    "LOBSTER",
    "MAD",
    "MIRL",
    "SET",
    "TSCNC",
    "WGSEF",
    "ActivationPenalty",
    "AdaSAP",
    "AutoSparse",
    "ContinuousSparsification",
    "EauDeQN",
    "FISHMask",
    "FedTiny",
    "GBLRLinear",
    "MaskSparsity",
    "MixedOp",
    "RigL",
    "RobustAtInitialization",
    "SparseIFT",
    "SparseMomentum",
    "SparseNeuralDynamics",
    "UpcycledMLP",
    "candidate_masks",
    "pgd_attack",
    "select_mask",
    "sparse_upcycling",
    "wgsef_prox",
]
