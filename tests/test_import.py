"""What importing and using deltaic brings into a process, and what it costs."""

import ast
import re
import subprocess
import sys
import time
from pathlib import Path

import deltaic
import pytest

SOURCE = Path(deltaic.__file__).parents[1]


# Every module and package of deltaic, from the ground up: each may import what is below it or beside it.
FLOORS = """
errors
arguments fileio machine __version__
_core _cuda
ops
model
weights
memory
chat
generate
api session
loading packing benchmark facts
cli
__main__
"""


def imported(path, package):
    """(line, module or package of deltaic) of each import of one from another."""
    place = path.relative_to(package).parts
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom):
            module = node.module.split(".") if node.module else []
            if node.level:
                module = [*place[: -node.level], *module]
            elif module[0] == "deltaic":
                module = module[1:]
            else:
                continue
            yield from ((node.lineno, name) for name in (module[:1] or [alias.name for alias in node.names]))


def test_imports_point_down():
    """No floor knows of one above it, not even for a type."""
    package = Path(deltaic.__file__).parent
    height = {name: i for i, names in enumerate(FLOORS.split("\n")) for name in names.split()}
    found = 0
    for path in package.rglob("*.py"):
        if path == package / "__init__.py":
            continue  # the public names, each imported when it is used
        own = path.relative_to(package).parts[0].removesuffix(".py")
        for line, name in imported(path, package):
            assert height[name] <= height[own], f"{path}:{line} imports {name}"
            found += 1
    assert found > 100


def python(code, *arguments):
    """Run `code` in a fresh interpreter and return what it prints."""
    code = f"import sys; sys.path.insert(0, {str(SOURCE)!r})\n{code}"
    done = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_import_is_light():
    """Best of several fresh interpreters each, so that a busy machine does not decide."""

    def seconds(module):
        code = f"import time; t = time.perf_counter(); import {module}; print(time.perf_counter() - t)"
        return min(float(python(code)) for _ in range(5))

    assert seconds("deltaic") - seconds("numpy") <= 0.150
    modules = python("import deltaic, deltaic.cli; print(*sys.modules)").split()
    heavy = {"torch", "transformers", "tokenizers", "jinja2", "PIL", "huggingface_hub", "safetensors", "tqdm"}
    assert heavy.isdisjoint(modules)


def test_generation_needs_neither_torch_nor_transformers(tiny_folder, device):
    out = python(
        """
import numpy as np
import deltaic
model = deltaic.load(sys.argv[1], device=sys.argv[2])
result = model.chat("what?", images=[np.zeros((64, 64, 3), np.uint8)], max_new_tokens=3)
print(result.completion_tokens, *sys.modules)
""",
        str(tiny_folder),
        device,
    ).split()
    assert int(out[0]) >= 1
    assert {"torch", "transformers", "safetensors"}.isdisjoint(out)
    assert "tokenizers" in out  # the list is the right one


def test_public_names_exist():
    for name in deltaic.__all__:
        assert getattr(deltaic, name) is not None
        assert name in dir(deltaic)
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        deltaic.nothing  # noqa: B018


def test_version_is_that_of_the_build_file():
    project = Path(__file__).parents[1] / "pyproject.toml"
    assert re.search(r'^version = "(.+)"$', project.read_text(), re.M).group(1) == deltaic.__version__


def test_command_line_starts_quickly():
    began = time.perf_counter()
    subprocess.run([sys.executable, "-m", "deltaic", "--version"], cwd=SOURCE, check=True, capture_output=True)
    assert time.perf_counter() - began < 5
