"""The package as it is installed: imports, versions, stubs, symbols, and what it says of itself."""

from __future__ import annotations

import ast
import importlib.metadata
import importlib.util
import inspect
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import gossamer
import pytest
import torch
from gossamer import _C, _cuda_module, info

ROOT = Path(__file__).parents[1]
PYPROJECT = (ROOT / "pyproject.toml").read_text()


def run_python(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-W", "error", "-c", code],
        capture_output=True,
        text=True,
        timeout=120,
        cwd=ROOT / "tests",
        env={**os.environ, **environment},
    )


def test_import_without_gpu_is_silent() -> None:
    done = run_python("import gossamer", CUDA_VISIBLE_DEVICES="")
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_import_touches_neither_threads_nor_cuda_nor_random_state() -> None:
    done = run_python(
        "import sys, torch\n"
        "torch.set_num_threads(1)\n"
        "state = torch.get_rng_state()\n"
        "import gossamer\n"
        "assert torch.get_num_threads() == 1\n"
        "assert torch.equal(torch.get_rng_state(), state)\n"
        "assert torch.is_grad_enabled() and torch.get_default_dtype() == torch.float32\n"
        "assert not torch.cuda.is_initialized()\n"
        "assert 'gossamer._cuda' not in sys.modules\n"
    )
    assert done.returncode == 0, done.stderr


def test_import_brings_torchs_openmp_runtime_first() -> None:
    """Otherwise a process has two of them, and torch.set_num_threads() reaches only one."""
    first_code = next(
        node
        for node in ast.parse(Path(gossamer.__file__).read_text()).body
        if not isinstance(node, ast.Expr) and getattr(node, "module", "") != "__future__"
    )
    assert isinstance(first_code, ast.Import)
    assert first_code.names[0].name == "torch"


def test_version_has_one_source() -> None:
    stated = re.search(r'^version = "(.+)"$', PYPROJECT, re.MULTILINE)[1]
    assert gossamer.__version__ == importlib.metadata.version("gossamer") == stated
    elsewhere = [
        path.name
        for path in [ROOT / "CMakeLists.txt", *(ROOT / "python").rglob("*.py")]
        if stated in path.read_text()
    ]
    assert elsewhere == []


def test_public_names_exist_and_are_listed() -> None:
    assert all(hasattr(gossamer, name) for name in gossamer.__all__)
    assert {
        "Block",
        "blocksparse_conv",
        "blocksparse_linear",
        "convert",
        "fold_batchnorm",
        "info",
        "formats",
        "nn",
        "prune",
        "ops",
        "quantize",
        "sparse24_linear",
    } <= set(gossamer.__all__)


def test_native_code_includes_no_torch_header() -> None:
    sources = [path for path in (ROOT / "csrc").rglob("*") if path.is_file()]
    assert sources
    including = re.compile(r'#\s*include\s*[<"](torch|ATen|c10)/')
    assert [path.name for path in sources if including.search(path.read_text())] == []
    assert "torch" not in re.search(r"^requires = (.+)$", PYPROJECT, re.MULTILINE)[1]


def stub_parameters(body: list[ast.stmt], prefix: str = "") -> dict[str, list[str]]:
    parameters = {}
    for node in body:
        if isinstance(node, ast.FunctionDef):
            parameters[prefix + node.name] = [argument.arg for argument in node.args.args]
        elif isinstance(node, ast.ClassDef):
            parameters |= stub_parameters(node.body, f"{node.name}.")
    return parameters


def native_parameters(owner: object, prefix: str = "") -> dict[str, list[str]]:
    parameters = {}
    for name, member in vars(owner).items():
        if isinstance(member, type):
            parameters |= native_parameters(member, f"{name}.")
            continue
        signature = (getattr(member, "__doc__", None) or "").split("\n")[0]
        if signature.startswith(f"{name}("):  # what pybind11 writes
            parameters[prefix + name] = re.findall(r"(\w+): ", signature)
    return parameters


def test_stub_states_the_native_signatures() -> None:
    stub = ast.parse((Path(gossamer.__file__).parent / "_C.pyi").read_text())
    native = native_parameters(_C)
    assert {name for name, value in vars(_C).items() if inspect.isroutine(value)} <= set(native)
    assert stub_parameters(stub.body) == native


@pytest.mark.skipif(
    importlib.util.find_spec("pybind11_stubgen") is None, reason="pybind11-stubgen not installed"
)
def test_stub_is_what_stubgen_writes(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "pybind11_stubgen", "gossamer._C", "-o", str(tmp_path)]
    subprocess.run(command, check=True, capture_output=True, timeout=120)
    fresh = (tmp_path / "gossamer" / "_C.pyi").read_text()
    assert (Path(gossamer.__file__).parent / "_C.pyi").read_text() == fresh


INSTRUCTION_SET_OBJECTS = sorted((ROOT / "build").rglob("*_avx*.cpp.o"))


@pytest.mark.skipif(
    not INSTRUCTION_SET_OBJECTS or shutil.which("nm") is None,
    reason="no objects under build/, or no nm",
)
@pytest.mark.parametrize("path", INSTRUCTION_SET_OBJECTS, ids=lambda path: path.name)
def test_instruction_set_units_export_no_weak_symbols(path: Path) -> None:
    """The linker keeps one copy of a weak symbol: it may be the one older machines cannot run."""
    listed = subprocess.run(
        ["nm", "-C", str(path)], check=True, capture_output=True, text=True
    ).stdout
    assert re.findall(r"^.* [WVu] .*$", listed, re.MULTILINE) == []


def test_targets_are_consistent() -> None:
    assert _C.targets_built()[0] == _C.machine_targets()[0] == "serial"
    assert set(_C.machine_targets()) <= set(_C.targets_built())
    assert _C.target() in _C.machine_targets()


def test_info_says_what_runs_here() -> None:
    told = info()
    assert told.version == gossamer.__version__
    assert told.torch_version == torch.__version__
    assert told.threads == torch.get_num_threads()
    assert told.target == _C.target()
    assert told.targets_built == tuple(_C.targets_built())
    assert all(choice.target in _C.machine_targets() for choice in told.choices)
    assert {choice.kernel for choice in told.choices if choice.dtype == "float64"} == {"serial"}
    (conv,) = [c for c in told.choices if (c.operation, c.dtype) == ("blocksparse_conv", "float32")]
    assert (conv.m, conv.n, conv.k) == (56 * 56, 64, 9 * 64)
    text = str(told)
    for word in (told.version, told.target, *told.targets_built, "CUDA", "float32", "bfloat16"):
        assert word in text
    assert repr(told) == text


def test_info_command_and_forced_target() -> None:
    command = [sys.executable, "-m", "gossamer", "info"]
    environment = {**os.environ, "GOSSAMER_TARGET": "serial"}
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, env=environment)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    assert re.search(r"target in force +serial", done.stdout)


def test_info_warns_where_torch_sees_a_gpu_that_gossamer_does_not(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util,
        "find_spec",
        lambda name, *rest: None if name == "gossamer._cuda" else find_spec(name, *rest),
    )
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert info().warnings == ()
    assert "not built" in info().cuda
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert len(info().warnings) == 1
    assert "warning: torch sees a GPU" in str(info())


def test_cuda_module_that_does_not_load_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util,
        "find_spec",
        lambda name, *rest: object() if name == "gossamer._cuda" else find_spec(name, *rest),
    )
    monkeypatch.setitem(sys.modules, "gossamer._cuda", None)
    assert "does not load" in info().cuda


def test_cuda_module_whose_driver_is_too_old_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    module = SimpleNamespace(devices=list, driver_status=lambda: "driver version is insufficient")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: object())
    monkeypatch.setitem(sys.modules, "gossamer._cuda", module)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    (warning,) = info().warnings
    assert "no GPU here (driver version is insufficient)" in warning
    _cuda_module._attached.cache_clear()
    reason = _cuda_module.obstacle(torch.device("cuda", 0))
    assert reason is not None
    assert "no GPU here (driver version is insufficient)" in reason
    with pytest.raises(ValueError, match=r"op: a CUDA tensor.*driver version is insufficient"):
        _cuda_module.on_cuda("op", lambda: None)()
    _cuda_module._attached.cache_clear()


@pytest.mark.skipif(
    importlib.util.find_spec("gossamer._cuda") is None, reason="built without the CUDA module"
)
def test_cuda_module_answers_without_a_driver() -> None:
    done = run_python(
        "import gossamer._cuda as cuda\n"
        "print(len(cuda.devices()), cuda.driver_status())\n"
        "for device in cuda.devices():\n"
        "    assert set(device) == "
        "{'name', 'compute_capability', 'memory', 'multiprocessors'}, device\n"
    )
    assert done.returncode == 0, done.stderr
    if not torch.cuda.is_available():
        assert done.stdout.startswith("0 ")


@pytest.mark.skipif(shutil.which("ldd") is None, reason="no ldd")
def test_native_modules_link_neither_torch_nor_cuda() -> None:
    folder = Path(_C.__file__).parent
    for module in folder.glob("_*.so"):
        linked = subprocess.run(
            ["ldd", str(module)], check=True, capture_output=True, text=True
        ).stdout
        assert not re.search(r"libtorch|libc10|libcudart|libcuda\.", linked), module.name


def test_readme_has_the_commands_that_ci_runs() -> None:
    commands = re.findall(r'^pip install "\.\[.*$', (ROOT / "README.md").read_text(), re.MULTILINE)
    assert commands == [
        'pip install ".[bench]" && python bench/run.py --quick',
        'pip install ".[test]" && pytest -n 2',
    ]


PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_examples_run(page: Path, capsys: pytest.CaptureFixture[str]) -> None:
    blocks = re.findall(r"```python\n(.*?)```", page.read_text(), re.DOTALL)
    names: dict[str, object] = {}
    for block in blocks:
        exec(block, names)
    if page.name == "README.md":
        assert blocks
        assert "layers swapped" in capsys.readouterr().out


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_of_pages_lead_somewhere(page: Path) -> None:
    for target, anchor in re.findall(r"\]\((?!https?:)([^)#]*)#?([^)]*)\)", page.read_text()):
        linked = (page.parent / target).resolve() if target else page
        assert linked.exists(), target
        titles = re.findall(r"^#+ (.*)$", linked.read_text(), re.MULTILINE) if anchor else []
        known = [re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles]
        assert not anchor or anchor in known, (target, anchor)
