"""Models of Hugging Face's transformers as backbones."""

import csv
import json
import shutil
from functools import partial
from pathlib import Path

import pytest
import pytorch_lightning as pl
import torch
from PIL import Image
from tokenizers import Tokenizer, models, pre_tokenizers, processors

import sinkformer_pl
from sinkformer_pl import Classifier
from sinkformer_pl.backbones import HuggingFaceBackbone
from sinkformer_pl.cli import main
from sinkformer_pl.conversion import report
from sinkformer_pl.data import TextTable
from sinkformer_pl.data.images.preprocessing import ImagePreprocessing
from sinkformer_pl.inference.export import Example, export
from sinkformer_pl.locations import locate
from sinkformer_pl.normalizations import SemiUnbalancedSinkhorn, Sinkhorn, Softmax
from tests.optional import transformers as hf

# Folders without a tokenizer or the like.
pytestmark = pytest.mark.filterwarnings("ignore:model.backbone.name")

SMALL = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
TEXT = {**SMALL, "vocab_size": 20, "pad_token_id": 1, "bos_token_id": 0, "eos_token_id": 2}
WORDS = ("[CLS]", "[PAD]", "[SEP]", "good", "bad", "film", "a", "very", "not", "[UNK]")


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A small RoBERTa, whose positions are counted from behind the number of padding, with a tokenizer of words."""
    folder = tmp_path_factory.mktemp("model")
    torch.manual_seed(0)
    model = hf.RobertaModel(hf.RobertaConfig(**TEXT, max_position_embeddings=12))
    for parameter in model.parameters():
        if parameter.ndim > 1:
            parameter.data.normal_(std=0.5)
    model.save_pretrained(folder)
    tokenizer = Tokenizer(models.WordLevel({word: n for n, word in enumerate(WORDS)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B [SEP]", special_tokens=[("[CLS]", 0), ("[SEP]", 2)]
    )
    tokenizer.enable_truncation(4)
    tokenizer.save(str(folder / "tokenizer.json"))
    return folder


@pytest.fixture(scope="module")
def image_folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("images")
    hf.ViTModel(hf.ViTConfig(**SMALL, image_size=16, patch_size=4)).save_pretrained(folder)
    return folder


def reviews(root: Path, **kwargs) -> TextTable:
    for part, count in (("train", 24), ("test", 6)):
        rows = [
            (f"a {'very ' * (n % 4)}{'good' if n % 2 else 'bad'} film {n}", ("bad", "good")[n % 2])
            for n in range(count)
        ]
        with (root / f"{part}.csv").open("w", newline="") as file:
            csv.writer(file).writerows([("text", "label"), *rows])
    return TextTable(root, max_length=10, batch_size=8, num_workers=0, **kwargs)


def trainer(**kwargs) -> pl.Trainer:
    quiet = dict.fromkeys(("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False)
    return pl.Trainer(accelerator="cpu", **quiet, **kwargs)


def test_a_checkpoint_needs_no_other_file(folder, tmp_path):
    shutil.copytree(folder, gone := tmp_path / "model")
    backbone = partial(HuggingFaceBackbone, name=str(gone), attention_dropout=0)
    learned = partial(SemiUnbalancedSinkhorn, learned=True)
    model = Classifier(backbone, learned, num_classes=2, layer_decay=0.5, freeze="backbone.network.embeddings")
    data = reviews(tmp_path)
    (rho,) = model.backbone.network.encoder.layer[0].attention.self.core.normalization.parameters()
    before, words = rho.clone(), model.backbone.network.embeddings.word_embeddings.weight.clone()
    (engine := trainer(max_epochs=1)).fit(model, data)
    assert not torch.equal(rho, before)
    assert torch.equal(model.backbone.network.embeddings.word_embeddings.weight, words)
    engine.save_checkpoint(tmp_path / "model.ckpt")
    shutil.rmtree(gone)
    loaded = sinkformer_pl.load(tmp_path / "model.ckpt", device="cpu")
    texts = ["a very good film", "bad"]
    tokens = data.tokenizer.encode(texts[0]).ids
    with torch.no_grad():
        wanted = model.eval()(torch.tensor([tokens])).softmax(-1)
    found = loaded.predict(texts)
    assert found[0].label == data.classes[wanted.argmax()]
    assert loaded.preprocessing("a film").tolist() == [0, 6, 5, 2]
    torch.testing.assert_close(loaded.features(texts)[:1], model.backbone(torch.tensor([tokens])).detach())
    example = Example(torch.tensor([tokens, tokens]), torch.ones(2, len(tokens), dtype=torch.bool))
    assert export(loaded, tmp_path / "model.safetensors", [example]) == 0
    assert sinkformer_pl.load(tmp_path / "model.safetensors").predict(texts)[0] == found[0]
    # A training resumes, too.
    content = torch.load(tmp_path / "model.ckpt", weights_only=True)
    again, data = Classifier(**content["hyper_parameters"]), reviews(tmp_path)
    data.restore(content)
    (engine := trainer(max_epochs=2)).fit(again, data, ckpt_path=tmp_path / "model.ckpt", weights_only=True)
    assert engine.global_step == 6
    assert dict(again.hparams) == dict(model.hparams)


def test_pretrained_weights_are_those_of_the_folder(folder):
    ours = HuggingFaceBackbone(Softmax, name=folder, pooling="cls")
    assert all(module.training for module in ours.modules())
    ours.eval()
    library = hf.RobertaModel.from_pretrained(folder).eval()
    tokens = torch.tensor([[0, 3, 5, 2], [0, 5, 2, 7]])
    with torch.no_grad():
        torch.testing.assert_close(ours(tokens), library(tokens).last_hidden_state[:, 0])
    assert ours.out_dim == 16
    assert ours.token_limits == (1, 10)
    assert json.loads(ours.preprocessing["tokenizer"])["truncation"] is None


@pytest.mark.parametrize("pooling", ["cls", "mean", "max"])
def test_a_padded_batch_gives_what_its_texts_give_alone(folder, pooling):
    backbone = HuggingFaceBackbone(Sinkhorn, name=folder, pooling=pooling).eval()
    tokens = torch.tensor([[0, 3, 5, 6, 2], [0, 4, 2, 19, 0], [19, 0, 0, 4, 2]])
    mask = torch.tensor([[True] * 5, [True] * 3 + [False] * 2, [False] * 2 + [True] * 3])
    # The class token is the first one of the row.
    rows = 2 if pooling == "cls" else 3
    together = backbone(tokens[:rows], mask[:rows])
    for alone, row in ((tokens[:1], 0), (tokens[1:2, :3], 1), (tokens[2:, 2:], 2))[:rows]:
        torch.testing.assert_close(together[row : row + 1], backbone(alone))
    assert backbone(tokens[:, :0]).isfinite().all()


def test_images(image_folder):
    backbone = HuggingFaceBackbone(Sinkhorn, name=image_folder, layers=-1).eval()
    library = hf.ViTModel.from_pretrained(image_folder).eval()
    images = torch.randn(2, 3, 16, 16)
    assert [site.core is not None for site in report(backbone)] == [False, True]
    tokens = library(images).last_hidden_state
    assert not torch.allclose(backbone(images), tokens.mean(1), atol=1e-6)
    torch.testing.assert_close(
        HuggingFaceBackbone(Softmax, name=image_folder).eval()(images), tokens.mean(1), atol=1e-5, rtol=1e-5
    )
    described = backbone.describe_tokens(images)
    assert [(each.kind, each.size, each.leading, each.grid) for each in described] == [("patches", 17, 1, (4, 4))] * 2


def test_what_a_model_pools_itself(folder, image_folder):
    backbone = HuggingFaceBackbone(Softmax, name=image_folder, pooling="model").eval()
    images = torch.randn(2, 3, 16, 16)
    wanted = hf.ViTModel.from_pretrained(image_folder).eval()(images).pooler_output
    torch.testing.assert_close(backbone(images), wanted, atol=1e-5, rtol=1e-5)
    # What isn't read out isn't there, and all that is there is trained.
    for pooling in ("mean", "model"):
        backbone = HuggingFaceBackbone(Sinkhorn, name=folder, pooling=pooling)
        backbone(torch.tensor([[0, 3, 5, 2]])).sum().backward()
        assert all(parameter.grad is not None for parameter in backbone.parameters())


def test_of_an_encoder_with_a_decoder_the_encoder_is_taken():
    config = {
        "model_type": "t5",
        "vocab_size": 20,
        "d_model": 16,
        "d_kv": 8,
        "d_ff": 32,
        "num_layers": 1,
        "num_heads": 2,
    }
    backbone = HuggingFaceBackbone(Sinkhorn, config=config).eval()
    again = HuggingFaceBackbone(Sinkhorn, **backbone.saved_arguments).eval()
    again.load_state_dict(backbone.state_dict())
    tokens = torch.tensor([[3, 4, 5]])
    assert torch.equal(backbone(tokens), again(tokens))
    assert not any("decoder" in name for name, _ in backbone.named_parameters())


def test_a_saved_conversion_is_not_the_task_s(folder, tmp_path):
    model = sinkformer_pl.convert(hf.RobertaModel.from_pretrained(folder), "SemiUnbalancedSinkhorn", learned=True)
    model.save_pretrained(tmp_path)
    backbone = HuggingFaceBackbone(Sinkhorn, name=tmp_path, layers=0)
    assert list(backbone.network.config.sinkformer_pl["layers"]) == ["encoder.layer.0.attention.self"]


def test_positions_do_not_decay_by_default(folder):
    backbone = HuggingFaceBackbone(Sinkhorn, name=folder)
    assert backbone.no_weight_decay() == {"network.embeddings.position_embeddings.weight"}


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({}, "either name"),
        ({"name": "x", "config": {}}, "either name"),
        ({"name": "FOLDER", "pooling": "median"}, "cls, mean, max, model"),
        ({"name": "/nowhere/at/all"}, "/nowhere/at/all"),
        ({"name": "package:no_such_package/model"}, "pip install no_such_package"),
        ({"name": "package:sinkformer_pl/model"}, "py.typed"),
        ({"config": {"model_type": "no such"}}, "model.backbone.config"),
        ({"config": {"model_type": "clip", "text_config": TEXT, "vision_config": SMALL}}, "CLIPVisionModel"),
    ],
)
def test_wrong_arguments(arguments, said, folder, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    given = {name: folder if value == "FOLDER" else value for name, value in arguments.items()}
    with pytest.raises(ValueError, match=said):
        HuggingFaceBackbone(Softmax, **given)


def test_weights_that_are_missing_are_an_error(folder, tmp_path):
    shutil.copytree(folder, tmp_path, dirs_exist_ok=True)
    config = hf.RobertaConfig.from_pretrained(folder)
    config.num_hidden_layers = 3
    config.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"encoder\.layer\.2"):
        HuggingFaceBackbone(Softmax, name=tmp_path)


def test_wrong_inputs(folder, image_folder):
    texts, images = (HuggingFaceBackbone(Softmax, name=name) for name in (folder, image_folder))
    for backbone, inputs, said in (
        (texts, torch.zeros(1, 11, dtype=torch.int64), "data.max_length to 10"),
        (texts, torch.full((1, 4), 20), "0 to 19.*data.tokenizer"),
        (texts, torch.zeros(1, 3, 16, 16), "token numbers"),
        (images, torch.zeros(1, 4, dtype=torch.int64), "images"),
        (images, torch.zeros(1, 3, 8, 8), "data.image_size to 16"),
    ):
        with pytest.raises(ValueError, match=said):
            backbone(inputs)


def test_files_of_an_installed_package():
    assert Path(locate("package:sinkformer_pl/py.typed")).is_file()
    assert locate("folder/model") == "folder/model"


def test_the_tokenizer_of_a_folder(folder, tmp_path):
    data = reviews(tmp_path, tokenizer=folder, vocab_size=20)
    data.setup()
    assert data.tokenizer.encode("a film").tokens == ["[CLS]", "a", "film", "[SEP]"]
    with pytest.raises(ValueError, match=r"no tokenizer\.json"):
        reviews(tmp_path, tokenizer=tmp_path).setup()


def test_the_command_line_takes_the_tokenizer_of_the_model(folder, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    reviews(tmp_path)
    model = ["--model.backbone", "HuggingFaceBackbone", "--model.backbone.name", str(folder)]
    model += ["--model.backbone.attention_dropout", "0", "--model.normalization", "Sinkhorn"]
    data = ["--data", "TextTable", "--data.root", str(tmp_path), "--data.max_length", "10", "--data.num_workers", "0"]
    quiet = ["--trainer.accelerator", "cpu", "--trainer.enable_progress_bar", "false", "--trainer.logger", "false"]
    main(["fit", *model, *data, *quiet, "--trainer.max_epochs", "1", "--name", "first"])
    assert "taken over from HuggingFaceBackbone for the data: tokenizer" in capsys.readouterr().out
    checkpoint = str(next(tmp_path.rglob("best.ckpt")))
    assert sinkformer_pl.load(checkpoint, device="cpu").preprocessing("a film").tolist() == [0, 6, 5, 2]
    # From a training of it another one starts, under another normalization.
    main(["fit", *model, *data, *quiet, "--trainer.fast_dev_run", "1", "--init_from", checkpoint])
    assert "initialised from" in capsys.readouterr().out
    with pytest.warns(UserWarning, match="lowercase is True, but the network's tokenizer"):
        main(["fit", *model, *data, *quiet, "--trainer.fast_dev_run", "1", "--data.lowercase", "true"])


def test_pairs_of_texts_take_the_tokenizer_too(folder, tmp_path):
    backbone = HuggingFaceBackbone(Softmax, name=folder)
    with (tmp_path / "train.csv").open("w") as file:
        file.write("one,two,label\n" + "".join(f"a film {n},very good {n},{'xy'[n % 2]}\n" for n in range(12)))
    shutil.copy(tmp_path / "train.csv", tmp_path / "test.csv")
    data = TextTable(tmp_path, text_columns=["one", "two"], max_length=10)
    assert data.take_over({"preprocessing": backbone.preprocessing}) == ["tokenizer"]
    data.setup()
    assert data.tokenizer.to_str() == backbone.preprocessing["tokenizer"]
    short = TextTable(tmp_path, text_columns=["one", "two"], max_length=3)
    with pytest.raises(ValueError, match="max_length is 3"):
        short.take_over({"preprocessing": backbone.preprocessing})


@pytest.mark.parametrize(
    ("processor", "wanted"),
    [
        ({"size": {"height": 16, "width": 16}, "resample": 3}, ("bicubic", 1.0, "squash")),
        (
            {"size": {"shortest_edge": 20}, "crop_size": {"height": 16, "width": 16}, "do_center_crop": True},
            ("bilinear", 0.8, "center"),
        ),
        ({"size": 16, "resample": 0}, ("nearest", 1.0, "squash")),
    ],
)
def test_images_are_resized_as_those_of_the_model(image_folder, tmp_path, processor, wanted):
    shutil.copytree(image_folder, tmp_path, dirs_exist_ok=True)
    constants = {"image_mean": [0.5, 0.4, 0.3], "image_std": [0.2, 0.2, 0.1], "do_normalize": True}
    (tmp_path / "preprocessor_config.json").write_text(json.dumps({**processor, **constants}))
    known = HuggingFaceBackbone(Softmax, name=tmp_path).preprocessing
    assert (known["interpolation"], known["crop_pct"], known["crop_mode"]) == wanted
    assert (known["mean"], known["std"]) == ([0.5, 0.4, 0.3], [0.2, 0.2, 0.1])


def test_an_image_as_the_processor_of_the_model_makes_it(image_folder, tmp_path):
    processor = hf.ViTImageProcessor(size={"height": 16, "width": 16}, resample=3)
    shutil.copytree(image_folder, tmp_path, dirs_exist_ok=True)
    processor.save_pretrained(tmp_path)
    known = dict(HuggingFaceBackbone(Softmax, name=tmp_path).preprocessing)
    assert known.pop("kind") == "images"
    picture = Image.fromarray(torch.randint(0, 256, (40, 60, 3), dtype=torch.uint8).numpy())
    ours = ImagePreprocessing(image_size=16, channels=3, **known)(picture)
    torch.testing.assert_close(ours, processor(picture, return_tensors="pt")["pixel_values"][0], atol=0.02, rtol=0)
