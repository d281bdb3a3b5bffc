"""The libraries whose attention can be converted."""

import importlib
import sys

from torch import nn

from sinkformer_pl.conversion.site import Site

FINDERS = {
    "torch": "sinkformer_pl.conversion.torch_attention",
    "transformers": "sinkformer_pl.conversion.transformers_attention",
    "timm": "sinkformer_pl.conversion.timm_attention",
}
"""By library the module whose `find(model)` lists the sites of its attention; imported if the library is."""


def find(model: nn.Module) -> list[Site]:
    """List the attention in a model, of all libraries, in the order of `named_modules`."""
    found: dict[str, Site] = {}
    for library, module in FINDERS.items():
        if library in sys.modules:
            found |= {site.name: site for site in importlib.import_module(module).find(model)}
    return [found[name] for name, _ in model.named_modules() if name in found]
