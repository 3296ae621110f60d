"""What threads do together: shuffles, votes, atomics, barriers, and launches that cannot be."""

from __future__ import annotations

import pytest
import torch
from devices import Device

LANES = range(32)


@pytest.mark.parametrize("width", [32, 16, 8, 2])
@pytest.mark.parametrize("by", [0, 1, 5, 9, 31])
def test_shuffles(device: Device, width: int, by: int) -> None:
    values = torch.randint(0, 10**6, (32,), dtype=torch.int32)
    out = device.empty(4, 32, dtype=torch.int32)
    device.call("shuffles", out, values, width, by)
    for lane in LANES:
        begin = lane - lane % width
        sources = [
            begin + by % width,
            lane ^ by if (lane ^ by) < begin + width else lane,
            lane - by if lane - by >= begin else lane,
            lane + by if lane + by < begin + width else lane,
        ]
        assert out.cpu()[:, lane].tolist() == values[sources].tolist(), lane


@pytest.mark.parametrize("mask", [0xFFFFFFFF, 0x0000FFFF, 0x55555555, 0x80000001])
def test_votes_and_reductions(device: Device, mask: int) -> None:
    values = torch.randint(0, 50, (32,), dtype=torch.int32)
    out = device.empty(9, 32, dtype=torch.int32)
    device.call("votes", out, values, mask)
    numbers = values.tolist()
    for lane in LANES:
        mine = [other for other in LANES if mask >> other & 1 == mask >> lane & 1]
        odd = [other for other in mine if numbers[other] & 1]
        same = [other for other in mine if numbers[other] & 3 == numbers[lane] & 3]
        ours = [numbers[other] for other in mine]
        any_bit, every_bit = 0, -1
        for number in ours:
            any_bit, every_bit = any_bit | number, every_bit & number
        want = [
            sum(1 << other for other in odd),
            len(odd) > 0,
            len(odd) == len(mine),
            sum(1 << other for other in same),
            *(sum(ours), min(ours), max(ours), any_bit, every_bit),
        ]
        got = out.cpu()[:, lane].view(torch.uint32).tolist()
        assert got == [int(value) for value in want], lane


def test_atomics(device: Device) -> None:
    values = torch.randint(-1000, 1000, (350,), dtype=torch.int32)
    fields = device.to(torch.zeros(12, dtype=torch.int32))
    fields[8] = torch.tensor(-1e30).view(torch.int32)
    device.call("totals", fields, values, values.numel())
    got = fields.cpu()
    total = int(values.sum())
    assert got[:6].tolist() == [
        total,
        max(0, int(values.max())),
        min(0, int(values.min())),
        0,
        total,
        350,
    ]
    assert int(got[6:7].view(torch.uint32)) == sum({1 << (v & 31) for v in values.tolist()})
    assert got[7:9].view(torch.float32).tolist() == [float(total), float(values.max())]
    assert int(got[10:].view(torch.int64)) == total << 20


@pytest.mark.parametrize("threads", [64, 160])
@pytest.mark.parametrize("rounds", [1, 2, 7])
def test_named_barriers(device: Device, threads: int, rounds: int) -> None:
    out = device.empty(threads - 32, dtype=torch.int32)
    device.call("handed_over", out, threads, rounds)
    want = 1000 * sum(range(rounds)) + rounds * (torch.arange(threads - 32) % 32)
    assert torch.equal(out.cpu().long(), want)


@pytest.mark.parametrize("threads", [1, 32, 33, 100, 256, 1024])
def test_blocks_of_any_size(device: Device, threads: int) -> None:
    values = torch.randint(-50, 50, (threads,), dtype=torch.int32)
    out = device.empty(4, dtype=torch.int32)
    device.call("block_votes", out, values, threads)
    count = int((values > 0).sum())
    assert out.cpu().tolist() == [count, 0, 1, int(values.sum())]


def test_shared_memory_starts_as_poison(emulated: Device) -> None:
    out = emulated.empty(64, dtype=torch.int32)
    emulated.call("untouched", out, 64, 64)
    assert set(out.view(torch.uint32).tolist()) == {0xCBCBCBCB}
    as_numbers = [int(out.view(dtype)[0]) for dtype in (torch.float32, torch.bfloat16)]
    assert max(as_numbers) < -(10**7)


def test_polling_for_ever_is_a_deadlock(emulated: Device) -> None:
    with pytest.raises(
        RuntimeError, match="threads poll for something that does not come"
    ) as fault:
        emulated.call("wait_for_ever", torch.zeros(1, dtype=torch.int32))
    assert "warp 0: all lanes: load_acquire at primitives.cu:" in str(fault.value)


@pytest.mark.parametrize(
    ("blocks", "threads", "shared_bytes", "message"),
    [
        (0, 32, 16, "a grid of 0 x 1 x 1 blocks"),
        (1, 0, 16, "a block of 0 x 1 x 1 threads"),
        (1, 1025, 16, "a block of 1025 x 1 x 1 threads"),
        (1, 32, 300_000, "300000 bytes of shared memory"),
        (1, 32, 0, "shared_memory: 4 bytes, but the launch asked for 0"),
    ],
)
def test_impossible_launch_is_refused(
    emulated: Device, blocks: int, threads: int, shared_bytes: int, message: str
) -> None:
    with pytest.raises(RuntimeError, match=message):
        emulated.call("launch_shape", blocks, threads, shared_bytes)
