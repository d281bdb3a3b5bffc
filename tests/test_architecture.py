"""Who may import whom, read off the imports."""

import ast
from pathlib import Path

import sinkformer_pl

PACKAGE = Path(sinkformer_pl.__file__).parent

# Each part, and the parts of this package that it may import beside itself.
MAY_IMPORT = {
    "errors": set(),
    "batch": {"errors"},
    "locations": {"errors"},
    "tables": set(),
    "factories": {"errors"},
    "parts": {"errors"},
    "class_weights": {"errors"},
    "training": {"errors"},
    "ops": set(),
    "normalizations": {"ops", "errors"},
    "models": {"normalizations", "ops", "errors"},
    "conversion": {"models", "normalizations", "ops", "errors", "factories", "parts", "tables"},
    "backbones": {"conversion", "models", "normalizations", "ops", "errors", "locations"},
    "tasks": {"models", "normalizations", "training", "batch", "class_weights", "errors", "factories", "parts"},
    "data": {"training", "batch", "class_weights", "errors", "locations"},
    "callbacks": {"training", "diagnostics", "models", "normalizations", "batch", "errors"},
    "diagnostics": {"models", "normalizations", "ops", "errors"},
    "inference": {
        "batch",
        "data",
        "diagnostics",
        "errors",
        "factories",
        "models",
        "normalizations",
        "tasks",
        "training",
        "ops",
    },
    "testing": {"normalizations", "ops", "errors"},
    "benchmark": {"models", "normalizations", "ops", "errors"},
    "flows": {"ops", "errors", "tables"},
    "comparison": {"training", "errors", "factories", "tables"},
    "cli": {
        "backbones",
        "batch",
        "benchmark",
        "callbacks",
        "comparison",
        "data",
        "diagnostics",
        "errors",
        "factories",
        "flows",
        "inference",
        "models",
        "normalizations",
        "tasks",
        "testing",
        "training",
    },
    "__main__": {"cli"},
    # Names of version 0.1.
    "checkpoints": {"training"},
    "runs": {"training"},
    "__init__": {"conversion", "inference", "normalizations", "ops", "tasks"},
}


def imports(path: Path) -> set[str]:
    names = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.module:
            names |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
        elif isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
    return names


def test_imports_point_one_way():
    for path in PACKAGE.rglob("*.py"):
        part = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
        used = {name.split(".")[1] for name in imports(path) if name.startswith("sinkformer_pl.")}
        used &= MAY_IMPORT.keys()
        assert used <= MAY_IMPORT[part] | {part}, (
            f"{path.relative_to(PACKAGE)} imports {used - MAY_IMPORT[part] - {part}}"
        )


def test_ops_need_nothing_but_torch():
    for path in (PACKAGE / "ops").glob("*.py"):
        outside = {name.split(".")[0] for name in imports(path)}
        assert outside <= {
            "torch",
            "sinkformer_pl",
            "math",
            "dataclasses",
            "typing",
            "contextlib",
            "collections",
            "threading",
        }, path


def test_tasks_import_no_model():
    for path in (PACKAGE / "tasks").glob("*.py"):
        models = {name for name in imports(path) if name.startswith("sinkformer_pl.models.")}
        assert {name.split(".")[2] for name in models} <= {"backbone"}, path


def test_one_lightning():
    for path in PACKAGE.rglob("*.py"):
        assert not any(name == "lightning" or name.startswith("lightning.") for name in imports(path)), path


def test_trimesh_is_imported_where_meshes_are_read_and_not_before():
    for path in PACKAGE.rglob("*.py"):
        at_once = {name for node in ast.parse(path.read_text(encoding="utf-8")).body for name in imported(node)}
        assert not any(name.partition(".")[0] == "trimesh" for name in at_once), path
        if "data/pointclouds" not in path.as_posix():
            assert "trimesh" not in imports(path), path


def imported(node: ast.stmt) -> set[str]:
    if isinstance(node, ast.ImportFrom):
        return {node.module or ""}
    return {alias.name for alias in node.names} if isinstance(node, ast.Import) else set()


OF_LOOPS = {"fit_loop", "epoch_loop", "val_loop", "epoch_progress", "batch_progress"}
# os._exit, those of named tuples, and what notebooks ask for.
PUBLIC_ALL_THE_SAME = {"_exit", "_replace", "_asdict", "_fields", "_repr_html_"}


def private_names(path: Path) -> set[str]:
    """Names of other objects that begin with an underscore, and those of Lightning's loops."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if not isinstance(node, ast.Attribute) or node.attr in PUBLIC_ALL_THE_SAME or node.attr.startswith("__"):
            continue
        own = isinstance(node.value, ast.Name) and node.value.id in ("self", "cls", "torch")
        if node.attr in OF_LOOPS or (node.attr.startswith("_") and not own):
            found.add(node.attr)
    return found


def test_private_names_of_lightning_and_jsonargparse_stand_in_one_module():
    for path in PACKAGE.rglob("*.py"):
        allowed = {
            "lightning_state.py": private_names(path),
            "capture.py": {"_compiled_call_impl"},  # PyTorch's
            "base.py": {"_loader"},  # of the parent class, here
            "transformers_attention.py": {"_supports_sdpa"},  # transformers'
            "transformers_record.py": {"_attn_implementation"},
        }.get(path.name, set())
        assert private_names(path) <= allowed, path
    assert private_names(PACKAGE / "training/lightning_state.py") >= {"_signal_connector", "_batches_that_stepped"}
