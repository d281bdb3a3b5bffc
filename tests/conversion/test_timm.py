"""Conversion of timm's attention."""

import copy
import pickle
import warnings

import pytest
import torch
from torch import Tensor, nn

from sinkformer_pl import convert, revert
from sinkformer_pl.conversion import ConvertedCore
from sinkformer_pl.diagnostics import attention_of

timm = pytest.importorskip("timm")

VIT = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 2}
SWIN = {"img_size": 32, "patch_size": 4, "window_size": 4, "embed_dim": 16, "depths": (2,), "num_heads": (2,)}
TWINS = {"embed_dims": (16,), "num_heads": (2,), "depths": (2,), "sr_ratios": (4,), "mlp_ratios": (2,), "wss": (4,)}

FAMILIES = {
    "vit_tiny_patch16_224": VIT,
    "vit_base_patch16_clip_224": {**VIT, "qk_norm": True, "scale_attn_norm": True, "reg_tokens": 3},
    "vit_base_patch16_siglip_224": VIT,
    "vit_base_patch16_xp_224": VIT,
    "deit3_small_patch16_224": {**VIT, "qkv_bias": False},
    "deit_tiny_distilled_patch16_224": VIT,
    "beit_base_patch16_224": {**VIT, "use_shared_rel_pos_bias": True},
    "eva_giant_patch14_224": VIT,
    "eva02_tiny_patch14_224": {**VIT, "scale_attn_inner": True},
    "vit_small_patch16_dinov3": VIT,
    "vit_relpos_small_patch16_224": VIT,
    "samvit_base_patch16": {**VIT, "window_size": 2},
    "swin_tiny_patch4_window7_224": SWIN,
    "hiera_tiny_224": {
        "img_size": 32,
        "embed_dim": 16,
        "stages": (1, 1),
        "num_heads": 1,
        "mask_unit_size": (4, 4),
        "q_pool": 1,
    },
    "twins_svt_small": TWINS,
}


def network(name: str, **arguments) -> nn.Module:
    """Make a model whose weights are large enough for its attention to matter."""
    torch.manual_seed(0)
    model = timm.create_model(name, num_classes=5, **arguments)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                nn.init.normal_(parameter, std=1.5 * parameter[0].numel() ** -0.5)
            else:
                parameter.copy_(torch.rand_like(parameter) + 0.5)
    return model.eval()


def images() -> Tensor:
    return torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(1))


def calls(model: nn.Module, x: Tensor) -> list[tuple[ConvertedCore, tuple]]:
    """Return what the cores of a model are called with."""
    found: list[tuple[ConvertedCore, tuple]] = []
    cores = [module for module in model.modules() if isinstance(module, ConvertedCore)]
    hooks = [core.register_forward_pre_hook(lambda core, args: found.append((core, args))) for core in cores]
    model(x)
    for hook in hooks:
        hook.remove()
    assert [core for core, _ in found] == cores
    return found


@pytest.mark.parametrize("name", FAMILIES)
def test_softmax_gives_the_outputs_and_gradients_of_the_library(name):
    model, x = network(name, **FAMILIES[name]), images()
    sites = convert.report(model)
    assert sites
    assert all(site.reason is None for site in sites)
    for fused in (True, False):
        for site in sites:
            site.module.fused_attn = fused
        for training in (True, False):
            model.train(training)
            torch.manual_seed(0)
            output = model(x)
            wanted = output, torch.autograd.grad(output.square().sum(), site.module.parameters(), allow_unused=True)[0]
            convert(model, "Softmax")
            torch.manual_seed(0)
            output = model(x)
            got = output, torch.autograd.grad(output.square().sum(), site.module.parameters(), allow_unused=True)[0]
            torch.testing.assert_close(got[0], wanted[0], atol=1e-5, rtol=1e-5)
            if wanted[1] is not None:
                torch.testing.assert_close(got[1], wanted[1], atol=1e-4, rtol=1e-3)
            revert(model)
            assert all(site.module.fused_attn == fused for site in sites)


@pytest.mark.parametrize("name", FAMILIES)
def test_plans_are_doubly_stochastic_under_sinkhorn(name):
    model, x = network(name, **FAMILIES[name]), images()
    softmax = model(x)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "not converted: attn_pool")
        convert(model, "Sinkhorn", n_iters=201)
    assert (model(x) - softmax).abs().max() > 1e-3
    for core, (q, k, _, mask, bias) in calls(model, x):
        plan = core.weights(q, k, mask, bias)
        torch.testing.assert_close(plan.sum(-1), torch.ones(plan.shape[:-1]), atol=1e-4, rtol=0)
        share = plan.shape[-2] / plan.shape[-1]
        torch.testing.assert_close(plan.sum(-2), torch.full_like(plan[..., 0, :], share), atol=1e-2, rtol=0)


def test_shifted_windows_stay_apart():
    model = network("swin_tiny_patch4_window7_224", **SWIN)
    convert(model, "Sinkhorn", n_iters=21)
    core, (q, k, _, mask, bias) = calls(model, images())[1]
    plan = core.weights(q, k, mask, bias)
    far = bias.expand_as(plan) < -50
    assert far.any()
    assert plan[far].max() < 1e-12
    assert plan[~far].max() > 1e-3


def test_of_windows_those_of_the_sample_are_shown():
    model, x = convert(network("swin_tiny_patch4_window7_224", **SWIN), "Sinkhorn"), images()
    layer, alone = attention_of(model, x)[0], attention_of(model, x[1:])[0]
    assert layer.windows == alone.windows == 4
    torch.testing.assert_close(layer.of_sample(1), alone.of_sample(0))


@pytest.mark.parametrize("mask", ["bool", "float", "left", "right", "causal"])
@pytest.mark.parametrize("kind", ["plain", "rope"])
def test_masks_of_a_single_attention(kind, mask):
    layers = timm.layers
    torch.manual_seed(0)
    more = {"qk_norm": True, "scale_norm": True, "norm_layer": nn.LayerNorm, "gated": True, "attn_drop": 0.3}
    if kind == "plain":
        attention, rope = layers.Attention(24, 3, attn_head_dim=6, **more).eval(), {}
    else:
        more |= {"qkv_fused": False, "num_kv_heads": 1, "num_prefix_tokens": 0}
        attention = layers.AttentionRope(24, 3, attn_head_dim=8, **more).eval()
        rope = {"rope": torch.randn(7, 16)}
    x, real = torch.randn(3, 7, 24), torch.tensor([7, 4, 2])[:, None]
    keys = (torch.arange(7) < real) if mask == "right" else (torch.arange(7) >= 7 - real)
    given = {
        "bool": {"attn_mask": torch.rand(3, 1, 7, 7) < 0.7},
        "float": {"attn_mask": torch.randn(3, 3, 7, 7)},
        "causal": {"is_causal": True},
    }.get(mask, {"attn_mask": keys[:, None, None]})
    if mask == "bool":
        given["attn_mask"][..., 0] = True
    wanted = attention(x, **rope, **given)
    convert(attention, "Softmax")
    torch.testing.assert_close(attention(x, **rope, **given), wanted, atol=1e-5, rtol=1e-5)
    convert(attention, "Sinkhorn", attention_dropout=0)
    if mask in ("causal", "bool"):
        with pytest.raises(NotImplementedError, match=r"Sinkhorn can't honour.*Softmax"):
            attention(x, **rope, **given)
        return
    output = attention(x, **rope, **given)
    assert (output - wanted).abs().max() > 1e-4
    if mask in ("left", "right") and kind == "plain":
        alone = attention(x[1:2, keys[1]])
        torch.testing.assert_close(output[1:2, keys[1]], alone, atol=1e-5, rtol=1e-5)


def test_padded_patches_of_images_of_any_size_are_none():
    model = network("naflexvit_base_patch16_gap", embed_dim=32, depth=2, num_heads=2)
    patches, real = torch.randn(2, 9, 16 * 16 * 3), torch.ones(2, 9, dtype=torch.bool)
    places = torch.cartesian_prod(torch.arange(3), torch.arange(3)).expand(2, -1, -1).clone()
    # It takes the patches of a grid in their order, and padding behind them.
    real[1, 6:], places[1, 6:] = False, 0
    wanted = model(patches, places, real)
    torch.testing.assert_close(convert(model, "Softmax")(patches, places, real), wanted, atol=1e-5, rtol=1e-5)
    output = convert(model, "Sinkhorn")(patches, places, real)
    assert (output - wanted).abs().max() > 1e-4
    alone = model(*(given[1:, :6] for given in (patches, places, real)))
    torch.testing.assert_close(output[1:], alone, atol=1e-5, rtol=1e-5)


def test_weights_are_dropped_as_in_the_library():
    model, x = network("vit_tiny_patch16_224", **VIT, attn_drop_rate=0.5), images()
    wanted = convert(copy.deepcopy(model), "Softmax", attention_dropout=0)(x)
    convert(model, "Softmax")
    torch.testing.assert_close(model(x), wanted)
    model.train()
    assert (model(x) - model(x)).abs().max() > 1e-2
    convert(model, "Softmax", attention_dropout=0)
    torch.testing.assert_close(model(x), wanted)


def test_it_is_copied_saved_and_reverted():
    model, x = network("vit_tiny_patch16_224", **VIT), images()
    wanted, state = model(x), model.state_dict()
    convert(model, "Sinkhorn")
    output = model(x)
    assert list(model.state_dict()) == list(state)
    assert isinstance(model.blocks[0].attn, timm.layers.Attention)
    for copied in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(copied(x), output)
        assert copied.blocks[0].attn.core is not model.blocks[0].attn.core
    fresh = convert(network("vit_tiny_patch16_224", **VIT), "Sinkhorn")
    fresh.load_state_dict(state)
    assert torch.equal(fresh(x), output)
    assert torch.equal(revert(model)(x), wanted)
    assert type(model.blocks[0].attn) is timm.layers.Attention
    convert(model, "SemiUnbalancedSinkhorn", learned=True)
    assert "blocks.1.attn.core.normalization." in " ".join(model.state_dict())


def test_layers_compile_as_one_graph_and_are_refused_by_torch_jit():
    model, x = convert(network("eva02_tiny_patch14_224", **{**VIT, "depth": 1}), "Sinkhorn"), images()
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(x), model(x))
    with pytest.raises(ValueError, match=r"torch\.jit\.script.*torch\.compile or torch\.export"):
        torch.jit.script(model)
    with pytest.raises(ValueError, match=r"torch\.jit\.trace.*torch\.compile or torch\.export"):
        torch.jit.trace(model, x)


@pytest.mark.parametrize(
    ("name", "arguments", "reasons"),
    [
        ("swinv2_tiny_window8_256", SWIN, ["cosine attention"]),
        ("cait_xxs24_224", VIT, ["talking heads", "one query, the class token"]),
        ("xcit_nano_12_p16_224", {"img_size": 32, "embed_dim": 32, "depth": 1, "num_heads": 2}, ["channels"]),
        ("vit_dlittle_patch16_reg1_gap_256", VIT, ["differential attention"]),
        ("mobilevitv2_050", {}, ["linear attention"]),
        ("botnet26t_256", {}, ["computes softmax by itself"]),
    ],
)
def test_what_can_not_be_converted_is_named(name, arguments, reasons):
    model = timm.create_model(name, **arguments)
    with pytest.raises(NotImplementedError, match="can't convert") as refused:
        convert(model, "Sinkhorn")
    assert all(reason in str(refused.value) for reason in reasons)
    assert any(reasons[0] in line and "can't be converted" in line for line in str(convert.report(model)).splitlines())


def test_a_network_without_attention_is_refused_and_its_gates_are_none():
    with pytest.raises(ValueError, match="no attention that can be converted"):
        convert(timm.create_model("test_efficientnet"), "Sinkhorn")


def test_a_latent_query_keeps_its_softmax_under_column_sums():
    model = network("vit_base_patch16_siglip_224", **VIT)
    with pytest.warns(UserWarning, match="attn_pool: one query, the latent query"):
        convert(model, "Sinkhorn")
    assert [site.core is not None for site in convert.report(model)] == [True, True, False]
    with pytest.raises(NotImplementedError, match="latent query"):
        convert(model, "Sinkhorn", layers="attn_pool")
    convert(model, "Entmax15")
    assert model.attn_pool.core.sides == ("latent query", "token")


class Own(timm.layers.Attention):
    """Attention of a user's, by a scale of its own, and by nothing for short sequences."""

    def forward(self, x, attn_mask=None, is_causal=False):
        heads = x.unflatten(-1, (self.num_heads, -1)).transpose(1, 2)
        return heads if x.shape[1] < 4 else nn.functional.scaled_dot_product_attention(heads, heads, heads, scale=0.1)


def test_the_scale_is_that_of_the_call():
    attention, x = Own(8, 2), torch.randn(2, 5, 8)
    wanted = attention(x)
    torch.testing.assert_close(convert(attention, "Softmax")(x), wanted, atol=1e-5, rtol=1e-5)


def test_a_forward_that_does_not_ask_its_core_is_an_error():
    attention = convert(Own(8, 2), "Sinkhorn")
    with pytest.raises(NotImplementedError, match="didn't use scaled_dot_product_attention"):
        attention(torch.randn(2, 3, 8))
