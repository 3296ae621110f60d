"""The kernels as nvcc compiles them: the intended instructions are in the machine code.

Needs nvcc and a disassembler (cuobjdump or nvdisasm, beside nvcc, on PATH, or from a Python package
that brings one, as the extra `test` does); no GPU.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import pytest
from devices import CLUSTER_SUMS, PRIMITIVES, PRIMITIVES_SM90
from emulator import CSRC, HERE, nvcc, run_nvcc
from sample_gemm import SAMPLE_GEMM, SAMPLE_GEMM_SM90

PACKAGED = ("nvidia/cu13/bin", "triton/backends/nvidia/bin")


def disassemble(cubin: Path) -> str:
    folders = [str(Path(str(nvcc())).resolve().parent), os.environ.get("PATH", "")]
    folders += [str(Path(site) / folder) for site in sys.path for folder in PACKAGED]
    places = os.pathsep.join(folders)
    for tool, *flags in (("cuobjdump", "--dump-sass"), ("nvdisasm", "--print-code")):
        if found := shutil.which(tool, path=places):
            # cuobjdump calls nvdisasm.
            environment = {**os.environ, "PATH": places}
            command = [found, *flags, str(cubin)]
            return subprocess.run(
                command, check=True, capture_output=True, text=True, env=environment
            ).stdout
    if "CI" in os.environ:
        pytest.fail("no cuobjdump or nvdisasm: nobody would read the machine code")
    pytest.skip("no cuobjdump or nvdisasm")


# Which file is looked at for which architecture, in the order of the tests.
SPARSE24 = CSRC / "sparse24"
COMPILED = [(SAMPLE_GEMM, "80"), (PRIMITIVES, "89")]
COMPILED += [
    (SPARSE24 / f"gemm_{kernel}_sm80.cu", architecture)
    for kernel, architectures in (
        ("decode", ("80", "89", "90")),
        ("prefill", ("80", "89", "90")),
        ("int4", ("80", "90")),
    )
    for architecture in architectures
]
COMPILED += [(SAMPLE_GEMM_SM90, "90a"), (CLUSTER_SUMS, "90a"), (SPARSE24 / "gemm_sm90.cu", "90a")]
COMPILED += [(HERE / "kernels" / "gemm_sm90_8bit.cu", "90a"), (PRIMITIVES_SM90, "90a")]
COMPILED += [(SPARSE24 / "gemm_sm90_stream.cu", "90a")]
COMPILED += [
    (SPARSE24 / f"{name}.cu", architecture)
    for name in ("pack", "pack_panels", "gemm_float32")
    for architecture in ("80", "90")
]
BLOCKSPARSE = CSRC / "blocksparse"
COMPILED += [
    (BLOCKSPARSE / f"{name}.cu", architecture)
    for name in ("conv_sm80", "conv_fma", "pack")
    for architecture in ("80", "90")
]
COMPILED += [(BLOCKSPARSE / "conv_sm90.cu", "90a")]
POINTCLOUD = CSRC / "pointcloud"
COMPILED += [
    (POINTCLOUD / f"{name}.cu", architecture)
    for name in ("conv_sm80", "conv_fma", "weight_grad")
    for architecture in ("80", "90")
]
_compiling: dict[tuple[Path, str], Future[tuple[Path, str]]] = {}


@pytest.fixture(scope="module", autouse=True)
def _compile_ahead(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """On all cores, while the first results are looked at: it takes minutes otherwise."""
    if nvcc() is None:
        pytest.skip("no nvcc")
    folder = tmp_path_factory.mktemp("cubins")
    pool = ThreadPoolExecutor(os.cpu_count())
    _compiling.update({case: pool.submit(_compile, *case, folder) for case in COMPILED})
    yield
    pool.shutdown(cancel_futures=True)
    _compiling.clear()


def _compile(source: Path, architecture: str, folder: Path) -> tuple[Path, str]:
    """The machine code and what ptxas says; a spilled register is an error."""
    cubin = folder / f"{source.parent.name}_{source.stem}_{architecture}.cubin"
    gencode = f"arch=compute_{architecture},code=sm_{architecture}"
    spills = ("-Xptxas=-warn-spills", "-Xptxas=-Werror")
    said = run_nvcc(
        "-std=c++17", *spills, "-gencode", gencode, "-cubin", "-o", str(cubin), str(source)
    )
    return cubin, said


def machine_code(source: Path, architecture: str) -> tuple[str, str]:
    """The disassembly and what ptxas says."""
    cubin, said = _compiling[source, architecture].result()
    return disassemble(cubin), said


INSTRUCTION = re.compile(r"/\*[0-9a-f]{4,}\*/ +(?:@!?U?P\w+ +)?([A-Z][\w.]+) *([^;]*)")


def opcodes(source: Path, architecture: str) -> set[str]:
    code, _ = machine_code(source, architecture)
    return {opcode for opcode, _ in INSTRUCTION.findall(code)}


def missing(expected: tuple[str, ...], found: set[str]) -> list[str]:
    return [name for name in expected if not any(opcode.startswith(name) for opcode in found)]


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


def test_sample_gemm() -> None:
    assert missing(GEMM_OPCODES, opcodes(SAMPLE_GEMM, "80")) == []


def test_primitives() -> None:
    found = opcodes(PRIMITIVES, "89")
    assert missing((*PRIMITIVE_OPCODES, *FP8_OPCODES), found) == []


# Weights by 16 bytes past the L1 (prefill: only metadata), x by cp.async, and the products of each
# dtype; to spill would be an error. Of these architectures only sm_89 has mma.sp for E4M3.
MMA_SP = {"HMMA.SP.16832.F32.BF16", "HMMA.SP.16832.F32", "IMMA.SP.16864.S8.S8"}
MMA_SP_E4M3 = {"QMMA.SP.16864.F32.E4M3.E4M3"}
WEIGHT_LOADS = {"decode": "LDG.E.NA.128.CONSTANT", "prefill": "LDG.E.NA.LTC128B.128.CONSTANT"}


@pytest.mark.parametrize("architecture", ["80", "89", "90"])
@pytest.mark.parametrize("kernel", WEIGHT_LOADS)
def test_gemm_sm80(kernel: str, architecture: str) -> None:
    found = opcodes(CSRC / "sparse24" / f"gemm_{kernel}_sm80.cu", architecture)
    products = {opcode for opcode in found if "MMA.SP" in opcode}
    assert products == (MMA_SP | MMA_SP_E4M3 if architecture == "89" else MMA_SP)
    copies = ("LDGSTS.E.BYPASS.LTC128B.128.ZFILL", "LDSM.16.M88.4", WEIGHT_LOADS[kernel])
    assert missing(copies, found) == []


# The same for int4 weights: LOP3 and HFMA2 widen them, a quad shares scales by shuffles.
@pytest.mark.parametrize("architecture", ["80", "90"])
def test_gemm_int4(architecture: str) -> None:
    found = opcodes(CSRC / "sparse24" / "gemm_int4_sm80.cu", architecture)
    assert {opcode for opcode in found if "MMA.SP" in opcode} == {
        "HMMA.SP.16832.F32.BF16",
        "HMMA.SP.16832.F32",
    }
    copies = ("LDGSTS.E.BYPASS.LTC128B.128.ZFILL", "LDSM.16.M88.4", WEIGHT_LOADS["decode"])
    widening = ("LOP3.LUT", "HFMA2.BF16_V2", "SHFL.IDX")
    assert missing((*copies, *widening), found) == []
    assert "HFMA2" in found or "HFMA2.MMA" in found


# Products of both types, of operands that come by 16 bytes past the registers.
@pytest.mark.parametrize("architecture", ["80", "90"])
@pytest.mark.parametrize(
    ("source", "others"),
    [
        (BLOCKSPARSE / "conv_sm80.cu", ("LDSM.16.M88.4", "STG.E.128", "REDUX")),
        (POINTCLOUD / "conv_sm80.cu", ("LDSM.16.M88.4", "LDSM.16.MT88.4", "STG.E.128")),
        (POINTCLOUD / "weight_grad.cu", ("LDSM.16.MT88.4", "STG.E.64")),
    ],
)
def test_products_of_gathered_rows(
    source: Path, others: tuple[str, ...], architecture: str
) -> None:
    found = opcodes(source, architecture)
    assert {opcode for opcode in found if "MMA." in opcode} == {
        "HMMA.16816.F32.BF16",
        "HMMA.16816.F32",
    }
    assert missing(("LDGSTS.E.BYPASS.LTC128B.128.ZFILL", *others), found) == []


# Products of both widths and types; operands by TMA, x also by cp.async that arrives at a barrier.
# Where a granule is dead its products are branched around, and still they run at once: one wait a
# step. A dead granule takes little more than its branch.
def test_blocksparse_conv_sm90() -> None:
    text, said = machine_code(BLOCKSPARSE / "conv_sm90.cu", "90a")
    assert "Potential Performance Loss" not in said, said
    code = INSTRUCTION.findall(text)
    found = {opcode for opcode, _ in code}
    products = {f"HGMMA.64x{n}x16.F32{t}" for n in (16, 32) for t in ("", ".BF16")}
    assert products <= found
    copies = ("UTMALDG.3D", "UTMALDG.2D.MULTICAST", "LDGSTS.E.BYPASS.LTC128B.128.ZFILL")
    assert missing((*copies, "ARRIVES.LDGSTSBAR", "LDSM.16.M88.4", "STG.E.128"), found) == []
    waits = [operands for opcode, operands in code if opcode == "WARPGROUP.DEPBAR.LE"]
    assert waits == ["gsb0, 0x0 "] * 4
    assert missing(("LDL", "STL"), found) == ["LDL", "STL"]


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
    "UTMALDG.2D",
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
    "UTMASTG.3D",
    "UBLKCP.S.G",
    "STSM.16.M88.4",
    "STSM.16.MT88.4",
    "USETMAXREG",
)


def test_sample_gemm_sm90() -> None:
    assert missing(HOPPER_GEMM_OPCODES, opcodes(SAMPLE_GEMM_SM90, "90a")) == []


def test_sample_of_clusters() -> None:
    assert missing(CLUSTER_OPCODES, opcodes(CLUSTER_SUMS, "90a")) == []


@pytest.mark.parametrize(
    ("source", "products"),
    [
        (
            CSRC / "sparse24" / "gemm_sm90.cu",
            (
                "HGMMA.SP.64x256x32.F32.BF16",
                "HGMMA.SP.64x128x32.F32.BF16",
                "HGMMA.SP.64x256x32.F32",
            ),
        ),
        (
            HERE / "kernels" / "gemm_sm90_8bit.cu",
            ("QGMMA.SP.64x128x64.F32.E4M3.E4M3", "IGMMA.SP.64x256x64.S8.S8"),
        ),
    ],
)
def test_gemm_sm90(source: Path, products: tuple[str, ...]) -> None:
    text, said = machine_code(source, "90a")
    assert "Potential Performance Loss" not in said, said  # products that run one by one
    code = INSTRUCTION.findall(text)
    found = {opcode for opcode, _ in code}
    assert set(products) <= found  # for float16 the name ends at F32
    assert missing(GEMM_SM90_OPCODES, found) == []
    # No exact division, which branches to a slow path, for each sum that is activated.
    assert "FCHK" not in found
    # Waits that leave a group of products running.
    assert any(op == "WARPGROUP.DEPBAR.LE" and ", 0x1" in rest for op, rest in code)

    check_operands_in_registers(code)


def test_gemm_sm90_stream() -> None:
    text, said = machine_code(SPARSE24 / "gemm_sm90_stream.cu", "90a")
    assert "Potential Performance Loss" not in said, said
    found = {opcode for opcode, _ in INSTRUCTION.findall(text)}
    products = {f"HGMMA.SP.64x{tokens}x32.F32.BF16" for tokens in (16, 32, 64, 128)}
    # Weights come in whole pieces, x in tiles; fragments leave by 16 bytes a lane.
    assert products | {"UBLKCP.S.G", "UTMALDG.2D", "LDS.128", "UTMASTG.2D"} <= found


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


def test_primitives_sm90() -> None:
    assert missing(HOPPER_PRIMITIVE_OPCODES, opcodes(PRIMITIVES_SM90, "90a")) == []


# Both build without spills; what moves 16 bytes a lane is named.
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
        ("pointcloud/conv_fma.cu", ("FFMA", "LDGSTS.E.BYPASS.LTC128B.128.ZFILL", "LDS.128")),
        ("blocksparse/pack.cu", ("LDG.E.CONSTANT", "LDG.E.64.CONSTANT", "STG.E.64")),
    ],
)
def test_portable_kernels(source: str, expected: tuple[str, ...], architecture: str) -> None:
    found = opcodes(CSRC / source, architecture)
    assert missing(expected, found) == []
    assert missing(("HMMA", "LDL", "STL"), found) == ["HMMA", "LDL", "STL"]
