"""fit, validate, test, predict and normalizations, as a user calls them."""

import csv
import json
import re
from functools import partial
from importlib.metadata import version
from pathlib import Path

import numpy as np
import pytest
import pytorch_lightning as pl
import torch
import yaml

from sinkformer_pl.cli import main
from sinkformer_pl.data import ProceduralShapes
from sinkformer_pl.models import SetTransformer
from sinkformer_pl.normalizations import Sinkhorn, Softmax
from sinkformer_pl.tasks import Classifier
from tests import commands
from tests.trials.kill_and_resume import differences

PLUGIN = """
from sinkformer_pl.normalizations import Promises, ScoreNormalization, register
from sinkformer_pl import ops


@register
class Tempered(ScoreNormalization):
    promises = Promises(row_sums="one", equivariant=True)

    def __init__(self, temperature: float = 1.0) -> None:
        super().__init__()
        self.temperature = temperature

    def forward(self, scores, mask):
        return ops.softmax(scores / self.temperature, mask=mask)
"""


def loaded(path: Path) -> dict:
    return torch.load(path, weights_only=True)


def test_fit_leaves_best_and_last_logs_and_a_config_that_repeats_it(tiny, run, tmp_path):
    printed = run("fit", "--config", tiny, "--trainer.default_root_dir", "here")
    folder = tmp_path / "here/tiny/version_0"
    assert {path.name for path in folder.iterdir()} >= {"config.yaml", "metrics.csv", "checkpoints"}
    assert any(path.name.startswith("events.out.tfevents") for path in folder.iterdir())
    assert {path.name for path in (folder / "checkpoints").iterdir()} == {"best.ckpt", "last.ckpt"}
    for shown in ("val/accuracy", "best.ckpt", "metrics.csv", "config.yaml", "Sinkhorn(n_iters=3)"):
        assert shown in printed
    # Nothing outside of the root that was given, but the user's own file.
    assert {path.name for path in tmp_path.iterdir()} == {"here", "tiny.yaml"}

    run("fit", "--config", str(folder / "config.yaml"))
    again = tmp_path / "here/tiny/version_1"
    first, second = (loaded(path / "checkpoints/last.ckpt")["state_dict"] for path in (folder, again))
    assert all(torch.equal(first[key], second[key]) for key in first)
    rows = [list(csv.DictReader((path / "metrics.csv").open())) for path in (folder, again)]
    assert rows[0] == rows[1]


def test_a_config_repeats_its_run_from_another_folder_whatever_the_flags_were(tiny, run, tmp_path, monkeypatch):
    generator = np.random.default_rng(0)
    points, labels = generator.normal(size=(36, 20, 3)), np.arange(36) % 3
    np.savez(
        tmp_path / "clouds.npz",
        train_points=points, train_label=labels, test_points=points[:9], test_label=labels[:9],
    )  # fmt: skip
    monkeypatch.syspath_prepend(str(tmp_path))
    (tmp_path / "repeated_plugin.py").write_text(PLUGIN.replace("Tempered", "Repeated"))
    flags = ["--data", "PointClouds", "--data.root", "clouds.npz", "--data.num_points", "12", "--data.batch_size", "4"]
    flags += ["--plugins", "repeated_plugin", "--model.normalization", "Repeated"]
    flags += ["--model.normalization.temperature", "2", "--model.backbone.dropout", "0.3", "--seed_everything", "7"]
    flags += ["--model.optimizer", "SGD", "--model.optimizer.momentum", "0.9", "--model.optimizer.lr", "0.05"]
    flags += ["--model.schedule", "StepDecay", "--model.schedule.milestones", "[0.5]", "--monitor", "val/loss"]
    flags += ["--trainer.accumulate_grad_batches", "2", "--trainer.max_epochs", "2", "--trainer.log_every_n_steps", "1"]
    run("fit", "--config", tiny, *flags)
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    main(["fit", "--config", str(tmp_path / "runs/tiny/version_0/config.yaml")])
    first, second = (tmp_path / place / "runs/tiny/version_0" for place in (".", "elsewhere"))
    assert differences(first, second) == []
    assert len((first / "metrics.csv").read_text().splitlines()) > 8


def test_report_shows_the_best_checkpoints_own_metrics(tiny, run, tmp_path):
    printed = run("fit", "--config", tiny, "--trainer.max_epochs", "3")
    folder = tmp_path / "runs/tiny/version_0"
    run("validate", "--ckpt_path", str(folder / "checkpoints/best.ckpt"))
    metrics = json.loads((folder / "validate.json").read_text())["metrics"]
    assert f"{metrics['val/accuracy']:.4f}" in printed
    assert f"{metrics['val/loss']:.4f}" in printed


def test_checkpoint_alone_is_enough_and_flags_override_it(tiny, run, tmp_path):
    run("fit", "--config", tiny, "--model.normalization", "Softmax")
    folder = tmp_path / "runs/tiny/version_0"
    checkpoint = str(folder / "checkpoints/best.ckpt")

    printed = run("test", "--ckpt_path", checkpoint)
    assert "testing under Softmax()" in printed
    softmax = json.loads((folder / "test.json").read_text())
    assert sum(map(sum, softmax["confusion"])) == 26
    assert softmax["metrics"]["test/accuracy"] == pytest.approx(
        sum(softmax["confusion"][i][i] for i in range(len(softmax["classes"]))) / 26
    )
    assert {f"test/accuracy_class/{name}" for name in softmax["classes"]} <= softmax["metrics"].keys()

    printed = run(
        "test", "--ckpt_path", checkpoint, "--model.normalization", "Sinkhorn", "--model.normalization.n_iters", "7"
    )
    assert "testing under Sinkhorn(n_iters=7), trained under Softmax()" in printed
    sinkhorn = json.loads((folder / "test.json").read_text())
    assert sinkhorn["metrics"]["test/loss"] != softmax["metrics"]["test/loss"]


@pytest.mark.parametrize("split", [[], ["--split", "test"]])
def test_predictions_are_one_row_a_sample(trained, tiny, run, tmp_path, split):
    printed = run("predict", *split, "--ckpt_path", "best", "--name", "tiny")
    path = tmp_path / "runs/tiny/version_0/predictions.csv"
    assert "predictions.csv" in printed
    rows = list(csv.DictReader(path.open()))
    assert len(rows) == 26
    assert len({row["sample"] for row in rows}) == 26
    for row in rows:
        probabilities = {name: float(value) for name, value in row.items() if name not in ("sample", "class")}
        assert sum(probabilities.values()) == pytest.approx(1, abs=1e-4)
        assert row["class"] == max(probabilities, key=probabilities.__getitem__)


def test_arguments_of_another_class_do_not_leak(tiny, run, tmp_path):
    run("fit", "--config", tiny, "--model.normalization.n_iters", "5")
    checkpoint = str(tmp_path / "runs/tiny/version_0/checkpoints/best.ckpt")
    assert "testing under Softmax()" in run("test", "--ckpt_path", checkpoint, "--model.normalization", "Softmax")
    assert "Sinkhorn(n_iters=5)" in run("test", "--ckpt_path", checkpoint)


def test_precedence_is_yaml_then_checkpoint_then_flags(tiny, run, tmp_path):
    run("fit", "--config", tiny, "--model.normalization.n_iters", "5")
    last = str(tmp_path / "runs/tiny/version_0/checkpoints/last.ckpt")
    other = tmp_path / "other.yaml"
    other.write_text(
        "model: {normalization: {class_path: Sinkhorn, init_args: {n_iters: 9}}}\ndata: {init_args: {test_size: 12}}"
    )
    assert "Sinkhorn(n_iters=5)" in run("test", "--config", str(other), "--ckpt_path", last)
    record = json.loads((tmp_path / "runs/tiny/version_0/test.json").read_text())
    assert sum(map(sum, record["confusion"])) == 12
    # A flag wins wherever it stands, before the file too.
    printed = run("test", "--model.normalization.n_iters", "11", "--config", str(other), "--ckpt_path", last)
    assert "Sinkhorn(n_iters=11)" in printed


def test_last_goes_on_in_its_folder_and_is_an_error_without_one(tiny, run, fail, tmp_path):
    assert "train first, with fit and without --ckpt_path" in fail("fit", "--config", tiny, "--ckpt_path", "last")
    run("fit", "--config", tiny)
    message = fail("test", "--ckpt_path", "best", "--name", "tinny")
    assert "no best.ckpt under runs/tinny; give --name, one of tiny" in message
    run("fit", "--config", tiny, "--ckpt_path", "last", "--trainer.max_epochs", "3")
    assert [path.name for path in (tmp_path / "runs/tiny").iterdir()] == ["version_0"]
    rows = list(csv.DictReader((tmp_path / "runs/tiny/version_0/metrics.csv").open()))
    assert [row["epoch"] for row in rows if row["val/loss"]] == ["0", "1", "2"]
    assert loaded(tmp_path / "runs/tiny/version_0/checkpoints/last.ckpt")["global_step"] == 6


def test_a_checkpoint_goes_on_in_its_folder_from_anywhere_but_under_its_own_name_and_network(
    trained, tiny, run, tmp_path, monkeypatch
):
    last = str(tmp_path / "runs/tiny/version_0/checkpoints/last.ckpt")
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    run("fit", "--ckpt_path", last, "--trainer.max_epochs", "2")
    assert not list((tmp_path / "elsewhere").iterdir())
    assert loaded(Path(last))["global_step"] == 4
    run("fit", "--ckpt_path", last, "--trainer.max_epochs", "3", "--name", "branch")
    assert (tmp_path / "runs/branch/version_0/checkpoints/last.ckpt").is_file()
    run("fit", "--ckpt_path", last, "--trainer.max_epochs", "3", "--model.normalization", "Softmax")
    assert (tmp_path / "runs/tiny/version_1/checkpoints/last.ckpt").is_file()
    assert loaded(Path(last))["global_step"] == 4


def test_a_resume_that_does_nothing_leaves_the_run_as_it_was(tiny, run, fail, tmp_path):
    run("fit", "--config", tiny, "--trainer.max_epochs", "2")
    before = (tmp_path / "runs/tiny/version_0/config.yaml").read_text()
    run("fit", "--config", tiny, "--ckpt_path", "last", "--trainer.max_epochs", "1")
    assert (tmp_path / "runs/tiny/version_0/config.yaml").read_text() == before
    assert "keep the optimizer" in fail("fit", "--config", tiny, "--ckpt_path", "last", "--model.optimizer", "SGD")


def test_runs_without_logger_validation_or_checkpoints(tiny, run, tmp_path):
    assert "metrics.csv" not in run("fit", "--config", tiny, "--trainer.logger", "false")
    run("fit", "--config", tiny, "--trainer.logger", "false")
    assert (tmp_path / "runs/tiny/version_1/checkpoints/best.ckpt").is_file()
    run("fit", "--config", tiny, "--trainer.limit_val_batches", "0")
    assert (tmp_path / "runs/tiny/version_2/checkpoints/last.ckpt").is_file()
    assert "no checkpoint" in run("fit", "--config", tiny, "--trainer.enable_checkpointing", "false")
    assert not (tmp_path / "runs/tiny/version_3/checkpoints").exists()
    printed = run("fit", "--config", tiny, "--trainer.fast_dev_run", "true")
    assert "nothing is kept" in printed
    assert "version_4" not in printed
    assert not (tmp_path / "runs/tiny/version_4").exists()


@pytest.mark.parametrize("chosen", ["Tempered", "my_norm.Tempered"])
def test_own_normalization_by_name_and_by_path_reloads_in_a_new_process(tiny, tmp_path, chosen):
    (tmp_path / "my_norm.py").write_text(PLUGIN)
    plugins = ["--plugins", "my_norm"] if chosen == "Tempered" else []

    def command(*argv: str) -> str:
        done = commands.run(*argv, cwd=tmp_path)
        assert done.returncode == 0, done.stderr
        return done.stdout + done.stderr

    trained = command(
        "fit", "--config", tiny, *plugins, "--model.normalization", chosen, "--model.normalization.temperature", "2"
    )
    assert "Tempered(temperature=2.0)" in trained
    assert "testing under Tempered(temperature=2.0)" in command("test", "--ckpt_path", "last", "--name", "tiny")
    reload = (
        "import torch; from sinkformer_pl.tasks import Classifier; "
        "model = Classifier.load_from_checkpoint('runs/tiny/version_0/checkpoints/last.ckpt'); "
        "print(model.backbone.blocks[0].gather.attention.core.normalization.temperature)"
    )
    assert command("-c", reload).strip() == "2.0"


def test_plugins_may_stand_in_the_yaml_file(tiny, run, tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(tmp_path))
    (tmp_path / "yaml_plugin.py").write_text(PLUGIN.replace("Tempered", "FromYaml"))
    text = yaml.safe_load(Path(tiny).read_text()) | {"plugins": ["yaml_plugin"]}
    text["model"]["normalization"] = {"class_path": "FromYaml", "init_args": {"temperature": 3}}
    Path(tiny).write_text(yaml.safe_dump(text))
    assert "FromYaml(temperature=3.0)" in run("fit", "--config", tiny)


def test_checkpoint_made_in_python_is_tested_by_the_command_line_and_saved_again(tiny, run, tmp_path):
    model = Classifier(
        partial(SetTransformer, dim=8, num_heads=2, pooling=partial(Sinkhorn, n_iters=1)), Softmax, num_classes=12
    )
    trainer = pl.Trainer(
        max_epochs=1, logger=False, enable_checkpointing=False, enable_progress_bar=False, accelerator="cpu"
    )
    trainer.fit(model, datamodule=ProceduralShapes(train_size=24, val_size=12, test_size=12, standardize=False))
    trainer.save_checkpoint("mine.ckpt", weights_only=False)
    again = Classifier.load_from_checkpoint("mine.ckpt")
    assert again.hparams == model.hparams
    trainer.strategy.connect(again)
    trainer.save_checkpoint("again.ckpt")
    third = Classifier.load_from_checkpoint("again.ckpt")
    assert third.hparams == model.hparams
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), third.state_dict().values(), strict=True))
    assert "testing under Softmax()" in run("test", "--config", tiny, "--ckpt_path", "again.ckpt")
    test = ["test", "--data", "ProceduralShapes", "--ckpt_path", "mine.ckpt"]
    assert "standardize: false" in run(*test, "--print_config")
    with pytest.warns(UserWarning, match=r"data\.standardize is True; it was False where the checkpoint's model was"):
        run(*test, "--data.standardize", "true", "--data.test_size", "12")


def test_normalizations_lists_arguments_and_guarantees(run, tmp_path, monkeypatch):
    printed = run("normalizations")
    assert "Sinkhorn(n_iters=3)" in printed
    assert "Softmax()" in printed
    assert re.search(r"Sinkhorn\(n_iters=3\) +sum to 1 +Q/K in the limit", printed)
    assert re.search(r"Entmax15\(\) +sum to 1 +- +sparse, any mask", printed)
    assert re.search(r"SymmetricSinkhorn\(n_iters=3\) .*one set, tied", printed)
    monkeypatch.syspath_prepend(str(tmp_path))
    (tmp_path / "listed_plugin.py").write_text(PLUGIN.replace("Tempered", "Listed"))
    assert "Listed(temperature=1.0)" in run("normalizations", "--plugins", "listed_plugin")


def test_help_lists_the_commands(run):
    assert all(command in run("--help") for command in ("fit", "validate", "test", "predict", "normalizations"))
    assert run("--version").startswith(f"sinkformer_pl {version('sinkformer_pl')}, torch {torch.__version__[:4]}")


@pytest.mark.parametrize(
    ("command", "needed"),
    [
        ("fit", "--config FILE"),
        ("test", "--ckpt_path PATH"),
        ("compare", "--config FILE --normalizations NAMES"),
        ("inspect", "--ckpt_path PATH"),
    ],
)
def test_help_of_a_command_begins_with_what_it_needs(capsys, command, needed):
    with pytest.raises(SystemExit) as exit_:
        main([command, "--help"])
    assert exit_.value.code == 0
    printed = capsys.readouterr().out
    assert printed.startswith(f"usage: python -m sinkformer_pl {command} {needed} [--OPTION VALUE ...]\n")
    # A checkpoint knows its network.
    assert ("(required" in printed) == (command == "fit")


def test_a_warning_is_one_line(tiny, tmp_path):
    (tmp_path / "warner.py").write_text("import warnings\n\nwarnings.warn('this\\n  and that')\n")
    done = commands.run("fit", "--config", tiny, "--plugins", "warner", "--trainer.fast_dev_run", "1", cwd=tmp_path)
    assert "warning: this and that" in done.stderr.splitlines()
    assert "warn(" not in done.stderr
