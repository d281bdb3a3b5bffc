"""Attention is measured on the same few samples each epoch, to the digit, and the training knows nothing of it."""

import csv
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import pytorch_lightning as pl
import torch
from pytorch_lightning.loggers import TensorBoardLogger
from pytorch_lightning.strategies import FSDPStrategy
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from sinkformer_pl.batch import collate
from sinkformer_pl.callbacks import AttentionDiagnostics
from sinkformer_pl.cli import main
from sinkformer_pl.data import Digits, Docstrings, ProceduralShapes
from sinkformer_pl.diagnostics import attention_of, pictures, summary
from sinkformer_pl.diagnostics.measures import MEASURES
from sinkformer_pl.errors import UserError
from sinkformer_pl.models import MultiHeadAttention, SetTransformer, TextTransformer, VisionTransformer
from sinkformer_pl.normalizations import Entmax, Sinkhorn, Softmax
from sinkformer_pl.tasks import Classifier
from tests import commands

pytestmark = pytest.mark.usefixtures("documentation_read_once")

POINTCLOUD = str(Path(__file__).parents[2] / "configs/pointcloud.yaml")
SETS = partial(SetTransformer, dim=8, num_heads=2, depth=1, inducing_points=4, dropout=0.1)


def shapes(**options):
    return ProceduralShapes(train_size=48, val_size=24, test_size=24, batch_size=8, **options)


def fit(folder, data, network=SETS, normalization=Sinkhorn, callbacks=(), epochs=2, **options):
    pl.seed_everything(0, verbose=False)
    model = Classifier(network, normalization, num_classes=data.num_classes)
    trainer = pl.Trainer(
        default_root_dir=folder,
        max_epochs=epochs,
        accelerator="cpu",
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=list(callbacks),
        **{"logger": False, "enable_checkpointing": False} | options,
    )
    trainer.fit(model, data)
    return model, trainer


def rows(path):
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def test_training_is_the_same_to_the_last_bit(tmp_path):
    plain, _ = fit(tmp_path / "a", shapes())
    watched, _ = fit(tmp_path / "b", shapes(), callbacks=[AttentionDiagnostics(draw_every=1)])
    after = torch.rand(3)
    for name, value in plain.state_dict().items():
        assert torch.equal(value, watched.state_dict()[name]), name
    fit(tmp_path / "c", shapes())
    assert torch.equal(torch.rand(3), after)
    assert all(
        module.training == other.training for module, other in zip(plain.modules(), watched.modules(), strict=True)
    )


def test_numbers_are_those_of_the_real_block_of_each_sample(tmp_path):
    data = shapes()
    model, _ = fit(tmp_path, data, callbacks=[AttentionDiagnostics(samples=3)], epochs=1)
    found = {(row["layer"], int(row["head"])): row for row in rows(tmp_path / "attention.csv")}
    assert len(found) == 6
    # Each sample alone, so without padding; the layer's own inputs, and softmax and half-steps by hand.
    blocks = {}
    model.eval()
    for index in range(3):
        inputs = {}
        for name, layer in model.named_modules():
            if isinstance(layer, MultiHeadAttention):
                layer.register_forward_pre_hook(lambda _, args, name=name, inputs=inputs: inputs.update({name: args}))
        with torch.no_grad():
            model(data.datasets["val"][index].inputs[None])
            for name, (queries, keys, *_) in inputs.items():
                layer = model.get_submodule(name)
                q, k = (
                    p(x).unflatten(-1, (2, 4)).transpose(1, 2) for p, x in ((layer.query, queries), (layer.key, keys))
                )
                plan = torch.softmax(q @ k.mT / 2, -1)[0].double().numpy()
                if "pool" not in name:
                    plan = plan / plan.sum(1, keepdims=True) * plan.shape[1] / plan.shape[2]
                    plan = plan / plan.sum(2, keepdims=True)
                for head in range(2):
                    blocks.setdefault((name, head), []).append(plan[head])
    assert blocks.keys() == found.keys()
    for place, plans in blocks.items():
        row = {name: float(found[place][name]) for name in MEASURES}
        columns = np.concatenate([plan.sum(0) * plan.shape[1] / plan.shape[0] for plan in plans])
        entropies = np.concatenate([-(plan * np.log(plan)).sum(1) for plan in plans])
        assert row["row_sum_median"] == pytest.approx(1, abs=1e-5)
        assert row["column_sum_min"] == pytest.approx(columns.min(), rel=1e-4)
        assert row["column_sum_p90"] == pytest.approx(np.quantile(columns, 0.9), rel=1e-4)
        assert row["marginal_error"] == pytest.approx(abs(columns - 1).max(), rel=1e-3, abs=1e-5)
        assert row["entropy"] == pytest.approx(entropies.mean(), rel=1e-4)
        assert row["sink_share"] == pytest.approx(np.mean([p.sum(0).max() / p.sum() for p in plans]), rel=1e-4)
        assert row["zero_share"] == 0
    [first, *_] = rows(tmp_path / "attention/column_sums.csv")
    both = np.concatenate(
        [p.sum(0) * p.shape[1] / p.shape[0] for head in range(2) for p in blocks[first["layer"], head]]
    )
    assert float(first["0.5"]) == pytest.approx(np.quantile(both, 0.5), rel=1e-4)


def test_one_line_of_a_configuration_and_all_that_it_leaves(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("more.yaml").write_text("trainer:\n  callbacks: [sinkformer_pl.callbacks.AttentionDiagnostics]\n")
    small = ["--data.train_size", "48", "--data.val_size", "24", "--data.test_size", "24", "--data.batch_size", "8"]
    small += ["--model.backbone.dim", "8", "--model.backbone.num_heads", "2", "--model.backbone.temperature", "learned"]
    quiet = ["--trainer.enable_progress_bar", "false", "--trainer.enable_model_summary", "false"]
    command = ["fit", "--config", POINTCLOUD, "--config", "more.yaml", *small, *quiet, "--trainer.accelerator", "cpu"]
    main([*command, "--trainer.max_epochs", "2"])
    run = tmp_path / "runs/pointcloud/version_0"
    table = rows(run / "attention.csv")
    assert [row["epoch"] for row in table] == ["0"] * 10 + ["1"] * 10
    assert {row["head"] for row in table} == {"0", "1"}
    assert [bool(row["temperature"]) for row in table] == ([True] * 8 + [False] * 2) * 2
    pictures = {"column_sums.png", "inputs_epoch_1.png", "maps_epoch_1.png", "column_sums.csv"}
    assert {path.name for path in (run / "attention").iterdir()} == pictures
    layer = "backbone.blocks.0.gather.attention"
    logged = [row for row in rows(run / "metrics.csv") if row[f"attention/relative_entropy/{layer}"]]
    assert [row["epoch"] for row in logged] == ["0", "1"]
    own = [float(row["relative_entropy"]) for row in table if row["layer"] == layer]
    means = [float(row[f"attention/relative_entropy/{layer}"]) for row in logged]
    assert means == pytest.approx([sum(own[:2]) / 2, sum(own[2:]) / 2], rel=1e-4)
    events = EventAccumulator(str(run)).Reload()
    assert {"attention/maps", "attention/inputs", "attention/column_sums"} <= set(events.Tags()["images"])

    # What was measured after the checkpoint is measured again, not twice.
    (run / "attention.csv").write_text((run / "attention.csv").read_text() + "2," + "x," * 18 + "\n3,half")
    main(["fit", "--ckpt_path", "last", "--name", "pointcloud", "--trainer.max_epochs", "3"])
    assert [row["epoch"] for row in rows(run / "attention.csv")] == ["0"] * 10 + ["1"] * 10 + ["2"] * 10
    assert [row["epoch"] for row in rows(run / "attention/column_sums.csv")] == ["0"] * 5 + ["1"] * 5 + ["2"] * 5
    logged = [row for row in rows(run / "metrics.csv") if row[f"attention/relative_entropy/{layer}"]]
    assert [row["epoch"] for row in logged] == ["0", "1", "2"]


@pytest.mark.parametrize("pooling", ["cls", "mean"])
def test_images_and_their_class_token(tmp_path, pooling):
    network = partial(
        VisionTransformer, image_size=8, patch_size=2, channels=1, dim=8, num_heads=2, depth=2, pooling=pooling
    )
    logger = TensorBoardLogger(tmp_path, name="", version="")
    data = Digits(train_size=40, batch_size=20)
    fit(tmp_path, data, network, Softmax, [AttentionDiagnostics()], epochs=1, logger=logger)
    assert (tmp_path / "attention/inputs_epoch_0.png").is_file()
    assert "attention/inputs" in EventAccumulator(str(tmp_path)).Reload().Tags()["images"]


def test_pictures_name_classes_and_the_epoch_of_the_tables(tmp_path, monkeypatch):
    drawn = {}
    for name in ("draw_inputs", "draw_maps"):
        real = getattr(pictures, name)
        spy = lambda *args, name=name, real=real: drawn.update({name: args}) or real(*args)  # noqa: E731
        monkeypatch.setattr(pictures, name, spy)
    data = shapes()
    fit(tmp_path, data, callbacks=[AttentionDiagnostics(samples=3)])
    names = [data.classes[data.datasets["val"][index].target] for index in range(3)]
    *_, classes, title = drawn["draw_inputs"]
    assert classes == names
    last = rows(tmp_path / "attention.csv")[-1]["epoch"]
    assert title.endswith(f"after epoch {last}")
    assert drawn["draw_maps"][-1] == f"attention weights of a sample of class {names[0]}\nafter epoch {last}"
    assert (tmp_path / f"attention/inputs_epoch_{last}.png").is_file()


@pytest.mark.slow
def test_texts_under_a_learned_alpha(tmp_path):
    network = partial(TextTransformer, vocab_size=500, max_length=32, dim=8, num_heads=2, depth=1)
    data = Docstrings(max_length=32, vocab_size=500)
    entmax = partial(Entmax, alpha=1.5, learned=True)
    fit(tmp_path, data, network, entmax, [AttentionDiagnostics()], epochs=1, limit_train_batches=2, limit_val_batches=1)
    [first, second] = rows(tmp_path / "attention.csv")
    assert {first["head"], second["head"]} == {"0", "1"}
    assert float(first["alpha"]) == pytest.approx(1.5, abs=0.01)
    assert (tmp_path / "attention/inputs_epoch_0.png").is_file()


@pytest.mark.slow
def test_compiled_and_in_half_precision(tmp_path):
    class Compiled(pl.Callback):
        def on_fit_start(self, trainer, pl_module):
            pl_module.backbone.compile(backend="eager")

    network = partial(VisionTransformer, image_size=8, patch_size=2, channels=1, dim=8, num_heads=2, depth=1)
    callbacks = [Compiled(), AttentionDiagnostics()]
    fit(tmp_path, Digits(train_size=40, batch_size=20), network, callbacks=callbacks, precision="bf16-mixed")
    table = rows(tmp_path / "attention.csv")
    assert len(table) == 4
    assert max(abs(float(row["row_sum_max"]) - 1) for row in table) < 1e-5


def test_what_is_refused(tmp_path):
    with pytest.raises(UserError, match="samples"):
        AttentionDiagnostics(samples=0)
    with pytest.raises(UserError, match="draw_every"):
        AttentionDiagnostics(draw_every=0)
    with pytest.raises(UserError, match="no process has the whole model"):
        AttentionDiagnostics().on_fit_start(SimpleNamespace(strategy=FSDPStrategy()), None)
    model, train = Classifier(SETS, Softmax, num_classes=12), shapes()
    train.setup()
    trainer = pl.Trainer(
        default_root_dir=tmp_path, accelerator="cpu", logger=False, callbacks=[AttentionDiagnostics()], max_epochs=1
    )
    with pytest.raises(UserError, match="no validation split"):
        trainer.fit(model, train.train_dataloader())


def test_fast_dev_run_writes_nothing(tmp_path):
    fit(tmp_path, shapes(), callbacks=[AttentionDiagnostics()], fast_dev_run=True)
    assert not list(tmp_path.rglob("*attention*"))


def test_it_costs_a_pass_over_its_few_samples_an_epoch(tmp_path):
    seen = []

    class Watch(pl.Callback):
        def on_train_start(self, trainer, pl_module):
            pl_module.backbone.register_forward_pre_hook(lambda _, args: seen.append(len(args[0])))

    fit(tmp_path, shapes(), callbacks=[Watch()])
    without, seen[:] = sorted(seen), []
    fit(tmp_path, shapes(), callbacks=[Watch(), AttentionDiagnostics(samples=3)])
    assert sorted(seen) == sorted([*without, 3, 3])


KEEP = """
import pytorch_lightning as pl
import torch


class Keep(pl.Callback):
    def on_fit_end(self, trainer, pl_module):
        torch.save(pl_module.state_dict(), f"{trainer.global_rank}.pt")
"""


@pytest.mark.slow
def test_two_processes(tmp_path):
    (tmp_path / "keep.py").write_text(KEEP)
    small = ["--data.train_size", "24", "--data.val_size", "12", "--data.test_size", "12", "--data.batch_size", "4"]
    small += ["--model.backbone.dim", "8", "--model.backbone.num_heads", "2", "--trainer.max_epochs", "2"]
    quiet = ["--trainer.enable_progress_bar", "false", "--trainer.enable_model_summary", "false"]
    two = ["--trainer.accelerator", "cpu", "--trainer.devices", "2", "--trainer.strategy", "ddp"]
    callbacks = [
        "--plugins",
        "keep",
        "--trainer.callbacks+",
        "keep.Keep",
        "--trainer.callbacks+",
        "AttentionDiagnostics",
    ]
    argv = ["fit", "--config", POINTCLOUD, *small, *quiet, *two, *callbacks]
    done = commands.run(*argv, cwd=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    first, second = (torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(2))
    assert all(torch.equal(value, second[name]) for name, value in first.items())
    # Written once, and about all the samples of the probe, not those of one process.
    run = tmp_path / "runs/pointcloud/version_0"
    table = rows(run / "attention.csv")
    assert [row["epoch"] for row in table] == ["0"] * 10 + ["1"] * 10
    data = ProceduralShapes(train_size=24, val_size=12, test_size=12)
    data.setup()
    with torch.random.fork_rng():
        model = Classifier.load_from_checkpoint(run / "checkpoints/last.ckpt")
    batch = collate([data.datasets["val"][index] for index in range(4)])
    layer = attention_of(model, batch.inputs, batch.mask)[0]
    expected = summary(layer.weights, layer.mask)["entropy"]
    last = [float(row["entropy"]) for row in table if row["epoch"] == "1" and row["layer"] == layer.name]
    assert last == pytest.approx(expected.tolist(), rel=1e-4)
