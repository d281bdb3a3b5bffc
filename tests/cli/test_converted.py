"""The commands on a network of another library, whose attention is converted."""

import csv

import pytest
import torch

import sinkformer_pl
from sinkformer_pl.diagnostics import attention_of, column_sums

BACKBONE = """
import torch
from torch import nn

from sinkformer_pl import convert
from sinkformer_pl.models import Backbone


class Torch(Backbone):
    def __init__(self, normalization, width: int = 8):
        super().__init__()
        self.out_dim = width
        self.embed = nn.Linear(3, width)
        layer = nn.TransformerEncoderLayer(width, 2, width, dropout=0.0, batch_first=True)
        self.encoder = convert(nn.TransformerEncoder(layer, 2), normalization)

    def forward(self, inputs, mask=None):
        x = self.encoder(self.embed(inputs), src_key_padding_mask=None if mask is None else ~mask)
        return x.amax(1)
"""


@pytest.fixture
def network(tiny, tmp_path, monkeypatch):
    """Arguments that choose the network."""
    (tmp_path / "of_torch.py").write_text(BACKBONE)
    monkeypatch.syspath_prepend(str(tmp_path))
    return "--config", tiny, "--plugins", "of_torch", "--model.backbone", "of_torch.Torch"


def marginal_error(folder):
    with (folder / "version_0/attention.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert {row["layer"] for row in rows} == {f"backbone.encoder.layers.{n}.self_attn" for n in (0, 1)}
    return max(float(row["marginal_error"]) for row in rows)


def test_a_network_with_converted_attention_is_watched_inspected_and_loaded(run, network, tmp_path):
    normalization = ("--model.normalization", "Sinkhorn(n_iters=21)")
    run("fit", *network, *normalization, "--trainer.callbacks", "AttentionDiagnostics")
    folder = tmp_path / "runs/tiny"
    assert marginal_error(folder) < 1e-3
    best = folder / "version_0/checkpoints/best.ckpt"
    output = tmp_path / "page.html"
    run("inspect", "--ckpt_path", str(best), "--plugins", "of_torch", "--samples", "2", "--output", str(output))
    assert output.stat().st_size > 10_000
    model = sinkformer_pl.load(best).network
    for layer in attention_of(model, torch.randn(2, 30, 3), None):
        torch.testing.assert_close(column_sums(layer.weights), torch.ones(2, 2, 30), atol=1e-3, rtol=0)


@pytest.mark.slow
def test_normalizations_of_converted_attention_are_compared_one_of_them_gradually(run, network, tmp_path):
    arms = "Softmax, Sinkhorn(n_iters=21), Blend(target=Sinkhorn(n_iters=21))"
    callbacks = ("--trainer.callbacks", "Gradual", "--trainer.callbacks+", "AttentionDiagnostics")
    run("compare", *network, *callbacks, "--normalizations", arms, "--seeds", "0", "--name", "arms")
    errors = {path.name[:3]: marginal_error(path) for path in (tmp_path / "runs/arms").glob("*-seed0")}
    assert max(errors["Ble"], errors["Sin"]) < 1e-3 < errors["Sof"]
