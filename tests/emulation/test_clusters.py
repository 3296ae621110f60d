"""Clusters of blocks: a sample that is right under every schedule, and its planted faults."""

from __future__ import annotations

import re

import pytest
import torch
from devices import CLUSTER_SUMS, SCHEDULES, Device, Sanitizers
from emulator import KernelFault, KernelLibrary
from sample_gemm import line_of, plants
from torch import Tensor

TILE, STEPS = 32, 8  # more than twice the stages


def sums(
    device: Device, cluster: int = 2, clusters: int = 1, plant: str = "none"
) -> tuple[Tensor, Tensor]:
    """What the kernel gives, and what it should."""
    blocks = cluster * clusters
    x = torch.randint(1, 100, (TILE, STEPS, TILE), dtype=torch.int32)
    w = torch.randint(1, 100, (blocks, STEPS), dtype=torch.int32)
    y = device.empty(blocks, TILE, TILE, dtype=torch.int32)
    device.call("cluster_sums", y, x, w, cluster, blocks, STEPS, plants(CLUSTER_SUMS).index(plant))
    return y.cpu(), torch.einsum("bs,rsc->brc", w.long(), x.long()).int()


@pytest.mark.parametrize("cluster", [1, 2, 4])
def test_blocks_share_what_each_brings(device_clusters: Device, cluster: int) -> None:
    y, expected = sums(device_clusters, cluster, clusters=3)
    assert torch.equal(y, expected)


def test_passes_in_any_order(clusters: KernelLibrary, sanitizers: Sanitizers) -> None:
    for schedule in ("late", "early"):
        for seed in range(3 if sanitizers.on else 20):
            for cluster in (2, 4):
                y, expected = sums(Device(clusters, "cpu", (schedule, seed)), cluster)
                assert torch.equal(y, expected), (schedule, seed, cluster)


def test_a_cluster_meets_without_who_has_returned(device_clusters: Device) -> None:
    counts = device_clusters.to(torch.zeros(2, dtype=torch.int32))
    y = device_clusters.empty(8, 5, dtype=torch.int32)
    device_clusters.call("met_in_turn", counts, y, 8, 5)
    assert torch.equal(y.cpu(), (10 * torch.arange(1, 6)).int().expand(8, 5))


# What only shows in the numbers, and of seeds 0 to 9, how many show it at least.
@pytest.mark.parametrize(
    ("plant", "schedule", "seeds"),
    [
        ("no_release_of_peers", "late", 7),
        ("no_release_of_peers", "early", 5),
        ("release_before_read", "late", 8),
        ("release_before_read", "early", 2),
    ],
)
def test_race_gives_wrong_numbers(
    clusters: KernelLibrary, plant: str, schedule: str, seeds: int
) -> None:
    found = 0
    for seed in range(10):
        y, expected = sums(Device(clusters, "cpu", (schedule, seed)), plant=plant)
        found += not torch.equal(y, expected)
    assert found >= seeds


EARLY_REUSE = "mbarrier_arrive_expect_tx: more than the 1 arrivals of a phase"


# The same for what is reported.
@pytest.mark.parametrize(
    ("plant", "message", "seeds"),
    [
        ("no_sync_at_begin", "tma_load_2d_multicast: no mbarrier was initialised at offset", 2),
        ("no_sync_at_end", r"mbarrier_arrive_remote: block \d of the cluster has exited", 8),
        ("no_wait_for_full", f"deadlock|{EARLY_REUSE}", 10),
        ("part_of_the_bytes", "deadlock|that nobody waited for before the block ended", 10),
        ("too_many_bytes", r"deadlock: (.*\n)*.*phase 0 wants 0 of 1 arrivals and 16 bytes", 10),
        ("release_twice", f"deadlock|{EARLY_REUSE}", 10),
        ("multicast_past_cluster", "tma_load_2d_multicast: block 3 of a cluster of 2", 10),
        ("release_past_cluster", "mbarrier_arrive_remote: block 2 of a cluster of 2", 10),
    ],
)
@pytest.mark.parametrize("schedule", ["late", "early"])
def test_fault_is_reported(
    clusters: KernelLibrary, plant: str, message: str, seeds: int, schedule: str
) -> None:
    reports = []
    for seed in range(10):
        try:
            sums(Device(clusters, "cpu", (schedule, seed)), plant=plant)
        except KernelFault as fault:
            reports.append(str(fault))
    assert len(reports) >= seeds
    for report in reports:
        assert re.search(message, report), report


@pytest.mark.parametrize(("schedule", "seed"), SCHEDULES)
def test_deadlock_lists_all_blocks(clusters: KernelLibrary, schedule: str, seed: int) -> None:
    with clusters.schedule(schedule, seed), pytest.raises(KernelFault) as caught:
        clusters.call("never_met")
    wait = line_of(CLUSTER_SUMS, "== 1) ptx::mbarrier_wait(barrier, 0)")
    assert re.search(
        r"deadlock: no thread can go on\n"
        rf"  block \(0, 0, 0\):\n  warp 0: all lanes: cluster_sync at .*:{wait + 1}\n"
        r"  mbarrier at .*phase 0 wants 1 of 1 arrivals and 0 bytes\n"
        rf"  block \(1, 0, 0\):\n  warp 0: all lanes: mbarrier_try_wait at .*:{wait}\n"
        r"  mbarrier at .*\n"
        r"  cluster_sync: 1 of 2 threads are there\n",
        str(caught.value),
    )


def test_grid_is_whole_clusters(clusters: KernelLibrary) -> None:
    counts, y = torch.zeros(2, dtype=torch.int32), torch.zeros(6, dtype=torch.int32)
    with pytest.raises(KernelFault, match="launch: a cluster of 4 blocks in a grid of 6 x 1 x 1"):
        clusters.call("met_in_turn", counts, y, 6, 1)
