"""cp.async and wide loads and stores."""

from __future__ import annotations

import pytest
import torch
from devices import Device


@pytest.mark.parametrize("size", [4, 8, 16])
def test_cp_async_fills_with_zeros(device: Device, size: int) -> None:
    source = torch.randint(1, 256, (32, size)).to(torch.uint8)
    valid = torch.randint(0, size + 1, (32,), dtype=torch.int32)
    valid[:2] = torch.tensor([0, size])
    out = device.empty(32, size, dtype=torch.uint8)
    device.call("copies", out, source, valid, size)
    assert torch.equal(out.cpu(), source * (torch.arange(size) < valid[:, None]))


def test_sixteen_byte_accesses(device: Device) -> None:
    source = torch.randint(0, 256, (1024,)).to(torch.uint8)
    out = device.empty(1024, dtype=torch.uint8)
    device.call("wide_copies", out, source)
    assert torch.equal(out.cpu(), source)


def test_misaligned_global_access_is_refused(emulated: Device) -> None:
    source = torch.zeros(1100, dtype=torch.uint8)
    at = source[(16 - source.data_ptr() % 16) % 16 + 8 :]
    with pytest.raises(RuntimeError, match="load_nc16: the global address is not a multiple of 16"):
        emulated.call("wide_copies", torch.zeros(1100, dtype=torch.uint8), at)
