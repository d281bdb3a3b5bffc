"""The page about converting a model."""

import re
from pathlib import Path

import pytest

PAGE = (Path(__file__).parents[2] / "docs/converting.md").read_text(encoding="utf-8")


def test_the_page_begins_with_five_lines_that_convert_a_model(capsys):
    code = re.search(r"```python\n(.*?)```", PAGE, re.DOTALL)[1]
    assert len([line for line in code.splitlines() if line]) == 5
    exec(code, {})
    lines = capsys.readouterr().out.splitlines()
    assert len([line for line in lines if "encoder.layers" in line and "Sinkhorn(n_iters=5" in line]) == 6
    assert len([line for line in lines if "decoder.layers" in line and "the library's" in line]) == 12


def test_a_model_of_timm_is_converted(capsys):
    pytest.importorskip("timm")
    section = PAGE.partition("\n## timm\n")[2].partition("\n## ")[0]
    exec(re.search(r"```python\n(.*?)```", section, re.DOTALL)[1], {})
    lines = capsys.readouterr().out.splitlines()[1:]
    assert ["Sinkhorn" in line for line in lines] == [False] * 6 + [True] * 6


def test_a_model_of_transformers_is_converted(capsys):
    pytest.importorskip("transformers")
    section = PAGE.partition("\n## Hugging Face transformers\n")[2].partition("\n## ")[0]
    exec(re.search(r"```python\n(.*?)```", section, re.DOTALL)[1], {})
    assert capsys.readouterr().out.count("Sinkhorn(n_iters=3") == 2
