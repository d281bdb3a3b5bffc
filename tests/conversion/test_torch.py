"""Conversion of PyTorch's own attention."""

import copy
import io
import itertools
import pickle
import subprocess
import sys
import tempfile

import pytest
import torch
from torch import Tensor, nn

from sinkformer_pl import convert, revert
from sinkformer_pl.diagnostics import attention_of, column_sums, row_sums

LENGTHS = torch.tensor([7, 4, 1])


def padding(side: str) -> Tensor:
    """Three samples of up to seven tokens, True at padding."""
    real, place = LENGTHS[:, None], torch.arange(7)
    return place >= real if side == "right" else place < 7 - real


def close(one: Tensor, other: Tensor) -> None:
    torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-5)


def additive(forbidden: Tensor) -> Tensor:
    return torch.zeros(forbidden.shape).masked_fill(forbidden, -torch.inf)


def layer(cls: type = nn.TransformerEncoderLayer, **options: object) -> nn.Module:
    return cls(16, 4, 32, batch_first=True, **{"dropout": 0.0, **options})


def encoder(**options: object) -> nn.TransformerEncoder:
    torch.manual_seed(0)
    return nn.TransformerEncoder(layer(**options), 2, enable_nested_tensor=not options.get("norm_first")).eval()


CAUSAL = torch.ones(7, 7, dtype=torch.bool).triu(1)
MASKS = {
    "none": {},
    "padding, left": {"key_padding_mask": padding("left")},
    "padding, right": {"key_padding_mask": padding("right")},
    "padding as float": {"key_padding_mask": additive(padding("left"))},
    "padding as a number": {"key_padding_mask": additive(padding("left")) + torch.randn(3, 7)},
    "causal": {"attn_mask": CAUSAL},
    "causal as float": {"attn_mask": additive(CAUSAL), "is_causal": True},
    "pairs of each head": {"attn_mask": torch.rand(9, 7, 7) > 0.9},
    "bias": {"attn_mask": torch.randn(7, 7), "key_padding_mask": additive(padding("right"))},
}
LAYERS = {
    "batch first": {"batch_first": True},
    "sequence first": {},
    "own keys and values": {"add_bias_kv": True, "add_zero_attn": True, "bias": False},
    "other widths": {"kdim": 12, "vdim": 12, "batch_first": True},
}


@pytest.mark.parametrize(
    ("options", "mask"),
    # With keys of its own the library takes is_causal at its word, and drops them with the mask.
    [pair for pair in itertools.product(LAYERS, MASKS) if pair != ("own keys and values", "causal as float")],
)
def test_softmax_gives_the_outputs_and_weights_of_the_library(options, mask):
    torch.manual_seed(0)
    attention = nn.MultiheadAttention(12, 3, **LAYERS[options]).eval()
    if attention.bias_k is not None:
        nn.init.normal_(attention.bias_v)
    x = torch.randn(3, 7, 12)
    x = x if attention.batch_first else x.transpose(0, 1)
    for more in ({}, {"average_attn_weights": False}, {"need_weights": False}):
        wanted = attention(x, x, x, **MASKS[mask], **more)
        outputs = convert(attention, "Softmax")(x, x, x, **MASKS[mask], **more)
        close(outputs[0], wanted[0])
        assert (outputs[1] is None) == (wanted[1] is None)
        if wanted[1] is not None:
            close(outputs[1], wanted[1])
        assert torch.equal(revert(attention)(x, x, x, **MASKS[mask], **more)[0], wanted[0])


def test_softmax_of_one_sample_without_a_batch_and_of_another_sequence():
    attention = nn.MultiheadAttention(12, 3).eval()
    queries, keys = torch.randn(5, 12), torch.randn(7, 12)
    for more in ({}, {"key_padding_mask": padding("left")[1]}, {"attn_mask": CAUSAL[2:]}):
        wanted = revert(attention)(queries, keys, keys, **more)
        for output, of_library in zip(convert(attention, "Softmax")(queries, keys, keys, **more), wanted, strict=True):
            close(output, of_library)


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("norm_first", [True, False])
@pytest.mark.parametrize("layers", [None, "last half"])
def test_an_encoder_in_evaluation_takes_the_converted_attention_and_not_its_fast_path(side, norm_first, layers):
    model, x, pad = encoder(norm_first=norm_first), torch.randn(3, 7, 16), padding(side)
    with torch.no_grad():
        wanted = model(x, src_key_padding_mask=pad)
        convert(model, "Softmax", layers=layers)
        close(model(x, src_key_padding_mask=pad)[~pad], wanted[~pad])
        convert(model, "Sinkhorn", layers=layers, n_iters=7)
        output = model(x, src_key_padding_mask=pad)
        assert (output - wanted)[~pad].abs().max() > 1e-3
        assert len(attention_of(model, x)) == (2 if layers is None else 1)
    # With a gradient there is no fast path.
    close(model(x, src_key_padding_mask=pad), output)
    with torch.no_grad():
        assert torch.equal(revert(model)(x, src_key_padding_mask=pad), wanted)
    assert type(model) is nn.TransformerEncoder
    assert type(model.layers[1].self_attn) is nn.MultiheadAttention


def test_the_gradients_of_a_training_are_those_of_the_library():
    model, x, pad = encoder().train(), torch.randn(3, 7, 16), padding("left")

    def gradients() -> list[Tensor]:
        model.zero_grad()
        model(x, src_key_padding_mask=pad)[~pad].square().sum().backward()
        return [parameter.grad.clone() for parameter in model.parameters()]

    wanted = gradients()
    convert(model, "Softmax")
    for gradient, of_library in zip(gradients(), wanted, strict=True):
        torch.testing.assert_close(gradient, of_library, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("side", ["left", "right"])
def test_under_sinkhorn_padding_changes_nothing_and_real_tokens_share_attention_evenly(side):
    model, x, pad = convert(encoder(), "Sinkhorn", n_iters=101), torch.randn(3, 7, 16), padding(side)
    output = model(x, src_key_padding_mask=pad)
    for sample, real in enumerate(~pad):
        close(output[sample, real], model(x[sample : sample + 1, real])[0])
    for found in attention_of(model, x, None, pad):
        real = ~pad[:, None].expand(-1, 4, -1)
        close(row_sums(found.weights, found.mask)[real], torch.ones(real.sum()))
        close(column_sums(found.weights, found.mask)[real], torch.ones(real.sum()))


def test_keys_of_the_layer_are_met_by_all_and_padding_still_changes_nothing():
    torch.manual_seed(0)
    attention = nn.MultiheadAttention(12, 3, add_bias_kv=True, add_zero_attn=True, batch_first=True)
    convert(attention, "Sinkhorn")
    x, pad = torch.randn(3, 7, 12), padding("right")
    for mask in (pad, additive(pad)):
        output, weights = attention(x, x, x, key_padding_mask=mask)
        for sample, real in enumerate(LENGTHS.tolist()):
            alone = x[sample : sample + 1, :real]
            close(output[sample, :real], attention(alone, alone, alone)[0][0])
            assert weights[sample, :real, 7:].min() > 0


@pytest.mark.parametrize("side", ["left", "right"])
def test_attention_to_another_sequence_under_sinkhorn_is_a_rectangular_plan_of_real_tokens(side):
    torch.manual_seed(0)
    model = nn.TransformerDecoder(layer(nn.TransformerDecoderLayer), 2).eval()
    convert(model, "Sinkhorn", n_iters=51)
    target, memory, pad = torch.randn(3, 5, 16), torch.randn(3, 7, 16), padding(side)
    short = padding(side)[:, :5] if side == "right" else padding(side)[:, 2:]
    options = {"tgt_key_padding_mask": short, "memory_key_padding_mask": pad}
    output = model(target, memory, **options)
    for sample in range(3):
        alone = model(target[sample : sample + 1, ~short[sample]], memory[sample : sample + 1, ~pad[sample]])
        close(output[sample, ~short[sample]], alone[0])


def test_a_whole_transformer_is_converted_where_the_normalization_can_be():
    torch.manual_seed(0)
    model = nn.Transformer(16, 4, 2, 2, 32, dropout=0.0, batch_first=True).eval()
    source, target, pad = torch.randn(3, 7, 16), torch.randn(3, 5, 16), padding("right")
    options = {
        "tgt_mask": nn.Transformer.generate_square_subsequent_mask(5),
        "src_key_padding_mask": additive(pad),
        "memory_key_padding_mask": additive(pad),
    }
    wanted = model(source, target, **options)
    close(convert(model, "Softmax")(source, target, **options), wanted)
    with pytest.raises(NotImplementedError, match=r"decoder\.layers\.0\.multihead_attn: Sinkhorn .*layers.*Softmax"):
        convert(model, "Sinkhorn")(source, target, **options)
    with pytest.raises(NotImplementedError, match=r"decoder\.layers\.0\.self_attn: Sinkhorn .*causal.*layers.*Softmax"):
        convert(revert(model), "Sinkhorn", layers="*.self_attn")(source, target, **options)
    convert(revert(model), "Sinkhorn", layers="encoder, decoder.*.multihead_attn")
    assert [site.core is None for site in convert.report(model)] == [False, False, True, False, True, False]
    for tgt_mask in (CAUSAL[:5, :5], additive(CAUSAL[:5, :5])):
        with pytest.raises(NotImplementedError, match=r"decoder\.layers\.0\.multihead_attn: .*causal decoder"):
            model(source, target, **{**options, "tgt_mask": tgt_mask})
    del options["tgt_mask"]
    assert model(source, target, **options).isfinite().all()
    assert model(source, target, **options, tgt_mask=torch.randn(5, 5)).isfinite().all()


@pytest.mark.parametrize(
    "mask", [CAUSAL, additive(CAUSAL), torch.rand(9, 7, 7) > 0.5, additive(torch.rand(9, 7, 7) > 0.5)]
)
def test_single_forbidden_pairs_are_refused_under_sinkhorn(mask):
    attention, x = convert(nn.MultiheadAttention(12, 3, batch_first=True), "Sinkhorn"), torch.randn(3, 7, 12)
    with pytest.raises(NotImplementedError, match=r"Sinkhorn can't honour a mask that forbids single pairs.*Softmax"):
        attention(x, x, x, attn_mask=mask)


def test_a_mask_of_pairs_that_says_which_tokens_are_real_is_padding():
    attention, x, pad = nn.MultiheadAttention(12, 3, batch_first=True), torch.randn(3, 7, 12), padding("left")
    convert(attention, "Sinkhorn")
    pairs = (pad[:, None] | pad[:, :, None]).repeat_interleave(3, 0)
    close(attention(x, x, x, attn_mask=pairs)[0], attention(x, x, x, key_padding_mask=pad)[0])


def test_dropout_of_weights_is_that_of_the_library_or_another_or_refused():
    torch.manual_seed(0)
    attention, x = nn.MultiheadAttention(8, 2, dropout=0.5, batch_first=True), torch.randn(1, 6, 8).repeat(3000, 1, 1)
    attention.out_proj.weight.data.copy_(torch.eye(8))
    with pytest.raises(NotImplementedError, match=r"LowRankSinkhorn .*attention_dropout=0"):
        convert(attention, "LowRankSinkhorn")
    convert(attention, "Sinkhorn")
    wanted = attention.eval()(x, x, x)[0]
    assert torch.equal(attention(x, x, x)[0], wanted)
    attention.train()
    draws = attention(x, x, x)[0]
    assert draws.std(0).min() > 0.01
    torch.testing.assert_close(draws.mean(0), wanted[0], atol=0.05, rtol=0)
    convert(attention, "Sinkhorn", attention_dropout=0)
    close(attention(x, x, x)[0], wanted)
    assert attention.dropout == 0.5


def test_a_learned_normalization_is_trained_saved_copied_and_pickled():
    def build() -> nn.Module:
        return convert(encoder(dropout=0.1), "SemiUnbalancedSinkhorn", rho=0.5, learned=True, attention_dropout=0)

    model, x = build(), torch.randn(3, 7, 16)
    keys = [f"layers.{n}.self_attn.core.normalization.log_rho" for n in (0, 1)]
    assert set(keys) == set(model.state_dict()) - set(encoder().state_dict())
    optimizer = torch.optim.SGD(model.parameters(), 10.0)
    (model(x) * torch.randn(16)).sum().backward()
    optimizer.step()
    assert all(model.state_dict()[key].ne(build().state_dict()[key]).all() for key in keys)
    wanted = model(x)
    file = io.BytesIO()
    torch.save(model.state_dict(), file)
    file.seek(0)
    other = build()
    other.load_state_dict(torch.load(file, weights_only=True))
    for same in (other, copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(same(x), wanted)
        assert type(revert(same)) is nn.TransformerEncoder
        assert not set(keys) & set(same.state_dict())


@pytest.mark.parametrize("name", ["Softmax", "Sinkhorn"])
def test_a_converted_model_compiles_into_one_graph(name):
    model, x = convert(encoder(), name), torch.randn(3, 7, 16)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    for pad in (None, padding("left")):
        close(compiled(x, src_key_padding_mask=pad), model(x, src_key_padding_mask=pad))
    loss = compiled(x).square().sum()
    loss.backward()
    assert model.layers[0].self_attn.in_proj_weight.grad.isfinite().all()


def test_a_subclass_that_may_attend_in_another_way_is_named():
    class Own(nn.MultiheadAttention):
        pass

    own = Own(8, 2)
    with pytest.raises(NotImplementedError, match=r"Own.*subclass"):
        convert(own, "Softmax")
    with pytest.warns(UserWarning, match=r"not converted: 1: Own"):
        model = convert(nn.Sequential(nn.MultiheadAttention(8, 2), own), "Softmax")
    assert [site.core is not None for site in convert.report(model)] == [True, False]


def test_a_decoder_layer_of_ones_own_may_not_say_which_queries_are_real():
    class Own(nn.TransformerDecoderLayer):
        pass

    model = nn.TransformerDecoder(layer(Own), 1)
    with pytest.raises(NotImplementedError, match=r"layers\.0\.multihead_attn: Own .*Sinkhorn sums over queries"):
        convert(model, "Sinkhorn", layers="*.multihead_attn")
    assert all(site.core is not None for site in convert.report(convert(model, "Softmax")))


@pytest.mark.slow
def test_processes_share_the_gradients_of_what_a_normalization_learns():
    code = """
import sys, torch
from torch import nn
from sinkformer_pl import convert
rank = int(sys.argv[1])
torch.distributed.init_process_group("gloo", f"file://{sys.argv[2]}", rank=rank, world_size=2)
torch.manual_seed(0)
layer = nn.TransformerEncoderLayer(16, 4, 32, batch_first=True, dropout=0.0)
model = convert(nn.TransformerEncoder(layer, 1), "SemiUnbalancedSinkhorn", learned=True)
torch.manual_seed(rank)
shared = nn.parallel.DistributedDataParallel(model)
(shared(torch.randn(2, 7, 16)) * torch.linspace(-1, 1, 16)).sum().backward()
print(model.layers[0].self_attn.core.normalization.log_rho.grad.tolist())
"""
    with tempfile.TemporaryDirectory() as folder:
        commands = [[sys.executable, "-c", code, str(rank), f"{folder}/meeting"] for rank in (0, 1)]
        processes = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for command in commands]
        one, other = (process.communicate()[0] for process in processes)
    assert one == other
    assert "0.0," not in one


def test_nested_tensors_are_refused_and_not_left_to_the_fast_path():
    class Own(nn.TransformerEncoder):
        pass

    model = convert(Own(layer(), 1).eval(), "Sinkhorn")
    with torch.no_grad(), pytest.raises(NotImplementedError, match=r"layers\.0\.self_attn.*enable_nested_tensor=False"):
        model(torch.randn(3, 7, 16), src_key_padding_mask=padding("right"))


def test_the_core_follows_device_dtype_and_mode_of_its_attention():
    attention = nn.MultiheadAttention(8, 2, dtype=torch.float64, device="meta").eval()
    core = convert(attention, "SemiUnbalancedSinkhorn", learned=True).core
    assert (core.normalization.log_rho.dtype, core.normalization.log_rho.device.type) == (torch.float64, "meta")
    assert not core.training
