"""The torch.library namespace in which every op of the package is defined."""

import torch

library = torch.library.Library("gossamer", "DEF")
