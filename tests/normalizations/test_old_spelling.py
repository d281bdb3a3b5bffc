"""Plug-ins written for version 0.1 train, and are told what to write."""

import warnings
from dataclasses import replace

import pytest
import torch

from sinkformer_pl import ops
from sinkformer_pl.models import MultiHeadAttention
from sinkformer_pl.normalizations import Guarantees, Promises, ScoreNormalization

with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")

    class Old(ScoreNormalization):
        guarantees = Guarantees(row_sums="one", square=True, tied=True)

        def __init__(self, sparse=False):
            super().__init__()
            self.guarantees = replace(self.guarantees, sparse=sparse)

        def forward(self, scores, mask):
            return ops.softmax(scores, mask=mask)

        def attend(self, q, k, v, mask, *, scale, bias=None):
            return super().attend(q, k, v, mask, scale=scale, bias=bias)


def test_one_line_says_what_to_write():
    (warning,) = caught
    assert issubclass(warning.category, FutureWarning)
    message = str(warning.message)
    assert "\n" not in message
    for part in ("Old:", "promises = Promises(...)", "requires_square = True", "requires_tied = True"):
        assert part in message


def test_what_it_says_is_taken_over():
    assert Old.promises == Promises(row_sums="one")
    assert (Old.requires_square, Old.requires_tied, Old.takes_bias) == (True, True, True)
    assert Old(sparse=True).promises == Promises(row_sums="one", sparse=True)
    assert Old(sparse=True).guarantees == Guarantees(row_sums="one", sparse=True, square=True, tied=True)
    assert Old.promises == Promises(row_sums="one")


def test_old_places_are_there_with_a_word():
    with pytest.warns(FutureWarning, match="will go: import from sinkformer_pl.normalizations"):
        from sinkformer_pl.normalizations.base import ScoreNormalization as OldPlace
    with pytest.warns(FutureWarning, match="will go: import from sinkformer_pl.models"):
        from sinkformer_pl.models.attention import MultiHeadAttention as OldAttention
    assert OldPlace is ScoreNormalization
    assert OldAttention is MultiHeadAttention


def test_it_trains():
    layer, x = MultiHeadAttention(8, 2, Old), torch.randn(2, 5, 8)
    assert layer.key is None
    layer(x, x).sum().backward()
    assert layer.query.weight.grad.abs().sum() > 0


def test_a_subclass_of_the_old_and_the_new_spelling_warn_no_more():
    with warnings.catch_warnings():
        warnings.simplefilter("error")

        class New(Old):
            promises = Promises(row_sums="at most one")

    assert New().promises.row_sums == "at most one"


def test_something_else_is_refused():
    with pytest.raises(TypeError, match=r"Wrong.guarantees must be Guarantees"):
        type("Wrong", (ScoreNormalization,), {"guarantees": {"row_sums": "one"}})
