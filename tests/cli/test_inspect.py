"""The page of a checkpoint: one file, the model's own numbers in it, and clicks that do what they say."""

import base64
import builtins
import importlib
import json
import re
from functools import partial
from itertools import pairwise

import numpy as np
import pytest
import torch

from sinkformer_pl.batch import collate
from sinkformer_pl.data import ProceduralShapes
from sinkformer_pl.diagnostics import attention_of
from sinkformer_pl.diagnostics.page import Page, Sample, write_page
from sinkformer_pl.diagnostics.tokens import tokens_of
from sinkformer_pl.errors import UserError
from sinkformer_pl.models import SetTransformer, TextTransformer, VisionTransformer
from sinkformer_pl.normalizations import Sinkhorn, Softmax
from sinkformer_pl.tasks import Classifier
from tests.optional import plotly  # noqa: F401


def content(path):
    html = path.read_text(encoding="utf-8")
    return json.loads(re.search(r'<script type="application/json" id="data">(.*?)</script>', html, re.S)[1])


def decoded(layer):
    numbers = np.frombuffer(base64.b64decode(layer["weights"]), "<f2").astype(np.float32)
    return torch.from_numpy(numbers).reshape(-1, layer["queries"], layer["keys"])


def page_of(model, inputs, mask, path, spell=None, **more):
    torch.manual_seed(0)
    layers = attention_of(model, inputs, mask)
    tokens = tokens_of(model, inputs, mask, spell)
    samples = [Sample(f"sample {i} </script>", "cat", "dog", 0.5, of) for i, of in enumerate(tokens)]
    write_page(Page("a <run>", "x.ckpt", [("data", "shapes")], samples, layers, **more), path)
    return layers


def test_the_command_writes_what_the_checkpoint_does(run, tiny, tmp_path):
    run("fit", "--config", tiny, "--trainer.callbacks", "AttentionDiagnostics")
    folder = tmp_path / "runs/tiny/version_0"
    printed = run("inspect", "--ckpt_path", "best", "--name", "tiny", "--samples", "3")
    assert "inspect.html" in printed.splitlines()[-1]
    found = content(folder / "inspect.html")
    model = Classifier.load_from_checkpoint(folder / "checkpoints/best.ckpt")
    data = ProceduralShapes(train_size=48, val_size=24, test_size=26)
    data.setup()
    draws = [list(data.test_dataloader().sampler)[place] for place in (0, 8, 17)]
    for sample, draw in zip(found["samples"], draws, strict=True):
        assert sample["name"] == data.names("test")[draw.index]
        alone = collate([data.datasets["test"][draw]])
        np.testing.assert_allclose(sample["tokens"]["points"], alone.inputs[0], atol=1e-4)
        for layer, own in zip(sample["layers"], attention_of(model, alone.inputs, None), strict=True):
            torch.testing.assert_close(decoded(layer), own.weights[0], rtol=1e-3, atol=1e-6)
    assert set(found["curves"]) == {"train/loss", "val/loss", "train/accuracy", "val/accuracy"}
    assert list(found["history"]["backbone.blocks.0.gather.attention"]) == ["0"]
    # Heads of five layers.
    assert len(found["table"]["rows"]) == 10

    run("inspect", "--ckpt_path", "best", "--name", "tiny", "--split", "val", "--output", "there/page.html")
    there = content(tmp_path / "there/page.html")
    assert len(there["samples"]) == 6
    assert [sample["name"] for sample in there["samples"]] == list(data.names("val")[::4])


def test_nothing_is_fetched_and_names_cannot_break_the_page(tmp_path):
    model = SetTransformer(Softmax, dim=8, num_heads=2, depth=1)
    page_of(model, torch.randn(1, 5, 3), None, tmp_path / "page.html")
    html = (tmp_path / "page.html").read_text(encoding="utf-8")
    assert not re.search(r'<(script|link|img)[^>]*(src|href)="', html)
    assert html.count("</script>") == 3
    assert content(tmp_path / "page.html")["samples"][0]["name"] == "sample 0 </script>"
    assert (tmp_path / "page.html").stat().st_size < 6e6


def test_as_many_samples_as_fit(tmp_path, monkeypatch):
    model = TextTransformer(Softmax, vocab_size=9, dim=8, num_heads=2, depth=1)
    monkeypatch.setattr("sinkformer_pl.diagnostics.page.MOST_NUMBERS", 2 * 2 * 36)
    page_of(model, torch.ones(3, 6, dtype=torch.int64), None, tmp_path / "page.html")
    assert len(content(tmp_path / "page.html")["samples"]) == 2
    with pytest.raises(UserError, match="single sample"):
        page_of(model, torch.ones(1, 9, dtype=torch.int64), None, tmp_path / "page.html")


def test_what_is_refused(fail, tiny, monkeypatch):
    assert "--ckpt_path" in fail("inspect")
    assert "--split: invalid choice: 'tst'" in fail("inspect", "--ckpt_path", tiny, "--split", "tst")
    assert "--samples 0" in fail("inspect", "--ckpt_path", tiny, "--samples", "0")
    assert "--output ." in fail("inspect", "--ckpt_path", tiny, "--output", ".")
    real = builtins.__import__

    def without(name, *rest):
        if name.startswith("plotly"):
            raise ImportError(name)
        return real(name, *rest)

    monkeypatch.setattr(builtins, "__import__", without)
    assert "isn't installed: pip install plotly" in fail("inspect", "--ckpt_path", tiny)


@pytest.fixture(scope="module")
def browser(chromium):
    playwright = importlib.import_module("playwright.sync_api")
    software = ["--no-sandbox", "--use-angle=swiftshader", "--enable-unsafe-swiftshader", "--ignore-gpu-blocklist"]
    with playwright.sync_playwright() as started:
        browser = started.chromium.launch(executable_path=chromium, args=software)
        yield browser
        browser.close()


@pytest.fixture
def visit(browser, tmp_path):
    """Open the page of a model without a network; no script may fail."""
    errors, opened = [], []

    def visit(model, inputs, mask=None, spell=None, **more):
        layers = page_of(model, inputs, mask, tmp_path / "page.html", spell, **more)
        page = browser.new_page(viewport={"width": 1280, "height": 1000})
        page.set_default_timeout(60_000)
        opened.append(page)
        page.on("pageerror", lambda error: errors.append(str(error)))
        page.on("request", lambda request: errors.append(request.url) if request.url.startswith("http") else None)
        page.goto((tmp_path / "page.html").as_uri())
        page.wait_for_selector("#table tbody tr")
        return page, layers

    yield visit
    for page in opened:
        page.close()
    assert not errors


def shown(page):
    """The heaviest keys and their weights, as the page writes them."""
    rows = page.locator("#heaviest tbody tr")
    keys = rows.evaluate_all("rows => rows.map(row => +row.dataset.key)")
    return keys, [float(cell) for cell in rows.locator("td:nth-child(3)").all_inner_texts()]


def check(page, row):
    """The page shows these weights of the chosen query."""
    keys, weights = shown(page)
    assert keys[0] == row.argmax()
    np.testing.assert_allclose(weights, row[keys], rtol=1e-3, atol=1e-6)
    np.testing.assert_allclose(weights, row.sort(descending=True).values[: len(weights)], rtol=1e-3, atol=1e-6)


@pytest.mark.slow
def test_points(visit):
    torch.manual_seed(1)
    model = SetTransformer(partial(Sinkhorn, n_iters=3), dim=8, num_heads=2, depth=1, inducing_points=4)
    for parameter in model.parameters():
        parameter.data *= 3
    mask = torch.arange(20) < torch.tensor([20, 12])[:, None]
    page, layers = visit(model, torch.randn(2, 20, 3), mask)
    gather, scatter, pool = layers
    check(page, gather.of_sample(0).mean((0, 1)))
    page.select_option("#sample", "1")
    page.select_option("#layer", "1")
    page.select_option("#head", "1")
    page.select_option("#query", "7")
    check(page, scatter.of_sample(1)[1, 7])
    assert page.locator("#query option").count() == 13
    # A row of the table chooses layer and head, and leaves the sample; a query that the layer lacks falls away.
    page.locator("#table tbody tr").nth(4).click()
    assert [page.input_value(f"#{name}") for name in ("sample", "layer", "head", "query")] == ["1", "2", "0", "all"]
    check(page, pool.of_sample(1)[0, 0])
    # A click into the map: the middle of its third row of four.
    page.select_option("#layer", "0")
    click_in(page, "#map .nsewdrag", 0.5, 2.5 / 4)
    page.wait_for_function("document.getElementById('query').value === '2'")
    check(page, gather.of_sample(1)[0, 2])
    # A click on a point of the cloud that can be turned.
    page.select_option("#layer", "1")
    page.select_option("#query", "all")
    page.locator("#view").scroll_into_view_if_needed()
    box = page.locator("#view").bounding_box()
    for place in range(400):
        across, down = 0.1 + 0.035 * (place % 20), 0.1 + 0.04 * (place // 20)
        page.mouse.move(box["x"] + box["width"] * across, box["y"] + box["height"] * down)
        page.wait_for_timeout(40)
        if page.locator("#view .hovertext").count():
            page.mouse.down()
            page.mouse.up()
            break
    page.wait_for_function("document.getElementById('query').value !== 'all'")
    check(page, scatter.of_sample(1)[0, int(page.input_value("#query"))])


PROJECTED = """(points) => {
  const scene = document.getElementById("view")._fullLayout.scene._scene;
  const times = (m, v) => [0, 1, 2, 3].map((row) => v.reduce((sum, value, i) => sum + m[4 * i + row] * value, 0));
  const { view, projection, model } = scene.glplot.cameraParams;
  return points.map((point) => {
    const scaled = [...point.map((v, d) => v * scene.dataScale[d]), 1];
    const [x, y, , w] = times(projection, times(view, times(model, scaled)));
    return [x / w, y / w];
  });
}"""


@pytest.mark.slow
@pytest.mark.parametrize("width", [1280, 900, 420])
def test_no_point_is_cut_off(visit, width):
    torch.manual_seed(0)
    clouds = torch.randn(1, 60, 3) * torch.tensor([4.0, 4.0, 0.2])
    page, _ = visit(SetTransformer(Softmax, dim=8, num_heads=2, depth=1), clouds)
    page.set_viewport_size({"width": width, "height": 1000})
    page.wait_for_timeout(1500)
    places = np.abs(np.array(page.evaluate(PROJECTED, clouds[0].tolist())))
    assert places.max() < 0.97
    # Nor are they a heap in the middle.
    assert places.max() > 0.5


@pytest.mark.slow
@pytest.mark.parametrize("low", [0.08, 0.0005])
def test_ticks_say_what_they_mean_and_titles_lie_beside_them(visit, low):
    torch.manual_seed(1)
    model = SetTransformer(Softmax, dim=8, num_heads=2, depth=1, inducing_points=4)
    history = {"pool.block.attention": {epoch: [low, 0.5, 2, 12] for epoch in range(2)}}
    page, _ = visit(model, torch.randn(1, 20, 3), history=history)
    # The pooling, whose one query is a row of its own.
    page.select_option("#layer", "2")
    page.check("#log")
    page.wait_for_timeout(500)
    ticks = page.evaluate("document.getElementById('sums')._fullLayout.yaxis._vals.map((tick) => [tick.x, tick.text])")
    assert len(ticks) >= 4
    for place, text in ticks:
        assert float(text) == pytest.approx(10**place, rel=1e-3)
    assert page.locator("#map .ytick text").all_text_contents() == ["0"]
    bar = page.evaluate("document.getElementById('map')._fullData[0].colorbar")
    for place, text in zip(bar["tickvals"], bar["ticktext"], strict=True):
        assert float(text) == pytest.approx(10**place, rel=0.06)
    for plot in ("map", "row", "sums"):
        labels = [label.bounding_box() for label in page.locator(f"#{plot} .ytick text").all()]
        title = page.locator(f"#{plot} .ytitle").bounding_box()
        assert title["x"] + title["width"] < min(label["x"] for label in labels)
        heights = sorted((label["y"], label["y"] + label["height"]) for label in labels)
        assert all(above[1] <= below[0] + 1 for above, below in pairwise(heights))


def click_in(page, selector, right, down):
    page.locator(selector).first.scroll_into_view_if_needed()
    box = page.locator(selector).first.bounding_box()
    page.mouse.move(box["x"] + box["width"] * right + 2, box["y"] + box["height"] * down)
    page.mouse.move(box["x"] + box["width"] * right, box["y"] + box["height"] * down)
    page.wait_for_timeout(200)
    page.mouse.click(box["x"] + box["width"] * right, box["y"] + box["height"] * down)


@pytest.mark.slow
def test_patches(visit):
    torch.manual_seed(1)
    model = VisionTransformer(Softmax, image_size=8, patch_size=2, channels=1, dim=8, num_heads=2, depth=2)
    for parameter in model.parameters():
        parameter.data *= 3
    page, layers = visit(model, torch.rand(2, 1, 8, 8))
    page.select_option("#layer", "1")
    page.select_option("#query", label="class token")
    check(page, layers[1].of_sample(0)[:, 0].mean(0))
    # The patch in row 1, column 2 of 4, after the class token.
    box = page.locator("#view .nsewdrag").first.bounding_box()
    assert box["width"] > 100
    click_in(page, "#view .nsewdrag", 2.5 / 4, 1.5 / 4)
    page.wait_for_function("document.getElementById('query').value === '7'")
    check(page, layers[1].of_sample(0)[:, 7].mean(0))


@pytest.mark.slow
def test_words(visit):
    torch.manual_seed(1)
    model = TextTransformer(Softmax, vocab_size=20, dim=8, num_heads=2, depth=1, pooling="cls")
    for parameter in model.parameters():
        parameter.data *= 5
    mask = torch.tensor([[True] * 6, [True] * 4 + [False] * 2])
    page, [layer] = visit(model, torch.arange(12).reshape(2, 6), mask, lambda token: f" <b>{token}")
    page.select_option("#sample", "1")
    assert page.locator(".words span").all_inner_texts() == ["[class]", " <b>6", " <b>7", " <b>8", " <b>9"]
    page.locator(".words span").nth(3).click()
    page.wait_for_function("document.getElementById('query').value === '3'")
    check(page, layer.of_sample(1)[:, 3].mean(0))
    assert page.locator(".words span.chosen").inner_text() == " <b>8"
    even = 1 / 5
    darkest = max(layer.of_sample(1)[:, 3].mean(0).max().item(), 2 * even)
    caption = page.locator("#input-caption").inner_text()
    low, high = re.search(r"White is (\S+), the darkest (\S+)\.$", caption).groups()
    assert (float(low), float(high)) == (0, pytest.approx(darkest, rel=2e-3))


@pytest.mark.slow
def test_a_text_of_one_word(visit):
    page, [layer] = visit(TextTransformer(Softmax, vocab_size=9, dim=8, num_heads=2, depth=1), torch.ones(1, 1).long())
    check(page, layer.of_sample(0).mean((0, 1)))
    for axis in ("x", "y"):
        assert page.locator(f"#map .{axis}tick text").all_text_contents() == ["0"]
    assert page.evaluate("document.getElementById('sums').data.at(-1).x") == [0, 1]
