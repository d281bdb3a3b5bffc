"""Convert a model of transformers as it was when it was saved."""

from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from sinkformer_pl.conversion.libraries import find
from sinkformer_pl.conversion.replace import convert
from sinkformer_pl.conversion.site import Site
from sinkformer_pl.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Model = TypeVar("Model", bound="PreTrainedModel")


def restore(model: Model, folder: str | Path | None = None) -> Model:
    """Convert a model as it was when `save_pretrained` wrote it, in place; `from_pretrained` loads its weights alone.

        model = sinkformer_pl.convert.restore(AutoModel.from_pretrained("folder"))

    The conversion is read off the model's configuration, and what its normalizations have learned off the files of
    weights. The class may be another than the one that was saved, such as one with a head.

    Args:
        model: as `from_pretrained` gives it.
        folder: of the weights, or their name on a hub; None is where the model was loaded from.

    Returns:
        The model itself.

    Raises:
        UserError: it has no record of a conversion, or is converted already; a layer isn't there; learned values are
            missing.
    """
    # Here, since the library is optional.
    from sinkformer_pl.conversion.transformers_record import load_learned, recorded

    sites = find(model)
    if any(site.core is not None for site in sites):
        raise UserError(f"{type(model).__name__} is converted already; restore takes what from_pretrained gives")
    for name, converted in recorded(model).items():
        number = _place(sites, name, type(model).__name__)
        dropout = converted["attention_dropout"]
        convert(
            model,
            converted["normalization"],
            layers=number,
            attention_dropout="keep" if dropout is None else dropout,
        )
    learned = {
        f"{site.name}.core.{key}": tensor
        for site in find(model)
        if site.core is not None
        for key, tensor in site.core.state_dict(keep_vars=True).items()
    }
    load_learned(model, learned, folder)
    return model


def _place(sites: list[Site], name: str, model: str) -> int:
    # The model with a head has a prefix that the model without lacks, and the other way round.
    found = [number for number, site in enumerate(sites) if _same(site.name, name)]
    if len(found) != 1:
        raise UserError(f"{name} was converted when the model was saved, and {model} has no such attention")
    return found[0]


def _same(one: str, other: str) -> bool:
    return f".{one}".endswith(f".{other}") or f".{other}".endswith(f".{one}")
