"""A street seen by a spinning LiDAR, ray by ray, and scans from files.

A sensor 1.8 m above the ground shoots 86 beams in 3000 directions a turn. Whatever of the scene is
hit first, within 70 m, is a point: ground, cars, walls and poles, each position with 2 cm of noise.
At 0.1 m that is about 100,000 voxels in a grid of 1400 x 1400 x 40, with 9 neighbours each.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from torch import Tensor

VOXEL = 0.1  # m
REACH = 70.0  # m, from the sensor along x and y
GRID = (1400, 1400, 44)
SENSOR_HEIGHT = 1.8  # m
GROUND = 0.2  # m, where the ground lies in the grid


def scene(seed: int = 0, beams: int = 86, azimuths: int = 3000) -> Tensor:
    """float32 [N, 4]: x, y, z in metres, none negative, and an intensity in [0, 1].

    x and y run from 0 to 140 m with the sensor in the middle, z from 0 to 4.4 m.
    """
    rng = np.random.default_rng(seed)
    low, high, shine = _boxes(rng)
    up = np.deg2rad(np.linspace(-20.0, 4.0, beams))[:, None]
    around = np.linspace(0, 2 * np.pi, azimuths, endpoint=False)[None]
    rays = np.stack(
        np.broadcast_arrays(np.cos(up) * np.cos(around), np.cos(up) * np.sin(around), np.sin(up)),
        -1,
    ).reshape(-1, 3)
    with np.errstate(divide="ignore"):
        distance = np.where(rays[:, 2] < 0, -SENSOR_HEIGHT / rays[:, 2], np.inf)
        inverse = 1 / rays
    hit = np.full(len(rays), 0.3)
    for corner, opposite, reflectance in zip(low, high, shine, strict=True):
        a, b = corner * inverse, opposite * inverse  # the sensor is the origin here
        enter, leave = np.minimum(a, b).max(1), np.maximum(a, b).min(1)
        nearer = (enter <= leave) & (enter > 0) & (enter < distance)
        distance[nearer] = enter[nearer]
        hit[nearer] = reflectance
    seen = np.isfinite(distance)
    points = rays[seen] * distance[seen, None]
    points += rng.normal(0, 0.02, points.shape)
    points += [REACH, REACH, SENSOR_HEIGHT + GROUND]
    top = np.array(GRID) * VOXEL
    inside = ((points >= 0) & (points < top)).all(1)
    intensity = np.clip(hit[seen] + rng.normal(0, 0.05, len(points)), 0, 1)
    return torch.from_numpy(
        np.concatenate([points, intensity[:, None]], 1)[inside].astype(np.float32)
    )


def _boxes(rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Lower and upper corners [B, 3] as the sensor sees them, and how much each reflects [B]."""
    ground = -SENSOR_HEIGHT
    centres, sizes, shine = [], [], []

    def add(x: float, y: float, size: tuple[float, float, float], reflectance: float) -> None:
        centres.append((x, y, ground + size[2] / 2))
        sizes.append(size)
        shine.append(reflectance)

    for side in (-1, 1):
        for x in np.arange(-66, 66, 6.5):  # parked along the road
            if rng.random() < 0.6:
                add(x + rng.normal(0, 0.5), side * 6.0, (4.4, 1.8, 1.5), rng.uniform(0.4, 0.9))
        for x in np.arange(-70, 70, 15.0):  # houses, a gap after each
            y = side * (13 + rng.uniform(0, 9))
            add(x + 6, y + side * 5, (rng.uniform(8, 13), 10, 12), rng.uniform(0.2, 0.6))
        for x in np.arange(-65, 65, 11.0):
            add(x + rng.normal(0, 1), side * 8.5, (0.25, 0.25, 6), 0.8)
    for _ in range(8):  # on the road
        add(rng.uniform(-60, 60), rng.choice((-3.0, 3.0)), (4.4, 1.8, 1.5), rng.uniform(0.4, 0.9))
    centre, half = np.array(centres), np.array(sizes) / 2
    clear = (np.abs(centre[:, :2]) - half[:, :2]).max(1) > 1  # the sensor stands in none of them
    return (centre - half)[clear], (centre + half)[clear], np.array(shine)[clear]


def scan(path: str | Path) -> Tensor:
    """float32 [N, 4] out of a .bin file of KITTI (x, y, z, intensity) or nuScenes (and the ring).

    The files do not say which; rings are whole numbers.
    """
    values = np.fromfile(path, "<f4")
    rings = values[4::5] if len(values) % 5 == 0 else None
    whole = rings is not None and bool(((rings == np.floor(rings)) & (rings >= 0)).all())
    columns = 5 if whole else 4
    if len(values) % columns:
        raise ValueError(f"{path} holds {len(values)} float32, expected 4 or 5 a point")
    return torch.from_numpy(values.reshape(-1, columns)[:, :4].copy())


def shuffled_voxels(points: Tensor, voxel: float = VOXEL, seed: int = 0) -> Tensor:
    """int32 [N, 4], batch first: the voxels that hold a point, in an order drawn once."""
    cells = torch.floor(points[:, :3].double() / voxel).int()
    cells = torch.unique(cells - cells.amin(0), dim=0)
    order = torch.randperm(len(cells), generator=torch.Generator().manual_seed(seed))
    return torch.nn.functional.pad(cells[order], (1, 0))
