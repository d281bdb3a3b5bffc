"""The package's own names, what they import, and the dependencies that it declares."""

import ast
import re
import subprocess
import sys
import tomllib
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest

import sinkformer_pl
from sinkformer_pl import factories, normalizations, ops, tasks

ROOT = Path(__file__).parents[1]
IMPORTED_BY_OTHERS = {"tensorboard"}  # Lightning's logger needs it
OPTIONAL = {
    "h5py",
    "pyarrow",
    "onnxruntime",
    "safetensors",
    "timm",
    "transformers",
    "huggingface_hub",
    "plotly",
    "geomloss",
    "ot",
    "triton",
}  # extras, peers, what PyTorch and tokenizers bring


def modules_after(code: str) -> set[str]:
    """Run code in a new process; return the top-level modules that it imported."""
    report = "\nimport sys; print('\\n' + ' '.join({name.partition('.')[0] for name in sys.modules}))"
    done = subprocess.run([sys.executable, "-c", code + report], capture_output=True, text=True, check=True)
    return set(done.stdout.splitlines()[-1].split())


def test_public_names_are_the_classes_themselves():
    assert sinkformer_pl.Sinkhorn is normalizations.Sinkhorn
    assert sinkformer_pl.register is normalizations.register
    assert sinkformer_pl.AttentionMask is ops.AttentionMask
    assert sinkformer_pl.sinkhorn_attention is ops.sinkhorn_attention
    assert sinkformer_pl.Classifier is tasks.Classifier
    assert set(sinkformer_pl.__all__) <= set(dir(sinkformer_pl))
    with pytest.raises(AttributeError, match="no attribute 'Sinkhrn'"):
        sinkformer_pl.Sinkhrn  # noqa: B018


def test_a_public_name_leaves_the_paths_in_checkpoints_as_they_are():
    assert factories.public_path(sinkformer_pl.Sinkhorn) == "sinkformer_pl.normalizations.Sinkhorn"
    assert factories.public_path(sinkformer_pl.Classifier) == "sinkformer_pl.tasks.Classifier"


@pytest.mark.parametrize(
    ("code", "absent"),
    [
        ("import sinkformer_pl", {"torch", "pytorch_lightning"}),
        ("from sinkformer_pl import Sinkhorn, sinkhorn_attention, AttentionMask, register", {"pytorch_lightning"}),
        ("from sinkformer_pl.cli import main; main(['--version'])", {"torch", "pytorch_lightning"}),
        ("from sinkformer_pl.cli import main; main(['--help'])", {"torch", "pytorch_lightning"}),
        ("from sinkformer_pl.cli import main; main(['normalizations'])", {"pytorch_lightning", "torchmetrics"}),
    ],
)
def test_what_takes_seconds_to_import_is_imported_where_it_is_needed(code, absent):
    assert not modules_after(code) & absent


def test_dependencies_are_those_that_are_imported():
    imported = set()
    for path in (ROOT / "sinkformer_pl").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom) and node.module and not node.level:
                imported.add(node.module.partition(".")[0])
            elif isinstance(node, ast.Import):
                imported |= {alias.name.partition(".")[0] for alias in node.names}
    imported -= {*sys.stdlib_module_names, "sinkformer_pl", "lightning_fabric", *OPTIONAL}
    of_module = packages_distributions()
    distributions = {min(of_module[name], key=len).lower().replace("_", "-") for name in imported}
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    declared = {re.match(r"[\w-]+", requirement)[0].lower() for requirement in project["dependencies"]}
    assert declared - IMPORTED_BY_OTHERS == distributions


@pytest.mark.slow
def test_comparisons_can_be_imported_where_there_is_no_fcntl():
    without = "import sys; sys.modules['fcntl'] = None\n"
    assert "scipy" in modules_after(f"{without}import sinkformer_pl.comparison")
