"""The house: its rooms and their order, no circles, and who may import torch, ray, mlflow and what is private."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterable, Iterator, Mapping
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
LAYERS = ("storage", "pipeline", "actors", "experiments")  # each may import itself and what stands before it
# Each room, or flat file, imports only what stands before it in its package.
ORDER = (
    *("storage.errors", "storage.subjects", "storage.identity", "storage.csv_table", "storage.parquet"),
    *("storage.fs", "storage.places", "storage.conditional", "storage.lease", "storage.lock"),
    *("storage.sharded_array", "storage.node_folder"),
    *("storage.nifti", "storage.dicom", "storage.images"),
    *("storage.layouts", "storage.slices", "storage.bank", "storage.survey"),
    *("pipeline.networks", "pipeline.phantom", "pipeline.samples", "pipeline.factors"),
    *("pipeline.scores", "pipeline.training", "pipeline.inference"),
    *(
        "actors.progress",
        "actors.cuda_build",
        "actors.ray_internals",
        "actors.waiting",
        "actors.crew",
        "actors.pool",
        "actors.resources",
        "actors.ray_start",
        "actors.streaming",
        "actors.ingest",
        "actors.extractor",
    ),
    *("actors.extraction", "actors.train_job", "actors.train_slices", "actors.train_worker", "actors.trainer"),
    *("actors.evaluate_arm", "actors.stages", "actors.export_samples", "actors.predict_studies"),
    *(
        "experiments.version",
        "experiments.progress",
        "experiments.page_template",
        "experiments.arms",
        "experiments.config",
    ),
    *("experiments.report", "experiments.tracking", "experiments.predict", "experiments.inspection"),
    *("experiments.run", "experiments.cli", "experiments.__main__"),
)
MAY_BE_PRIVATE = {"actors.ray_internals"}
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


def modules(root: Path) -> dict[str, Path]:
    """Our modules by dotted name; a package by its own."""
    found = {}
    for layer in LAYERS:
        for path in sorted((root / layer).rglob("*.py")):
            found[".".join(path.relative_to(root).with_suffix("").parts).removesuffix(".__init__")] = path
    return found


def edges(root: Path) -> dict[str, set[str]]:
    """Which of our modules each imports, those under TYPE_CHECKING and inside functions included."""
    ours = modules(root)
    graph: dict[str, set[str]] = {name: set() for name in ours}
    for name, path in ours.items():
        for _, target in imported(path, root):
            while target and target not in ours:  # `from a.b import C`: C is a name in module a.b
                target = target.rpartition(".")[0]
            if target and target != name:
                graph[name].add(target)
    return graph


def room(module: str) -> str:
    """The folder of a package that a module is in, or the module itself if it is flat."""
    return ".".join(module.split(".")[:2])


def circles(graph: Mapping[str, Iterable[str]]) -> list[str]:
    """A line for each circle that a search meets; none if there is no circle."""
    try:
        tuple(TopologicalSorter(graph).static_order())
    except CycleError as error:
        return [" → ".join(error.args[1])]
    return []


def upward(graph: Mapping[str, Iterable[str]]) -> list[str]:
    """Imports that run against the rooms' order inside a package."""
    place = {name: k for k, name in enumerate(ORDER)}
    return [
        f"{source} imports {target}, which stands above it"
        for source, targets in graph.items()
        for target in sorted(targets)
        if room(source) != room(target)
        and source.split(".")[0] == target.split(".")[0]
        and place.get(room(source), -1) < place.get(room(target), -1)
    ]


def private_imports(root: Path) -> list[str]:
    """Modules that import another package's private module."""
    return [
        f"{name}: {target}"
        for name, path in modules(root).items()
        for _, target in imported(path, root)
        if name not in MAY_BE_PRIVATE
        and target.split(".")[0] not in LAYERS
        and not target.startswith("__future__")
        # a private module is one on the way, not the last name, which may be a function
        and any(part.startswith("_") for part in target.split(".")[:-1])
    ]


def test_imports_run_one_way() -> None:
    assert violations(ROOT) == []


def test_no_module_is_in_a_circle_and_no_room_either() -> None:
    graph = edges(ROOT)
    assert circles(graph) == []
    rooms: dict[str, set[str]] = {}
    for source, targets in graph.items():
        rooms.setdefault(room(source), set()).update(room(target) for target in targets)
    assert circles({name: targets - {name} for name, targets in rooms.items()}) == []


def test_imports_follow_the_order_of_the_rooms() -> None:
    assert upward(edges(ROOT)) == []


def test_the_order_names_every_room_and_flat_file() -> None:
    there = {room(name) for name in modules(ROOT) if "." in name}
    assert there == set(ORDER), there ^ set(ORDER)


def test_no_room_imports_what_another_package_keeps_private() -> None:
    assert private_imports(ROOT) == []


def test_a_circle_and_an_arrow_upwards_are_caught_wherever_they_hide(tmp_path: Path) -> None:
    for name, code in {
        "storage/bank/a.py": "def late():\n    from storage.bank.b import f\n",
        "storage/bank/b.py": "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from storage.bank import a\n",
        "storage/fs.py": "from storage.bank.c import g\n",
        "storage/bank/c.py": "",
        "actors/a.py": "def late():\n    from ray.train.v2._internal.exceptions import RayTrainError\n",
    }.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(code, encoding="utf-8")
    graph = edges(tmp_path)
    assert circles(graph) and len(upward(graph)) == 1 and len(private_imports(tmp_path)) == 1


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
        "storage": "from . import fs\nimport rays\nfrom storage import zarr_store",
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
