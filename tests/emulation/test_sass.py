"""The kernels as nvcc compiles them: the intended instructions are in the machine code.

The package's kernels are read out of the module that was built; samples, and all where it was built
without nvcc, are compiled here. Needs nvcc and the tools for its code (beside it, on PATH, or from
Python packages, as in the extra `test`), but no GPU.
"""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest
from devices import CLUSTER_SUMS, PRIMITIVES, PRIMITIVES_SM90
from emulator import CSRC, nvcc, run_nvcc
from sample_gemm import SAMPLE_GEMM, SAMPLE_GEMM_SM90

PACKAGED = ("nvidia/cu13/bin", "triton/backends/nvidia/bin")
SPARSE24 = CSRC / "sparse24"
BLOCKSPARSE = CSRC / "blocksparse"
GROUPED = CSRC / "grouped"
POINTCLOUD = CSRC / "pointcloud"


def run_tool(name: str, *arguments: str, folder: Path) -> str:
    """What one of CUDA's tools for machine code prints."""
    folders = [str(Path(str(nvcc())).resolve().parent), os.environ.get("PATH", "")]
    folders += [str(Path(site) / packaged) for site in sys.path for packaged in PACKAGED]
    if found := shutil.which(name, path=os.pathsep.join(folders)):
        command = [found, *arguments]
        done = subprocess.run(command, check=True, capture_output=True, text=True, cwd=folder)
        return done.stdout
    if "CI" in os.environ:
        pytest.fail(f"no {name}: nobody would read the machine code")
    pytest.skip(f"no {name}")


class Code:
    """A file's machine code: by kernel, and together, its instructions as (opcode, operands)."""

    INSTRUCTION = re.compile(r"/\*[0-9a-f]{4,}\*/ +(?:@!?U?P\w+ +)?([A-Z][\w.]+) *([^;]*)")

    def __init__(self, text: str) -> None:
        kernels = re.split(r"^\s*\.section\s+\.text\.", text, flags=re.MULTILINE)[1:]
        self.kernels = [self.INSTRUCTION.findall(kernel) for kernel in kernels]
        self.instructions = [instruction for kernel in self.kernels for instruction in kernel]
        self.opcodes = {opcode for opcode, _ in self.instructions}

    def missing(self, *expected: str) -> list[str]:
        return [name for name in expected if not any(op.startswith(name) for op in self.opcodes)]

    def serialised(self) -> bool:
        """Whether in some kernel each wgmma is waited for before the next one."""
        for kernel in self.kernels:
            products = [rest for op, rest in kernel if re.match("[HIQ]GMMA", op)]
            waits = [rest for op, rest in kernel if op == "WARPGROUP.DEPBAR.LE"]
            alone = all("gsb0" in rest for rest in products)
            if products and alone and all(", 0x0" in rest for rest in waits):
                return True
        return False


class Kernels:
    """The machine code of kernel files."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        module = importlib.util.find_spec("gossamer._cuda")
        if module is None or module.origin is None:
            assert "CI" not in os.environ, "nvcc is here, and gossamer was built without it"
            self._built: dict[Path, bytes] = {}
        else:
            run_tool("cuobjdump", "-xelf", "all", module.origin, folder=folder)
            self._built = {path: path.read_bytes() for path in folder.glob("*.cubin")}

    def _of_the_module(self, source: Path, architecture: str) -> Path | None:
        # The namespace and the file are in the names of what is local to it:
        # _ZN8gossamer11blocksparse45_GLOBAL__N__be35d430_12_conv_sm80_cu_fad36cd1...
        feature, file = source.parent.name, f"{source.stem}_cu"
        names = (f"{len(feature)}{feature}".encode(), f"_{len(file)}_{file}_".encode())
        for path, binary in self._built.items():
            if path.name.endswith(f".sm_{architecture}.cubin") and all(n in binary for n in names):
                return path
        return None

    def code(self, source: Path, architecture: str) -> Code:
        cubin = self._of_the_module(source, architecture)
        if cubin is None:
            cubin = self.folder / f"{source.parent.name}_{source.stem}_{architecture}.cubin"
            source_of = {"90": "80"}.get(architecture, architecture)  # as in csrc/CMakeLists.txt
            gencode = f"arch=compute_{source_of},code=sm_{architecture}"
            # Where the module is built in CI, a spilled register is an error, too.
            flags = ("-std=c++17", "-Xptxas=-warn-spills,-Werror", "-gencode", gencode, "-cubin")
            run_nvcc(*flags, "-o", str(cubin), str(source))
        return Code(run_tool("nvdisasm", "-c", str(cubin), folder=self.folder))


CodeOf = Callable[[Path, str], Code]


@pytest.fixture(scope="module")
def code_of(tmp_path_factory: pytest.TempPathFactory) -> CodeOf:
    """Of a kernel file, the machine code for an architecture."""
    if nvcc() is None:
        pytest.skip("no nvcc")
    return cache(Kernels(tmp_path_factory.mktemp("cubins")).code)


GEMM_OPCODES = (
    "HMMA.SP.16832.F32.BF16",
    "LDGSTS.E.BYPASS.LTC128B.128",
    "LDGDEPBAR",
    "DEPBAR.LE",
    "LDSM.16.M88.4",
)
PRIMITIVE_OPCODES = (
    "HMMA.16816.F32",
    "HMMA.16816.F32.BF16",
    "HMMA.1688.F32.TF32",
    "IMMA.16832.S8.S8",
    "HMMA.SP.16832.F32",
    "IMMA.SP.16864.S8.S8",
    "LDSM.16.MT88.4",
    "BAR.SYNC",
    "BAR.ARV",
    "LDG.E.128",
    "LDG.E.NA",
    "STG.E.EF.128",
    "SHFL.BFLY",
    "MATCH.ANY",
    "REDUX",
    "HFMA2.BF16_V2",
    "LOP3.LUT",
)
FP8_OPCODES = ("QMMA.16832.F32.E4M3.E4M3", "QMMA.SP.16864.F32.E4M3.E4M3")


def test_sample_gemm(code_of: CodeOf) -> None:
    assert code_of(SAMPLE_GEMM, "80").missing(*GEMM_OPCODES) == []


def test_primitives(code_of: CodeOf) -> None:
    assert code_of(PRIMITIVES, "89").missing(*PRIMITIVE_OPCODES, *FP8_OPCODES) == []


# Weights by 16 bytes past the L1 (prefill: only metadata), x by cp.async, and the products of each
# dtype; to spill would be an error. Of these architectures only sm_89 has mma.sp for E4M3.
MMA_SP = {"HMMA.SP.16832.F32.BF16", "HMMA.SP.16832.F32", "IMMA.SP.16864.S8.S8"}
MMA_SP_E4M3 = {"QMMA.SP.16864.F32.E4M3.E4M3"}
WEIGHT_LOADS = {"decode": "LDG.E.NA.128.CONSTANT", "prefill": "LDG.E.NA.LTC128B.128.CONSTANT"}


@pytest.mark.parametrize("architecture", ["80", "89", "90"])
@pytest.mark.parametrize("kernel", WEIGHT_LOADS)
def test_gemm_sm80(code_of: CodeOf, kernel: str, architecture: str) -> None:
    code = code_of(SPARSE24 / f"gemm_{kernel}_sm80.cu", architecture)
    products = {opcode for opcode in code.opcodes if "MMA.SP" in opcode}
    assert products == (MMA_SP | MMA_SP_E4M3 if architecture == "89" else MMA_SP)
    copies = ("LDGSTS.E.BYPASS.LTC128B.128.ZFILL", "LDSM.16.M88.4", WEIGHT_LOADS[kernel])
    assert code.missing(*copies) == []


@pytest.mark.parametrize("architecture", ["80", "90"])
def test_sparse24_conv_sm80(code_of: CodeOf, architecture: str) -> None:
    code = code_of(SPARSE24 / "conv_sm80.cu", architecture)
    assert {opcode for opcode in code.opcodes if "MMA." in opcode} == {
        "HMMA.SP.16832.F32.BF16",
        "HMMA.SP.16832.F32",
    }
    # Copies of 16 bytes or none: what is not there is said by a predicate, not by a size.
    copies = ("LDGSTS.E.BYPASS.LTC128B.128", "LDSM.16.M88.4", WEIGHT_LOADS["prefill"])
    assert code.missing(*copies) == []


# The same for int4 weights, which come to shared memory past the registers, with metadata by eight
# bytes and scales by four; LOP3 and HFMA2 widen them.
@pytest.mark.parametrize("architecture", ["80", "90"])
def test_gemm_int4(code_of: CodeOf, architecture: str) -> None:
    code = code_of(SPARSE24 / "gemm_int4_sm80.cu", architecture)
    assert {opcode for opcode in code.opcodes if "MMA.SP" in opcode} == {
        "HMMA.SP.16832.F32.BF16",
        "HMMA.SP.16832.F32",
    }
    copies = ("LDGSTS.E.BYPASS.LTC128B.128.ZFILL", "LDGSTS.E.BYPASS.128", "LDGSTS.E.64", "LDGSTS.E")
    widening = ("LDSM.16.M88.4", "LOP3.LUT", "HFMA2.BF16_V2")
    assert code.missing(*copies, *widening) == []
    assert code.opcodes & {"HFMA2", "HFMA2.MMA"}


# Products of both types, of operands that come by 16 bytes past the registers.
@pytest.mark.parametrize("architecture", ["80", "90"])
@pytest.mark.parametrize(
    ("source", "others"),
    [
        (BLOCKSPARSE / "conv_sm80.cu", ("LDSM.16.M88.4", "STG.E.128", "REDUX")),
        (GROUPED / "gemm_sm80.cu", ("LDSM.16.M88.4", "LDSM.16.MT88.4", "STG.E.128")),
        (POINTCLOUD / "conv_sm80.cu", ("LDSM.16.M88.4", "LDSM.16.MT88.4", "STG.E.128")),
        (POINTCLOUD / "weight_grad.cu", ("LDSM.16.MT88.4", "STG.E.64")),
    ],
)
def test_products_of_gathered_rows(
    code_of: CodeOf, source: Path, others: tuple[str, ...], architecture: str
) -> None:
    code = code_of(source, architecture)
    assert {opcode for opcode in code.opcodes if "MMA." in opcode} == {
        "HMMA.16816.F32.BF16",
        "HMMA.16816.F32",
    }
    assert code.missing("LDGSTS.E.BYPASS.LTC128B.128.ZFILL", *others) == []


# Rows by 16 bytes past the L1, pairs by shuffles, and no sum by atomics. Entries are counted at
# barriers and collected by atomics of shared memory.
@pytest.mark.parametrize("architecture", ["80", "90"])
def test_codes(code_of: CodeOf, architecture: str) -> None:
    sums = code_of(CSRC / "actsparse" / "topk_cuda.cu", architecture)
    rows = ("LDG.E.NA.LTC128B.128.CONSTANT", "SHFL.IDX", "SHFL.BFLY", "STG.E.128")
    assert sums.missing(*rows) == []
    assert sums.missing("ATOM", "RED") == ["ATOM", "RED"]
    selection = code_of(CSRC / "actsparse" / "topk_select_cuda.cu", architecture)
    assert selection.missing("LDG.E.128", "BAR.RED.POPC", "MATCH.ANY", "ATOMS") == []
    assert selection.missing("ATOMG", "RED") == ["ATOMG", "RED"]


# Products of both widths and types; operands by TMA, x also by cp.async that arrives at a barrier.
# Where a granule is dead its products are branched around, and still they run at once: one wait a
# step. A dead granule takes little more than its branch.
def test_blocksparse_conv_sm90(code_of: CodeOf) -> None:
    code = code_of(BLOCKSPARSE / "conv_sm90.cu", "90a")
    products = {f"HGMMA.64x{n}x16.F32{t}" for n in (16, 32) for t in ("", ".BF16")}
    assert products <= code.opcodes
    copies = ("UTMALDG.3D", "UTMALDG.2D.MULTICAST", "LDGSTS.E.BYPASS.LTC128B.128.ZFILL")
    assert code.missing(*copies, "ARRIVES.LDGSTSBAR", "LDSM.16.M88.4", "STG.E.128") == []
    waits = [operands for opcode, operands in code.instructions if opcode == "WARPGROUP.DEPBAR.LE"]
    assert waits == ["gsb0, 0x0 "] * 4
    assert code.missing("LDL", "STL") == ["LDL", "STL"]


HOPPER_GEMM_OPCODES = (
    "HGMMA.SP.64x64x32.F32.BF16",
    "WARPGROUP.ARRIVE",
    "WARPGROUP.DEPBAR.LE",
    "UTMALDG.2D",
    "UTMASTG.2D",
    "SYNCS.ARRIVE.TRANS64",
    "SYNCS.PHASECHK.TRANS64.TRYWAIT",
    "FENCE.VIEW.ASYNC",
    "ELECT",
)
CLUSTER_OPCODES = ("UTMALDG.2D.MULTICAST", "SYNCS.ARRIVE.TRANS64.RED", "UCGABAR_ARV")
GEMM_SM90_OPCODES = (
    "LDG.E.NA.LTC128B.128",
    "UTMALDG",
    "UTMASTG.2D",
    "STSM.16.MT88.4",
    "USETMAXREG.TRY_ALLOC",
    "USETMAXREG.DEALLOC",
)
HOPPER_PRIMITIVE_OPCODES = (
    "HGMMA.64x32x16.F32",
    "HGMMA.64x32x16.F32.BF16",
    "IGMMA.64x32x32.S8.S8",
    "QGMMA.64x32x32.F32.E4M3.E4M3",
    "HGMMA.SP.64x32x32.F32",
    "HGMMA.SP.64x256x32.F32.BF16",
    "IGMMA.SP.64x32x64.S8.S8",
    "QGMMA.SP.64x32x64.F32.E4M3.E4M3",
    "UTMALDG.3D",
    "UTMALDG.4D.IM2COL",
    "UTMALDG.4D.IM2COL.MULTICAST",
    "UTMASTG.3D",
    "UBLKCP.S.G",
    "STSM.16.M88.4",
    "STSM.16.MT88.4",
    "USETMAXREG",
)


def test_sample_gemm_sm90(code_of: CodeOf) -> None:
    assert code_of(SAMPLE_GEMM_SM90, "90a").missing(*HOPPER_GEMM_OPCODES) == []


def test_sample_of_clusters(code_of: CodeOf) -> None:
    assert code_of(CLUSTER_SUMS, "90a").missing(*CLUSTER_OPCODES) == []


@pytest.mark.parametrize(
    ("source", "products"),
    [
        (
            SPARSE24 / "gemm_sm90.cu",
            (
                "HGMMA.SP.64x256x32.F32.BF16",
                "HGMMA.SP.64x128x32.F32.BF16",
                "HGMMA.SP.64x256x32.F32",
            ),
        ),
        (
            SPARSE24 / "gemm_sm90_8bit.cu",
            ("QGMMA.SP.64x128x64.F32.E4M3.E4M3", "IGMMA.SP.64x256x64.S8.S8"),
        ),
        (
            SPARSE24 / "conv_sm90.cu",
            (
                "HGMMA.SP.64x256x32.F32.BF16",
                "HGMMA.SP.64x128x32.F32",
                "UTMALDG.4D.IM2COL",
                "UTMALDG.4D.IM2COL.MULTICAST",
            ),
        ),
    ],
)
def test_gemm_sm90(code_of: CodeOf, source: Path, products: tuple[str, ...]) -> None:
    code = code_of(source, "90a")
    assert not code.serialised()
    assert set(products) <= code.opcodes  # for float16 the name ends at F32
    assert code.missing(*GEMM_SM90_OPCODES) == []
    # No exact division, which branches to a slow path, for each sum that is activated.
    assert "FCHK" not in code.opcodes
    for kernel in code.kernels:
        check_operands_in_registers(kernel)
        check_producer_registers(kernel)


@pytest.mark.parametrize(
    ("file", "tiles"), [("gemm_sm90_stream", "2D"), ("conv_sm90_stream", "4D.IM2COL")]
)
def test_gemm_sm90_stream(code_of: CodeOf, file: str, tiles: str) -> None:
    code = code_of(SPARSE24 / f"{file}.cu", "90a")
    assert not code.serialised()
    products = {f"HGMMA.SP.64x{tokens}x32.F32.BF16" for tokens in (16, 32, 64, 128)}
    # Weights come in whole pieces, x in tiles; fragments leave by 16 bytes a lane.
    assert products | {"UBLKCP.S.G", f"UTMALDG.{tiles}", "LDS.128", "UTMASTG.2D"} <= code.opcodes


def check_producer_registers(code: list[tuple[str, str]]) -> None:
    """The producer, which gives up all registers but 24, uses no others."""
    opcodes = [opcode for opcode, _ in code]
    first = opcodes.index("USETMAXREG.DEALLOC.CTAPOOL")
    of_producer = code[first : opcodes.index("USETMAXREG.TRY_ALLOC.CTAPOOL")]
    assert any(opcode.startswith("UTMALDG") for opcode, _ in of_producer)
    used = {int(n) for _, operands in of_producer for n in re.findall(r"\bR(\d+)\b", operands)}
    assert max(used) < 24


def check_operands_in_registers(code: list[tuple[str, str]]) -> None:
    """wgmma's A and metadata stay where a load has put them, until a wait says they are read.

    In the order of the listing, in which the body of a loop stands once.
    """
    writer: dict[int, str] = {}
    read_by: dict[int, int] = {}  # the group of products that reads a register
    groups = done = products = 0
    for opcode, operands in code:
        registers = [int(number) for number in re.findall(r"\bR(\d+)\b", operands)]
        if re.match("[HIQ]GMMA.SP", opcode):
            _, a, _, metadata = registers  # D, A, D, metadata; B is a descriptor
            for register in (*range(a, a + 4), metadata):
                assert writer[register] == "LDG.E.NA.LTC128B.128", (opcode, operands)
                read_by[register] = groups
            groups += "gsb0" in operands
            products += 1
        elif opcode == "WARPGROUP.DEPBAR.LE":
            pending = int(operands.split(",")[1], 16)
            done = max(done, groups - pending)
        elif re.match(r"R\d", operands):  # the register that is written
            for register in range(registers[0], registers[0] + (4 if ".128" in opcode else 1)):
                assert read_by.get(register, -1) < done, (opcode, operands)
                writer[register] = opcode
    assert products > 0


def test_primitives_sm90(code_of: CodeOf) -> None:
    assert code_of(PRIMITIVES_SM90, "90a").missing(*HOPPER_PRIMITIVE_OPCODES) == []


# What moves 16 bytes a lane is named.
@pytest.mark.parametrize("architecture", ["80", "90"])
@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("sparse24/pack.cu", ("LDG.E.128.CONSTANT", "STG.E.128")),
        (
            "sparse24/pack_panels.cu",
            ("LDG.E.NA.LTC128B.128", "STG.E.EF.128", "STG.E.128", "SHFL.BFLY"),
        ),
        (
            "sparse24/gemm_float32.cu",
            ("FFMA", "LDG.E.128.CONSTANT", "STS.128", "LDS.128", "LDS.64"),
        ),
        ("blocksparse/conv_fma.cu", ("FFMA", "DFMA", "LDGSTS.E", "LDGSTS.E.64", "LDS.128")),
        ("grouped/gemm_fma.cu", ("FFMA", "LDGSTS.E.BYPASS.LTC128B.128.ZFILL", "LDS.128")),
        ("pointcloud/conv_grouped.cu", ("FFMA", "LDG.E.128", "LDG.E.64", "STG.E")),
        ("pointcloud/conv_fma.cu", ("FFMA", "LDGSTS.E.BYPASS.LTC128B.128.ZFILL", "LDS.128")),
        ("pointcloud/layout.cu", ("ATOMG.E.OR.STRONG.GPU", "RED", "VOTE.ANY")),
        ("pointcloud/pool.cu", ("DADD", "LDG.E.128", "LDG.E.64", "STG.E.128")),
        ("pointcloud/voxelize.cu", ("RED", "VOTE.ANY", "LDG.E.64")),
        ("pointcloud/maps.cu", ("VOTE.ANY", "POPC", "LDG.E.64", "STG.E.U8")),
        ("actsparse/linear_cuda.cu", ("LDG.E.NA.128.CONSTANT", "FFMA", "LDS.128", "R2P")),
        ("actsparse/outputs_cuda.cu", ("LDG.E.NA.128.CONSTANT", "FFMA", "LDG.E.128", "SHFL.BFLY")),
        ("blocksparse/pack.cu", ("LDG.E.CONSTANT", "LDG.E.64.CONSTANT", "STG.E.64")),
    ],
)
def test_portable_kernels(
    code_of: CodeOf, source: str, expected: tuple[str, ...], architecture: str
) -> None:
    code = code_of(CSRC / source, architecture)
    assert code.missing(*expected) == []
    assert code.missing("HMMA", "LDL", "STL") == ["HMMA", "LDL", "STL"]
