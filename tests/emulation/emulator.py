"""Builds CUDA kernel files for the host, against twins of their instructions, and calls them."""

from __future__ import annotations

import ctypes
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock  # torch depends on it
from torch import Tensor

HERE = Path(__file__).parent
CSRC = HERE.parents[1] / "csrc"
# The twins shadow csrc/common/ptx.cuh and launch.cuh, so they come first.
INCLUDES = [f"-I{path}" for path in (HERE / "twins", HERE, CSRC)]
# Hidden, so that each library has a runtime of its own. "#pragma unroll" is nvcc's; a tensor map's
# alignment draws a note about the ABI of old compilers.
FLAGS = ["-std=c++20", "-fPIC", "-fvisibility=hidden"]
FLAGS += ["-Wall", "-Wextra", "-Wno-unknown-pragmas", "-Wno-psabi"]
PLAIN = ["-O1"]  # compiles a fifth faster than -O2, and small shapes run in no time either way
# Reports go to a log and the run goes on, so that one process can hold many tests.
# With -O1 the largest kernels take two to three times as long to compile.
SANITIZED = ["-O0", "-g1", "-fsanitize=address,undefined"]
SANITIZED += ["-fsanitize-recover=address,undefined"]

MESSAGE_BYTES = 1 << 14


def nvcc() -> str | None:
    homes = [os.environ[name] for name in ("CUDA_HOME", "CUDA_PATH") if name in os.environ]
    places = [*(f"{home}/bin" for home in homes), os.environ.get("PATH", ""), "/usr/local/cuda/bin"]
    return shutil.which("nvcc", path=os.pathsep.join(places))


def compile_with(compiler: str, *arguments: str) -> str:
    """What a compiler says; an error, or in CI a warning, is a RuntimeError with it."""
    # Not with the sanitizers preloaded: they would also watch the compiler.
    environment = {name: value for name, value in os.environ.items() if name != "LD_PRELOAD"}
    command = [compiler, *arguments]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    # A user's compiler may be newer than those that the sources were tried with.
    warned = "warning" in done.stderr and "CI" in os.environ
    if done.returncode != 0 or warned:
        raise RuntimeError(f"{' '.join(command)}\n{done.stderr}")
    return done.stdout + done.stderr


def run_nvcc(*arguments: str) -> str:
    """nvcc on the same sources, with the real common/ptx.cuh and launch.cuh."""
    return compile_with(str(nvcc()), f"-I{HERE}", f"-I{CSRC}", *arguments)


def build_for_gpu(source: Path, folder: Path, architecture: str) -> KernelLibrary:
    """The library of a kernel file for GPUs of one architecture, such as "90a"."""
    path = folder / f"lib{source.stem}.so"
    gencode = f"arch=compute_{architecture},code=sm_{architecture}"
    flags = ["-std=c++17", "-gencode", gencode, "-cudart=static"]
    run_nvcc(*flags, "-shared", "-Xcompiler=-fPIC", "-o", str(path), str(source))
    return KernelLibrary(path, source)


class KernelFault(RuntimeError):
    """What the emulation, or on a GPU the CUDA runtime, found wrong with a kernel."""


def native(argument: Tensor | int | list[int]) -> object:
    """A pointer to a tensor's data, an int64, or an array of int64 for the host to read."""
    if isinstance(argument, Tensor):
        return ctypes.c_void_p(argument.data_ptr())
    if isinstance(argument, list):
        return (ctypes.c_int64 * len(argument))(*argument)
    return ctypes.c_int64(argument)


class KernelLibrary:
    """The exported functions of a library of kernels, as ``library.call(name, *arguments)``."""

    def __init__(self, path: Path, source: Path) -> None:
        self.source = source
        self._library = ctypes.CDLL(str(path))

    def call(self, name: str, *arguments: Tensor | int | list[int]) -> None:
        message = ctypes.create_string_buffer(MESSAGE_BYTES)
        failed = self._library[name](
            *map(native, arguments), message, ctypes.c_int64(MESSAGE_BYTES)
        )
        if failed:
            raise KernelFault(message.value.decode())

    @contextmanager
    def schedule(self, name: str, seed: int = 0) -> Iterator[None]:
        """Launch ``late`` or ``early`` (runtime/schedule.h), in an order drawn by ``seed``."""
        set_schedule = self._library["set_schedule"]
        set_schedule(ctypes.c_int64({"late": 0, "early": 1}[name]), ctypes.c_uint64(seed))
        try:
            yield
        finally:
            set_schedule(ctypes.c_int64(0), ctypes.c_uint64(0))


class Emulator:
    """A compiler for kernel files, into a folder that processes may share: each is built once."""

    def __init__(self, folder: Path, sanitize: bool = False) -> None:
        self.folder = folder
        self.sanitize = sanitize
        self._libraries: dict[Path, KernelLibrary] = {}
        folder.mkdir(parents=True, exist_ok=True)

    @staticmethod
    def compiler() -> str | None:
        # Elsewhere the name may stand for another compiler.
        return shutil.which("g++") if sys.platform == "linux" else None

    def _run(self, out: Path, *arguments: str) -> Path:
        """``out``, which appears only when it is whole."""
        unfinished = out.with_suffix(".unfinished")
        compile_with(str(self.compiler()), *arguments, "-o", str(unfinished))
        return unfinished.rename(out)

    def _object(self, source: Path, *flags: str) -> Path:
        """Of files that several libraries have in common, built for the first of them."""
        out = self.folder / f"{source.parent.name}_{source.stem}.o"
        with FileLock(out.with_suffix(".lock")):
            if out.exists():
                return out
            return self._run(out, *FLAGS, *INCLUDES, *flags, "-x", "c++", "-c", str(source))

    def _runtime(self) -> Path:
        # As one unit: most of the time goes into the standard headers.
        unit = self.folder / "runtime.cpp"
        with FileLock(self.folder / "runtime.source.lock"):
            if not unit.exists():
                parts = sorted((HERE / "runtime").glob("*.cpp"))
                unit.write_text("".join(f'#include "runtime/{part.name}"\n' for part in parts))
        address = ("-O1", "-g1", "-fsanitize=address") if self.sanitize else ("-O2",)
        return self._object(unit, *address)

    def build(self, source: Path, *more: Path) -> KernelLibrary:
        """The library of this kernel file and others it calls, built at most once."""
        if source not in self._libraries:
            flags = SANITIZED if self.sanitize else PLAIN
            path = self.folder / f"lib{source.stem}.so"
            with FileLock(path.with_suffix(".lock")):
                if not path.exists():
                    parts = [
                        self._runtime(),
                        *(self._object(file, *flags) for file in (source, *more)),
                    ]
                    sanitizers = SANITIZED if self.sanitize else []
                    self._run(path, "-shared", *sanitizers, *map(str, parts))
            self._libraries[source] = KernelLibrary(path, source)
        return self._libraries[source]
