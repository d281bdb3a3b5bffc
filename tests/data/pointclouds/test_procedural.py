"""The embedded shapes as data for learning."""

import itertools
from typing import Any

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from sinkformer_pl.data import ProceduralShapes, Sample, Split
from sinkformer_pl.errors import UserError


def shapes(**kwargs: Any) -> ProceduralShapes:
    module = ProceduralShapes(**{"train_size": 120, "val_size": 24, "test_size": 36} | kwargs)
    module.setup()
    return module


def samples(module: ProceduralShapes, split: Split) -> list[Sample]:
    dataset = module.datasets[split]
    return [dataset[index] for index in range(len(dataset))]


def test_sizes_are_exact_and_classes_balanced():
    module = shapes(train_size=240, val_size=36, test_size=48)
    assert {split: len(dataset) for split, dataset in module.datasets.items()} == {"train": 240, "val": 36, "test": 48}
    for dataset in module.datasets.values():
        counts = torch.bincount(dataset.targets, minlength=module.num_classes)
        assert counts.max() - counts.min() <= 1
    assert module.num_classes == len(module.classes) >= 12


def test_clouds_have_the_sizes_asked_for():
    module = shapes(min_points=20, max_points=24)
    assert {len(sample.inputs) for sample in samples(module, "train")} == {20, 21, 22, 23, 24}


def test_no_two_splits_share_a_shape():
    module = shapes(standardize=False)
    places = [{tuple(sample.inputs[0].tolist()) for sample in samples(module, split)} for split in module.datasets]
    assert [len(part) for part in places] == [120, 24, 36]
    assert len(set().union(*places)) == 120 + 24 + 36


def test_a_shape_depends_on_seed_and_index_alone():
    few, many, other = shapes(), shapes(test_size=72), shapes(seed=1)
    for index in range(36):
        assert torch.equal(few.datasets["test"][index].inputs, many.datasets["test"][index].inputs)
        assert few.names("test")[index] == many.names("test")[index]
    assert not torch.equal(few.datasets["test"][0].inputs, other.datasets["test"][0].inputs)


def moments(module: ProceduralShapes, split: Split) -> np.ndarray:
    """Return means and all second and third moments of each cloud."""
    return np.array(
        [
            [
                np.prod(axes, axis=0).mean()
                for order in (1, 2, 3)
                for axes in itertools.combinations_with_replacement(sample.inputs.numpy().T, order)
            ]
            for sample in samples(module, split)
        ]
    )


def test_moments_do_not_solve_the_task():
    module = shapes(train_size=1200, test_size=360)
    model = make_pipeline(StandardScaler(), LogisticRegression(max_iter=1000))
    model.fit(moments(module, "train"), module.datasets["train"].targets)
    accuracy = model.score(moments(module, "test"), module.datasets["test"].targets)
    # Above chance, so there is something to learn; far from solved.
    assert 0.2 < accuracy < 0.75


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("train_size", 0),
        ("val_size", 0),
        ("test_size", 0),
        ("min_points", 1),
        ("max_points", 10),
        ("tilt", -0.1),
        ("noise", -0.1),
        ("noise", float("nan")),
        ("noise", 1001),
        ("num_points", 49),
        ("occlusion", 1.0),
    ],
)
def test_arguments_out_of_range_are_refused(key, value):
    with pytest.raises(UserError, match=f"data.{key} is {value}"):
        ProceduralShapes(**{key: value})
