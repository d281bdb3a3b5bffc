"""AttentionMask: what it means, and what it refuses."""

import pytest
import torch

from sinkformer_pl.models import MultiHeadAttention
from sinkformer_pl.normalizations import registered
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


CAUSAL = torch.ones(4, 4, dtype=torch.bool).tril()
REAL = torch.tensor([[True, True, True, False], [True, False, False, False]])
OTHER = torch.tensor([[True, True, False], [True, True, True]])


@pytest.mark.parametrize("shape", [(2, 4), (2, 1, 4), (2, 1, 1, 4)])
@pytest.mark.parametrize("dtype", [torch.bool, torch.int64, torch.int32, torch.uint8])
def test_padding_of_the_usual_forms_is_that_of_queries_and_keys(shape, dtype):
    for given in ({"real": REAL}, {"padding": ~REAL}):
        ((name, tensor),) = given.items()
        mask = AttentionMask.from_padding(**{name: tensor.reshape(shape).to(dtype)})
        assert mask.query is mask.key
        assert mask.key.equal(REAL)
        assert mask.pairs is None


@pytest.mark.parametrize("name", list(registered()))
def test_a_padded_batch_under_it_is_what_its_samples_give(name):
    torch.manual_seed(0)
    layer = MultiHeadAttention(8, 2, registered()[name]).eval()
    x = torch.randn(2, 4, 8)
    together = layer(x, x, AttentionMask.from_padding(real=REAL.long()[:, None, None]))
    for sample, length in enumerate((3, 1)):
        alone = x[sample : sample + 1, :length]
        torch.testing.assert_close(together[sample, :length], layer(alone, alone)[0], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("kind", ["allowed", "forbidden", "additive"])
def test_masks_of_the_keys_are_padding(kind):
    def given(allowed):
        if kind == "additive":
            return {kind: torch.zeros(allowed.shape).masked_fill(~allowed, torch.finfo(torch.float32).min)}
        return {kind: allowed if kind == "allowed" else ~allowed}

    own = AttentionMask.from_attention_mask(**given(REAL[:, None, None]))
    assert own.query is own.key
    assert own.key.equal(REAL)
    assert own.pairs is None
    cross = AttentionMask.from_attention_mask(**given(OTHER[:, None, None]), self_attention=False)
    assert cross.query is None
    assert cross.key.equal(OTHER)
    whole = REAL[:, None, :, None] & OTHER[:, None, None]
    both = AttentionMask.from_attention_mask(**given(whole), padding_only=True)
    assert (both.query.tolist(), both.key.tolist(), both.pairs) == (REAL.tolist(), OTHER.tolist(), None)
    pairs = AttentionMask.from_attention_mask(**given(whole))
    assert pairs.query is pairs.key is None
    assert pairs.pairs.equal(whole)
    for shape in ((4, 4), (1, 4, 4), (1, 1, 4, 4)):
        assert AttentionMask.from_attention_mask(**given(CAUSAL.reshape(shape))).pairs.equal(CAUSAL[None, None])


@pytest.mark.parametrize(
    ("make", "given", "error", "words"),
    [
        ("from_padding", {}, ValueError, "one of real=, padding=, got none"),
        ("from_padding", {"real": REAL, "padding": REAL}, ValueError, "got real and padding"),
        ("from_padding", {"real": REAL.float()}, TypeError, "real= must be bool"),
        ("from_padding", {"real": 2 * REAL.long()}, ValueError, "other numbers"),
        ("from_padding", {"real": REAL[:, None, :, None] & REAL[:, None, None]}, ValueError, "from_attention_mask"),
        ("from_attention_mask", {"allowed": REAL[0]}, ValueError, "2, 3 or 4 axes"),
        ("from_attention_mask", {"forbidden": REAL.float()}, TypeError, "additive="),
        ("from_attention_mask", {"additive": REAL}, TypeError, "float"),
        ("from_attention_mask", {"additive": torch.ones(4, 4)}, ValueError, "bias"),
        (
            "from_attention_mask",
            {"allowed": torch.ones(4, 4).tril() > 0, "padding_only": True},
            ValueError,
            "forbids pairs",
        ),
    ],
)
def test_forms_that_say_something_else_are_refused(make, given, error, words):
    with pytest.raises(error, match=words):
        getattr(AttentionMask, make)(**given)


def test_transport_plans_say_how_padding_is_given():
    x = torch.randn(2, 3, 4, 8)
    with pytest.raises(NotImplementedError, match=r"AttentionMask\.from_padding"):
        registered()["Sinkhorn"]().attend(x, x, x, AttentionMask(pairs=REAL[:, None, None]))
