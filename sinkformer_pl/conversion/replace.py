"""Replace the normalization of a model's attention, and put it back."""

import functools
import math
import warnings
from collections.abc import Callable, Mapping
from typing import Any, Literal, TypeVar

import torch
from torch import nn

from sinkformer_pl.conversion.core import ConvertedCore
from sinkformer_pl.conversion.layers import Layers, choose
from sinkformer_pl.conversion.libraries import FINDERS, find
from sinkformer_pl.conversion.listing import report
from sinkformer_pl.conversion.site import Site
from sinkformer_pl.errors import UserError, did_you_mean
from sinkformer_pl.factories import Spec, as_factory, describe, import_class, parameters_of, read_calls
from sinkformer_pl.models.attention_core import why_no_dropout
from sinkformer_pl.normalizations.contract import AttentionNormalization, NormalizationFactory
from sinkformer_pl.normalizations.registry import registered

Model = TypeVar("Model", bound=nn.Module)


def convert(
    model: Model,
    normalization: str | NormalizationFactory | Mapping[str, Any],
    *,
    layers: Layers = None,
    attention_dropout: float | Literal["keep"] = "keep",
    **arguments: Any,
) -> Model:
    """Replace the normalization of a model's attention, in place; weights are kept.

    Attention of PyTorch, timm and transformers is converted. What a normalization learns are parameters of the model,
    `LAYER.core.normalization.NAME`; make optimizers afterwards. A layer that was converted before gets a new core.

    Args:
        model: a model, or one attention.
        normalization: a name, such as "Sinkhorn", a call, "Sinkhorn(n_iters=5)", or what makes one for each layer.
        layers: the attention to convert, see `Layers`; None is all. What can't be converted among all is named by a
            warning, among those that are asked for by an error.
        attention_dropout: share of the weights dropped in training; "keep" is what the library drops.
        **arguments: of the normalization.

    Returns:
        The model itself.

    Raises:
        UserError: an unknown normalization, argument or layer; no attention in the model.
        NotImplementedError: a layer that was asked for, or every one, can't be converted; the model is as it was.
    """
    sites = find(model)
    if not sites:
        raise UserError(
            f"{type(model).__name__}: no attention that can be converted, which is that of {', '.join(FINDERS)}; a "
            "network of this package takes its normalization when it is built"
        )
    dropout = _dropout(attention_dropout)
    factory = _factory(normalization, arguments)
    try:
        spec = describe(factory)
    except TypeError:  # A lambda, which can't be saved.
        spec = None
    cores: list[tuple[Site, ConvertedCore]] = []
    refused: dict[str, list[str]] = {}
    for site in choose(sites, layers):
        core = None if site.reason is not None else _core(site, factory, dropout, spec)
        reason = site.reason if core is None else _refusal(site, core)
        if core is None or reason is not None:
            refused.setdefault(str(reason), []).append(site.name or type(model).__name__)
        else:
            cores.append((site, core))
    if refused:
        said = "; ".join(f"{_listed(names)}: {reason}" for reason, names in refused.items())
        if layers is not None or not cores:
            possible = f"; layers that can: {_listed([site.name for site, _ in cores])}" if cores else ""
            raise NotImplementedError(f"can't convert {said}{possible}")
        warnings.warn(f"not converted: {said}", UserWarning, stacklevel=2)
    for site, core in cores:
        site.attach(core)
    return model


convert.report = report  # type: ignore[attr-defined]


def revert(model: Model) -> Model:
    """Give a model's attention back to its library, in place; weights are kept, what normalizations learned is lost.

    Returns:
        The model itself.
    """
    for site in find(model):
        if site.core is not None:
            site.detach()
    return model


def _factory(normalization: Any, arguments: Mapping[str, Any]) -> Callable[[], AttentionNormalization]:
    if isinstance(normalization, str):
        normalization = _named(normalization)
    made = as_factory(normalization, AttentionNormalization)
    if not callable(made) or isinstance(made, nn.Module):
        raise UserError(f"normalization {made!r}: give a name, a class or what makes one for each layer, no instance")
    maker = made.func if isinstance(made, functools.partial) else made
    taken = parameters_of(maker) if isinstance(maker, type) else dict.fromkeys(arguments)
    given = {**(made.keywords if isinstance(made, functools.partial) else {}), **arguments}
    for name in given:
        if name not in taken:
            raise UserError(
                f"{maker.__name__}.{name}: no such argument{did_you_mean(name, taken)}; it takes "
                f"{', '.join(taken) or 'none'}"
            )
    inner = {
        name: _named(value)
        for name, value in given.items()
        if isinstance(value, str) and getattr(taken[name], "annotation", None) == NormalizationFactory
    }
    return functools.partial(made, **{**arguments, **inner}) if given else made


def _named(text: str) -> Callable[[], AttentionNormalization]:
    """Make the factory of a name or a call."""
    try:
        (called,) = read_calls(text)
    except ValueError:
        raise UserError(f"normalization {text!r}: give a name or a call, such as Sinkhorn(n_iters=5)") from None
    name, known = called["class_path"], registered()
    if name not in known and "." not in name:
        raise UserError(
            f"normalization {name}: no such name{did_you_mean(name, known)}; registered are {', '.join(known)}"
        )
    return functools.partial(known[name] if name in known else import_class(name), **called["init_args"])


def _dropout(given: float | Literal["keep"]) -> float | None:
    if given == "keep":
        return None
    if isinstance(given, bool | str) or not 0 <= given < 1 or not math.isfinite(given):
        raise UserError(f"attention_dropout {given!r}: give 'keep', or a number in [0, 1)")
    return float(given)


def _core(site: Site, factory: NormalizationFactory, dropout: float | None, spec: Spec | None) -> ConvertedCore:
    core = ConvertedCore(
        site.num_heads,
        site.head_dim,
        factory,
        scale=site.scale,
        layer=site.name,
        attention_dropout=dropout,
        spec=spec,
    )
    like = next((p for p in site.module.parameters() if p.is_floating_point()), None)
    if like is not None:
        core.to(like.device, like.dtype if like.dtype.itemsize > 1 else torch.get_default_dtype())
    return core.train(site.module.training)


def _refusal(site: Site, core: ConvertedCore) -> str | None:
    reason = site.refusal(core.normalization)
    drops = site.dropout if core.attention_dropout is None else core.attention_dropout
    return reason or (why_no_dropout(core.normalization) if drops else None)


def _listed(names: list[str]) -> str:
    return ", ".join(names) if len(names) <= 4 else f"{', '.join(names[:3])} and {len(names) - 3} more"
