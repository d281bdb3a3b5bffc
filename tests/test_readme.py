"""What the README and docs/extend.md show works as it stands there."""

import ast
import json
import re
from pathlib import Path

import pytest

from sinkformer_pl.cli import main
from sinkformer_pl.tasks import Classifier
from sinkformer_pl.testing import check_normalization

README = (Path(__file__).parents[1] / "README.md").read_text(encoding="utf-8")
CONFIG = Path(__file__).parents[1] / "configs/pointcloud.yaml"
EXTEND = (Path(__file__).parents[1] / "docs/extend.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"```python\n(.*?)```", README, re.DOTALL)


def block_with(text: str) -> str:
    (found,) = [block for block in BLOCKS if text in block]
    return found


def test_own_normalization_keeps_its_contract_and_trains(tmp_path, monkeypatch, capsys):
    code = block_with("@register")
    body = next(node for node in ast.parse(code).body if isinstance(node, ast.ClassDef))
    assert body.end_lineno - body.lineno + 2 <= 12, "the README promises twelve lines"
    (tmp_path / "my_norm.py").write_text(code)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.chdir(tmp_path)
    command = next(line for line in README.splitlines() if "--plugins my_norm" in line)
    argv = command.removeprefix("python -m sinkformer_pl ").replace("configs/pointcloud.yaml", str(CONFIG)).split()
    main([*argv, "--trainer.fast_dev_run", "2", "--trainer.accelerator", "cpu"])
    assert "training under TopK(k=5)" in capsys.readouterr().out
    import my_norm

    check_normalization(my_norm.TopK)


def test_python_example_runs(tmp_path, monkeypatch):
    code = block_with("pl.Trainer")
    code = code.replace("ProceduralShapes()", "ProceduralShapes(train_size=24, val_size=12, test_size=12)")
    code = code.replace("max_epochs=8", "fast_dev_run=True, accelerator='cpu', enable_progress_bar=False")
    monkeypatch.chdir(tmp_path)
    exec(compile(code, "README", "exec"), {})


def test_own_backbone_and_own_data_train_and_are_tested_from_the_checkpoint(tmp_path, monkeypatch, capsys):
    (tmp_path / "my_code.py").write_text("\n".join(re.findall(r"```python\n(.*?)```", EXTEND, re.DOTALL)))
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.chdir(tmp_path)
    command = next(line for line in EXTEND.splitlines() if "--data my_code.MyData" in line)
    argv = command.strip().removeprefix("python -m sinkformer_pl ").split()
    quiet = ["--trainer.accelerator", "cpu", "--trainer.enable_progress_bar", "false", "--name", "mine"]
    chosen = ["--model.backbone.activation", "torch.nn.GELU", "--model.backbone.activation.approximate", "tanh"]
    main([*argv, *quiet, *chosen])
    main(["test", "--ckpt_path", "best", "--name", "mine", "--model.normalization", "Softmax"])
    assert "testing under Softmax(), trained under Sinkhorn(n_iters=3)" in capsys.readouterr().out
    model = Classifier.load_from_checkpoint("runs/mine/version_0/checkpoints/best.ckpt")
    assert model.backbone.activation.approximate == "tanh"
    # Half of the samples is of each class.
    assert json.loads(Path("runs/mine/version_0/fit.json").read_text())["best"]["val/accuracy"] > 0.8


@pytest.mark.parametrize("folder", ["configs", "docs"])
def test_files_it_names_exist(folder):
    for name in set(re.findall(rf"\b({folder}/[\w/.-]+\.\w+)", README)):
        assert (Path(__file__).parents[1] / name).is_file(), name
