"""The argument `layers`, names of normalizations, and the table of a model's attention."""

from functools import partial

import pytest
from torch import nn

from sinkformer_pl import Sinkhorn, convert, revert
from sinkformer_pl.errors import UserError


def encoder() -> nn.TransformerEncoder:
    return nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 8), 5, enable_nested_tensor=False)


def converted(model: nn.Module) -> list[int]:
    return [number for number, site in enumerate(convert.report(model)) if site.core is not None]


@pytest.mark.parametrize(
    ("layers", "chosen"),
    [
        (None, [0, 1, 2, 3, 4]),
        (0, [0]),
        (-1, [4]),
        ([1, -2], [1, 3]),
        ("last half", [2, 3, 4]),
        ("layers.1-2", [1, 2]),
        ("*.3.self_attn", [3]),
        ("0-1,4", [0, 1, 4]),
        (["layers.0", 3], [0, 3]),
    ],
)
def test_layers_are_chosen_by_number_range_pattern_or_half(layers, chosen):
    assert converted(convert(encoder(), "Sinkhorn", layers=layers)) == chosen


@pytest.mark.parametrize(
    ("layers", "words"),
    [
        (5, ["5", "from 0 to 4"]),
        ("3-7", ["5", "from 0 to 4"]),
        ("2-1", ["FIRST-LAST"]),
        ("layer.1", ["layer.1", "layers.1"]),
        ([], ["no layer", "5"]),
        (True, ["True", "last half"]),
        ([0.5], ["0.5"]),
    ],
)
def test_layers_that_are_not_there_are_refused_and_nothing_is_converted(layers, words):
    model = encoder()
    with pytest.raises(UserError) as error:
        convert(model, "Sinkhorn", layers=layers)
    assert all(word in str(error.value) for word in words)
    assert not converted(model)


def test_a_text_that_may_be_a_number_or_a_name_is_refused():
    model = nn.Sequential(nn.Identity(), nn.MultiheadAttention(8, 2), nn.MultiheadAttention(8, 2))
    with pytest.raises(UserError, match=r"'1'.*number.*name"):
        convert(model, "Sinkhorn", layers="1")
    assert converted(convert(model, "Sinkhorn", layers=1)) == [1]
    assert converted(convert(revert(model), "Sinkhorn", layers="1*")) == [0]


@pytest.mark.parametrize(
    ("normalization", "arguments", "words"),
    [
        ("Sinkhrn", {}, ["Sinkhrn", "did you mean Sinkhorn", "Entmax15"]),
        ("Sinkhorn", {"n_iter": 3}, ["Sinkhorn.n_iter", "did you mean n_iters"]),
        ("Sinkhorn(n_iter=3)", {}, ["Sinkhorn.n_iter", "did you mean n_iters"]),
        ("Sinkhorn(", {}, ["Sinkhorn(n_iters=5)"]),
        (Sinkhorn(), {}, ["no instance"]),
        ("Sinkhorn", {"attention_dropout": 1.5}, ["attention_dropout", "keep"]),
    ],
)
def test_wrong_normalizations_are_one_line_with_the_remedy(normalization, arguments, words):
    with pytest.raises(UserError) as error:
        convert(encoder(), normalization, **arguments)
    assert all(word in str(error.value) for word in words)


@pytest.mark.parametrize(
    ("normalization", "arguments"),
    [
        ("Sinkhorn", {"n_iters": 5}),
        ("Sinkhorn(n_iters=5)", {}),
        ("sinkformer_pl.normalizations.Sinkhorn", {"n_iters": 5}),
        (Sinkhorn, {"n_iters": 5}),
        (partial(Sinkhorn, n_iters=5), {}),
        ({"class_path": "sinkformer_pl.normalizations.Sinkhorn", "init_args": {"n_iters": 5}}, {}),
        (lambda: Sinkhorn(n_iters=5), {}),
    ],
)
def test_a_normalization_is_a_name_a_call_a_class_or_what_makes_one(normalization, arguments):
    sites = list(convert.report(convert(encoder(), normalization, **arguments)))
    assert len({id(site.core.normalization) for site in sites}) == 5
    assert all(site.core.normalization.n_iters == 5 for site in sites)


@pytest.mark.parametrize("normalization", ["Blend(target=Sinkhorn(n_iters=5), share=0.5)", "Blend"])
def test_a_normalization_of_another_is_a_call_within_a_call(normalization):
    arguments = {} if "(" in normalization else {"target": "Sinkhorn(n_iters=5)", "share": 0.5}
    (site, *_) = convert.report(convert(encoder(), normalization, **arguments))
    assert (site.core.normalization.target.n_iters, site.core.normalization.share) == (5, 0.5)
    with pytest.raises(UserError, match=r"Sinkhrn.*did you mean Sinkhorn"):
        convert(encoder(), "Blend(target=Sinkhrn)")


def test_a_layer_that_is_converted_again_has_the_new_normalization():
    model = convert(convert(encoder(), "Softmax"), "Sinkhorn", layers=1)
    names = [type(site.core.normalization).__name__ for site in convert.report(model)]
    assert names == ["Softmax", "Sinkhorn", "Softmax", "Softmax", "Softmax"]


def test_a_model_without_attention_is_refused_by_name():
    with pytest.raises(UserError, match=r"Linear: no attention.*torch"):
        convert(nn.Linear(3, 3), "Sinkhorn")
    assert str(convert.report(nn.Linear(3, 3))) == "no attention that can be converted"


def test_the_report_is_a_table_of_every_attention():
    model = convert(nn.Transformer(8, 2, 1, 1, 8, batch_first=True), "Sinkhorn", layers=0)
    header, encoder_line, decoder_line, cross_line = str(convert.report(model)).splitlines()
    assert header.split()[:2] == ["layer", "name"]
    for words, line in [
        (["encoder.layers.0.self_attn", "2 x 4", "to itself", "Sinkhorn(n_iters=3"], encoder_line),
        (["decoder.layers.0.self_attn", "to itself", "the library's"], decoder_line),
        (["decoder.layers.0.multihead_attn", "to another sequence", "the library's"], cross_line),
    ]:
        assert all(word in line for word in words)


def test_normalizations_that_the_layers_cannot_have_are_refused_with_the_reason():
    for name, word in [("SymmetricSinkhorn", "one projection"), ("LowRankSinkhorn", "attention_dropout=0")]:
        model = encoder()
        with pytest.raises(NotImplementedError, match=f"layers.0.self_attn, .*{name}.*{word}"):
            convert(model, name)
        assert not converted(model)
    with pytest.warns(UserWarning, match=r"not converted: decoder\.layers\.0\.multihead_attn.*as many queries as keys"):
        model = convert(nn.Transformer(8, 2, 1, 1, 8, dropout=0.0, batch_first=True), "SlicedTransport")
    assert converted(model) == [0, 1]
