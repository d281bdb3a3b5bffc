"""Models of timm as backbones, with weights from files and the preprocessing of these."""

import copy
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import pytorch_lightning as pl
import torch
from PIL import Image

from sinkformer_pl import Sinkhorn
from sinkformer_pl.backbones import TimmBackbone
from sinkformer_pl.data import Digits
from sinkformer_pl.data.images.preprocessing import ImagePreprocessing
from sinkformer_pl.normalizations import Softmax
from sinkformer_pl.tasks import Classifier, init_from
from sinkformer_pl.training.checkpoint_file import read_checkpoint

timm = pytest.importorskip("timm")

NAME = "vit_tiny_patch16_224.augreg_in21k"
SMALL = {"patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 2}
ARGUMENTS = {"image_size": 32, "channels": 1, "arguments": SMALL}


@pytest.fixture(scope="module")
def weights(tmp_path_factory) -> Path:
    """Folder of the weights of a small model, as timm writes it for the hub, and as a state_dict."""
    torch.manual_seed(0)
    model = timm.create_model(NAME, img_size=32, num_classes=7, in_chans=1, **SMALL)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    folder = tmp_path_factory.mktemp("weights")
    model.pretrained_cfg |= {"mean": (0.25,), "std": (0.125,), "crop_pct": 0.5, "input_size": (1, 32, 32)}
    timm.models.save_for_hf(model, folder, model_args={"img_size": 32, **SMALL}, safe_serialization=True)
    torch.save({"state_dict": model.state_dict()}, folder / "weights.pth")
    return folder


def features(weights: Path, images: torch.Tensor) -> torch.Tensor:
    """Return what timm makes of images by these weights."""
    model = timm.create_model(NAME, img_size=32, num_classes=0, in_chans=1, **SMALL).eval()
    model.load_state_dict(torch.load(weights / "weights.pth")["state_dict"], strict=False)
    return model(images)


@pytest.mark.parametrize("file", ["", "model.safetensors", "weights.pth"])
def test_features_are_those_of_timm_by_the_weights_of_a_file(weights, file):
    images = torch.randn(2, 1, 32, 32)
    backbone = TimmBackbone(Softmax, NAME, pretrained=weights / file, **ARGUMENTS).eval()
    output = backbone(images)
    torch.testing.assert_close(output, features(weights, images), atol=1e-5, rtol=1e-5)
    assert output.shape == (2, backbone.out_dim)
    sinkhorn = TimmBackbone(Sinkhorn, NAME, pretrained=weights / file, layers=-1, **ARGUMENTS).eval()
    assert (sinkhorn(images) - output).abs().max() > 1e-4
    assert [hasattr(block.attn, "core") for block in sinkhorn.network.blocks] == [False, True]


def test_positions_and_channels_are_fitted_as_timm_does(weights):
    arguments = {**ARGUMENTS, "image_size": [16, 48]}
    backbone = TimmBackbone(Softmax, NAME, pretrained=weights, **arguments)
    assert backbone(torch.randn(2, 1, 16, 48)).shape == (2, 32)
    trained = torch.load(weights / "weights.pth")["state_dict"]
    assert torch.equal(backbone.network.pos_embed[:, 0], trained["pos_embed"][:, 0])
    assert torch.equal(backbone.network.blocks[0].attn.qkv.weight, trained["blocks.0.attn.qkv.weight"])
    [tokens] = backbone.describe_tokens(torch.randn(1, 1, 16, 48))
    assert (tokens.grid, tokens.leading, tokens.size) == ((2, 6), 1, 13)


@pytest.mark.parametrize(
    ("mode", "pct", "interpolation"),
    [
        ("center", 0.875, "bicubic"),
        ("squash", 1.0, "bicubic"),
        ("squash", 0.9, "bilinear"),
        ("center", 1.0, "bilinear"),
    ],
)
@pytest.mark.parametrize("shape", [(60, 41), (40, 77)])
def test_images_are_prepared_as_timm_does(mode, pct, interpolation, shape):
    y, x, channel = np.meshgrid(*map(np.arange, (*shape, 3)), indexing="ij")
    image = Image.fromarray((127 + 120 * np.sin(x / 5 + y / 7 + channel)).astype(np.uint8))
    constants = {"mean": [0.2, 0.3, 0.4], "std": [0.1, 0.2, 0.3]}
    kept = {"interpolation": interpolation, "crop_pct": pct, "crop_mode": mode}
    wanted = timm.data.create_transform(input_size=(3, 32, 32), is_training=False, **constants, **kept)(image)
    got = ImagePreprocessing(32, 3, **constants, **kept)(image)
    # Pillow and torchvision round each value, twice.
    torch.testing.assert_close(got, wanted, atol=3 / 255 / 0.1, rtol=0)
    assert (got - wanted).abs().mean() < 0.5 / 255 / 0.1


def trainer(**arguments) -> pl.Trainer:
    quiet = dict.fromkeys(("enable_progress_bar", "enable_model_summary", "logger"), False)
    return pl.Trainer(accelerator="cpu", max_steps=1, limit_val_batches=1, **quiet, **arguments)


def test_a_checkpoint_needs_no_other_file_and_keeps_the_preprocessing(weights, tmp_path):
    moved = tmp_path / "weights"
    moved.mkdir()
    for file in weights.iterdir():
        (moved / file.name).write_bytes(file.read_bytes())
    backbone = partial(TimmBackbone, name=NAME, pretrained=str(moved), **ARGUMENTS)
    model = Classifier(backbone, Sinkhorn, 10, layer_decay=0.5, freeze="backbone.network.patch_embed")
    data = Digits(image_size=32, batch_size=16)
    engine = trainer(enable_checkpointing=False)
    engine.fit(model, data)
    kept = {"mean": [0.25], "std": [0.125], "interpolation": "bicubic", "crop_pct": 0.5, "crop_mode": "center"}
    assert kept.items() <= data.learnt["preprocessing"].items()
    assert all(dataset.preprocessing == data.preprocessing for dataset in data.datasets.values())
    sample = data.datasets["train"].images[data.datasets["train"].chosen[0]]
    torch.testing.assert_close(data.datasets["train"][0].inputs, data.preprocessing(sample))
    scales = [group["lr_scale"] for group in engine.optimizers[0].param_groups]
    assert sorted(set(scales)) == [0.125, 0.25, 0.5, 1]
    engine.save_checkpoint(tmp_path / "model.ckpt")
    for file in moved.iterdir():
        file.unlink()
    loaded = Classifier.load_from_checkpoint(tmp_path / "model.ckpt")
    images = torch.randn(2, 1, 32, 32)
    assert torch.equal(loaded.eval()(images), model.eval()(images))
    assert read_checkpoint(tmp_path / "model.ckpt")["hyper_parameters"] == dict(loaded.hparams)
    assert loaded.backbone.preprocessing is None
    # Evaluation by another data module is done as the training was.
    again = Digits(image_size=32)
    trainer().test(loaded, again, ckpt_path=str(tmp_path / "model.ckpt"), weights_only=True, verbose=False)
    assert again.preprocessing == data.preprocessing


@pytest.mark.parametrize(
    ("name", "resized"),
    [(NAME, "pos_embed, 1 x 17 x 32 to 1 x 25 x 32"), ("beit_base_patch16_224", "52 x 2 to 80 x 2")],
)
def test_initial_weights_of_another_size_are_fitted(name, resized, tmp_path):
    def model(size):
        return Classifier(
            partial(TimmBackbone, name=name, channels=1, image_size=size, arguments=SMALL), Softmax, num_classes=10
        )

    first, second = model([32, 32]), model([32, 48])
    torch.save(first.state_dict(), tmp_path / "weights.pth")
    done = init_from(second, tmp_path / "weights.pth")
    assert resized in str(done)
    assert not done.new
    same = "backbone.network.blocks.1.attn.qkv.weight"
    assert torch.equal(second.state_dict()[same], first.state_dict()[same])


def refused(**arguments) -> str:
    with pytest.raises(ValueError, match=r"model\.backbone") as error:
        TimmBackbone(**{"normalization": Softmax, "name": NAME, **arguments})
    return str(error.value)


def test_what_can_not_be_made_is_a_line_with_a_remedy(weights, tmp_path, monkeypatch):
    assert "did you mean vit_tiny_patch16_224" in refused(name="vit_tiny_patch16_244")
    assert "no tag in1k; vit_tiny_patch16_224 has augreg_in21k" in refused(name="vit_tiny_patch16_224.in1k")
    assert "embed_dims" in refused(arguments={"embed_dims": 3})
    assert "no such file or folder" in refused(pretrained=tmp_path / "none.pth")
    assert "no model.safetensors" in refused(pretrained=tmp_path)
    torch.save(Softmax(), tmp_path / "object.pth")
    assert "tensors alone" in refused(pretrained=tmp_path / "object.pth")
    state = torch.load(weights / "weights.pth")["state_dict"]
    torch.save({**state, "more": torch.ones(1)}, tmp_path / "more.pth")
    with pytest.warns(UserWarning, match=r"left out of the file: more"):
        TimmBackbone(Softmax, NAME, pretrained=tmp_path / "more.pth", **ARGUMENTS)
    del state["blocks.1.mlp.fc1.weight"]
    torch.save(state, tmp_path / "less.pth")
    assert "no weights for blocks.1.mlp.fc1.weight" in refused(pretrained=tmp_path / "less.pth", **ARGUMENTS)
    wide = {**ARGUMENTS, "arguments": {**SMALL, "embed_dim": 48}}
    assert "give the weights of model.backbone.name" in refused(pretrained=weights / "weights.pth", **wide)
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    assert "give model.backbone.pretrained as a file or folder" in refused(pretrained=True)


def test_images_that_do_not_fit_and_other_initial_weights_are_refused(weights):
    model = Classifier(partial(TimmBackbone, name=NAME, pretrained=str(weights), **ARGUMENTS), Softmax, 10)
    for shape in ((2, 1, 24, 32), (2, 3, 32, 32)):
        with pytest.raises(ValueError, match=r"set data\.channels to 1 and data\.image_size to \[32, 32\]"):
            model(torch.randn(shape))
    with pytest.raises(ValueError, match="takes images"):
        model(torch.randn(2, 5, 3))
    with pytest.raises(ValueError, match="pretrained weights already"):
        init_from(copy.deepcopy(model), weights / "model.safetensors")
    with pytest.raises(ValueError, match="no attention that can be converted"):
        TimmBackbone(Softmax, "test_efficientnet")
