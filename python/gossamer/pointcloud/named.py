"""The layers by how many axes they have, so that one number stands for a whole kernel."""

from __future__ import annotations

from .convolution import Conv, SubmanifoldConv
from .pooling import AvgPool, MaxPool
from .transposed import ConvTranspose, GenerativeConvTranspose, InverseConv


class SubmanifoldConv1d(SubmanifoldConv):
    """`SubmanifoldConv` over 1 axis."""

    axes = 1


class SubmanifoldConv2d(SubmanifoldConv):
    """`SubmanifoldConv` over 2 axes."""

    axes = 2


class SubmanifoldConv3d(SubmanifoldConv):
    """`SubmanifoldConv` over 3 axes."""

    axes = 3


class SubmanifoldConv4d(SubmanifoldConv):
    """`SubmanifoldConv` over 4 axes."""

    axes = 4


class Conv1d(Conv):
    """`Conv` over 1 axis."""

    axes = 1


class Conv2d(Conv):
    """`Conv` over 2 axes."""

    axes = 2


class Conv3d(Conv):
    """`Conv` over 3 axes."""

    axes = 3


class Conv4d(Conv):
    """`Conv` over 4 axes."""

    axes = 4


class ConvTranspose1d(ConvTranspose):
    """`ConvTranspose` over 1 axis."""

    axes = 1


class ConvTranspose2d(ConvTranspose):
    """`ConvTranspose` over 2 axes."""

    axes = 2


class ConvTranspose3d(ConvTranspose):
    """`ConvTranspose` over 3 axes."""

    axes = 3


class ConvTranspose4d(ConvTranspose):
    """`ConvTranspose` over 4 axes."""

    axes = 4


class InverseConv1d(InverseConv):
    """`InverseConv` over 1 axis."""

    axes = 1


class InverseConv2d(InverseConv):
    """`InverseConv` over 2 axes."""

    axes = 2


class InverseConv3d(InverseConv):
    """`InverseConv` over 3 axes."""

    axes = 3


class InverseConv4d(InverseConv):
    """`InverseConv` over 4 axes."""

    axes = 4


class GenerativeConvTranspose1d(GenerativeConvTranspose):
    """`GenerativeConvTranspose` over 1 axis."""

    axes = 1


class GenerativeConvTranspose2d(GenerativeConvTranspose):
    """`GenerativeConvTranspose` over 2 axes."""

    axes = 2


class GenerativeConvTranspose3d(GenerativeConvTranspose):
    """`GenerativeConvTranspose` over 3 axes."""

    axes = 3


class GenerativeConvTranspose4d(GenerativeConvTranspose):
    """`GenerativeConvTranspose` over 4 axes."""

    axes = 4


class MaxPool1d(MaxPool):
    """`MaxPool` over 1 axis."""

    axes = 1


class MaxPool2d(MaxPool):
    """`MaxPool` over 2 axes."""

    axes = 2


class MaxPool3d(MaxPool):
    """`MaxPool` over 3 axes."""

    axes = 3


class MaxPool4d(MaxPool):
    """`MaxPool` over 4 axes."""

    axes = 4


class AvgPool1d(AvgPool):
    """`AvgPool` over 1 axis."""

    axes = 1


class AvgPool2d(AvgPool):
    """`AvgPool` over 2 axes."""

    axes = 2


class AvgPool3d(AvgPool):
    """`AvgPool` over 3 axes."""

    axes = 3


class AvgPool4d(AvgPool):
    """`AvgPool` over 4 axes."""

    axes = 4
