"""Checkpoints survive what may happen while they are written, and say what is wrong with them when they are read."""

import contextlib
import io
import json
import os
import random
import resource
import shutil
import stat
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
import pytorch_lightning as pl
import torch
import yaml
from pytorch_lightning.plugins.io import AsyncCheckpointIO, TorchCheckpointIO

from sinkformer_pl.cli import main
from sinkformer_pl.errors import UserError
from sinkformer_pl.tasks import Classifier
from sinkformer_pl.training.checkpoint_checksum import DamagedError, verify, write
from sinkformer_pl.training.checkpoint_content import LEARNT_KEY, learnt_from
from sinkformer_pl.training.checkpoint_file import load_file, read_checkpoint, save_file
from sinkformer_pl.training.checkpoint_io import VerifiedCheckpointIO, use_verified
from sinkformer_pl.training.checkpoint_match import differing, require_classes
from tests.cli.conftest import TINY

TRIAL = Path(__file__).parents[1] / "trials/kill_while_saving.py"

CONTENT = {
    "state_dict": {"weight": torch.arange(30.0).reshape(5, 6), "bias": torch.ones(5)},
    "hyper_parameters": {"name": "a"},
    "epoch": 3,
}


def same(first: dict, second: dict) -> bool:
    return (
        first["hyper_parameters"] == second["hyper_parameters"]
        and first["epoch"] == second["epoch"]
        and first["state_dict"].keys() == second["state_dict"].keys()
        and all(torch.equal(value, second["state_dict"][key]) for key, value in first["state_dict"].items())
    )


def flipped(data: bytes, bit: int) -> bytes:
    place = bit // 8
    return data[:place] + bytes([data[place] ^ 1 << bit % 8]) + data[place + 1 :]


def message_of(path: Path) -> str:
    with pytest.raises(UserError) as error:
        load_file(path)
    assert str(path) in str(error.value)
    assert "\n" not in str(error.value)
    return str(error.value)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """Path of a checkpoint that `save_file` wrote."""
    save_file(CONTENT, tmp_path / "a.ckpt")
    return tmp_path / "a.ckpt"


@pytest.fixture
def plain(tmp_path: Path) -> Path:
    """Path of one that plain Lightning wrote."""
    TorchCheckpointIO().save_checkpoint(CONTENT, tmp_path / "plain.ckpt")
    return tmp_path / "plain.ckpt"


def test_a_checkpoint_is_an_ordinary_one_with_a_checksum(path):
    assert same(load_file(path), CONTENT)
    assert same(torch.load(path, weights_only=True), CONTENT)
    assert same(torch.load(path, weights_only=True, mmap=True), CONTENT)
    assert same(TorchCheckpointIO().load_checkpoint(path), CONTENT)
    with path.open("rb") as file:
        assert verify(file)
    assert path.read_bytes()[-85:].startswith(b"sinkformer_pl sha256 ")


def test_every_flipped_bit_is_found(path):
    data = path.read_bytes()
    for bit in range(8 * len(data)):
        with pytest.raises(DamagedError):
            verify(io.BytesIO(flipped(data, bit)))
    for bit in random.Random(0).sample(range(8 * len(data)), 20):
        path.write_bytes(flipped(data, bit))
        assert "is damaged" in message_of(path)


def test_in_a_plain_checkpoint_a_flipped_bit_is_found_or_changes_nothing(plain):
    data = plain.read_bytes()
    chance = random.Random(0)
    harmless = 0
    for place in range(len(data)):
        plain.write_bytes(flipped(data, 8 * place + chance.randrange(8)))
        with contextlib.suppress(UserError):
            loaded = load_file(plain)
            harmless += 1
            assert same(loaded, CONTENT)
    assert harmless < 0.7 * len(data)


@pytest.mark.parametrize("kind", ["path", "plain"])
def test_every_truncation_is_found(kind, request):
    path = request.getfixturevalue(kind)
    data = path.read_bytes()
    for length in [*range(0, len(data), 23), *range(len(data) - 120, len(data))]:
        path.write_bytes(data[:length])
        assert "damaged" in message_of(path)


def test_bytes_put_behind_or_before_are_found(path):
    data = path.read_bytes()
    for other in (data + b"\0", b"\0" + data, data + data):
        path.write_bytes(other)
        assert "damaged" in message_of(path)


def test_the_message_names_the_newest_intact_checkpoint_beside_it(path):
    assert message_of_damaged(path).endswith("use another copy")
    (path.parent / "text.ckpt").write_text("no checkpoint")
    assert message_of_damaged(path).endswith("use another copy")
    for number, name in enumerate(("best.ckpt", "last.ckpt")):
        save_file(CONTENT, path.parent / name)
        os.utime(path.parent / name, (number, number))
    assert message_of_damaged(path).endswith("use last.ckpt beside it, which is intact")
    (path.parent / "last.ckpt").write_bytes(path.read_bytes())
    assert message_of_damaged(path).endswith("use best.ckpt beside it, which is intact")


def message_of_damaged(path: Path) -> str:
    save_file(CONTENT, path)
    path.write_bytes(flipped(path.read_bytes(), 5000))
    message = message_of(path)
    assert "its bytes don't match its checksum" in message
    return message


def test_old_formats_load(tmp_path):
    path = tmp_path / "old.ckpt"
    torch.save(CONTENT, path, _use_new_zipfile_serialization=False)
    assert same(load_file(path), CONTENT)
    torch.serialization.set_crc32_options(False)
    try:
        torch.save(CONTENT, path)
    finally:
        torch.serialization.set_crc32_options(True)
    assert same(load_file(path), CONTENT)


class Malicious:
    def __reduce__(self):
        return (Path.touch, (Path("owned"),))


def test_objects_are_refused_however_they_are_asked_for(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "bad.ckpt"
    torch.save({"state_dict": {}, "hyper_parameters": Malicious()}, path)
    plugin = VerifiedCheckpointIO()
    for load in (load_file, read_checkpoint, plugin.load_checkpoint):
        with pytest.raises(UserError, match=r"bad\.ckpt.*could run code"):
            load(path)
    with pytest.raises(UserError, match="weights_only=False"):
        plugin.load_checkpoint(path, weights_only=False)
    assert not (tmp_path / "owned").exists()


def test_what_could_not_be_read_again_is_not_written(path):
    with pytest.raises(UserError, match=r"a\.ckpt: pathlib\.\w*Path in it could not be read again"):
        save_file({**CONTENT, "callbacks": {"mine": Path("x")}}, path)
    assert same(load_file(path), CONTENT)
    assert [other.name for other in path.parent.iterdir()] == ["a.ckpt"]


def test_a_full_disk_leaves_the_old_checkpoint_and_nothing_else(path):
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2**20, hard))
    try:
        with pytest.raises(UserError) as error:
            save_file({**CONTENT, "state_dict": {"weight": torch.zeros(2**19)}}, path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    message = str(error.value)
    assert f"{path} can't be written (File too large): free some space" in message
    assert message.endswith("the one written before is unchanged")
    assert same(load_file(path), CONTENT)
    assert [other.name for other in path.parent.iterdir()] == ["a.ckpt"]


def test_an_interruption_while_writing_stays_one():
    class Interrupted(io.BytesIO):
        def write(self, data):
            if self.tell() > 1000:
                raise KeyboardInterrupt
            return super().write(data)

    with pytest.raises(KeyboardInterrupt):
        write(CONTENT, Interrupted())


def test_the_new_file_is_on_the_disk_before_it_takes_the_name(path, monkeypatch):
    calls = []
    fsync, replace = os.fsync, os.replace

    def synced(descriptor: int) -> None:
        calls.append("folder" if stat.S_ISDIR(os.fstat(descriptor).st_mode) else "file")
        fsync(descriptor)

    def replaced(source: Path, target: Path) -> None:
        calls.append("replace")
        assert source.parent == target.parent
        with source.open("rb") as file:
            assert verify(file)
        replace(source, target)

    monkeypatch.setattr(os, "fsync", synced)
    monkeypatch.setattr(os, "replace", replaced)
    # Nothing goes through the folder for temporary files.
    monkeypatch.setattr(tempfile, "tempdir", "/nowhere")
    save_file(CONTENT, path)
    assert calls == ["file", "replace", "folder"]


def test_permissions_are_those_of_any_new_file(path):
    (path.parent / "other").touch()
    assert path.stat().st_mode == (path.parent / "other").stat().st_mode


def test_leftovers_of_killed_processes_go_once_they_are_old(path):
    old, young, foreign = (path.parent / name for name in (".a.ckpt.1.tmp", ".a.ckpt.2.tmp", ".b.ckpt.1.tmp"))
    for leftover in (old, young, foreign):
        leftover.touch()
    for leftover in (old, foreign):
        os.utime(leftover, (1, 1))
    save_file(CONTENT, path)
    assert [leftover.exists() for leftover in (old, young, foreign)] == [False, True, True]


@pytest.mark.slow
def test_kill_while_saving_loses_nothing():
    command = [sys.executable, str(TRIAL), "--kills", "5", "--megabytes", "20", "--pause", "0"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stdout + done.stderr
    result = json.loads(done.stdout.splitlines()[-1])
    assert (result["kills"], result["lost"]) == (5, 0)
    assert result["killed while saving"] > 0


class Own(TorchCheckpointIO):
    pass


@pytest.mark.parametrize("strategy", [{}, {"strategy": "ddp", "devices": 2}])
def test_every_strategy_gets_the_plugin_and_a_users_own_is_kept(strategy, tmp_path):
    def plugin_of(*plugins):
        trainer = pl.Trainer(accelerator="cpu", logger=False, plugins=list(plugins), **strategy)
        use_verified(trainer.strategy)
        return trainer.strategy.checkpoint_io

    assert type(plugin_of()) is VerifiedCheckpointIO
    assert type(plugin_of(Own())) is Own
    around = plugin_of(AsyncCheckpointIO())
    assert type(around) is AsyncCheckpointIO
    assert type(around.checkpoint_io) is VerifiedCheckpointIO
    assert type(plugin_of(AsyncCheckpointIO(Own())).checkpoint_io) is Own
    # Sharded checkpoints are folders.
    (tmp_path / "sharded.ckpt").mkdir()
    plugin_of().remove_checkpoint(tmp_path / "sharded.ckpt")
    assert not (tmp_path / "sharded.ckpt").exists()


class OtherTask(pl.LightningModule):
    def __init__(self, hidden: int, rate: float) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.layer = torch.nn.Linear(hidden, 2)

    def training_step(self, batch, batch_idx):
        return self.layer(batch[0]).sum()

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), self.hparams.rate)


def trainer_in_python(**arguments) -> pl.Trainer:
    quiet = {"enable_progress_bar": False, "enable_model_summary": False, "enable_checkpointing": False}
    return pl.Trainer(accelerator="cpu", logger=False, **quiet, **arguments)


def test_lightnings_own_restore_is_checked(tmp_path):
    data = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(torch.ones(4, 3)))
    trainer = trainer_in_python(max_epochs=1, plugins=[VerifiedCheckpointIO()])
    trainer.fit(OtherTask(3, 0.1), data)
    trainer.save_checkpoint(tmp_path / "a.ckpt")
    again = trainer_in_python(max_epochs=2, plugins=[VerifiedCheckpointIO()])
    again.fit(OtherTask(3, 0.1), data, ckpt_path=tmp_path / "a.ckpt")
    assert again.global_step == 8
    broken = (tmp_path / "a.ckpt").read_bytes()
    (tmp_path / "a.ckpt").write_bytes(flipped(broken, 4 * len(broken)))
    with pytest.raises(UserError, match=r"a\.ckpt is damaged"):
        trainer_in_python(max_epochs=2, plugins=[VerifiedCheckpointIO()]).fit(
            OtherTask(3, 0.1), data, ckpt_path=tmp_path / "a.ckpt"
        )


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Path:
    """Folder of a run of the command line, and the configuration it is from."""
    folder = tmp_path_factory.mktemp("trained")
    (folder / "tiny.yaml").write_text(yaml.safe_dump(TINY))
    main(["fit", "--config", str(folder / "tiny.yaml"), "--trainer.default_root_dir", str(folder / "runs")])
    return folder


@pytest.fixture
def there(trained, tmp_path, monkeypatch) -> Path:
    """A copy of it, as the current folder."""
    shutil.copytree(trained, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    return tmp_path / "runs/tiny/version_0/checkpoints"


def refused(capsys: pytest.CaptureFixture[str], *argv: str) -> str:
    capsys.readouterr()
    with pytest.raises(SystemExit) as exit_:
        main(list(argv))
    assert exit_.value.code == 2
    [line] = capsys.readouterr().err.splitlines()
    return line


def test_the_command_line_writes_checksums_and_checks_them(there, capsys):
    for name in ("best.ckpt", "last.ckpt"):
        assert b"sinkformer_pl sha256 " in (there / name).read_bytes()[-85:]
    last = (there / "last.ckpt").read_bytes()
    (there / "last.ckpt").write_bytes(flipped(last, 4 * len(last)))
    for command in ("fit", "test"):
        line = refused(capsys, command, "--config", "tiny.yaml", "--ckpt_path", "last", "--trainer.max_epochs", "2")
        assert "version_0/checkpoints/last.ckpt is damaged: its bytes don't match its checksum" in line
        assert line.endswith("use best.ckpt beside it, which is intact")
    main(["fit", "--config", "tiny.yaml", "--ckpt_path", "best", "--trainer.max_epochs", "2"])
    assert read_checkpoint(there / "last.ckpt")["global_step"] == 4


def test_a_checkpoint_of_another_task_is_named(there, capsys):
    trainer = trainer_in_python()
    trainer.strategy.connect(OtherTask(3, 0.1))
    trainer.save_checkpoint("other.ckpt")
    for command in ("fit", "test"):
        line = refused(capsys, command, "--config", "tiny.yaml", "--ckpt_path", "other.ckpt")
        assert "other.ckpt is of another task than Classifier" in line
        assert "without backbone, normalization, num_classes; with hidden, rate" in line
    trainer.strategy.connect(pl.LightningModule())
    trainer.save_checkpoint("bare.ckpt")
    assert "'hyper_parameters'" in refused(capsys, "test", "--config", "tiny.yaml", "--ckpt_path", "bare.ckpt")


def test_a_model_is_loaded_in_python_from_intact_plain_files_alone(there):
    assert isinstance(Classifier.load_from_checkpoint(there / "best.ckpt"), Classifier)
    content = (there / "best.ckpt").read_bytes()
    Path("flipped.ckpt").write_bytes(flipped(content, 4 * len(content)))
    with pytest.raises(UserError, match=r"flipped\.ckpt is damaged"):
        Classifier.load_from_checkpoint("flipped.ckpt")
    checkpoint = read_checkpoint(there / "best.ckpt")
    torch.save({**checkpoint, "more": Path("an object")}, "objects.ckpt")
    with pytest.raises(UserError, match="could run code: refused"):
        Classifier.load_from_checkpoint("objects.ckpt")
    with pytest.raises(UserError, match="weights_only=False"):
        Classifier.load_from_checkpoint("objects.ckpt", weights_only=False)


def test_weights_alone_are_tested_but_no_training_goes_on_from_them(there, capsys):
    checkpoint = read_checkpoint(there / "best.ckpt")
    weights = {key: value for key, value in checkpoint.items() if key not in ("loops", "optimizer_states")}
    save_file(weights, "weights.ckpt")
    before = sorted(there.rglob("*"))
    assert "weights alone, not the state of a training" in refused(capsys, "fit", "--ckpt_path", "weights.ckpt")
    assert sorted(there.rglob("*")) == before
    main(["test", "--ckpt_path", "weights.ckpt"])


def test_other_classes_are_listed(there, capsys):
    last = there / "last.ckpt"
    checkpoint = read_checkpoint(last)
    classes = learnt_from(checkpoint)["classes"]
    assert len(classes) == 12
    require_classes(checkpoint, tuple(classes), last)
    checkpoint["ProceduralShapes"][LEARNT_KEY]["classes"] = ["hat", *classes[1:]]
    save_file(checkpoint, last)
    for command in ("fit", "test"):
        line = refused(capsys, command, "--config", "tiny.yaml", "--ckpt_path", "last")
        assert f"only in the checkpoint: hat; only in the data: {classes[0]}" in line


@pytest.mark.parametrize("form", ["now", "0.1.0"])
def test_classes_of_the_data_that_a_checkpoint_does_not_know_are_listed(form):
    def check(saved: list[str], number: int) -> None:
        kept = {LEARNT_KEY: {"classes": saved}} if form == "now" else saved
        key = "Any" if form == "now" else "sinkformer_pl_classes"
        require_classes({key: kept, "hyper_parameters": {"num_classes": number}}, ["a", "b", "c"], "x.ckpt")

    check(["c", "d", "a", "b"], 4)
    with pytest.raises(UserError, match=r"x.ckpt has .* 2 in the checkpoint and 3 in the data; only in the data: c"):
        check(["b", "a"], 2)
    check([], 3)
    with pytest.raises(UserError, match="10 in the checkpoint and 3 in the data"):
        check([], 10)


def test_another_normalization_or_backbone_is_listed_or_said(there, capsys):
    last = str(there / "last.ckpt")
    learned = ["--model.normalization", "ScalableSoftmax", "--model.normalization.learned", "true"]
    line = refused(capsys, "test", "--ckpt_path", last, *learned)
    assert "normalization is sinkformer_pl.normalizations.Sinkhorn in the checkpoint and" in line
    assert "sinkformer_pl.normalizations.ScalableSoftmax here" in line
    line = refused(capsys, "test", "--ckpt_path", last, "--model.backbone.dim", "16")
    assert "backbone.dim is 8 in the checkpoint and 16 here" in line
    # The same weights may be tested, or trained on, under other arguments; what these are is said.
    main(["test", "--ckpt_path", last, "--model.normalization.n_iters", "7", "--model.backbone.num_heads", "4"])
    printed = capsys.readouterr().out
    assert "testing under Sinkhorn(n_iters=7), trained under Sinkhorn(n_iters=3); backbone.num_heads 4, 2 in" in printed
    main(["fit", "--ckpt_path", last, "--trainer.max_epochs", "2", "--model.normalization.n_iters", "7"])
    printed = capsys.readouterr().out
    assert "training under Sinkhorn(n_iters=7), trained under Sinkhorn(n_iters=3); folder" in printed
    assert "tiny/version_1" in printed
    assert read_checkpoint(last)["global_step"] == 2


def test_differing_lists_what_both_have():
    def spec(path: str, **arguments) -> dict:
        return {"class_path": path, "init_args": arguments}

    saved = {"backbone": spec("a.Net", dim=8, pooling=spec("b.Softmax")), "rate": 0.1, "old": 1}
    wanted = {"backbone": spec("a.Net", dim=16, pooling=spec("b.Sinkhorn", n_iters=3)), "rate": 0.1, "new": 1}
    assert differing(saved, wanted) == {
        "backbone.dim": (8, 16),
        "backbone.pooling": ("b.Softmax", "b.Sinkhorn"),
    }
