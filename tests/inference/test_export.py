"""Exported files give what the model gives, elsewhere too."""

import csv
import json
import resource
import subprocess
import sys
from functools import partial

import pytest
import torch

import sinkformer_pl
from sinkformer_pl.cli import main
from sinkformer_pl.data.learnt import Learnt
from sinkformer_pl.errors import UserError
from sinkformer_pl.inference.export import TOLERANCE, Example, export
from sinkformer_pl.inference.model import TrainedModel
from sinkformer_pl.models import PointCloudTransformer, SetTransformer
from sinkformer_pl.normalizations import registered
from sinkformer_pl.tasks import Classifier
from tests.inference.conftest import BACKBONES
from tests.inference.test_load import inputs_of

pytest.importorskip("onnxscript", reason="onnxscript isn't installed: pip install -e '.[export]'")

WITHOUT_PACKAGE = """
import json, sys
sys.modules["sinkformer_pl"] = None
import torch
extra = {"sinkformer_pl": ""}
module = torch.export.load("model.pt2", extra_files=extra).module()
inputs = torch.load("inputs.pt")
torch.save([output.detach() for output in module(*inputs)], "outputs.pt")
about = json.loads(extra["sinkformer_pl"])
print(about["classes"], about["preprocessing"]["mean"])
"""
NORMALIZATIONS = {
    **{name: (name, {}) for name in registered() if name != "Sinkhorn"},
    **{f"Sinkhorn {n}": ("Sinkhorn", {"n_iters": n}) for n in (3, 21)},
}
NETWORKS = {
    **BACKBONES,
    "square": partial(SetTransformer, dim=16, num_heads=2, inducing_points=0),
    "pct": partial(
        PointCloudTransformer, dim=32, depth=1, centres=(16, 8), neighbours=4, fused_dim=32, head_dims=(16,)
    ),
}


def batches_of(kind):
    """Return batches of other sizes and lengths than the first one's."""
    if kind == "image":
        return [Example(torch.randn(size, 3, 16, 16), None) for size in (3, 1)]
    made = []
    for size, length in ((3, 21), (1, 17), (4, 30)):
        real = torch.arange(length) < torch.randint(9, length + 1, (size, 1))
        inputs = torch.randint(0, 300, (size, length)) if kind == "text" else torch.randn(size, length, 3)
        made.append(Example(inputs, real))
    return made


def export_untrained(checkpoints, kind, normalization, path):
    """Export a new network of a kind under a normalization, with the preprocessing of a trained one."""
    name, given = NORMALIZATIONS[normalization]
    torch.manual_seed(0)
    trained = sinkformer_pl.load(checkpoints[kind if kind in checkpoints else "cloud"], device="cpu")
    network = Classifier(NETWORKS[kind], partial(registered()[name], **given), 2)
    return export(TrainedModel(network, Learnt(trained.classes, trained.preprocessing), "cpu"), path, batches_of(kind))


@pytest.mark.parametrize("kind", ["image", "text", "cloud"])
def test_weights_bring_the_whole_model(checkpoints, tmp_path, kind):
    model = sinkformer_pl.load(checkpoints[kind], device="cpu")
    assert export(model, tmp_path / "model.safetensors", batches_of(kind)) == 0
    inputs, _, _ = inputs_of(kind, tmp_path / "new")
    again = sinkformer_pl.load(tmp_path / "model.safetensors", device="cpu")
    assert [each.scores for each in again.predict(inputs)] == [each.scores for each in model.predict(inputs)]
    assert (tmp_path / "tokenizer.json").exists() == (kind == "text")


def test_weights_bring_their_plugins_and_the_column_of_texts(checkpoints, tmp_path, monkeypatch):
    (tmp_path / "brings_nothing.py").write_text("LOADED = True")
    monkeypatch.syspath_prepend(str(tmp_path))
    content = torch.load(checkpoints["text"], weights_only=True)
    content["sinkformer_pl_config"] = {"plugins": ["brings_nothing"], "data": {"init_args": {"text": "review"}}}
    torch.save(content, tmp_path / "x.ckpt")
    model = sinkformer_pl.load(tmp_path / "x.ckpt", device="cpu")
    export(model, tmp_path / "model.safetensors", batches_of("text"))
    monkeypatch.delitem(sys.modules, "brings_nothing")
    again = sinkformer_pl.load(tmp_path / "model.safetensors", device="cpu")
    assert "brings_nothing" in sys.modules
    assert again.plugins == ("brings_nothing",)
    assert again.text_columns == ("review",)
    with pytest.raises(UserError, match="--plugins nowhere: no module"):
        sinkformer_pl.load(tmp_path / "model.safetensors", plugins=["nowhere"])


def test_a_program_runs_without_the_package(checkpoints, tmp_path):
    model = sinkformer_pl.load(checkpoints["image"], device="cpu")
    assert export(model, tmp_path / "model.pt2", batches_of("image")) < TOLERANCE
    inputs = torch.randn(5, 3, 16, 16)
    torch.save((inputs,), tmp_path / "inputs.pt")
    done = subprocess.run([sys.executable, "-c", WITHOUT_PACKAGE], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.split() == f"{list(model.classes)} {list(model.preprocessing.mean)}".split()
    with torch.inference_mode():
        wanted = model.network.outputs(inputs)
    torch.testing.assert_close(torch.load(tmp_path / "outputs.pt"), list(wanted), rtol=1e-4, atol=1e-5)


def test_onnx_runs_elsewhere_and_predicts_as_the_checkpoint(checkpoints, tmp_path, monkeypatch, capsys):
    import onnxruntime

    monkeypatch.chdir(tmp_path)
    texts = ["a good thing", "a bad and poor thing number 3 much longer than the other", "fine"]
    (tmp_path / "new.csv").write_text("\n".join(["text", *texts]))
    main(["export", "--ckpt_path", str(checkpoints["text"]), "--format", "onnx", "--output", "m.onnx", "new.csv"])
    session = onnxruntime.InferenceSession("m.onnx")
    assert [value.name for value in session.get_inputs()] == ["inputs", "mask"]
    about = json.loads(session.get_modelmeta().custom_metadata_map["sinkformer_pl"])
    assert about["classes"] == ["neg", "pos"]
    rows = []
    for name in (checkpoints["text"], "m.onnx"):
        main(["predict", "--ckpt_path", str(name), "new.csv", "--output", "-"])
        rows.append(list(csv.reader(capsys.readouterr().out.splitlines()[-3:])))
    for one, other in zip(*rows, strict=True):
        assert one[:2] == other[:2]
        assert float(one[2]) == pytest.approx(float(other[2]), abs=1e-5)


def test_refusals_leave_nothing(checkpoints, tmp_path, capsys):
    model = sinkformer_pl.load(checkpoints["cloud"], device="cpu")
    with pytest.raises(UserError, match=r"\.tflite"):
        export(model, tmp_path / "model.tflite", batches_of("cloud"))

    class Broken(SetTransformer):
        def forward(self, inputs, mask=None):
            return super().forward(inputs, mask) if inputs.sum() > 0 else super().forward(-inputs, mask)

    model.network.backbone.__class__ = Broken
    with pytest.raises(UserError, match=r"Broken under Sinkhorn.*\.safetensors"):
        export(model, tmp_path / "model.pt2", batches_of("cloud"))
    (tmp_path / "there.pt2").touch()
    for arguments, told in (
        (["--format", "torch", "--output", str(tmp_path / "there.pt2")], "--overwrite"),
        (["--format", "onnx", "--output", str(tmp_path / "there.pt2")], ".onnx"),
        (["--format", "onnx", "--output", str(tmp_path / "no" / "x.onnx")], "no folder"),
        (["--format", "torch", "--ckpt_path", str(tmp_path / "there.pt2")], "damaged"),
    ):
        with pytest.raises(SystemExit) as exit_:
            main(["export", "--ckpt_path", str(checkpoints["image"]), *arguments])
        assert exit_.value.code == 2
        assert told in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["there.pt2"]


@pytest.mark.parametrize(
    "suffix", [".safetensors", *(pytest.param(s, marks=pytest.mark.slow) for s in (".pt2", ".onnx"))]
)
def test_a_full_disk_is_told_as_such_and_leaves_nothing(checkpoints, tmp_path, suffix):
    model = sinkformer_pl.load(checkpoints["text"], device="cpu")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limits[1]))
    try:
        with pytest.raises(OSError, match="File too large"):
            export(model, tmp_path / f"model{suffix}", batches_of("text"))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert not list(tmp_path.iterdir())


def test_outputs_that_are_no_numbers_are_an_error(checkpoints, tmp_path, monkeypatch):
    model = sinkformer_pl.load(checkpoints["cloud"], device="cpu")

    def load_broken(path):
        found = sinkformer_pl.load(path, device="cpu")
        found.network.head.bias.data[0] = torch.nan
        return found

    monkeypatch.setattr("sinkformer_pl.inference.export.load", load_broken)
    with pytest.raises(UserError, match="differ from the model's by nan"):
        export(model, tmp_path / "model.safetensors", batches_of("cloud"))
    assert not list(tmp_path.iterdir())


def test_another_tokenizer_beside_the_file_is_kept_unless_asked(checkpoints, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "new.csv").write_text("text\ngood\nbad")
    (tmp_path / "tokenizer.json").write_text("mine")
    command = ["export", "--ckpt_path", str(checkpoints["text"]), "--format", "safetensors", "new.csv"]
    with pytest.raises(SystemExit) as exit_:
        main(command)
    assert exit_.value.code == 2
    assert "tokenizer.json: another one is there already" in capsys.readouterr().err
    assert (tmp_path / "tokenizer.json").read_text() == "mine"
    main([*command, "--overwrite"])
    main([*command, "--output", "again.safetensors"])
    assert "mine" not in (tmp_path / "tokenizer.json").read_text()


# A program of torch.export is the first half of the way to ONNX, so not each is tried by itself.
@pytest.mark.slow
@pytest.mark.parametrize(
    ("normalization", "suffix", "kind"),
    [
        *(("Softmax", ".onnx", kind) for kind in ("text", "cloud")),
        *(("Sinkhorn 3", ".onnx", kind) for kind in ("image", "text", "cloud", "pct")),
        *(("Sinkhorn 21", ".onnx", kind) for kind in ("image", "text")),
        *(("Sparsemax", ".onnx", kind) for kind in ("image", "pct")),
        *(("SemiUnbalancedSinkhorn", ".onnx", kind) for kind in ("text", "cloud")),
        *(("Sinkhorn 3", ".pt2", kind) for kind in ("image", "text", "cloud", "pct")),
    ],
)
def test_programs_agree_for_every_modality(checkpoints, tmp_path, kind, normalization, suffix):
    assert export_untrained(checkpoints, kind, normalization, tmp_path / f"model{suffix}") < TOLERANCE


@pytest.mark.slow
@pytest.mark.parametrize("normalization", [name for name in NORMALIZATIONS if name != "SlicedTransport"])
def test_programs_agree_for_every_normalization(checkpoints, tmp_path, normalization):
    assert export_untrained(checkpoints, "square", normalization, tmp_path / "model.onnx") < TOLERANCE


@pytest.mark.slow
def test_what_depends_on_the_number_of_tokens_is_refused_as_a_program(checkpoints, tmp_path):
    with pytest.raises(UserError, match=r"under SlicedTransport.*\.safetensors"):
        export_untrained(checkpoints, "square", "SlicedTransport", tmp_path / "model.onnx")
    assert not list(tmp_path.iterdir())
