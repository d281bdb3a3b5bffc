"""Attention of Hugging Face's transformers, through its attention interface and the mask function of the same name."""

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import bidirectional_mask_function, prepare_padding_mask, sdpa_mask
from typing_extensions import override

from sinkformer_pl.conversion.attend import core_inputs
from sinkformer_pl.conversion.core import ConvertedCore
from sinkformer_pl.conversion.site import Site, those_that
from sinkformer_pl.conversion.transformers_record import forget, record
from sinkformer_pl.normalizations.contract import AttentionNormalization

NAME = "sinkformer_pl"
"""Of the attention function and the mask function among those of transformers."""

UNKNOWN = {"softcap", "s_aux", "sinks", "indices", "block_indices"}
"""Options of an attention function that change the scores or which keys are met, in ways that a core doesn't know."""


@dataclass(eq=False, kw_only=True)
class TransformersSite(Site):
    """An attention that calls the function that its model's configuration names.

    Attributes:
        model: the outermost model of transformers that it is part of.
        decoder: it is part of a decoder that generates from left to right.
    """

    model: PreTrainedModel | None
    decoder: bool = False

    @override
    def attach(self, core: ConvertedCore) -> None:
        super().attach(core)
        if self.kind == "cross":
            core.sides = ("query", "key")
        assert self.model is not None
        record(self.model, self.module, core)
        _let_call(self.model, NAME)

    @override
    def detach(self) -> None:
        super().detach()
        assert self.model is not None
        if (before := forget(self.model, self.module)) is not None:
            _let_call(self.model, before)

    @override
    def refusal(self, normalization: AttentionNormalization) -> str | None:
        if self.reason is None and self.kind == "cross" and self.decoder and not normalization.promises.causal:
            return (
                f"its queries are those of a decoder, each of which would depend on later ones under "
                f"{type(normalization).__name__}; normalizations by rows: {those_that('causal')}"
            )
        return super().refusal(normalization)


def find(model: nn.Module) -> list[Site]:
    """List the attention of transformers in a model; with a reason where it doesn't call the interface."""
    modules = dict(model.named_modules())
    sites: list[Site] = []
    for name, module in modules.items():
        if not _is_attention(module):
            continue
        around = [modules[outer] for outer in _outer_names(name) if outer in modules]
        owner = next((outer for outer in reversed(around) if isinstance(outer, PreTrainedModel)), None)
        sites.append(_site(name, module, around, owner))
    return sites


def _let_call(model: PreTrainedModel, function: str) -> None:
    """Let all attention of a model call a function of the interface."""
    for part in model.modules():
        # Each has to be told where parts have copies of the configuration, as T5's encoder has.
        if isinstance(part, PreTrainedModel):
            part.set_attn_implementation(function)


def _outer_names(name: str) -> list[str]:
    """Return the names of the modules around one, the innermost first."""
    parts = name.split(".")
    return [".".join(parts[:length]) for length in range(len(parts) - 1, -1, -1)] if name else []


def _is_attention(module: nn.Module) -> bool:
    """Tell whether a module computes attention by the interface, or is of transformers and computes it itself."""
    if _calls_interface(module):
        return True
    inner = (part for part in module.modules() if part is not module)
    return (
        type(module).__module__.startswith("transformers.")
        and type(module).__name__.endswith("Attention")
        and not any("Attention" in type(part).__name__ for part in inner)
    )


def _calls_interface(module: nn.Module) -> bool:
    return "ALL_ATTENTION_FUNCTIONS" in _names_in(type(module).forward)


def _names_in(function: Any) -> set[str]:
    """Return the global names and attributes that a function uses."""
    return set(getattr(inspect.unwrap(function), "__code__", _NO_CODE).co_names)


def _options(module: nn.Module) -> set[str]:
    """Return the keywords that the forward of a module gives to functions."""
    code = getattr(inspect.unwrap(type(module).forward), "__code__", _NO_CODE)
    return {name for entry in code.co_consts if isinstance(entry, tuple) for name in entry if isinstance(name, str)}


_NO_CODE = compile("", "", "exec")


def _site(name: str, module: nn.Module, around: Sequence[nn.Module], model: PreTrainedModel | None) -> TransformersSite:
    config: Any = getattr(module, "config", None)
    heads = _first(module, "num_attention_heads", "num_heads", "n_heads") or getattr(config, "num_attention_heads", 0)
    width = _first(module, "attention_head_size", "head_dim", "key_value_proj_dim") or 0
    masks, options = _mask_functions(around), _options(module)
    cross = _is_cross(name, module)
    # CLIP's texts are causal by their mask alone.
    causal = not cross and (getattr(module, "is_causal", False) is True or masks == {"create_causal_mask"})
    return TransformersSite(
        name=name,
        module=module,
        family=f"transformers {type(module).__name__}",
        num_heads=int(heads),
        head_dim=int(width),
        scale=_first(module, "scaling", "scale"),
        kind="cross" if cross else "self",
        causal=causal,
        pairs=_window(module, options),
        bias="position_bias" in options,
        dropout=_dropout(module),
        reason=_reason(module, model, options, sized=bool(heads and width)),
        model=model,
        decoder=cross and "create_causal_mask" in masks,
    )


def _first(module: nn.Module, *names: str) -> Any:
    return next((value for name in names if isinstance(value := getattr(module, name, None), int | float)), None)


def _mask_functions(around: Sequence[nn.Module]) -> set[str]:
    """Return the functions that make the masks of an attention: those of the innermost module that names any."""
    for module in around:
        functions = [function for function in vars(type(module)).values() if callable(function)]
        named = {name for function in functions for name in _names_in(function)}
        if masks := named & {"create_causal_mask", "create_bidirectional_mask"}:
            return masks
    return set()


def _is_cross(name: str, module: nn.Module) -> bool:
    """Tell whether queries come from another sequence than keys, which transformers says in several ways."""
    said = (type(module).__name__ + name.rpartition(".")[2]).lower()
    marked = getattr(module, "is_cross_attention", False) is True
    return marked or any(word in said for word in ("cross", "encoder_attn", "encdec"))


def _window(module: nn.Module, options: set[str]) -> str | None:
    config: Any = getattr(module, "config", None)
    if "sliding_window" not in options:
        return None
    return "a sliding window" if getattr(module, "sliding_window", getattr(config, "sliding_window", None)) else None


def _dropout(module: nn.Module) -> float:
    for name in ("attention_dropout", "attn_dropout", "dropout"):
        value = getattr(module, name, None)
        if isinstance(value, nn.Dropout | int | float):
            return float(value.p if isinstance(value, nn.Dropout) else value)
    return 0.0


def _reason(module: nn.Module, model: PreTrainedModel | None, options: set[str], *, sized: bool) -> str | None:
    """Say why an attention can't be converted under any normalization; None if it can."""
    if not _calls_interface(module):
        return "it computes its softmax itself, without the attention interface of transformers"
    if model is None:
        return "it needs the masks of its model: give the whole PreTrainedModel, and its layer by `layers`"
    if not model._supports_sdpa:
        return f"{type(model).__name__} has attention that transformers' scaled dot products can't compute"
    if unknown := sorted(options & UNKNOWN):
        return f"its scores depend on more than queries, keys and a bias: {', '.join(unknown)}"
    return None if sized else "it doesn't say how many heads it has, and how wide they are"


def attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    position_bias: Tensor | None = None,
    **options: Any,
) -> tuple[Tensor, Tensor | None]:
    """Attend by the core of a module, or as transformers does where it has none.

    Args:
        module: the attention.
        query: (B, H, Q, D).
        key: (B, Hk, K, D).
        value: (B, Hk, K, Dv).
        attention_mask: as `mask` makes it, or one of the user's own, bool or additive.
        dropout: share of the weights to drop now.
        scaling: multiplies q·k.
        is_causal: where there is no mask, a query meets the keys up to its own position; None is the module's own.
        position_bias: added to the scores.
        **options: of transformers; `output_attentions` asks for the weights.

    Returns:
        The output (B, Q, H, Dv), and the weights (B, H, Q, K), without dropout, or None.
    """
    core = getattr(module, "core", None)
    if not isinstance(core, ConvertedCore):
        more = {} if position_bias is None else {"position_bias": position_bias}
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, is_causal=is_causal,
            **more, **options,
        )  # fmt: skip
    if unknown := [name for name in UNKNOWN & options.keys() if options[name] is not None]:
        raise NotImplementedError(f"{core.layer}: {unknown[0]} changes the scores in a way that a core doesn't know")
    if scaling is not None and isinstance(core.scale, float) and abs(scaling / core.scale - 1) > 1e-6:
        # Some, such as Whisper's, scale their queries and don't say so.
        query = query * (scaling / core.scale)
    if is_causal is None:
        is_causal = getattr(module, "is_causal", True)
    causal = bool(is_causal) and attention_mask is None and query.shape[2] > 1
    inputs = core_inputs(
        core, query, key, value, mask=attention_mask, bias=position_bias, causal=causal,
        self_attention=core.sides[0] == core.sides[1],
    )  # fmt: skip
    output = core(*inputs, dropout=core.dropout_of(dropout))
    asked = options.get("output_attentions") or getattr(getattr(module, "config", None), "output_attentions", False)
    weights = core.weights(inputs.q, inputs.k, inputs.mask, inputs.bias) if asked else None
    return output.transpose(1, 2).contiguous(), weights


def mask(
    *,
    kv_length: int,
    kv_offset: int = 0,
    mask_function: Callable[..., Any],
    attention_mask: Tensor | None = None,
    allow_is_bidirectional_skip: bool = False,
    **options: Any,
) -> Tensor | None:
    """Make the mask of an attention function: of padding alone (B, 1, 1, K), which isn't spread over the queries.

    What is real can be read off it, and a plan needs that. All others are those of scaled dot products, (B, 1, Q, K).
    """
    if mask_function is bidirectional_mask_function and allow_is_bidirectional_skip and not kv_offset:
        real = prepare_padding_mask(attention_mask, kv_length, kv_offset)
        return None if real is None else real[:, None, None, :kv_length]
    return sdpa_mask(
        kv_length=kv_length, kv_offset=kv_offset, mask_function=mask_function, attention_mask=attention_mask,
        allow_is_bidirectional_skip=allow_is_bidirectional_skip, **options,
    )  # fmt: skip


AttentionInterface.register(NAME, attention)
AttentionMaskInterface.register(NAME, mask)
