"""The mass of a class token's column: against POT, the reference and the definition; padded; refused."""

from functools import partial

import pytest
import torch

from sinkformer_pl import ops
from sinkformer_pl.diagnostics import attention_of, learned_parameters
from sinkformer_pl.models import AttentionCore, TextTransformer, VisionTransformer
from sinkformer_pl.normalizations import GumbelSinkhorn, SemiUnbalancedSinkhorn, Sinkhorn, Softmax
from sinkformer_pl.ops import AttentionMask
from tests.optional import ot

MASSES = [0.0, 0.25, 3.0, "learned", "free"]
every_mass = pytest.mark.parametrize("mass", MASSES)
REAL = torch.tensor([[True] * 6, [True, True, False, True, False, True], [True] + [False] * 5])


def core_of(mass, n_iters=201, **given):
    torch.manual_seed(0)
    core = AttentionCore(2, 4, partial(given.pop("kind", Sinkhorn), n_iters=n_iters, **given), class_mass=mass).double()
    if mass == "learned":
        with torch.no_grad():
            core.class_mass.log_mass.copy_(torch.tensor([0.7, -1.1]))
    return core


def tokens(seed=1, width=4):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(3, 2, 6, size, generator=generator, dtype=torch.float64) for size in (width, width, 5)]


def columns_of(mass, scores):
    """The sums of the columns of one head, by the definition."""
    queries, keys = scores.shape
    if mass == "free":
        received = scores.softmax(1)[:, 0].sum()
        return torch.cat((received[None], ((queries - received) / (keys - 1)).expand(keys - 1)))
    shares = torch.tensor([mass] + [1.0] * (keys - 1), dtype=torch.float64)
    return queries * shares / shares.sum()


@every_mass
def test_plans_are_those_of_pot_with_these_marginals(mass):
    core, (q, k, v) = core_of(mass), tokens()
    weights, output = core.weights(q, k), core(q, k, v)
    torch.testing.assert_close(output, weights @ v)
    for sample in range(3):
        for head in range(2):
            scores = core.scale * q[sample, head] @ k[sample, head].T
            own = core.class_mass.log_mass[head].exp().item() if mass == "learned" else mass
            columns = columns_of(own, scores)
            kept = slice(int(own == 0), None)
            plan = ot.sinkhorn(torch.ones(6, dtype=torch.float64), columns[kept], -scores[:, kept], 1.0, stopThr=1e-13)
            torch.testing.assert_close(weights[sample, head][:, kept], plan, rtol=0, atol=1e-8)
            torch.testing.assert_close(weights[sample, head].sum(0), columns, rtol=1e-6, atol=1e-9)


@every_mass
@pytest.mark.parametrize("given", [{}, {"gradient": "implicit"}, {"kind": SemiUnbalancedSinkhorn, "rho": 2.0}], ids=str)
def test_padding_has_no_mass(mass, given):
    core, (q, k, v) = core_of(mass, n_iters=41, **given), tokens()
    for tensor in (q, k, v):
        tensor.requires_grad_()
    leaves = [q, k, v, *core.parameters()]
    output = core(q, k, v, AttentionMask(REAL, REAL))
    upstream = torch.linspace(-1, 1, output.numel(), dtype=torch.float64).view_as(output)
    found = torch.autograd.grad(output, leaves, upstream)
    parts = [[x[i : i + 1, :, row].detach().requires_grad_() for x in (q, k, v)] for i, row in enumerate(REAL)]
    alone = [core(*part) for part in parts]
    wanted = [torch.autograd.grad(y, [*part, *core.parameters()], upstream[i : i + 1, :, REAL[i]])
              for i, (part, y) in enumerate(zip(parts, alone, strict=True))]  # fmt: skip
    for i, row in enumerate(REAL):
        torch.testing.assert_close(output[i : i + 1, :, row], alone[i], rtol=1e-8, atol=1e-10)
        assert (output[i, :, ~row] == 0).all()
        for place in range(3):
            torch.testing.assert_close(found[place][i : i + 1, :, row], wanted[i][place], rtol=1e-6, atol=1e-9)
    for place in range(3, len(leaves)):
        torch.testing.assert_close(found[place], sum(w[place] for w in wanted), rtol=1e-6, atol=1e-9)


@every_mass
@pytest.mark.parametrize("kind", [Sinkhorn, SemiUnbalancedSinkhorn])
def test_gradients_are_exact(mass, kind):
    core, (q, k, v) = core_of(mass, n_iters=3, kind=kind), tokens()
    inputs = [x[1:2].requires_grad_() for x in (q, k, v)]
    mask = AttentionMask(REAL[1:2], REAL[1:2])

    def attend(q, k, v, *_):
        return core(q, k, v, mask)

    assert torch.autograd.gradcheck(attend, (*inputs, *core.parameters()))


def test_a_free_column_is_left_as_it_is_by_the_first_column_step():
    core, (q, k, _) = core_of("free", n_iters=3), tokens()
    columns = core.class_mass(q, k, AttentionMask(), scale=core.scale, bias=None)
    row, scores = torch.ones(3, 2, 6, dtype=torch.float64), core.scale * q @ k.mT
    two = ops.sinkhorn(scores, 2, row_marginal=row, column_marginal=columns)
    torch.testing.assert_close(two[..., 0], scores.softmax(-1)[..., 0])
    torch.testing.assert_close(two[..., 1:].sum(-2), columns[..., 1:])


def test_a_mass_of_1_is_no_mass_of_its_own():
    (q, k, v), mask = tokens(), AttentionMask(REAL, REAL)
    plain, counted = AttentionCore(2, 4, Sinkhorn), AttentionCore(2, 4, Sinkhorn, class_mass=1)
    assert plain(q, k, v, mask).equal(counted(q, k, v, mask))
    assert not list(counted.parameters())
    learned = AttentionCore(2, 4, Sinkhorn, class_mass="learned").double()
    torch.testing.assert_close(learned(q, k, v, mask), plain(q, k, v, mask))
    assert set(learned_parameters(learned)) >= {"class_mass"}


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("mass", [0, "learned", "free"])
def test_texts_with_a_mass_of_their_token(mass, side):
    torch.manual_seed(0)
    sizes = {"vocab_size": 20, "dim": 8, "num_heads": 2, "depth": 2, "pooling": "cls", "class_mass": mass}
    model = TextTransformer(partial(Sinkhorn, n_iters=7), **sizes).double().eval()
    texts = [torch.arange(1, size + 1) for size in (7, 3, 0)]
    inputs, mask = torch.zeros(3, 9, dtype=torch.int64), torch.zeros(3, 9, dtype=torch.bool)
    for i, text in enumerate(texts):
        at = slice(9 - len(text), 9) if side == "left" else slice(len(text))
        inputs[i, at], mask[i, at] = text, True
    features = model(inputs, mask)
    torch.testing.assert_close(features, torch.cat([model(text[None]) for text in texts]), rtol=1e-9, atol=1e-11)
    features.sin().sum().backward()
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)
    [layer, _] = attention_of(model, inputs, mask)
    received = layer.of_sample(0).sum(1)[:, 0]
    if mass == 0:
        assert (received == 0).all()
    if mass == "free":
        bare = layer.core.class_mass
        assert (received - 1).abs().max() > 1e-3
        assert bare.log_mass is None


def test_images_with_a_mass_of_their_token_in_one_graph():
    torch.compiler.reset()
    torch.manual_seed(0)
    model = VisionTransformer(Sinkhorn, image_size=8, dim=8, num_heads=2, depth=1, class_mass="free").eval()
    images = torch.randn(2, 3, 8, 8)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(images), model(images), rtol=1e-5, atol=1e-5)
    with torch.autocast("cpu", torch.bfloat16):
        half = model(images)
    assert (half - model(images)).abs().mean() < 0.05


@pytest.mark.parametrize(
    "normalization",
    [Softmax, GumbelSinkhorn, partial(Sinkhorn, n_iters=1), partial(SemiUnbalancedSinkhorn, rho=0)],
)
def test_a_normalization_without_column_sums_refuses(normalization):
    with pytest.raises(NotImplementedError, match=r"class_mass=free: .* leave it at 1, or use Sinkhorn"):
        AttentionCore(2, 4, normalization, class_mass="free")


@pytest.mark.parametrize("mass", [-1, True, float("nan"), float("inf"), "fixed"])
def test_what_is_no_mass(mass):
    with pytest.raises(ValueError, match="class_mass must be a number of at least 0, 'free' or 'learned'"):
        AttentionCore(2, 4, Sinkhorn, class_mass=mass)


@pytest.mark.parametrize("network", [TextTransformer, VisionTransformer])
def test_a_mass_needs_a_token(network):
    with pytest.raises(ValueError, match="class_mass=2 is of the class token; give pooling=cls"):
        network(Sinkhorn, pooling="seed", class_mass=2)
