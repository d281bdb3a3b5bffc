"""Factories as plain data and back."""

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch

from sinkformer_pl.errors import UserError
from sinkformer_pl.factories import as_factory, describe, public_path, readable, with_defaults
from sinkformer_pl.models import Backbone, SetTransformer
from sinkformer_pl.normalizations import AttentionNormalization, Sinkhorn, Softmax


def test_defaults_are_filled_in_and_nested_factories_described():
    spec = describe(partial(SetTransformer, dim=16, pooling=partial(Sinkhorn, n_iters=5)))
    assert spec["class_path"] == "sinkformer_pl.models.SetTransformer"
    assert spec["init_args"]["dim"] == 16
    assert spec["init_args"]["num_heads"] == 4
    assert spec["init_args"]["pooling"] == {
        "class_path": "sinkformer_pl.normalizations.Sinkhorn",
        "init_args": {"n_iters": 5, "gradient": "unrolled"},
    }


@pytest.mark.filterwarnings("ignore:pooling by one seed")
def test_there_and_back():
    factory = partial(SetTransformer, dim=8, num_heads=2, pooling=partial(Sinkhorn, n_iters=5))
    spec = describe(factory)
    again = as_factory(spec, Backbone)
    assert describe(again) == spec
    torch.manual_seed(0)
    first = factory(Softmax)
    torch.manual_seed(0)
    second = again(Softmax)
    assert str(first) == str(second)
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True))


def test_optimizers_are_described_too():
    spec = describe(partial(torch.optim.AdamW, lr=0.1))
    assert spec["class_path"] == "torch.optim.AdamW"
    assert spec["init_args"]["lr"] == 0.1
    assert spec["init_args"]["betas"] == [0.9, 0.999]
    assert "params" not in spec["init_args"]


def test_what_cannot_be_saved_or_built_is_refused():
    with pytest.raises(TypeError, match=r"functools\.partial"):
        describe(lambda: Softmax())
    with pytest.raises(TypeError, match=r"n_iters=.* is no plain data"):
        describe(partial(Sinkhorn, n_iters=torch.ones(1)))
    with pytest.raises(ValueError, match="abstract"):
        describe(AttentionNormalization)
    with pytest.raises(TypeError, match="is no Backbone"):
        as_factory({"class_path": "sinkformer_pl.normalizations.Softmax"}, Backbone)
    with pytest.raises(ValueError, match=r"can't import sinkformer_pl.normalizations.Nothing"):
        as_factory({"class_path": "sinkformer_pl.normalizations.Nothing"}, Backbone)


def test_a_spec_within_a_spec_must_be_of_the_class_that_its_place_is_for(tmp_path):
    touch = {"class_path": "subprocess.Popen", "init_args": {"args": ["touch", str(tmp_path / "ran")]}}
    spec = {"class_path": "sinkformer_pl.models.SetTransformer", "init_args": {"dim": 8, "pooling": touch}}
    with pytest.raises(TypeError, match=r"subprocess\.Popen is no AttentionNormalization"):
        as_factory(spec, Backbone)
    assert not (tmp_path / "ran").exists()


class Holder:
    """Arguments that name what they take in several ways, or don't."""

    def __init__(self, plain, whatever: Any = None, text: "Callable[..., torch.nn.Module]" = torch.nn.ReLU) -> None:
        self.made = text()


def test_a_spec_within_a_spec_needs_an_annotation_that_says_what_it_is():
    relu = {"class_path": "torch.nn.GELU", "init_args": {}}
    spec = {"class_path": f"{__name__}.Holder", "init_args": {"plain": 1, "text": relu}}
    assert isinstance(as_factory(spec, Holder)().made, torch.nn.GELU)
    for name in ("plain", "whatever"):
        with pytest.raises(UserError, match=rf"Holder\.{name} is given a class, but doesn't say which"):
            as_factory({"class_path": f"{__name__}.Holder", "init_args": {name: relu}}, Holder)


def test_public_path_is_the_shortest():
    assert public_path(Sinkhorn) == "sinkformer_pl.normalizations.Sinkhorn"
    assert public_path(torch.nn.Linear) == "torch.nn.Linear"


def test_what_was_saved_before_an_argument_was_there_is_what_is_built_now():
    saved = {
        "normalization": {"class_path": "sinkformer_pl.normalizations.Sinkhorn", "init_args": {"n_iters": 5}},
        "n": 1,
    }
    assert with_defaults(saved) == {"normalization": describe(partial(Sinkhorn, n_iters=5)), "n": 1}
    nested = describe(partial(SetTransformer, dim=8, pooling=partial(Sinkhorn, n_iters=3)))
    old = {
        **nested,
        "init_args": {**nested["init_args"], "pooling": {**saved["normalization"], "init_args": {"n_iters": 3}}},
    }
    assert with_defaults({"backbone": old}) == {"backbone": nested}


def test_words_are_shown_where_they_are_chosen():
    assert readable(describe(Sinkhorn)) == "Sinkhorn(n_iters=3)"
    assert readable(describe(partial(Sinkhorn, gradient="detached"))) == "Sinkhorn(n_iters=3, gradient=detached)"
    assert readable({"class_path": "nowhere.Gone", "init_args": {"a": "b"}}) == "Gone(a=b)"
