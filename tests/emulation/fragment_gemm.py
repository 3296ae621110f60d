"""2:4 GEMMs of every type that fragments hold, and the ways to cut them up."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import torch
import torch.nn.functional as F
from cases import integers
from emulator import HERE, KernelLibrary
from fragments import fragments_of
from gossamer import reference
from torch import Tensor

GEMM_SM80 = HERE / "kernels" / "gemm_sm80.cu"

DTYPES = (torch.bfloat16, torch.float16, torch.int8, torch.float8_e4m3fn)
# The values of enum DType, enum Activation and enum CudaKernel.
DTYPE_CODES = {
    torch.float32: 1,
    torch.bfloat16: 2,
    torch.float16: 3,
    torch.float8_e4m3fn: 4,
    torch.int8: 5,
}
ACTIVATION_CODES = {None: 0, "relu": 1, "gelu": 2, "silu": 3}
DECODE, PREFILL = 0, 1

PAIRS = torch.tensor([0x4, 0x8, 0xC, 0x9, 0xD, 0xE], dtype=torch.uint8)


@dataclass(frozen=True)
class Config:
    """A ``CudaGemmConfig``."""

    kernel: int
    tile_n: int
    tile_m: int
    warps_k: int = 1
    split_k: int = 1

    @classmethod
    def decode(cls, m: int, warps_k: int, split_k: int) -> Config:
        tile_m = next(tile for tile in (8, 16, 32, 64) if m <= tile)
        row_tiles = 2 if tile_m == 64 else 1
        return cls(DECODE, 16 * row_tiles * 8 // warps_k, tile_m, warps_k, split_k)

    @classmethod
    def prefill(cls, tile_m: int) -> Config:
        return cls(PREFILL, 128, tile_m)


@dataclass
class FragmentGemm:
    """Operands of whole numbers and scales of powers of two, so that every sum is exact."""

    x: Tensor  # [m, k], rows further apart than k, with NaN (int8: 127) after each and the last
    values: Tensor  # [n, 2G]
    nibbles: Tensor  # [n, G]
    bias: Tensor | None = None
    activation: str | None = None
    out_dtype: torch.dtype = torch.float32
    x_scales: Tensor | None = None
    row_scales: Tensor | None = None
    counters: Tensor = field(default_factory=lambda: torch.zeros(4096, dtype=torch.int32))

    @classmethod
    def of(
        cls, m: int, n: int, k: int, dtype: torch.dtype, out_dtype: torch.dtype | None = None
    ) -> FragmentGemm:
        groups = -(-k // 4)
        nibbles = PAIRS[torch.randint(6, (n, groups))]
        values = integers(n, 2 * groups, limit=4, dtype=torch.float32)
        gemm = cls(
            with_poison(integers(m, k, limit=4, dtype=torch.float32).to(dtype)), values, nibbles
        )
        gemm.values[gemm.columns() >= k] = 0  # there is no such column
        gemm.values = values.to(dtype)
        gemm.out_dtype = out_dtype or (dtype if dtype.itemsize == 2 else torch.float32)
        if dtype.itemsize == 1:
            gemm.x_scales = 2.0 ** integers(m, limit=3, dtype=torch.float32)
            gemm.row_scales = 2.0 ** integers(n, limit=3, dtype=torch.float32)
        return gemm

    def cuda(self) -> FragmentGemm:
        moved = {name: part.cuda() for name, part in vars(self).items() if isinstance(part, Tensor)}
        return replace(self, **{**moved, "x": with_poison(moved["x"])})

    @property
    def indices(self) -> Tensor:
        padded = F.pad(self.nibbles, (0, self.nibbles.shape[1] % 2))
        return padded[:, 0::2] | padded[:, 1::2] << 4

    def columns(self) -> Tensor:
        return reference.sparse24_columns(self.indices, self.x.shape[1])

    def expected(self) -> Tensor:
        """In float64, by ``reference.sparse24_linear``, which never sees x past its columns."""
        x, values = self.x.double(), self.values.double()
        if self.x_scales is not None:
            x = x * self.x_scales.double()[:, None]
        if self.row_scales is not None:
            values = values * self.row_scales.double()[:, None]
        bias = None if self.bias is None else self.bias.double()
        return reference.sparse24_linear(x, values, self.indices, bias, x.shape[1], self.activation)

    def run(self, library: KernelLibrary, config: Config, out_offset: int = 0) -> Tensor:
        """The kernel's result. Around it, and in the counters, nothing must have changed."""
        (m, k), n = self.x.shape, self.values.shape[0]
        tiles = -(-n // config.tile_n)
        device = self.x.device
        workspace_size = tiles * config.split_k * m * config.tile_n
        workspace = torch.full((workspace_size,), torch.nan, device=device)
        out = torch.full((out_offset + m * n + 16,), 77.0, dtype=self.out_dtype, device=device)
        panels = fragments_of(self.values, self.indices, k)
        library.call(
            "gemm_sm80",
            *(DTYPE_CODES[self.x.dtype], m, n, k, panels, self.x, self.x.stride(0)),
            *(0 if self.bias is None else self.bias, ACTIVATION_CODES[self.activation]),
            *(out[out_offset:], DTYPE_CODES[self.out_dtype]),
            0 if self.x_scales is None else self.x_scales,
            0 if self.row_scales is None else self.row_scales,
            [config.kernel, config.tile_n, config.tile_m, config.warps_k, config.split_k],
            *(workspace, self.counters),
        )
        assert not self.counters.any()
        y, around = out[out_offset:][: m * n], (out[:out_offset], out[out_offset + m * n :])
        assert all(bool((part == 77).all()) for part in around)
        return y.view(m, n)


def with_poison(x: Tensor) -> Tensor:
    """The same [m, k], of rows that begin at multiples of 16 bytes, with poison between them."""
    (m, k), granule = x.shape, 16 // x.element_size()
    stride = (-(-k // granule) + 1) * granule
    poison = 127 if x.dtype == torch.int8 else torch.nan
    # float8 tensors cannot be filled everywhere: through float32.
    memory = torch.full((m + 1, stride), poison, device=x.device).to(x.dtype)
    memory[:m, :k] = x
    return memory[:m, :k]


def choose(
    library: KernelLibrary,
    m: int,
    n: int,
    k: int,
    dtype: torch.dtype,
    multiprocessors: int = 132,
    shared_bytes: int = 227 << 10,
) -> tuple[Config, int, int]:
    """What ``choose_cuda_gemm_config`` says, the bytes of its workspace and of shared memory."""
    chosen = torch.zeros(7, dtype=torch.int64)  # in host memory, also where the kernels are not
    library.call(
        "choose_gemm", DTYPE_CODES[dtype], m, n, k, 80, multiprocessors, shared_bytes, chosen
    )
    kernel, tile_n, tile_m, warps_k, split_k, workspace, shared = chosen.tolist()
    return Config(kernel, tile_n, tile_m, warps_k, split_k), workspace, shared
