"""Pictures say what they show: readable ticks, colours that a bar explains, nothing cut off or left out in silence."""

from functools import partial
from itertools import pairwise

import numpy as np
import pytest
import torch
from matplotlib.colors import to_rgba_array
from mpl_toolkits.mplot3d.proj3d import proj_transform

from sinkformer_pl.diagnostics import attention_of, pictures
from sinkformer_pl.diagnostics.tokens import tokens_of
from sinkformer_pl.models import SetTransformer, TextTransformer, VisionTransformer
from sinkformer_pl.normalizations import Softmax

TEXT = partial(TextTransformer, Softmax, vocab_size=9, max_length=400, dim=8, num_heads=2, depth=1)


def drawn(model, inputs, mask=None, spell=None):
    """The picture of the inputs, and what each sample received in the last layer that is in it."""
    torch.manual_seed(0)
    layers = attention_of(model, inputs, mask)
    tokens = tokens_of(model, inputs, mask, spell)
    classes = [f"kind {number}" for number in range(len(inputs))]
    figure = pictures.draw_inputs(layers, tokens, classes, "after epoch 3")
    figure.canvas.draw()
    return figure, [pictures.received(layers[-1].of_sample(number)) for number in range(len(inputs))]


def panels(figure):
    """Without the colour bars."""
    return [axes for axes in figure.axes if "kind" in axes.get_title()]


@pytest.mark.parametrize(
    ("low", "high"), [(1 - 1e-7, 1 + 1e-7), (0.9, 1.15), (0.6, 2.4), (0.2, 4), (0.004, 11), (1e-12, 90)]
)
def test_ticks_of_column_sums(low, high):
    history = {"backbone.a.attention": {epoch: np.geomspace(low, high, 41).tolist() for epoch in range(2)}}
    figure = pictures.draw_column_sums(history, "column sums")
    figure.canvas.draw()
    axes = figure.axes[0]
    bottom, top = axes.get_ylim()
    assert bottom <= min(low, 0.9) < max(high, 1.1) <= top
    shown = [label for label in axes.get_yticklabels() if bottom <= label.get_position()[1] <= top]
    assert 3 <= len(shown) <= 10
    for label in shown:
        assert float(label.get_text().replace("\N{MINUS SIGN}", "-")) == pytest.approx(
            label.get_position()[1], rel=1e-4
        )
    assert "1" in [label.get_text() for label in shown]
    boxes = sorted((label.get_window_extent() for label in shown), key=lambda box: box.y0)
    assert all(below.y1 < above.y0 for below, above in pairwise(boxes))
    assert not any(label.get_text() for label in axes.get_yticklabels(minor=True))


@pytest.mark.parametrize("epochs", [[0], [4, 5], [0, 1, 2]])
def test_the_bar_of_epochs_has_those_there_are(epochs):
    history = {"a": {epoch: [0.5, 1.0, 1.5] for epoch in epochs}}
    figure = pictures.draw_column_sums(history, "column sums")
    figure.canvas.draw()
    bar = figure.axes[-1]
    bottom, top = bar.get_ylim()
    assert [tick for tick in bar.get_yticks() if bottom <= tick <= top] == epochs


def test_points_have_the_colours_of_the_bar_and_are_all_inside():
    torch.manual_seed(6)
    clouds = torch.randn(2, 40, 3) * torch.tensor([3.0, 1.0, 0.05])
    mask = torch.arange(40) < torch.tensor([40, 30])[:, None]
    model = SetTransformer(Softmax, dim=8, num_heads=2, depth=1)
    for parameter in model.parameters():
        parameter.data *= 3
    figure, received = drawn(model, clouds, mask)
    assert 2 < received[0].max() < received[1].max()
    assert len(panels(figure)) == 4
    [_, bar] = [axes for axes in figure.axes if "1 = even" in axes.get_xlabel()]
    assert "all queries" in bar.get_xlabel()
    assert bar.get_xlim() == (0, pytest.approx(received[1].max().item()))
    for number, axes in enumerate(panels(figure)[1::2]):
        assert f"class kind {number}" in axes.get_title()
        [points] = axes.collections
        expected = pictures.COLOURS["points"](received[number].numpy() / bar.get_xlim()[1])
        # Drawn from back to front.
        seen = to_rgba_array(points.get_facecolor())
        np.testing.assert_allclose(np.sort(seen, 0), np.sort(expected, 0), atol=0.02)
        across, down, _ = proj_transform(*clouds[number][mask[number]].T.numpy(), axes.get_proj())
        places = axes.transData.transform(np.stack([across, down], 1))
        assert all(axes.get_window_extent().contains(*place) for place in places)


def test_patches_are_as_red_as_the_bar():
    model = VisionTransformer(
        Softmax, image_size=8, patch_size=4, channels=1, dim=8, num_heads=2, depth=1, pooling="mean"
    )
    figure, [received] = drawn(model, torch.rand(1, 1, 8, 8))
    [axes] = panels(figure)
    reds = axes.images[1].get_array()
    np.testing.assert_allclose(reds[..., 3].ravel(), 0.85 * received / 2, atol=0.01)
    assert axes.images[0].get_array().min() >= 1 - pictures.PALE


@pytest.mark.parametrize("length", [1, 300])
def test_words_that_are_left_out_are_counted(length):
    figure, _ = drawn(TEXT(), torch.ones(1, length, dtype=torch.int64), None, lambda _: " word")
    [axes] = panels(figure)
    *words, last = [text.get_text() for text in axes.texts]
    if length == 1:
        assert last == " word"
    else:
        assert last == f"and {300 - len(words)} more"
    assert axes.get_title().startswith("encoder.blocks.0\nclass kind 0: ")


def test_maps_of_many_heads_say_so_and_of_one_have_room_for_the_title():
    ids = torch.ones(1, 5, dtype=torch.int64)
    many = pictures.draw_maps(attention_of(TEXT(dim=24, num_heads=12), ids), 0, "weights")
    assert "8 of 12 heads" in many.get_suptitle()
    one = pictures.draw_maps(attention_of(TEXT(num_heads=1), ids), 0, "weights of a sample\nafter epoch 12")
    one.canvas.draw()
    box = one._suptitle.get_window_extent()
    assert box.x0 > 0
    assert box.x1 < one.bbox.width
