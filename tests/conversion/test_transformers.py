"""Conversion of Hugging Face's transformers."""

import copy
import functools

import pytest
import torch
from torch import Tensor, nn

from sinkformer_pl import convert, revert
from sinkformer_pl.conversion import report
from tests.optional import transformers as hf

SMALL = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}
TEXT = {**SMALL, "vocab_size": 50, "pad_token_id": 1}
IMAGE = {**SMALL, "image_size": 16, "patch_size": 4}
NO_SPECIAL = {"bos_token_id": None, "eos_token_id": None, "cls_token_id": None, "sep_token_id": None}
NO_DROPOUT = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
SEQ2SEQ = {
    "vocab_size": 50,
    "d_model": 32,
    "pad_token_id": 1,
    "decoder_start_token_id": 2,
    "bos_token_id": 2,
    "eos_token_id": 3,
    "forced_eos_token_id": 3,
}

FAMILIES = {
    "bert": lambda: hf.BertModel(hf.BertConfig(**TEXT, **NO_DROPOUT)),
    "distilbert": lambda: hf.DistilBertModel(
        hf.DistilBertConfig(
            vocab_size=50, dim=32, n_layers=2, n_heads=4, hidden_dim=48, pad_token_id=1, dropout=0, attention_dropout=0
        )
    ),
    "roberta": lambda: hf.RobertaModel(hf.RobertaConfig(**TEXT, **NO_DROPOUT)),
    "modernbert": lambda: hf.ModernBertModel(
        hf.ModernBertConfig(**TEXT, **NO_SPECIAL, local_attention=4, global_attn_every_n_layers=2)
    ),
    "vit": lambda: hf.ViTModel(hf.ViTConfig(**IMAGE)),
    "dinov2": lambda: hf.Dinov2Model(hf.Dinov2Config(**{**IMAGE, "intermediate_size": None}, mlp_ratio=2)),
    "clip vision": lambda: hf.CLIPVisionModel(hf.CLIPVisionConfig(**IMAGE)),
    "clip text": lambda: hf.CLIPTextModel(hf.CLIPTextConfig(**{**TEXT, "bos_token_id": 2, "eos_token_id": 49})),
    "gpt2": lambda: hf.GPT2Model(
        hf.GPT2Config(
            vocab_size=50,
            n_embd=32,
            n_layer=2,
            n_head=4,
            bos_token_id=2,
            eos_token_id=3,
            resid_pdrop=0,
            embd_pdrop=0,
            attn_pdrop=0,
        )
    ),
    "llama": lambda: hf.LlamaModel(hf.LlamaConfig(**TEXT, num_key_value_heads=2)),
    "bart": lambda: hf.BartModel(
        hf.BartConfig(
            **SEQ2SEQ,
            encoder_layers=1,
            decoder_layers=1,
            encoder_attention_heads=4,
            decoder_attention_heads=4,
            encoder_ffn_dim=48,
            decoder_ffn_dim=48,
            dropout=0,
        )
    ),
    "t5": lambda: hf.T5Model(
        hf.T5Config(
            vocab_size=50,
            d_model=32,
            d_kv=8,
            d_ff=48,
            num_layers=1,
            num_heads=4,
            pad_token_id=1,
            decoder_start_token_id=2,
            eos_token_id=3,
            dropout_rate=0,
        )
    ),
}
TEXTS = [name for name in FAMILIES if name not in ("vit", "dinov2", "clip vision")]
PADDED = [(name, side) for name in FAMILIES for side in (("left", "right") if name in TEXTS else ("none",))]


@functools.cache
def made(family: str) -> nn.Module:
    torch.manual_seed(0)
    model = FAMILIES[family]()
    for parameter in model.parameters():
        # From their initial values attention is all but uniform.
        if parameter.ndim > 1:
            parameter.data.normal_(std=0.25)
    return model.eval()


def model_of(family: str) -> nn.Module:
    return copy.deepcopy(made(family))


def inputs_of(family: str, side: str = "right") -> tuple[dict[str, Tensor], Tensor]:
    """Three samples, of 7, 4 and 1 tokens, and which of their tokens are real."""
    generator = torch.Generator().manual_seed(1)
    if family not in TEXTS:
        return {"pixel_values": torch.randn(3, 3, 16, 16, generator=generator)}, torch.ones(3, 17, dtype=torch.bool)
    place, lengths = torch.arange(7), torch.tensor([7, 4, 1])[:, None]
    real = place < lengths if side == "right" else place >= 7 - lengths
    numbers = torch.randint(4, 49, (3, 7), generator=generator).where(real, 1)
    inputs = {"input_ids": numbers, "attention_mask": real.long()}
    if family in ("bart", "t5"):
        inputs["decoder_input_ids"] = torch.randint(4, 49, (3, 5), generator=generator)
        real = torch.ones(3, 5, dtype=torch.bool)
    return inputs, real


def run(model: nn.Module, inputs: dict[str, Tensor], real: Tensor | None = None) -> Tensor:
    with torch.no_grad():
        output = model(**inputs).last_hidden_state
    return output if real is None else output[real]


@pytest.mark.parametrize(("family", "side"), PADDED)
@pytest.mark.parametrize("training", [False, True])
def test_softmax_gives_the_outputs_of_the_library(family, side, training):
    model, (inputs, real) = model_of(family).train(training), inputs_of(family, side)
    wanted = run(model, inputs, real)
    assert all(site.reason is None for site in report(model))
    convert(model, "Softmax")
    calls = []
    for site in report(model):
        site.core.register_forward_hook(lambda core, *_: calls.append(core))
    torch.testing.assert_close(run(model, inputs, real), wanted, atol=1e-5, rtol=1e-5)
    assert calls == [site.core for site in report(model)]
    assert torch.equal(run(revert(model), inputs, real), wanted)
    assert (model.config._attn_implementation, hasattr(model.config, "sinkformer_pl")) == ("sdpa", False)


@pytest.mark.parametrize(
    ("family", "side"),
    [("bert", "right"), ("distilbert", "right"), ("modernbert", "right"), ("roberta", "left"), ("roberta", "right")],
)
@pytest.mark.filterwarnings("ignore:not converted")
def test_padding_takes_no_mass(family, side):
    model, (inputs, real) = convert(model_of(family), "Sinkhorn", n_iters=5), inputs_of(family, side)
    together = run(model, inputs)
    assert not torch.allclose(together[real], run(made(family), inputs, real), atol=1e-3)
    for number, row in enumerate(real):
        alone = run(model, {"input_ids": inputs["input_ids"][number, row][None]})
        torch.testing.assert_close(together[number, row][None], alone, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("family", ["vit", "dinov2", "clip vision"])
def test_images_under_sinkhorn(family):
    model, (inputs, _) = convert(model_of(family), "Sinkhorn", n_iters=41), inputs_of(family)
    weights = []
    for site in report(model):
        site.core.register_forward_hook(lambda core, given, _: weights.append(core.weights(*given[:2])))
    run(model, inputs)
    assert len(weights) == 2
    for matrix in weights:
        torch.testing.assert_close(matrix.sum(-2), torch.ones(3, 4, 17), atol=1e-2, rtol=0)


@pytest.mark.parametrize("family", ["clip text", "gpt2", "llama"])
def test_a_plan_is_refused_where_attention_is_causal(family):
    model = model_of(family)
    with pytest.raises(NotImplementedError, match=r"layers?\.0\.self_attn|h\.0\.attn") as refused:
        convert(model, "Sinkhorn")
    assert "causal" in str(refused.value)
    assert "Softmax" in str(refused.value)
    assert all(site.core is None for site in report(model))
    inputs, real = inputs_of(family)
    assert run(convert(model, "Entmax15"), inputs, real).isfinite().all()


def test_a_plan_goes_to_global_layers_only():
    model = model_of("modernbert")
    with pytest.warns(UserWarning, match=r"layers\.1\.attn: a sliding window"):
        convert(model, "Sinkhorn")
    assert [site.core is not None for site in report(model)] == [True, False]
    with pytest.raises(NotImplementedError, match=r"layers\.1\.attn"):
        convert(model, "Sinkhorn", layers=1)
    inputs, real = inputs_of("modernbert")
    # The other layer attends in its window, as in the library.
    torch.testing.assert_close(
        run(convert(model, "Softmax", layers=0), inputs, real), run(made("modernbert"), inputs, real)
    )


@pytest.mark.parametrize("family", ["bart", "t5"])
def test_of_an_encoder_with_a_decoder_the_encoder_gets_the_plan(family):
    model, (inputs, _) = model_of(family), inputs_of(family)
    with pytest.warns(UserWarning, match="its queries are those of a decoder"):
        convert(model, "Sinkhorn")
    assert [site.core is not None for site in report(model)] == [True, False, False]
    assert [(site.kind, site.causal) for site in report(model)] == [("self", False), ("self", True), ("cross", False)]
    output = run(model, inputs)
    assert not torch.allclose(output, run(made(family), inputs), atol=1e-3)
    # Later tokens of the decoder change nothing before them.
    later = {**inputs, "decoder_input_ids": inputs["decoder_input_ids"].index_fill(1, torch.tensor([4]), 9)}
    torch.testing.assert_close(run(model, later)[:, :4], output[:, :4])


def test_relative_positions_are_refused_where_they_have_no_place():
    with pytest.raises(NotImplementedError, match="adds a bias"):
        convert(model_of("t5"), "SlicedTransport", layers=0, attention_dropout=0)


def test_what_computes_its_own_softmax_is_named():
    model = hf.MPNetModel(hf.MPNetConfig(vocab_size=50, **SMALL))
    assert all("itself" in site.reason for site in report(model))
    with pytest.raises(NotImplementedError, match=r"encoder\.layer\.0\.attention\.attn"):
        convert(model, "Softmax")


def test_a_part_without_its_model_is_refused():
    with pytest.raises(NotImplementedError, match="PreTrainedModel"):
        convert(model_of("bert").encoder.layer[0], "Softmax")


def test_one_layer_is_converted_and_the_others_are_the_library_s():
    model, (inputs, real) = model_of("bert"), inputs_of("bert", "left")
    convert(model, "Sinkhorn", layers="last half")
    with torch.no_grad():
        ours, wanted = (m(**inputs, output_hidden_states=True).hidden_states for m in (model, made("bert")))
    torch.testing.assert_close(ours[1][real], wanted[1][real], atol=1e-5, rtol=1e-5)
    assert not torch.allclose(ours[2][real], wanted[2][real], atol=1e-3)


def test_dropout_of_the_weights_is_the_library_s():
    config = hf.BertConfig(**TEXT, hidden_dropout_prob=0, attention_probs_dropout_prob=0.3)
    eager = hf.BertModel._from_config(config, attn_implementation="eager").train()
    model, (inputs, real) = copy.deepcopy(eager), inputs_of("bert")
    for parameter in model.parameters():
        parameter.data.normal_(std=0.25)
    eager.load_state_dict(model.state_dict())
    convert(model, "Softmax")
    outputs = []
    for network in (model, eager):
        torch.manual_seed(0)
        outputs.append(run(network, inputs, real))
    torch.testing.assert_close(*outputs, atol=1e-5, rtol=1e-5)
    evaluated = run(copy.deepcopy(eager).eval(), inputs, real)
    assert not torch.allclose(outputs[0], evaluated, atol=1e-2)
    convert(model, "Softmax", attention_dropout=0)
    torch.testing.assert_close(run(model, inputs, real), evaluated, atol=1e-5, rtol=1e-5)
    with pytest.raises(NotImplementedError, match="attention_dropout=0"):
        convert(model, "LowRankSinkhorn")


def test_weights_are_returned_where_they_are_asked_for():
    eager = copy.deepcopy(made("bert"))
    eager.set_attn_implementation("eager")
    model, (inputs, real) = convert(model_of("bert"), "Softmax"), inputs_of("bert")
    ours, wanted = (m(**inputs, output_attentions=True).attentions for m in (model, eager))
    for one, other in zip(ours, wanted, strict=True):
        torch.testing.assert_close(one.mT[real[:, None].expand(3, 4, 7)], other.mT[real[:, None].expand(3, 4, 7)])
    assert model(**inputs).get("attentions") is None


def test_queries_that_the_library_has_scaled_already():
    model = hf.WhisperModel(
        hf.WhisperConfig(
            **{**SEQ2SEQ, "forced_eos_token_id": None},
            encoder_layers=1,
            decoder_layers=1,
            encoder_attention_heads=4,
            decoder_attention_heads=4,
            encoder_ffn_dim=48,
            decoder_ffn_dim=48,
            num_mel_bins=8,
            max_source_positions=10,
        )
    ).eval()
    for parameter in model.parameters():
        parameter.data.normal_(std=0.25)
    inputs = {"input_features": torch.randn(2, 8, 20), "decoder_input_ids": torch.tensor([[4, 5, 6], [7, 8, 9]])}
    wanted = run(model, inputs)
    torch.testing.assert_close(run(convert(model, "Softmax"), inputs), wanted, atol=1e-5, rtol=1e-5)


def test_a_causal_model_generates_with_its_cache():
    model = hf.GPT2LMHeadModel(made("gpt2").config).eval()
    convert(model, "Entmax15")
    tokens = {"input_ids": torch.tensor([[1, 1, 7], [4, 5, 6]]), "attention_mask": torch.tensor([[0, 0, 1], [1, 1, 1]])}
    options = {"max_new_tokens": 4, "do_sample": False, "pad_token_id": 1, "eos_token_id": None}
    generated = [model.generate(**tokens, **options, use_cache=cached) for cached in (True, False)]
    assert torch.equal(*generated)


def test_a_mask_of_pairs_of_one_s_own():
    pairs = torch.ones(3, 1, 7, 7, dtype=torch.bool).tril()
    inputs = {"input_ids": inputs_of("bert")[0]["input_ids"], "attention_mask": pairs}
    model = convert(model_of("bert"), "Softmax")
    torch.testing.assert_close(run(model, inputs), run(made("bert"), inputs), atol=1e-5, rtol=1e-5)
    convert(model, "Sinkhorn")
    with pytest.raises(NotImplementedError, match=r"encoder\.layer\.0\.attention\.self"):
        run(model, inputs)


@pytest.mark.parametrize("family", ["bert", "vit", "bart"])
@pytest.mark.filterwarnings("ignore:not converted")
def test_a_saved_model_is_restored_with_what_it_has_learned(family, tmp_path):
    model, (inputs, _) = model_of(family), inputs_of(family)
    convert(model, "SemiUnbalancedSinkhorn", layers=0, learned=True, attention_dropout=0)
    for name, parameter in model.named_parameters():
        if ".core." in name:
            parameter.data.normal_()
    wanted = run(model, inputs)
    model.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path).eval()
    assert not torch.allclose(run(loaded, inputs), wanted, atol=1e-3)
    assert torch.equal(run(convert.restore(loaded), inputs), wanted)
    assert str(convert.report(loaded)) == str(convert.report(model))
    assert report(loaded).sites[0].core.attention_dropout == 0
    with pytest.raises(ValueError, match="converted already"):
        convert.restore(loaded)


def test_a_model_is_restored_behind_another_head(tmp_path):
    model = hf.BertForSequenceClassification(hf.BertConfig(**TEXT, **NO_DROPOUT)).eval()
    convert(model, "SemiUnbalancedSinkhorn", learned=True, rho=3.0)
    model.save_pretrained(tmp_path)
    base = convert.restore(hf.BertModel.from_pretrained(tmp_path)).eval()
    inputs, real = inputs_of("bert")
    assert torch.equal(run(base, inputs, real), run(model.bert, inputs, real))


def test_a_model_without_a_conversion_has_none_to_restore():
    with pytest.raises(ValueError, match="tells of no conversion"):
        convert.restore(model_of("bert"))


def test_a_converted_model_is_a_model():
    model, (inputs, _) = convert(model_of("bert"), "SemiUnbalancedSinkhorn", learned=True), inputs_of("bert")
    wanted = run(model, inputs)
    assert torch.equal(run(copy.deepcopy(model), inputs), wanted)
    other = convert(model_of("bert"), "SemiUnbalancedSinkhorn", learned=True, rho=7.0)
    other.load_state_dict(model.state_dict())
    assert torch.equal(run(other, inputs), wanted)
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    torch.testing.assert_close(run(compiled, inputs), wanted)
