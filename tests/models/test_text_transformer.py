"""Text transformer, against PyTorch's encoder, padded and under every normalization."""

import math
import re
import zlib
from functools import partial

import pytest
import torch
from torch import nn

from sinkformer_pl.batch import pad
from sinkformer_pl.errors import UserError
from sinkformer_pl.models.text_transformer import TextTransformer
from sinkformer_pl.normalizations import Sinkhorn, Softmax, registered

EVERY = pytest.mark.parametrize("name", list(registered()))


def build(normalization=Softmax, **given):
    torch.manual_seed(0)
    sizes = {"vocab_size": 50, "dim": 16, "num_heads": 2, **given}
    return TextTransformer(normalization, **sizes).eval()


def texts(*lengths, vocab_size=50):
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(vocab_size, (length,), generator=generator) for length in lengths]


def padded(sequences, width, side="right", filler=0):
    inputs, mask = torch.full((len(sequences), width), filler), torch.zeros(len(sequences), width, dtype=torch.bool)
    for i, tokens in enumerate(sequences):
        at = slice(width - len(tokens), width) if side == "left" else slice(len(tokens))
        inputs[i, at], mask[i, at] = tokens, True
    return inputs, mask


def gradients(model, features):
    upstream = torch.linspace(-1, 1, features.numel(), dtype=features.dtype).reshape(features.shape)
    return torch.autograd.grad(features, list(model.parameters()), upstream)


@pytest.mark.parametrize("layer_norm", ["pre", "post"])
@pytest.mark.parametrize("pooling", ["mean", "max"])
def test_it_is_pytorchs_encoder_with_the_same_weights(layer_norm, pooling):
    layer = nn.TransformerEncoderLayer(
        16, 2, 24, dropout=0.0, activation="gelu", batch_first=True, norm_first=layer_norm == "pre"
    )
    final = nn.LayerNorm(16) if layer_norm == "pre" else None
    encoder = nn.TransformerEncoder(layer, 2, norm=final, enable_nested_tensor=False)
    model = build(mlp_dim=24, layer_norm=layer_norm, pooling=pooling)
    with torch.no_grad():
        for parameter in (*encoder.parameters(), *model.embed.parameters()):
            parameter.add_(torch.randn_like(parameter) * 0.2)
        if final is not None:
            model.encoder.norm.load_state_dict(encoder.norm.state_dict())
        for block, theirs in zip(model.encoder.blocks, encoder.layers, strict=True):
            parts, joint = (block.attention.query, block.attention.key, block.attention.value), theirs.self_attn
            for part, weight, bias in zip(
                parts, joint.in_proj_weight.chunk(3), joint.in_proj_bias.chunk(3), strict=True
            ):
                part.weight.copy_(weight)
                part.bias.copy_(bias)
            block.attention.out.load_state_dict(joint.out_proj.state_dict())
            block.attention_norm.load_state_dict(theirs.norm1.state_dict())
            block.mlp_norm.load_state_dict(theirs.norm2.state_dict())
            block.mlp[0].load_state_dict(theirs.linear1.state_dict())
            block.mlp[-1].load_state_dict(theirs.linear2.state_dict())
    inputs, mask = pad(texts(7, 3, 5))
    x = encoder(model.embed.weight[inputs] + model.positions.table[:7], src_key_padding_mask=~mask)
    sequences = [sequence[real] for sequence, real in zip(x, mask, strict=True)]
    wanted = torch.stack([s.mean(0) if pooling == "mean" else s.amax(0) for s in sequences])
    torch.testing.assert_close(model(inputs, mask), wanted, rtol=1e-4, atol=1e-5)


def test_parameter_count_of_the_published_imdb_network():
    """6 layers of width 256, 8 heads, 1024 hidden, 16k subwords; without its head of 2 classes."""
    published = {"vocab_size": 16_000, "dim": 256, "num_heads": 8, "depth": 6, "mlp_dim": 1024, "layer_norm": "post"}
    with torch.device("meta"):
        model = TextTransformer(Sinkhorn, positions="sinusoidal", pooling="max", **published)
    layer = 4 * (256 * 256 + 256) + (256 * 1024 + 1024) + (1024 * 256 + 256) + 2 * 2 * 256
    assert sum(parameter.numel() for parameter in model.parameters()) == 16_000 * 256 + 6 * layer == 8_834_560


def same_padded_and_alone(model, side, filler=-7):
    sequences = texts(7, 4, 1)
    features, wanted = (
        model(*padded(sequences, 9, side, filler)),
        torch.cat([model(tokens[None]) for tokens in sequences]),
    )
    torch.testing.assert_close(features, wanted, rtol=1e-9, atol=1e-11)
    for found, right in zip(gradients(model, features), gradients(model, wanted), strict=True):
        torch.testing.assert_close(found, right, rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("normalization", [Softmax, partial(Sinkhorn, n_iters=5)], ids=["Softmax", "Sinkhorn"])
@pytest.mark.parametrize("positions", ["learned", "sinusoidal", "none"])
@pytest.mark.parametrize("pooling", ["mean", "max", "cls", "seed"])
@pytest.mark.parametrize("side", ["left", "right"])
def test_a_padded_batch_gives_what_the_texts_give_alone(normalization, positions, pooling, side):
    same_padded_and_alone(build(normalization, positions=positions, pooling=pooling).double(), side)


@EVERY
def test_a_padded_batch_gives_what_the_texts_give_alone_under_every_normalization(name):
    model = build(registered()[name], pooling="cls").double()
    sequences = texts(7, 4, 1)
    features = model(*padded(sequences, 9, "right"))
    wanted = torch.cat([model(tokens[None]) for tokens in sequences])
    torch.testing.assert_close(features, wanted, rtol=1e-8, atol=1e-9)
    assert features.isfinite().all()


def test_padding_trains_no_embedding():
    model = build(pooling="max")
    sequences = [tokens.clamp(min=1) for tokens in texts(7, 3)]
    model(*padded(sequences, 9)).sin().sum().backward()
    assert (model.embed.weight.grad[0] == 0).all()
    assert model.embed.weight.grad[sequences[0]].abs().amin() > 0
    assert (model.positions.table.grad[7:] == 0).all()
    assert (model.positions.table.grad[:7].abs().amax(1) > 0).all()


@pytest.mark.parametrize("pooling", ["mean", "max", "cls", "seed"])
@pytest.mark.parametrize("normalization", [Softmax, Sinkhorn])
def test_a_text_without_tokens_is_finite_and_the_same_alone_and_padded(normalization, pooling):
    model = build(normalization, pooling=pooling)
    empty, text = torch.zeros(0, dtype=torch.int64), texts(5)[0]
    features = model(*pad([text, empty]))
    torch.testing.assert_close(features, torch.cat((model(text[None]), model(empty[None]))))
    assert features.isfinite().all()
    assert all(gradient.isfinite().all() for gradient in gradients(model, features))


@pytest.mark.parametrize(("positions", "matters"), [("learned", True), ("sinusoidal", True), ("none", False)])
@pytest.mark.parametrize("pooling", ["mean", "max", "cls", "seed"])
def test_the_order_of_the_tokens(positions, matters, pooling):
    model, (tokens,) = build(positions=positions, pooling=pooling).double(), texts(7)
    difference = (model(tokens[None]) - model(tokens.flip(0)[None])).abs().amax()
    assert difference > 1e-4 if matters else difference < 1e-12


@pytest.mark.parametrize("dim", [16, 15])
def test_sinusoids_are_those_of_vaswani_et_al(dim):
    model, (tokens,) = build(positions="sinusoidal", dim=dim, num_heads=1), texts(300)
    seen = []
    model.dropout.register_forward_hook(lambda _module, given, _output: seen.append(given[0]))
    model(tokens[None])
    angle = [[p / 10000 ** (2 * (i // 2) / dim) for i in range(dim)] for p in range(300)]
    wanted = torch.tensor([[math.cos(a) if i % 2 else math.sin(a) for i, a in enumerate(row)] for row in angle])
    torch.testing.assert_close(seen[0][0] - model.embed.weight[tokens] * math.sqrt(dim), wanted, rtol=0, atol=3e-5)


@EVERY
def test_training_in_half_precision_under_every_normalization(name):
    model, (inputs, mask) = build(registered()[name], dropout=0.0), pad(texts(7, 4))
    with torch.autocast("cpu", torch.bfloat16):
        features = model(inputs, mask)
        assert (features - model(inputs, mask)).abs().mean() < 0.05
        model.train()(inputs, mask).sin().sum().backward()
    for parameter_name, parameter in model.named_parameters():
        assert parameter.grad is not None, parameter_name
        assert parameter.grad.isfinite().all(), parameter_name


@pytest.mark.parametrize("normalization", [Softmax, Sinkhorn])
def test_one_graph_for_the_compiler(normalization):
    torch.compiler.reset()
    model, (inputs, mask) = build(normalization, pooling="cls", depth=1), pad(texts(7, 4))
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(inputs, mask), model(inputs, mask), rtol=1e-5, atol=1e-5)
    compiled(inputs, mask).sum().backward()
    assert model.embed.weight.grad.isfinite().all()


def test_initial_weights_and_options():
    model = build(vocab_size=500, dim=64, temperature="learned", dropout=0.5, pooling="cls")
    for embedding in (model.embed.weight, model.positions.table, model.class_token.token):
        assert 0.015 < embedding.std() < 0.025
    assert model.positions.table.shape == (256, 64)
    assert model.encoder.blocks[0].attention.core.log_temperature is not None
    (tokens,) = texts(7)
    assert model(tokens[None]).equal(model(tokens[None]))
    model.train()
    assert not model(tokens[None]).equal(model(tokens[None]))
    softmax, sinkhorn = build(Softmax).state_dict(), build(Sinkhorn).state_dict()
    assert all(softmax[name].equal(sinkhorn[name]) for name in softmax | sinkhorn)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"vocab_size": 0}, "vocab_size must be at least 1"),
        ({"max_length": 0}, "max_length must be at least 1"),
        ({"depth": 0}, "depth must be at least 1"),
        ({"mlp_dim": -1}, "mlp_dim must be at least 0"),
        ({"num_heads": 3}, "num_heads=3 must divide the width dim=16"),
        ({"pooling": "sum"}, "pooling must be one of cls, mean, max, seed, got 'sum'"),
        ({"positions": "rotary"}, "positions must be one of learned, sinusoidal, relative, none, got 'rotary'"),
        ({"positions": "sinusoidal", "max_length": 9}, "max_length=9 is the number of learned positions; leave it out"),
    ],
)
def test_what_cant_be_built(given, message):
    with pytest.raises(ValueError, match=message):
        build(**given)


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        (torch.full((2, 9), 3), "has 9 tokens, .* max_length=8: set model.backbone.max_length to 9 or more"),
        (torch.tensor([[3, 50]]), "token number 50 is outside .* model.backbone.vocab_size=50 must be at least"),
        (torch.tensor([[3, -1]]), "token number -1 is outside"),
        (torch.randn(2, 7, 3), r"takes token numbers \(batch, tokens\) of an integer dtype, got shape \(2, 7, 3\)"),
    ],
)
def test_texts_that_the_network_wasnt_built_for(inputs, message):
    with pytest.raises(UserError, match=message):
        build(max_length=8)(inputs)


def test_masks_that_arent():
    (tokens,) = texts(7)
    for mask in (torch.ones(1, 6, dtype=torch.bool), torch.ones(1, 7)):
        with pytest.raises(UserError, match="the mask must be bool of the shape of the tokens"):
            build()(tokens[None], mask)


def test_positions_without_a_limit():
    (tokens,) = texts(1000)
    for positions in ("sinusoidal", "none"):
        assert build(positions=positions)(tokens[None]).isfinite().all()


@pytest.mark.parametrize("normalization", [Softmax, Sinkhorn])
def test_it_learns_real_tweets(real_data, normalization):
    """Four emotions, of which the most frequent has less than 0.45 of the tweets; 0.57 was seen."""
    folder, splits = real_data / "tweeteval_emotion", []
    for split in ("train", "val"):
        lines = (folder / f"{split}_text.txt").read_text(encoding="utf-8").splitlines()
        words = [re.findall(r"\w+|[^\w\s]", line.lower()) for line in lines]
        tokens = [torch.tensor([zlib.crc32(word.encode()) % 4000 for word in line][:48]) for line in words]
        labels = (folder / f"{split}_labels.txt").read_text(encoding="utf-8").split()
        splits.append((tokens, torch.tensor([int(label) for label in labels])))
    model = build(normalization, vocab_size=4000, dim=32, depth=1).train()
    head = nn.Linear(32, 4)
    optimizer = torch.optim.Adam([*model.parameters(), *head.parameters()], lr=5e-3)
    (tokens, target), (val_tokens, val_target) = splits
    for _ in range(2):
        for chosen in torch.randperm(len(tokens)).split(64):
            logits = head(model(*pad([tokens[i] for i in chosen])))
            loss = nn.functional.cross_entropy(logits, target[chosen])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    model.eval()
    with torch.no_grad():
        accuracy = (head(model(*pad(val_tokens))).argmax(1) == val_target).float().mean()
    assert accuracy > 0.5
