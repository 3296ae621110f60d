"""A bench that takes no time: one small shape, the least effort, a made-up machine."""

from machine import Limits
from shapes import DTYPES, LinearShape
from timing import Effort

TINY = LinearShape("32x64", 32, 64)
HASTE = Effort(budget=0.0, slice=1e-5, least_rounds=2, most_rounds=2)
LIMITS = Limits(2, dict.fromkeys(DTYPES, 1e11), {1024: 2e11, 1024**2: 1e10})
