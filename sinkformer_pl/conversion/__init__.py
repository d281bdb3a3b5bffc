"""Attention of other libraries under any normalization: in place, weights kept.

`convert` attaches an `AttentionCore` to each attention of a model and `revert` takes it away; `report` lists what there
is. One file for each library finds its attention (`find`) and lets it call the core.
"""

from sinkformer_pl.conversion.attend import attend
from sinkformer_pl.conversion.core import ConvertedCore
from sinkformer_pl.conversion.listing import Report, report
from sinkformer_pl.conversion.replace import convert, revert
from sinkformer_pl.conversion.restoring import restore
from sinkformer_pl.conversion.site import Site

convert.restore = restore  # type: ignore[attr-defined]

__all__ = ["ConvertedCore", "Report", "Site", "attend", "convert", "report", "restore", "revert"]
