"""From a dense model to one that the kernels can run: patterns, scores, schedules, recipes."""

from ..formats import Block
from .dynamic import DropGrow
from .patterns import NM, Blocks, ConstantFanIn, Filters, Pattern, RowBalanced, Unstructured
from .permute import channel_permutation
from .posttraining import Pruned, prune_after_training
from .report import SparsityReport
from .schedules import (
    Cubic,
    DropAndGrow,
    LotteryRounds,
    OneShot,
    PlateauBisection,
    Schedule,
)
from .scores import (
    SNIP,
    Fisher,
    FisherPruning,
    Gradient,
    Magnitude,
    Momentum,
    Score,
    SecondOrder,
    Taylor,
    WandaScore,
    WeightGradient,
)
from .sparsifier import Sparsifier
from .straight import SRSTE, SSTE, STE, MaskedDecay

__all__ = [
    "NM",
    "SNIP",
    "SRSTE",
    "SSTE",
    "STE",
    "Block",
    "Blocks",
    "ConstantFanIn",
    "Cubic",
    "DropAndGrow",
    "DropGrow",
    "Filters",
    "Fisher",
    "FisherPruning",
    "Gradient",
    "LotteryRounds",
    "Magnitude",
    "MaskedDecay",
    "Momentum",
    "OneShot",
    "Pattern",
    "PlateauBisection",
    "Pruned",
    "RowBalanced",
    "Schedule",
    "Score",
    "SecondOrder",
    "Sparsifier",
    "SparsityReport",
    "Taylor",
    "Unstructured",
    "WandaScore",
    "WeightGradient",
    "channel_permutation",
    "prune_after_training",
]
