"""The import rule: storage ← pipeline ← actors ← experiments, and who may import torch, ray and mlflow."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
LAYERS = ("storage", "pipeline", "actors", "experiments")  # each may import itself and what stands before it
ONLY_IN = {"ray": {"actors"}, "mlflow": {"experiments"}}
# torch, and what would bring it in
NOT_IN_STORAGE = {"torch", "torchvision", "monai", "safetensors.torch", "ray", "mlflow"}


def imported(path: Path, root: Path) -> Iterator[tuple[int, str]]:
    """Every import of a file as (line, absolute dotted name): lazy, conditional, relative or by a literal name."""
    package = path.relative_to(root).with_suffix("").parts[:-1]
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"), filename=str(path))):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            above = package[: len(package) - node.level + 1] if node.level else ()
            base = ".".join([*above, *filter(None, [node.module])])
            yield from ((node.lineno, f"{base}.{alias.name}".lstrip(".")) for alias in node.names)
        elif isinstance(node, ast.Call) and node.args and isinstance(node.args[0], ast.Constant):
            called = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
            if called in {"import_module", "__import__"} and isinstance(node.args[0].value, str):
                yield node.lineno, node.args[0].value


def within(name: str, module: str) -> bool:
    """Whether dotted `name` is `module` or lies in it."""
    return name == module or name.startswith(module + ".")


def violations(root: Path) -> list[str]:
    """Lines `file:line: what it imports and why it may not`, for the four packages under `root`."""
    found = []
    for rank, layer in enumerate(LAYERS):
        for path in sorted((root / layer).rglob("*.py")):
            for line, name in imported(path, root):
                where = f"{path.relative_to(root)}:{line}: {layer} imports {name}"
                if any(within(name, above) for above in LAYERS[rank + 1 :]):
                    found.append(f"{where}, which stands above it")
                if any(within(name, module) and layer not in allowed for module, allowed in ONLY_IN.items()):
                    found.append(f"{where}, which belongs to {' and '.join(ONLY_IN[name.split('.')[0]])} alone")
                elif layer == "storage" and any(within(name, module) for module in NOT_IN_STORAGE):
                    found.append(f"{where}, but storage is bytes on disk")
    return found


def test_imports_run_one_way() -> None:
    assert violations(ROOT) == []


def test_every_package_is_there_to_be_checked() -> None:
    for layer in LAYERS:
        assert len(list((ROOT / layer).rglob("*.py"))) > 1, layer


@pytest.mark.parametrize(
    ("file", "code"),
    [
        ("storage/a.py", "def late():\n    import pipeline.training.losses\n"),
        ("storage/a.py", "from torch.utils import data\n"),
        ("storage/a.py", "def late():\n    from monai.data import Dataset\n"),
        ("storage/layouts/a.py", "from ... import experiments\n"),
        ("pipeline/a.py", "if False:\n    import ray.data\n"),
        ("pipeline/networks/a.py", "from actors import resources\n"),
        ("actors/a.py", "import importlib\nimportlib.import_module('experiments.config')\n"),
        ("actors/a.py", "class A:\n    def run(self):\n        import mlflow\n"),
        ("experiments/a.py", "async def late():\n    from ray import train\n"),
    ],
)
def test_a_forbidden_import_is_caught_wherever_it_hides(tmp_path: Path, file: str, code: str) -> None:
    path = tmp_path / file
    path.parent.mkdir(parents=True)
    path.write_text(code, encoding="utf-8")
    assert len(violations(tmp_path)) == 1


def test_what_the_rule_allows_passes(tmp_path: Path) -> None:
    for layer, code in {
        "storage": "from . import uri\nimport rays\nfrom storage import zarr_store",
        "pipeline": "import torch\nfrom storage.errors import InputError",
        "actors": "import ray\nfrom pipeline import rescale",
        "experiments": "import mlflow\nfrom actors import stages\nfrom .config import Config",
    }.items():
        (tmp_path / layer).mkdir()
        (tmp_path / layer / "a.py").write_text(code, encoding="utf-8")
    assert violations(tmp_path) == []


def test_importing_all_of_storage_loads_neither_torch_nor_ray_nor_mlflow() -> None:
    """The graph above cannot see what a third party drags in; a fresh interpreter can."""
    files = (path.relative_to(ROOT).with_suffix("") for path in sorted((ROOT / "storage").rglob("*.py")))
    modules = [".".join(path.parts).removesuffix(".__init__") for path in files]
    code = (
        "import importlib, sys\n"
        f"for name in {modules!r}: importlib.import_module(name)\n"
        "print(sorted({'torch', 'monai', 'ray', 'mlflow'} & set(sys.modules)))\n"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "[]"
