"""Groups of parameters: a learning rate and a weight decay for parts of a network, by their names."""

from collections.abc import Collection, Mapping, Sequence
from typing import Any

from torch import nn

from sinkformer_pl.errors import UserError
from sinkformer_pl.normalizations.contract import AttentionNormalization
from sinkformer_pl.parts import as_list, matches, select
from sinkformer_pl.tasks.layer_decay import LayerDecay

GROUPS_KEY = "model.parameter_groups"

_WRAPPERS = ("_fsdp_wrapped_module.", "_orig_mod.")
"""Prefixes that wrappers of modules add to the names of parameters."""


def as_groups(groups: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Check groups of parameters, and return them as plain data.

    Args:
        groups: each with "parameters", patterns of names (`parts.Patterns`), and "lr_scale", a factor on the rate, or
            "weight_decay", or both.

    Raises:
        UserError: another key, no patterns, or a number that isn't at least 0.
    """
    return [_as_group(group) for group in groups]


def _as_group(group: Mapping[str, Any]) -> dict[str, Any]:
    shown = dict(group)
    if unknown := [key for key in group if key not in ("parameters", "lr_scale", "weight_decay")]:
        raise UserError(f"{GROUPS_KEY} {shown}: no key {unknown[0]}; valid: parameters, lr_scale, weight_decay")
    patterns = group.get("parameters") or ()
    if not all(isinstance(pattern, str) for pattern in patterns) or not as_list(patterns):
        raise UserError(f"{GROUPS_KEY} {shown}: parameters must be patterns of names, such as backbone.*")
    numbers = {key: group[key] for key in ("lr_scale", "weight_decay") if group.get(key) is not None}
    for key, value in numbers.items():
        if isinstance(value, bool) or not isinstance(value, int | float) or not value >= 0:
            raise UserError(f"{GROUPS_KEY} {shown}: {key} must be a number of at least 0")
    if not numbers:
        raise UserError(f"{GROUPS_KEY} {shown}: it changes nothing; give lr_scale or weight_decay")
    return {"parameters": as_list(patterns), **{key: float(value) for key, value in numbers.items()}}


def undecayed(network: nn.Module) -> list[str]:
    """Return the names of the parameters that don't decay unless one asks for it.

    These are biases and all vectors (scales of norms, class tokens, numbers per head); all that a normalization of
    attention learns; and what a module names in a method `no_weight_decay()`, as those of timm do: positions, tokens.
    """
    found = set()
    for prefix, module in network.named_modules():
        inside = [(f"{prefix}.{name}" if prefix else name, value) for name, value in module.named_parameters()]
        if isinstance(module, AttentionNormalization):
            found |= {name for name, _ in inside}
        if callable(declare := getattr(module, "no_weight_decay", None)):
            declared = {f"{prefix}.{name}" if prefix else name for name in declare()}
            found |= {name for name, _ in inside if name in declared}
    return [name for name, p in network.named_parameters() if name in found or p.ndim <= 1 or name.endswith("bias")]


def trained_parameters(network: nn.Module) -> dict[str, nn.Parameter]:
    """Return the parameters that need a gradient, by their names without those of wrappers.

    Raises:
        UserError: there is none.
    """
    found = {}
    for name, parameter in network.named_parameters():
        for wrapper in _WRAPPERS:
            name = name.replace(wrapper, "")
        if parameter.requires_grad:
            found[name] = parameter
    if not found:
        raise UserError("no parameter needs a gradient, so nothing would be trained; leave some unfrozen")
    return found


def require_members(
    network: nn.Module, groups: Sequence[Mapping[str, Any]], no_weight_decay: Sequence[str], defaults: Mapping[str, Any]
) -> None:
    """Check that groups can be made of a network's parameters for an optimizer.

    Args:
        network: with all parameters, frozen ones too.
        groups: as of `as_groups`.
        no_weight_decay: patterns of names.
        defaults: of the optimizer.

    Raises:
        UserError: a pattern without a match, a group whose parameters are all in others before it, or an optimizer
            without weight decay.
    """
    names = [name for name, _ in network.named_parameters()]
    select(names, no_weight_decay, "model.no_weight_decay")
    left = set(names)
    for group in groups:
        members = set(select(names, group["parameters"], GROUPS_KEY)) & left
        if not members:
            raise UserError(f"{GROUPS_KEY} {_label(group)}: all of these are in groups before it; put it before them")
        if "weight_decay" in group and "weight_decay" not in defaults:
            raise UserError(f"{GROUPS_KEY} {_label(group)}: the optimizer has no weight_decay; leave it out")
        left -= members


def grouped(
    parameters: Mapping[str, nn.Parameter],
    defaults: Mapping[str, Any],
    groups: Sequence[Mapping[str, Any]],
    exempt: Collection[str],
    layers: LayerDecay | None = None,
) -> list[nn.Parameter] | list[dict[str, Any]]:
    """Divide parameters into groups for an optimizer.

    A parameter is in the first group that means it, else in the rest. Each layer of a group is a group of its own where
    layers have rates of their own, and so is what doesn't decay.

    Args:
        parameters: by name.
        defaults: of the optimizer: its "lr" and maybe "weight_decay".
        groups: as of `as_groups`; one without any of the parameters is left out.
        exempt: names of parameters that don't decay.
        layers: have factors on the rate, which multiply that of a group.

    Returns:
        The parameters, in their order, if they are treated alike. Else groups with names, in the order
        given and the rest last; those with a factor on the rate keep it as "lr_scale".
    """
    if layers is not None:
        layers.require_trained(parameters)
    left = list(parameters)
    made: list[dict[str, Any]] = []
    for group in [*groups, {"parameters": ["*"]}]:
        members = [name for name in left if matches(name, group["parameters"])]
        left = [name for name in left if not matches(name, group["parameters"])]
        for part in _by_layer(members, layers):
            options, label = dict(group), _label(group) if groups else ""
            if layers is not None:
                depth = layers.depth(part[0])
                options["lr_scale"] = layers.scale(depth) * options.get("lr_scale", 1.0)
                label = f"{label}-layer_{depth}" if label else f"layer_{depth}"
            made += _divided(part, options, defaults, set(exempt), label=label)
    if not groups and layers is None and len(made) == 1 and "weight_decay" not in made[0]:
        return list(parameters.values())
    return [{**group, "params": [parameters[name] for name in group["params"]]} for group in made]


def _by_layer(members: Sequence[str], layers: LayerDecay | None) -> list[Sequence[str]]:
    """Divide a group into its layers, if they have rates of their own."""
    if layers is None:
        return [members]
    depths = sorted({layers.depth(name) for name in members})
    return [[name for name in members if layers.depth(name) == depth] for depth in depths]


def _divided(
    members: Sequence[str], group: Mapping[str, Any], defaults: Mapping[str, Any], exempt: Collection[str], label: str
) -> list[dict[str, Any]]:
    """Divide a group into what decays and what doesn't."""
    options = {"weight_decay": group["weight_decay"]} if "weight_decay" in group else {}
    if "lr_scale" in group:
        options |= {"lr": defaults["lr"] * group["lr_scale"], "lr_scale": group["lr_scale"]}
    decays = group.get("weight_decay", defaults.get("weight_decay"))
    spared = [name for name in members if name in exempt] if decays else []
    kept = [name for name in members if name not in set(spared)]
    parts = [
        {"name": label or "decay", "params": kept, **options},
        {"name": f"{label}-no_decay" if label else "no_decay", "params": spared, **options, "weight_decay": 0.0},
    ]
    return [part for part in parts if part["params"]]


def _label(group: Mapping[str, Any]) -> str:
    """Name a group, for logs and messages."""
    return "rest" if group["parameters"] == ["*"] else ",".join(group["parameters"])
