"""From a dense model to one that the kernels can run: patterns, scores, schedules, recipes."""

from ..formats import Block
from .dynamic import DropGrow
from .patterns import NM, Blocks, ConstantFanIn, Filters, Pattern, RowBalanced, Unstructured
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
]
