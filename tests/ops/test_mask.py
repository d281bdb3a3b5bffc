"""AttentionMask: what it means, and what it refuses."""

import pytest
import torch

from sinkformer_pl.ops import AttentionMask, causal_pairs, softmax


def test_allowed_is_the_product_of_its_parts():
    query, key = torch.tensor([[True, False], [True, True]]), torch.tensor([[True, True, False], [False, True, True]])
    pairs = torch.tensor([[[[True, False, True], [True, True, True]]]])
    allowed = AttentionMask(query, key, pairs).allowed(torch.zeros(2, 4, 2, 3)).expand(2, 4, 2, 3)
    for b, h, i, j in torch.cartesian_prod(*(torch.arange(n) for n in (2, 4, 2, 3))).tolist():
        assert allowed[b, h, i, j] == (query[b, i] and key[b, j] and pairs[0, 0, i, j])


def test_an_empty_mask_allows_everything():
    assert AttentionMask().allowed(torch.zeros(2, 4, 2, 3)).all()


@pytest.mark.parametrize("leading", [(), (2,), (2, 4), (2, 4, 5)])
def test_the_first_leading_axis_is_the_sample(leading):
    scores = torch.zeros(*leading, 3, 5)
    key = torch.ones(leading[0] if leading else 1, 5, dtype=torch.bool)
    key[-1, 0] = False
    allowed = AttentionMask(key=key).allowed(scores).expand(scores.shape)
    assert not (allowed[-1] if leading else allowed)[..., 0].any()
    assert allowed.sum() == scores.numel() - scores[-1:, ..., 0].numel() if leading else 12


@pytest.mark.parametrize("filler", [7.0, float("inf"), float("nan")])
def test_without_padding_zeroes_padded_tokens_and_their_gradients(filler):
    q, k, v = torch.ones(2, 2, 3, 4), torch.ones(2, 2, 5, 4), torch.ones(2, 2, 5, 6)
    query, key = torch.tensor([[True, True, False]] * 2), torch.tensor([[True] * 4 + [False]] * 2)
    q[:, :, 2], k[:, :, 4], v[:, :, 4] = filler, filler, filler
    leaves = [x.requires_grad_() for x in (q, k, v)]
    for x, leaf, real in zip(AttentionMask(query, key).without_padding(q, k, v), leaves, (2, 4, 4), strict=True):
        assert (x[:, :, :real] == 1).all()
        assert (x[:, :, real:] == 0).all()
        (gradient,) = torch.autograd.grad(x.sum(), leaf)
        assert (gradient[:, :, :real] == 1).all()
        assert (gradient[:, :, real:] == 0).all()


def test_causal_pairs():
    wanted = torch.tensor([[True, False, False], [True, True, False]])
    assert causal_pairs(2, 3).equal(wanted[None, None])


@pytest.mark.parametrize("entry", [torch.ones(2, 3), torch.ones(2, 3, dtype=torch.long), [[True]]])
@pytest.mark.parametrize("name", ["query", "key", "pairs"])
def test_what_is_no_bool_tensor_is_refused(name, entry):
    with pytest.raises(TypeError, match=rf"AttentionMask.{name} must be a bool tensor.*got"):
        AttentionMask(**{name: entry})


@pytest.mark.parametrize(
    ("name", "shape"), [("query", (3,)), ("key", (2, 1, 3)), ("pairs", (3, 3)), ("pairs", (2, 3, 3))]
)
def test_a_wrong_number_of_axes_is_refused(name, shape):
    with pytest.raises(ValueError, match=rf"AttentionMask.{name} must have . axes, got shape"):
        AttentionMask(**{name: torch.ones(shape, dtype=torch.bool)})


@pytest.mark.parametrize("name", ["query", "key"])
def test_sizes_that_dont_fit_the_scores_are_refused(name):
    for shape in ((2, 4), (1, 3), (3, 3)):
        with pytest.raises(ValueError, match=r"doesn't fit a tensor of shape \(2, 2, 3, 3\), which needs \(2, 3\)"):
            softmax(torch.zeros(2, 2, 3, 3), mask=AttentionMask(**{name: torch.ones(shape, dtype=torch.bool)}))


def test_pairs_need_scores_of_four_axes():
    with pytest.raises(ValueError, match="needs scores"):
        AttentionMask(pairs=causal_pairs(3, 3)).allowed(torch.zeros(2, 3, 3))


def test_it_is_frozen():
    with pytest.raises(AttributeError):
        AttentionMask().key = torch.ones(2, 3, dtype=torch.bool)  # pyright: ignore[reportAttributeAccessIssue]


def test_pairs_of_another_size_are_refused():
    for shape in [(3, 1, 5, 5), (1, 1, 4, 5), (1, 1, 5, 4)]:
        mask = AttentionMask(pairs=torch.ones(shape, dtype=torch.bool))
        with pytest.raises(ValueError, match="doesn't broadcast"):
            mask.allowed(torch.randn(2, 2, 5, 5))
