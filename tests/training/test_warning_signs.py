"""A training that learnt nothing, or nothing more, ends with a line about it; others don't."""

import re

import pytest

from sinkformer_pl.cli import main
from sinkformer_pl.training.warning_signs import Progress, warning_sign
from tests.inference.conftest import data_of

LONG = 2000


def curve(*values):
    return dict(enumerate(values))


def sign(steps=LONG, majority=0.1, num_classes=10, best=None, ended_by="max_epochs", **curves):
    """Return the line of a training, of which curves are given as train, val and macro."""
    names = {"train": "train/accuracy", "val": "val/accuracy", "macro": "val/accuracy_macro"}
    named = {names[name]: curve(*values) for name, values in curves.items()}
    epochs = max(map(len, curves.values()), default=0)
    return warning_sign(Progress(steps, epochs, named, majority, num_classes, best, ended_by))


def test_too_few_steps_are_told_with_how_many_more():
    assert "240 optimizer steps in all" in sign(steps=240, train=[0.2, 0.3, 0.5])
    assert "--trainer.max_epochs 13" in sign(steps=240, train=[0.2, 0.3, 0.5])
    assert "--trainer.max_steps 1000" in sign(steps=240, train=[0.2, 0.3, 0.5], ended_by="max_steps")
    assert "EarlyStopping" in sign(steps=240, train=[0.2, 0.3, 0.5], ended_by=None)
    # Half the way from chance to 1, or steps enough.
    assert sign(steps=240, train=[0.2, 0.3, 0.6]) is None
    assert "240 optimizer steps" in sign(steps=240, train=[0.6], majority=0.5)
    assert sign(steps=500, train=[0.2, 0.3, 0.5]) is None
    assert sign(steps=0) is None


def test_an_accuracy_at_chance_is_told():
    assert "training accuracy, 0.12" in sign(train=[0.5, 0.12], val=[0.5, 0.1], macro=[0.5, 0.1])
    assert "the most frequent class (0.90)" in sign(train=[0.9, 0.9], macro=[0.5, 0.5], majority=0.9, num_classes=2)
    assert "nothing was learnt" in sign(train=[0.1, 0.1])
    assert sign(train=[0.1, 0.16]) is None
    # Classes were weighted: less accurate than the most frequent class, but better at each.
    assert sign(train=[0.8, 0.8], macro=[0.75, 0.78], majority=0.9, num_classes=2) is None


def test_overfitting_is_told_with_the_epoch_that_was_best():
    train, val = [0.5, 0.6, 0.7, 0.8, 0.85, 0.9, 0.95, 0.99], [0.5, 0.62, 0.6, 0.55, 0.58, 0.57, 0.6, 0.59]
    told = sign(train=train, val=val, best=1)
    assert re.search(r"best in epoch 1 of 7, 0.62, which best.ckpt keeps, .* rose from 0.60 to 0.99", told)
    assert "best.ckpt" not in sign(train=train, val=val, best=3)
    assert "EarlyStopping" in told
    # Too short to tell; the best isn't among the first quarter; the training didn't rise either.
    assert sign(train=train[:7], val=val[:7]) is None
    assert sign(train=train, val=[*val[:7], 0.62]) is None
    assert sign(train=[0.9, 0.91, *[0.95] * 6], val=val) is None


def test_a_flat_validation_is_told_wherever_noise_has_its_best():
    train = [0.5 + 0.02 * epoch for epoch in range(24)]
    noise = [0.5, 0.45, 0.55, 0.5, 0.47, 0.52, 0.58, 0.49] * 3
    assert re.search(r"0.50 in the first quarter .* 0.51 in their second half", sign(train=train, val=noise))
    assert "EarlyStopping" in sign(train=train, val=noise)
    # It rises a little, but stays near chance.
    heart = [0.5, 0.52, 0.6, 0.7, 0.8, 0.9, 0.95, 0.99]
    assert "0.51 in the first quarter" in sign(
        train=heart, val=[0.5, 0.52, 0.55, 0.56, 0.57, 0.58, 0.59, 0.6], majority=0.5
    )
    assert sign(train=heart, val=[0.5, 0.52, 0.55, 0.56, 0.57, 0.58, 0.59, 0.6]) is None
    # It follows the training; there is nothing to follow; an early plateau is no flat curve.
    assert sign(train=train, val=[value + 0.002 * epoch for epoch, value in enumerate(noise)]) is None
    assert sign(train=[0.9] * 24, val=noise) is None
    assert sign(train=train, val=[0.3, 0.4, 0.5, *[0.55, 0.56, 0.55] * 7]) is None


def test_nothing_is_told_of_what_is_not_known():
    assert sign(steps=10) is None
    assert sign(steps=10, train=[0.1], majority=None) is None
    assert sign(val=[0.1] * 20) is None


@pytest.mark.parametrize("logger", ["true", "false"])
def test_a_fit_ends_with_the_line_unless_it_has_learnt(tmp_path, monkeypatch, capsys, logger):
    monkeypatch.chdir(tmp_path)
    data_of("image", tmp_path / "photos")
    (tmp_path / "run.yaml").write_text(
        """
        data: {class_path: ImageFolder, init_args: {root: photos, image_size: 16, crop_area: 1.0, batch_size: 8}}
        model:
          normalization: Softmax
          backbone: {class_path: VisionTransformer,
            init_args: {image_size: 16, patch_size: 8, dim: 16, depth: 1, num_heads: 2}}
        trainer: {accelerator: cpu, enable_progress_bar: false, enable_model_summary: false}
        """
    )
    told = {}
    for rate in ("1e-9", "0.01"):
        flags = ["--trainer.max_epochs", "3", "--model.optimizer.lr", rate, "--trainer.logger", logger]
        main(["fit", "--config", "run.yaml", *flags])
        told[rate] = [line for line in capsys.readouterr().out.splitlines() if line.startswith("warning: ")]
    assert len(told["1e-9"]) == 1
    assert re.search(r"warning: 15 optimizer steps in all.*--trainer.max_epochs 200", told["1e-9"][0])
    assert told["0.01"] == []
