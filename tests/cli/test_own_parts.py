"""Mistakes in a backbone or in data of one's own: a line that names the class and what it lacks."""

import sys

import pytest

BACKBONE = """
from torch import nn

from sinkformer_pl.models import Backbone


class Net(Backbone):
    def __init__(self, normalization, width: int = 8):
        super().__init__()
        self.linear = nn.Linear(3, width)
        {init}

    {forward}
"""

FORWARD = "def forward(self, inputs, mask=None): return self.linear(inputs)"

DATA = """
import torch

from sinkformer_pl.data import ClassificationData, LabelledDataset


class Split(LabelledDataset):
    def inputs(self, draw):
        return {inputs}


class Data(ClassificationData):
    def __init__(self, batch_size: int = 4):
        super().__init__(["even", "odd"], batch_size=batch_size)

    {make}
"""

MAKE = """def make_datasets(self):
        targets = torch.tensor([0, 1, {target}])
        return {{split: Split(targets, "abc") for split in ({splits})}}"""

INPUTS = "torch.zeros(5, 3)"


@pytest.fixture
def plugin(tmp_path, monkeypatch):
    """Make a module of some code; returns its name."""
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(sys, "dont_write_bytecode", True)

    def write(code: str) -> str:
        name = f"own_{abs(hash(code))}"
        (tmp_path / f"{name}.py").write_text(code)
        return name

    return write


@pytest.mark.parametrize(
    ("init", "forward", "expected"),
    [
        ("pass", FORWARD, "Net: no out_dim; set self.out_dim, the width of its features, in Net.__init__"),
        ("self.out_dim = width", FORWARD, "8); give (1, 8), a row of out_dim"),
        ("self.out_dim = 9", FORWARD.replace("(inputs)", "(inputs).mean(1)"), "of shape (1, 8); give (1, 9)"),
        ("self.out_dim = width", "pass", "Net is abstract, it lacks forward: write that"),
    ],
)
def test_a_backbone(tiny, fail, plugin, init, forward, expected):
    module = plugin(BACKBONE.format(init=init, forward=forward))
    assert expected in fail("fit", "--config", tiny, "--plugins", module, "--model.backbone", f"{module}.Net")


@pytest.mark.parametrize(
    ("inputs", "make", "expected"),
    [
        (INPUTS, "pass", "data Data is abstract, it lacks make_datasets: write that"),
        (INPUTS, "def make_datasets(self): return None", "Data.make_datasets: return a dictionary"),
        (INPUTS, MAKE.format(target=1, splits="'train', 'val'"), "for each of train, val, test"),
        (INPUTS, MAKE.format(target=2, splits="'train', 'val', 'test'"), "a target of the train split is 2; give"),
        (INPUTS, MAKE.format(target=-1, splits="'train', 'val', 'test'"), "-1; give places in its classes, 0 to 1"),
        ("[1.0]", MAKE.format(target=1, splits="'train', 'val', 'test'"), "Split.inputs: gave a list; return a tensor"),
    ],
)
def test_data(tiny, fail, plugin, inputs, make, expected):
    module = plugin(DATA.format(inputs=inputs, make=make))
    assert expected in fail("fit", "--config", tiny, "--plugins", module, "--data", f"{module}.Data")
