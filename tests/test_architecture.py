"""Who may import whom, read off the imports."""

import ast
from pathlib import Path

import sinkformer_pl

PACKAGE = Path(sinkformer_pl.__file__).parent

# Each part, and the parts of this package that it may import beside itself.
MAY_IMPORT = {
    "errors": set(),
    "batch": set(),
    "factories": {"errors"},
    "checkpoints": {"errors"},
    "runs": {"checkpoints", "errors"},
    "ops": set(),
    "normalizations": {"ops", "errors"},
    "models": {"normalizations", "ops", "errors"},
    "tasks": {"models", "normalizations", "checkpoints", "batch", "errors", "factories"},
    "data": {"batch", "errors"},
    "callbacks": {"runs", "diagnostics", "batch", "errors"},
    "diagnostics": {"models", "normalizations", "ops", "errors"},
    "testing": {"normalizations", "ops"},
    "benchmark": {"models", "normalizations", "ops", "errors"},
    "flows": {"ops", "errors"},
    "comparison": {"runs", "normalizations", "errors", "factories"},
    "cli": {
        "batch",
        "benchmark",
        "callbacks",
        "checkpoints",
        "comparison",
        "data",
        "diagnostics",
        "errors",
        "factories",
        "flows",
        "models",
        "normalizations",
        "runs",
        "tasks",
    },
    "__main__": {"cli"},
    "__init__": {"normalizations", "ops", "tasks"},
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
