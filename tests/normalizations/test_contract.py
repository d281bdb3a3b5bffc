"""What a newcomer's one method gets from the base class."""

import pytest
import torch

from sinkformer_pl.normalizations import AttentionNormalization, Promises, ScoreNormalization
from sinkformer_pl.ops import AttentionMask


class Recorder(ScoreNormalization):
    def forward(self, scores, mask):
        self.scores, self.mask = scores, mask
        return torch.ones_like(scores)


@pytest.mark.parametrize("method", ["attend", "weights"])
@pytest.mark.parametrize(("given", "inside"), [(torch.bfloat16, torch.float32), (torch.float64, torch.float64)])
def test_forward_gets_scaled_biased_scores_in_single_precision_or_above(method, given, inside):
    q, k, bias = torch.ones(2, 3, 4, 8, dtype=given), torch.ones(2, 3, 5, 8, dtype=given), torch.ones(1, 1, 4, 5)
    tensors = (q, k, k) if method == "attend" else (q, k)
    module = Recorder()
    with torch.autocast("cpu", torch.bfloat16):
        result = getattr(module, method)(
            *tensors, None, scale=torch.tensor([1.0, 2.0, 3.0]).to(given), bias=bias.to(given)
        )
    assert result.dtype == given
    assert module.scores.dtype == inside
    assert isinstance(module.mask, AttentionMask)
    wanted = torch.tensor([9.0, 17.0, 25.0], dtype=inside)[:, None, None].expand(2, 3, 4, 5)
    torch.testing.assert_close(module.scores, wanted)


def test_padding_never_reaches_the_scores():
    q, k = torch.full((1, 1, 2, 4), 1e30), torch.full((1, 1, 3, 4), 1e30)
    real = AttentionMask(torch.zeros(1, 2, dtype=torch.bool), torch.zeros(1, 3, dtype=torch.bool))
    module = Recorder()
    module.weights(q, k, real, scale=1.0)
    assert not module.scores.any()


def test_nothing_is_promised_by_default():
    assert Recorder().promises == Promises()
    assert not any(value for name, value in vars(Promises()).items() if name != "exact_gradient")


@pytest.mark.parametrize("cls", [AttentionNormalization, ScoreNormalization])
def test_abstract_classes_make_no_instance(cls):
    with pytest.raises(TypeError, match="abstract"):
        cls()
