"""The mistakes that people make in a normalization of their own are one line before the run; sound ones pass."""

import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from sinkformer_pl import ops
from sinkformer_pl.cli import main
from sinkformer_pl.errors import UserError
from sinkformer_pl.models import AttentionCore
from sinkformer_pl.normalizations import AttentionNormalization, Promises, ScoreNormalization, registered
from sinkformer_pl.testing import rehearse

CONFIG = Path(__file__).parents[1] / "configs/pointcloud.yaml"


def rehearsed(factory, num_heads=2):
    core = AttentionCore(num_heads, 4, factory)
    before = {name: x.clone() for name, x in core.state_dict().items()}
    state = torch.random.get_rng_state()
    rehearse(core.normalization, num_heads, 4)
    assert torch.random.get_rng_state().equal(state)
    assert core.normalization.training
    assert all(x.equal(before[name]) for name, x in core.state_dict().items())


@pytest.mark.parametrize("heads", [1, 3])
@pytest.mark.parametrize("name", list(registered()))
def test_the_packages_own_pass(name, heads):
    rehearsed(registered()[name], heads)


class _Base(ScoreNormalization):
    promises = Promises(row_sums="one")

    def forward(self, scores, mask):
        return ops.softmax(scores, mask=mask)


class NoMask(_Base):
    def forward(self, scores, mask):
        return scores.softmax(-1)


class MaskAfterwards(_Base):
    """Masked weights are 0, but they took part in the sum."""

    def forward(self, scores, mask):
        return scores.softmax(-1).where(mask.allowed(scores), 0.0)


class MagicNumber(_Base):
    def forward(self, scores, mask):
        plan = ops.sinkhorn(scores.masked_fill(~mask.key_row(scores), -1e4), 5)
        return plan.where(mask.allowed(scores), 0.0)


class CountsPadding(_Base):
    def forward(self, scores, mask):
        return scores.where(mask.allowed(scores), 0.0).relu() / scores.shape[-1]


class BatchStatistics(_Base):
    def forward(self, scores, mask):
        return super().forward(scores / scores.where(mask.allowed(scores), 0.0).std((0, 2, 3), keepdim=True), mask)


class NoHeads(_Base):
    def forward(self, scores, mask):
        return super().forward(scores.mean(1, keepdim=True), mask)


class Transposed(_Base):
    def forward(self, scores, mask):
        return super().forward(scores, mask).movedim(1, -1)


class ReturnsNone(_Base):
    def forward(self, scores, mask):
        super().forward(scores, mask)


class ReturnsTwo(_Base):
    def forward(self, scores, mask):
        return super().forward(scores, mask), scores


class ReturnsNumpy(_Base):
    def forward(self, scores, mask):
        return super().forward(scores, mask).numpy()


class Half(_Base):
    def forward(self, scores, mask):
        return super().forward(scores, mask).half()


class Double(_Base):
    def forward(self, scores, mask):
        return super().forward(scores, mask).double()


class ParameterInForward(_Base):
    def forward(self, scores, mask):
        if not hasattr(self, "slope"):
            self.slope = nn.Parameter(torch.ones(scores.shape[1], 1, 1))
        return super().forward(scores * self.slope, mask)


class Nan(_Base):
    def forward(self, scores, mask):
        return super().forward(scores, mask) * torch.nan


class Crashes(_Base):
    def forward(self, scores, mask):
        return scores.no_such_method()


class NoneAttend(AttentionNormalization):
    def attend(self, q, k, v, mask=None, **options):
        return None

    def weights(self, q, k, mask=None, **options):
        return None


class WideAttend(NoneAttend):
    def attend(self, q, k, v, mask=None, **options):
        return (q @ k.mT)[..., :1] * torch.ones(3)


class UnmaskedAttend(NoneAttend):
    def attend(self, q, k, v, mask=None, **options):
        return nn.functional.scaled_dot_product_attention(q, k, v)


@pytest.mark.parametrize(
    ("cls", "parts"),
    [
        (NoMask, ["NoMask.forward", "masked weights are exactly 0", "mask.allowed(scores)"]),
        (MaskAfterwards, ["MaskAfterwards", "padded batch", "alone"]),
        (MagicNumber, ["MagicNumber", "padded batch", "alone"]),
        (CountsPadding, ["CountsPadding", "padded batch", "alone"]),
        (BatchStatistics, ["BatchStatistics", "padded batch", "alone"]),
        (NoHeads, ["NoHeads.forward", "(2, 1, 6, 6)", "(2, 2, 6, 6)", "head"]),
        (Transposed, ["Transposed.forward", "(2, 6, 6, 2)"]),
        (ReturnsNone, ["ReturnsNone.forward", "returned None", "return the weights"]),
        (ReturnsTwo, ["ReturnsTwo.forward", "tuple", "return the weights"]),
        (ReturnsNumpy, ["ReturnsNumpy.forward", "ndarray"]),
        (Half, ["Half.forward", "torch.float16", "torch.float32"]),
        (Double, ["Double.forward", "torch.float64"]),
        (ParameterInForward, ["ParameterInForward", "slope", "build(num_heads, head_dim)"]),
        (Nan, ["Nan.forward", "nan"]),
        (Crashes, ["Crashes.forward", "AttributeError", "no_such_method"]),
        (NoneAttend, ["NoneAttend.attend", "returned None"]),
        (WideAttend, ["WideAttend.attend", "(2, 2, 6, 3)"]),
        (UnmaskedAttend, ["UnmaskedAttend", "padded batch"]),
    ],
)
def test_a_mistake_is_one_line_with_the_class_and_the_rule(cls, parts):
    with pytest.raises(UserError) as error:
        rehearsed(cls)
    assert "\n" not in str(error.value)
    for part in parts:
        assert part in str(error.value)


class Sloppy(_Base):
    """Breaks the contract where no result depends on it: rows of padded queries."""

    def forward(self, scores, mask):
        return scores.masked_fill(~mask.allowed(scores), -1e4).softmax(-1)


class Remembers(_Base):
    """Keeps what it saw: the rehearsal must leave no trace in the network."""

    def forward(self, scores, mask):
        self.calls = getattr(self, "calls", 0) + 1
        return super().forward(scores, mask)


def test_what_trains_rightly_passes_and_keeps_no_trace():
    rehearsed(Sloppy)
    core = AttentionCore(2, 4, Remembers)
    rehearse(core.normalization, 2, 4)
    assert not hasattr(core.normalization, "calls")


PLUGIN = """
from sinkformer_pl.normalizations import Promises, ScoreNormalization, register

@register
class {name}(ScoreNormalization):
    promises = Promises(row_sums="one")

    def __init__(self, k):
        super().__init__()
        self.k = k

    def forward(self, scores, mask):
        return scores.softmax(-1)
"""


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        (["--model.normalization.k", "3"], "{}.forward breaks the rule that masked weights are exactly 0"),
        ([], "{} needs k"),
    ],
)
@pytest.mark.parametrize("number", range(3))
def test_the_command_line_says_it_before_a_run(flags, expected, number, tmp_path, monkeypatch, capsys):
    name = f"Forgets{number}{len(flags)}"
    spelling = ("./{}.py", "{}.py", "folder/{}.py")[number].format(f"plugin_{name.lower()}")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.path", list(sys.path))
    (tmp_path / spelling).parent.mkdir(exist_ok=True)
    (tmp_path / spelling).write_text(PLUGIN.format(name=name))
    arguments = ["--plugins", spelling, "--model.normalization", name, *flags]
    with pytest.raises((SystemExit, UserError)) as stopped:
        main(["fit", "--config", str(CONFIG), "--trainer.accelerator", "cpu", *arguments])
    said = capsys.readouterr().err + str(stopped.value)
    assert expected.format(name) in said
    assert "Traceback" not in said
    assert not (tmp_path / "runs").exists()
