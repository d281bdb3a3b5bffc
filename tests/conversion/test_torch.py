"""Conversion of PyTorch's own attention."""

import pytest
import torch
from torch import Tensor, nn

from sinkformer_pl import convert, revert


def padding(side: str) -> Tensor:
    """Three samples of seven tokens, True at padding."""
    real = torch.tensor([7, 4, 1])[:, None]
    place = torch.arange(7)
    return place >= real if side == "right" else place < 7 - real


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("batch_first", [True, False])
def test_softmax_gives_the_outputs_of_the_library(side, batch_first):
    torch.manual_seed(0)
    attention = nn.MultiheadAttention(12, 3, batch_first=batch_first).eval()
    x = torch.randn(3, 7, 12)
    x = x if batch_first else x.transpose(0, 1)
    wanted, weights = attention(x, x, x, key_padding_mask=padding(side))
    convert(attention, "Softmax")
    output, ours = attention(x, x, x, key_padding_mask=padding(side))
    torch.testing.assert_close(output, wanted, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(ours, weights, atol=1e-5, rtol=1e-5)
    assert torch.equal(revert(attention)(x, x, x, key_padding_mask=padding(side))[0], wanted)
