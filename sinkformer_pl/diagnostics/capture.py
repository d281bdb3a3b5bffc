"""Capture the attention weights of every attention layer of a network on a batch."""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from sinkformer_pl.models.attention_core import AttentionCore
from sinkformer_pl.normalizations.per_head import numbers_per_head
from sinkformer_pl.ops.mask import AttentionMask, Mask


class LayerAttention(NamedTuple):
    """The attention of one layer on a batch.

    Attributes:
        name: path of the module, as in the keys of the state_dict, without the last part where that is "core".
        core: the module that attended.
        weights: (B, H, Q, K), exactly 0 at padding; of windows (B * windows, H, Q, K).
        mask: real queries and keys, and the pairs that may meet.
        windows: number of parts into which the network cuts each sample, whose tokens attend to one another alone.
    """

    name: str
    core: AttentionCore
    weights: Tensor
    mask: AttentionMask
    windows: int = 1

    def of_sample(self, sample: int) -> Tensor:
        """Return the weights of one sample without its padding, (H, Q, K); of windows those of its first one."""
        sample *= self.windows
        weights = self.weights[sample]
        if self.mask.query is not None:
            weights = weights[:, self.mask.query[sample]]
        return weights if self.mask.key is None else weights[:, :, self.mask.key[sample]]


def attention_of(model: nn.Module, *inputs: Any) -> list[LayerAttention]:
    """Run a network and return the weights of its attention layers, in the order in which they ran.

    In evaluation mode, without gradient and without compiled code; afterwards each module is in the mode that it was
    in. Each `AttentionCore` is asked for the weights of what reaches it, beside its forward pass.

    Args:
        model: any module with an `AttentionCore` in it, such as a `MultiHeadAttention` or an attention of your own.
        inputs: what to call it with.
    """
    caught: list[LayerAttention] = []
    handles = []

    def catch(name: str) -> Any:
        def hook(core: AttentionCore, arguments: tuple[Any, ...], named: dict[str, Any]) -> None:
            caught.append(_look(name, core, *arguments, **named))

        return hook

    for name, module in model.named_modules():
        if isinstance(module, AttentionCore):
            handles.append(module.register_forward_pre_hook(catch(name), with_kwargs=True))
    try:
        with evaluating(model):
            model(*inputs)
    finally:
        for handle in handles:
            handle.remove()
    samples = len(inputs[0]) if inputs and isinstance(inputs[0], Tensor) else 0
    return [layer._replace(windows=max(len(layer.weights) // samples, 1)) if samples else layer for layer in caught]


def _look(
    name: str,
    core: AttentionCore,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Mask = None,
    bias: Tensor | None = None,
    dropout: float = 0.0,
) -> LayerAttention:
    name = "" if name == "core" else name.removesuffix(".core")
    return LayerAttention(name, core, core.weights(q, k, mask, bias), core.effective_mask(q, k, mask, bias))


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Set evaluation mode without gradient; compiled modules run as they were written.

    To compile them anew, for hooks and another batch, would take minutes and might change the code of the training.
    """
    modes = {module: module.training for module in model.modules()}
    compiled = any(module._compiled_call_impl is not None for module in modes)
    model.eval()
    try:
        with torch.no_grad(), torch.compiler.set_stance("force_eager") if compiled else nullcontext():
            yield
    finally:
        for module, training in modes.items():
            module.training = training


def learned_parameters(core: AttentionCore) -> dict[str, Tensor]:
    """Collect what a layer has learned about its scores, each (H,): the temperature, and the normalization's own.

    These are its parameters of one number, or of one a head, and the numbers that its class makes of them, declared
    `PerHead` or as properties, such as alpha.
    """
    heads = core.num_heads
    found: dict[str, Tensor] = {}
    if isinstance(core.log_temperature, Tensor):
        found["temperature"] = core.log_temperature.exp()
    if core.class_mass is not None and core.class_mass.log_mass is not None:
        found["class_mass"] = core.class_mass.log_mass.exp()
    own = core.normalization
    parameters = dict(own.named_parameters())
    if parameters:
        names = [number.name for number in numbers_per_head(type(own))]
        for kind in type(own).__mro__:
            names += [name for name, value in vars(kind).items() if isinstance(value, property)]
        found |= {
            name: value
            for name in names
            if isinstance(value := getattr(own, name), Tensor) and not any(value is raw for raw in parameters.values())
        }
    found |= parameters
    return {
        name: value.detach().flatten().expand(heads)
        for name, value in found.items()
        if value.numel() == 1 or value.shape == (heads,)
    }
