"""A small trained model of each modality, on files of its own."""

from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import pytorch_lightning as pl
from PIL import Image
from torch.optim import AdamW

from sinkformer_pl.cli import main
from sinkformer_pl.data import ClassificationData, ImageFolder, PointClouds, TextTable
from sinkformer_pl.models import SetTransformer, TextTransformer, VisionTransformer
from sinkformer_pl.normalizations import Sinkhorn
from sinkformer_pl.tasks import Classifier

KINDS = ("image", "text", "cloud")


def photo(path: Path, dark: bool, seed: int) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    level = 60 if dark else 190
    pixels = np.random.default_rng(seed).normal(level, 20, (17, 20, 3)).clip(0, 255).astype(np.uint8)
    Image.fromarray(pixels).save(path)
    return path


def cloud(path: Path, flat: bool, seed: int) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    points = np.random.default_rng(seed).normal(size=(24 + seed % 9, 3)) * [1, 1, 0.05 if flat else 1]
    if path.suffix == ".npy":
        np.save(path, points)
    else:
        np.savetxt(path, points)
    return path


def words(good: bool, seed: int) -> str:
    return f"{'a good and fine' if good else 'a bad and poor'} thing, number {seed}"


def data_of(kind: str, root: Path) -> ClassificationData:
    for part, number in (("train", 20), ("test", 4)):
        for seed in range(number):
            for first in (True, False):
                if kind == "image":
                    photo(root / part / ("dark" if first else "light") / f"{seed}.png", first, 100 + seed)
                elif kind == "cloud":
                    cloud(root / ("flat" if first else "round") / part / f"{seed}.xyz", first, 100 + seed)
    if kind == "image":
        return ImageFolder(root, image_size=16, crop_area=1.0, batch_size=8)
    if kind == "cloud":
        return PointClouds(root, batch_size=8)
    root.mkdir(exist_ok=True)
    for part, number in (("train", 20), ("test", 4)):
        rows = [f'"{words(good, seed)}",{"pos" if good else "neg"}' for seed in range(number) for good in (True, False)]
        (root / f"{part}.csv").write_text("\n".join(["review,label", *rows]))
    return TextTable(root, text="review", vocab_size=300, max_length=32, batch_size=8)


BACKBONES = {
    "image": partial(VisionTransformer, image_size=16, patch_size=4, dim=16, depth=1, num_heads=2),
    "text": partial(TextTransformer, vocab_size=300, max_length=32, dim=16, depth=1, num_heads=2),
    "cloud": partial(SetTransformer, dim=16, num_heads=2, inducing_points=4),
}


@pytest.fixture(scope="session")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Return a checkpoint of each kind, trained until it tells its two classes apart."""
    folder = tmp_path_factory.mktemp("inference")
    for kind in KINDS:
        pl.seed_everything(0)
        data = data_of(kind, folder / kind)
        model = Classifier(BACKBONES[kind], partial(Sinkhorn, n_iters=3), 2, optimizer=partial(AdamW, lr=0.01))
        quiet = {"enable_progress_bar": False, "enable_model_summary": False, "enable_checkpointing": False}
        trainer = pl.Trainer(max_epochs=5, accelerator="cpu", logger=False, default_root_dir=folder, **quiet)
        trainer.fit(model, data)
        trainer.save_checkpoint(folder / f"{kind}.ckpt", weights_only=True)
    return {kind: folder / f"{kind}.ckpt" for kind in KINDS}


@pytest.fixture
def run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> Callable[..., tuple[str, str]]:
    """Run predict in an empty folder; returns standard output and standard error."""
    monkeypatch.chdir(tmp_path)

    def run(*argv: str | Path) -> tuple[str, str]:
        capfd.readouterr()
        main(["predict", *map(str, argv)])
        return capfd.readouterr()

    return run


@pytest.fixture
def fail(run, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """Run a predict that must be refused; returns its line, having checked that no file was written."""

    def fail(*argv: str | Path) -> str:
        before = sorted(tmp_path.rglob("*"))
        with pytest.raises(SystemExit) as exit_:
            run(*argv)
        assert exit_.value.code == 2
        [line] = [line for line in capfd.readouterr().err.splitlines() if line.startswith("error: ")]
        assert sorted(tmp_path.rglob("*")) == before
        return line

    return fail
