"""The attention of a model on one input, as numbers and as a picture."""

import base64
import io
from collections.abc import Callable
from dataclasses import dataclass
from html import escape
from types import SimpleNamespace
from typing import TYPE_CHECKING

from torch import Tensor

from sinkformer_pl.data.preprocessing import Preprocessing
from sinkformer_pl.data.texts.preprocessing import TextPreprocessing
from sinkformer_pl.diagnostics.capture import LayerAttention
from sinkformer_pl.diagnostics.tokens import speller as speller_of
from sinkformer_pl.inference.results import Prediction
from sinkformer_pl.models.tokens import Tokens

if TYPE_CHECKING:
    from matplotlib.figure import Figure


@dataclass(frozen=True)
class Attention:
    """Weights of every layer on one input; a notebook shows them as a picture.

    Attributes:
        prediction: of the input.
        layers: in the order in which they ran, each on a batch of this input alone.
        tokens: what attends and is attended to, where that is points, patches or words.
    """

    prediction: Prediction
    layers: list[LayerAttention]
    tokens: Tokens

    @property
    def names(self) -> list[str]:
        """Those of the layers."""
        return [layer.name for layer in self.layers]

    def __getitem__(self, layer: int | str) -> Tensor:
        """Return the weights of a layer, by its place or name: (H, Q, K), rows are queries."""
        place = self.names.index(layer) if isinstance(layer, str) else layer
        return self.layers[place].of_sample(0)

    def figure(self) -> "Figure":
        """Draw the tokens, coloured by the attention that they receive; the weights where tokens can't be drawn."""
        from sinkformer_pl.diagnostics.pictures import draw_inputs, draw_maps

        drawn = draw_inputs(self.layers, [self.tokens], [self._label], self.prediction.name)
        return drawn or draw_maps(self.layers, 0, self.prediction.name)

    @property
    def _label(self) -> str:
        return ", ".join(self.prediction.labels)

    def _repr_html_(self) -> str:
        buffer = io.BytesIO()
        self.figure().savefig(buffer, format="png")
        picture = base64.b64encode(buffer.getvalue()).decode()
        said = f"{self.prediction.name}: " + ", ".join(
            f"{label} {score:.3f}" for label, score in self.prediction.chosen[: len(self.prediction.labels)]
        )
        return f'<p>{escape(said)}</p><img src="data:image/png;base64,{picture}" alt="attention">'


def speller(preprocessing: Preprocessing) -> Callable[[int], str] | None:
    """Make strings of the token numbers of texts; None for anything else."""
    if not isinstance(preprocessing, TextPreprocessing):
        return None
    return speller_of(SimpleNamespace(tokenizer=preprocessing.loaded))
