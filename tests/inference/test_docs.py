"""The examples of docs/using_a_model.md run as they stand there."""

import json
import re
import shlex
from pathlib import Path

import numpy as np
import pytest

import sinkformer_pl
from sinkformer_pl.cli import main

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs/using_a_model.md").read_text(encoding="utf-8")
QUIET = "--trainer.enable_progress_bar false --trainer.accelerator cpu"
SHORT = f"--trainer.max_epochs 1 --trainer.limit_train_batches 3 {QUIET}"


def blocks(title: str) -> list[tuple[str, str]]:
    """Return the language and the code of a section's examples, in order."""
    section = PAGE.partition(f"\n## {title}\n")[2].partition("\n## ")[0]
    return re.findall(r"```(sh|python)\n(.*?)```", section, re.DOTALL)


@pytest.mark.usefixtures("documentation_read_once")
@pytest.mark.parametrize(
    "title", ["Images", *(pytest.param(t, marks=pytest.mark.slow) for t in ("Texts", "Point clouds"))]
)
def test_each_modality_from_training_to_an_answer(tmp_path, monkeypatch, capsys, title):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "configs").symlink_to(ROOT / "configs")
    examples = blocks(title)
    assert [language for language, _ in examples] == ["sh", "python", "sh"]
    for language, code in examples:
        if language == "python":
            exec(compile(code, f"docs/using_a_model.md, {title}", "exec"), {})
            continue
        argv = shlex.split(code)
        assert argv[:3] == ["python", "-m", "sinkformer_pl"]
        main([*argv[3:], *(SHORT.split() if argv[3] == "fit" else [])])
    printed = capsys.readouterr().out
    if title == "Images":
        [(_, code)] = blocks("Export")
        main(shlex.split(code)[3:])
        assert "on samples of the test part" in capsys.readouterr().out
        assert len(sinkformer_pl.load("model.onnx").predict("one.png", top=3)[0].scores) == 3
        assert (tmp_path / "predictions.csv").read_text().startswith("name,class,probability,class_2,probability_2")
    elif title == "Texts":
        rows = [json.loads(line) for line in (tmp_path / "answers.jsonl").read_text().splitlines()]
        assert [row["name"] for row in rows] == ["texts.csv:2", "texts.csv:3"]
        assert "accuracy" in printed
    else:
        assert printed.splitlines()[-1].startswith("ball.xyz,")
        assert np.load(tmp_path / "features.npz")["features"].shape == (1, 64)
        assert (tmp_path / "attention.png").stat().st_size > 1000
