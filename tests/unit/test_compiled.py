"""The compiled modules: hot paths stay in C, and each stub says what its module has."""

from __future__ import annotations

import ast
import functools
import importlib
import importlib.util
import inspect
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support import require

ROOT = Path(__file__).resolve().parents[2]
SOURCES = sorted(path.relative_to(ROOT) for path in ROOT.glob("chv/**/*.pyx"))

# What runs once per exit: functions that must exist and must not touch Python.
HOT = {
    "_bus": {"Bus.find", "Bus.find_movable", "bus_access", "stats_record"},
    "_irq": {"irq_raise", "line_assert", "line_deassert"},
    "_virtqueue": {"ram_find", "vq_pop", "vq_push", "vq_signal", "vq_enable_kick", "vq_wait"},
    "_config": {"space_read", "ports_read", "ports_write", "ecam_read", "ecam_write"},
    "_block": {"start", "take", "complete", "reap", "serve_ring", "serve_plainly"},
    "_net": {"rx_loop", "rx_frame", "rx_fill", "rx_deliver", "push_all", "tx_loop", "tx_frame", "tx_vector"},
    "_kvmrun": {"VcpuRun.loop", "VcpuRun.handle_io", "VcpuRun.handle_mmio"},
    "_serial": {"serial_read", "serial_write", "writer_loop", "reader_loop"},
    "_timer": {"timer_read", "timer_write"},
    "_debug_port": {"port_read", "port_write"},
}


def directives() -> list[str]:
    """The compiler directives that setup.py builds with, as options of the cython command."""
    tree = ast.parse((ROOT / "setup.py").read_text(encoding="utf-8"))
    for node in ast.walk(tree):
        if isinstance(node, ast.keyword) and node.arg == "compiler_directives":
            assert isinstance(node.value, ast.Dict)
            pairs = zip(node.value.keys, node.value.values, strict=True)
            return [
                f"{key.value!s}={value.value!s}"
                for key, value in pairs
                if isinstance(key, ast.Constant) and isinstance(value, ast.Constant)
            ]
    raise AssertionError("setup.py has no compiler_directives")


@functools.cache
def line_scores(source: Path) -> dict[int, int]:
    """Line number -> how much of the Python C API its C code uses (0: none), from Cython's annotation."""
    require(importlib.util.find_spec("Cython") is not None, "Cython is not installed")
    with tempfile.TemporaryDirectory() as folder:
        output = Path(folder, source.stem + ".c")
        options = [part for directive in directives() for part in ("-X", directive)]
        subprocess.run(
            [sys.executable, "-m", "cython", "-a", *options, str(source), "-o", str(output)],
            cwd=ROOT,
            check=True,
            capture_output=True,
        )
        html = output.with_suffix(".html").read_text(encoding="utf-8")
    found = re.findall(r'<pre class="cython line score-(\d+)"[^>]*>.?<span class="">0*(\d+)</span>', html)
    assert found, "the annotation's format is not the expected one"
    return {int(line): int(score) for score, line in found}


def block_end(lines: list[str], start: int) -> int:
    """The index behind the block whose head ends at ``start``."""
    indent = len(lines[start]) - len(lines[start].lstrip())
    for index in range(start + 1, len(lines)):
        text = lines[index].strip()
        if text and not text.startswith("#") and len(lines[index]) - len(lines[index].lstrip()) <= indent:
            return index
    return len(lines)


def nogil_functions(source: Path) -> Iterator[tuple[str, list[int]]]:
    """(name, line numbers) of each function that is declared nogil, without its ``with gil`` blocks."""
    lines = (ROOT / source).read_text(encoding="utf-8").splitlines()
    owner = ""
    for index, line in enumerate(lines):
        if line and not line[0].isspace():
            match = re.match(r"cdef class (\w+)", line)
            owner = f"{match[1]}." if match else ""
        match = re.match(r"(\s*)cdef (?!class|extern|enum|struct)[^(=]*?(\w+)\(", line)
        if not match:
            continue
        head = index
        indent = len(match[1])
        while not lines[head].rstrip().endswith(":"):
            head += 1
            if head == len(lines):
                break
        if head == len(lines) or "nogil" not in lines[head]:
            continue
        # The end is that of the first line's indentation, not of a wrapped head's.
        end = block_end([*lines[:head], " " * indent + lines[head].lstrip(), *lines[head + 1 :]], head)
        body = set(range(index, end))
        for inner in range(head + 1, end):
            if re.match(r"\s*with gil:", lines[inner]):
                body -= set(range(inner, block_end(lines, inner)))
        yield (owner if indent else "") + match[2], [number + 1 for number in sorted(body)]


def test_every_module_is_looked_at() -> None:
    assert {path.stem for path in SOURCES} >= set(HOT)


@pytest.mark.parametrize("source", SOURCES, ids=str)
def test_functions_without_the_gil_do_not_touch_python(source: Path) -> None:
    functions = dict(nogil_functions(source))
    assert set(functions) >= HOT.get(source.stem, set())
    scores = line_scores(source)
    text = (ROOT / source).read_text(encoding="utf-8").splitlines()
    touched = [
        f"{source}:{line} in {name}: {text[line - 1].strip()}"
        for name, lines in functions.items()
        for line in lines
        if scores.get(line, 0)
    ]
    assert touched == []


def test_the_score_of_a_line_that_touches_python_is_not_zero() -> None:
    """The tests above can fail: the same files have lines of Python, and they are seen."""
    source = Path("chv/_bus.pyx")
    text = (ROOT / source).read_text(encoding="utf-8").splitlines()
    line = next(number for number, line in enumerate(text, 1) if "raise BusError(" in line)
    assert line_scores(source)[line] > 0


# -- stubs ------------------------------------------------------------------------------


def module_name(source: Path) -> str:
    return ".".join(source.with_suffix("").parts)


def stub_tree(source: Path) -> ast.Module:
    stub = ROOT / source.with_suffix(".pyi")
    assert stub.exists(), f"{source} has no stub"
    return ast.parse(stub.read_text(encoding="utf-8"))


def declared(body: list[ast.stmt]) -> dict[str, ast.stmt]:
    names: dict[str, ast.stmt] = {}
    for node in body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            names[node.name] = node
        elif isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            names[node.target.id] = node
        elif isinstance(node, ast.Assign):
            names.update((target.id, node) for target in node.targets if isinstance(target, ast.Name))
    return names


def defined_in(module: object, name: str) -> set[str]:
    """The public names that a compiled module defines itself."""
    found = set()
    for attribute, value in vars(module).items():
        if attribute.startswith("_") or inspect.ismodule(value):
            continue
        if getattr(value, "__module__", name) == name or attribute.isupper():
            found.add(attribute)
    return found


@pytest.mark.parametrize("source", SOURCES, ids=str)
def test_the_stub_has_the_modules_public_names(source: Path) -> None:
    name = module_name(source)
    module = importlib.import_module(name)
    stub = {n for n in declared(stub_tree(source).body) if not n.startswith("_")}
    assert {n for n in stub if not hasattr(module, n)} == set(), "in the stub, not in the module"
    assert defined_in(module, name) - stub == set(), "in the module, not in the stub"


PROTOCOL = {"__init__", "__enter__", "__exit__"}


@pytest.mark.parametrize("source", SOURCES, ids=str)
def test_the_stubs_classes_have_the_compiled_ones_members(source: Path) -> None:
    module = importlib.import_module(module_name(source))
    for class_name, node in declared(stub_tree(source).body).items():
        if not isinstance(node, ast.ClassDef):
            continue
        compiled = getattr(module, class_name)
        in_stub = {n for n in declared(node.body) if not n.startswith("_") or n in PROTOCOL}
        missing = {n for n in in_stub if not hasattr(compiled, n)}
        if "__dict__" in vars(compiled):  # a plain Python class: __init__ may set more
            missing = {n for n in missing if not isinstance(declared(node.body)[n], ast.AnnAssign)}
        assert missing == set(), f"{class_name}: in the stub, not in the class"
        own = {n for n in vars(compiled) if not n.startswith("_")}
        assert own - in_stub == set(), f"{class_name}: in the class, not in the stub"


@pytest.mark.parametrize("source", SOURCES, ids=str)
def test_the_stubs_functions_take_the_compiled_ones_arguments(source: Path) -> None:
    module = importlib.import_module(module_name(source))

    def compare(stub: ast.FunctionDef, function: object, label: str) -> None:
        try:
            signature = inspect.signature(function)  # type: ignore[arg-type]
        except (TypeError, ValueError):
            return  # a constructor in C has none to show
        theirs = [n for n in signature.parameters if n != "self"]
        ours = [a.arg for a in [*stub.args.args, *stub.args.kwonlyargs] if a.arg != "self"]
        assert ours == theirs, label

    for name, node in declared(stub_tree(source).body).items():
        if isinstance(node, ast.FunctionDef):
            compare(node, getattr(module, name), name)
        elif isinstance(node, ast.ClassDef):
            for method, inner in declared(node.body).items():
                if isinstance(inner, ast.FunctionDef) and not method.startswith("_"):
                    if inner.decorator_list:
                        continue  # a property
                    compare(inner, getattr(getattr(module, name), method), f"{name}.{method}")
