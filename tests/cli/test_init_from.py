"""Trainings that start from given weights, and with frozen parts, by the command line."""

import json
import re
import shlex
from pathlib import Path

import pytest
import torch
import yaml

from sinkformer_pl.cli.settings import read_settings
from sinkformer_pl.training.checkpoint_file import read_checkpoint
from tests.cli.conftest import ROOT, TINY
from tests.trials.kill_and_resume import differences

SOURCE = "runs/tiny/version_0/checkpoints/best.ckpt"
FROZEN = {
    **TINY,
    "name": "fine",
    "model": {**TINY["model"], "schedule": "Constant", "freeze": ["backbone.embed", "backbone.blocks.0-0"]},
    "trainer": {
        **TINY["trainer"],
        "max_epochs": 3,
        "callbacks": [{"class_path": "BackboneFinetuning", "init_args": {"unfreeze_backbone_at_epoch": 1}}],
    },
}


@pytest.fixture
def fine(tmp_path: Path, trained: Path) -> str:
    """Path of a YAML file of a training from the weights of the tiny run, with frozen parts."""
    path = tmp_path / "fine.yaml"
    path.write_text(yaml.safe_dump({**FROZEN, "init_from": SOURCE}))
    return str(path)


def weights(path: str | Path) -> dict[str, torch.Tensor]:
    return read_checkpoint(path)["state_dict"]


def test_a_training_starts_from_the_weights_of_another(fine, run, tmp_path):
    said = run("fit", "--config", fine, "--trainer.max_steps", "1", "--seed_everything", "7")
    assert f"initialised from {SOURCE}: " in said
    assert " of them frozen" in said
    there, here = weights(SOURCE), weights("runs/fine/version_0/checkpoints/last.ckpt")
    # One step at the rate of a warm-up, with the backbone frozen.
    for name, value in here.items():
        assert torch.equal(value, there[name]) != name.startswith("head."), name
        assert torch.allclose(value, there[name], atol=0.01)
    config = yaml.safe_load(Path("runs/fine/version_0/config.yaml").read_text())
    assert config["init_from"] == str(tmp_path / SOURCE)
    assert config["model"]["freeze"] == ["backbone.embed", "backbone.blocks.0-0"]


def test_it_resumes_bit_for_bit_without_the_file(fine, run, fail, tmp_path):
    run("fit", "--config", fine)
    steps = read_checkpoint("runs/fine/version_0/checkpoints/last.ckpt")["global_step"]
    again = ["fit", "--config", fine, "--name", "parts", "--ckpt_path", "last"]
    # Within the first epoch, and within that of the unfreezing.
    run(*again[:-2], "--trainer.max_steps", "1")
    (tmp_path / SOURCE).rename(tmp_path / "moved.ckpt")
    run(*again, "--trainer.max_steps", str(steps // 2))
    again += ["--trainer.max_steps", "-1"]
    assert "initialised" not in run(*again)
    assert json.loads(Path("runs/parts/version_0/fit.json").read_text())["resumed"] == [0, 1]
    alone, parts = (tmp_path / f"runs/{name}/version_0" for name in ("fine", "parts"))
    left = [line for line in differences(alone, parts) if "/lr_schedulers/0/steps" not in line]
    assert left == []
    config = yaml.safe_load((parts / "config.yaml").read_text())
    assert config["init_from"] == str(tmp_path / SOURCE)
    there, here = weights("moved.ckpt"), weights(parts / "checkpoints/last.ckpt")
    frozen = {name for name in here if torch.equal(here[name], there[name])}
    assert frozen == {name for name in here if name.startswith(("backbone.embed.", "backbone.blocks.0."))}
    # From another folder it is the same file still.
    with pytest.MonkeyPatch.context() as patch:
        (tmp_path / "elsewhere").mkdir()
        patch.chdir(tmp_path / "elsewhere")
        there = ["--config", fine, "--ckpt_path", str(parts / "checkpoints/last.ckpt")]
        assert read_settings("fit", there).plain()["init_from"] == str(tmp_path / SOURCE)
    # Other weights to start from are none to go on with.
    for flags in (["--init_from", "moved.ckpt"], ["--init_only", "backbone"]):
        message = fail(*again, *flags)
        assert flags[0][2:] in message
        assert "--ckpt_path" in message
    message = fail(*again, "--model.freeze", "backbone.embed")
    assert "model.freeze is ['backbone.embed', 'backbone.blocks.0-0'] in the checkpoint" in message


def test_parts_and_what_fits_by_flags(trained, tiny, run):
    deeper = ["fit", "--config", tiny, "--name", "deep", "--model.backbone.depth", "3", "--trainer.max_steps", "1"]
    said = run(*deeper, "--init_from", SOURCE, "--init_strict", "false", "--model.normalization", "Softmax")
    assert "  new, not in the file: backbone.blocks.2" in said
    said = run(*deeper, "--init_from", SOURCE, "--init_only", "backbone.blocks.0-1")
    assert "  new" not in said
    assert "  left out of the file: backbone.embed, backbone.norm, backbone.pool, head" in said
    assert read_checkpoint("runs/deep/version_1/checkpoints/last.ckpt")["sinkformer_pl_config"]["init_only"] == (
        "backbone.blocks.0-1"
    )


def test_what_can_not_be_is_a_line_before_anything_is_written(trained, tiny, fail):
    fit = ["fit", "--config", tiny]
    for flags, said in (
        (["--init_from", "nowhere.ckpt"], ["init_from", "nowhere.ckpt", "no such file"]),
        (["--init_from", SOURCE, "--model.backbone.dim", "16"], ["backbone.dim is 8", "init_strict"]),
        (["--init_from", SOURCE, "--init_only", "backbone.block"], ["init_only backbone.block", "backbone.blocks"]),
        (["--init_only", "backbone"], ["init_only backbone", "--init_from"]),
        (["--init_from", SOURCE, "--ckpt_path", SOURCE], ["init_from", "--ckpt_path"]),
        (["--model.freeze", "backbone.blocks.0-3"], ["model.freeze backbone.blocks.2, of backbone.blocks.0-3"]),
        (["--model.freeze", "[backbone, head]"], ["model.freeze", "nothing would be trained"]),
    ):
        message = fail(*fit, *flags)
        for words in said:
            assert words in message, message


def test_the_examples_of_the_documentation_run(run, tmp_path):
    (tmp_path / "configs").symlink_to(ROOT / "configs")
    page = (ROOT / "docs/training.md").read_text(encoding="utf-8")
    sections = [
        page.partition(f"\n## {title}\n")[2].partition("\n## ")[0] for title in ("From given weights", "Frozen parts")
    ]
    lines = [
        line for block in re.findall(r"```sh\n(.*?)```", "".join(sections), re.DOTALL) for line in block.splitlines()
    ]
    small = "--data.train_size 40 --model.backbone.dim 8 --model.backbone.num_heads 2 --model.backbone.mlp_dim 8"
    quiet = "--trainer.accelerator cpu --trainer.enable_progress_bar false --trainer.max_epochs 2"
    said = [run(*shlex.split(line)[3:], *small.split(), *quiet.split()) for line in lines]
    assert len(said) == 4
    assert "  resized: backbone.positions, 4 x 4 to 6 x 6" in said[1]
    assert "of them frozen" in said[2]
    there, here = (
        weights("runs/image/version_0/checkpoints/best.ckpt"),
        weights("runs/frozen/version_0/checkpoints/last.ckpt"),
    )
    frozen = ("backbone.embed.", "backbone.encoder.blocks.0.", "backbone.encoder.blocks.1.")
    assert {name for name in here if torch.equal(here[name], there[name])} == {n for n in here if n.startswith(frozen)}
    groups = read_checkpoint("runs/thawed/version_0/checkpoints/last.ckpt")["optimizer_states"][0]["param_groups"]
    assert len(groups) == 2
