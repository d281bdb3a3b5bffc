"""Draw docs/pointcloud.png from two runs of configs/pointcloud.yaml.

python -m sinkformer_pl fit --config configs/pointcloud.yaml --name sinkhorn
python -m sinkformer_pl fit --config configs/pointcloud.yaml --name softmax --model.normalization Softmax
python docs/draw_pointcloud.py runs/sinkhorn/version_0 runs/softmax/version_0

"""

import argparse
import csv
from pathlib import Path

import matplotlib.pyplot as plt
import torch
from torch import Tensor

from sinkformer_pl.data import ProceduralShapes
from sinkformer_pl.models import MultiHeadAttention
from sinkformer_pl.ops import AttentionMask
from sinkformer_pl.tasks import Classifier

SHOWN = 8
COLOURS = {"Sinkhorn": "#1b6ca8", "Softmax": "#d1495b"}


def received(model: Classifier, inputs: Tensor, mask: Tensor) -> Tensor:
    """Column sums, times K/Q, of the first attention layer over all real keys and heads; 1 is even attention."""
    caught: list[tuple[Tensor, Tensor, AttentionMask]] = []
    layer = next(module for module in model.modules() if isinstance(module, MultiHeadAttention))
    handle = layer.register_forward_pre_hook(lambda _, arguments: caught.append(arguments))
    model(inputs, mask)
    handle.remove()
    weights = layer.weights(*caught[0])
    sums = weights.sum(-2) * mask.sum(-1)[:, None, None] / weights.shape[-2]
    return sums.masked_select(mask[:, None].expand_as(sums)).sort().values


def main() -> None:
    """Draw shapes with predictions, learning curves and column sums."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs=2, type=Path, help="folders of the Sinkhorn and the Softmax run")
    runs = dict(zip(COLOURS, parser.parse_args().runs, strict=True))
    models = {
        name: Classifier.load_from_checkpoint(run / "checkpoints/best.ckpt", map_location="cpu").eval()
        for name, run in runs.items()
    }
    data = ProceduralShapes(batch_size=400)
    data.setup()
    batch = next(iter(data.test_dataloader()))

    figure = plt.figure(figsize=(13, 4.6), layout="constrained")
    left, middle, right = figure.subfigures(1, 3, width_ratios=[2, 1.1, 1.1])
    with torch.no_grad():
        predicted = models["Sinkhorn"](batch.inputs, batch.mask).argmax(-1)
        for place in range(SHOWN):
            axes = left.add_subplot(2, SHOWN // 2, place + 1, projection="3d")
            points = batch.inputs[place][batch.mask[place]]
            axes.scatter(*points.T, c=points[:, 2], s=9, cmap="viridis")
            right_class = predicted[place] == batch.target[place]
            axes.set_title(data.classes[predicted[place]], fontsize=10, color="black" if right_class else "red", pad=-4)
            axes.set_axis_off()
            axes.set_aspect("equal")
        left.suptitle("test shapes and the class that the Set Sinkformer gives them", fontsize=10)

        curves, columns = middle.subplots(), right.subplots()
        for name, run in runs.items():
            with (run / "metrics.csv").open(newline="") as file:
                rows = [row for row in csv.DictReader(file) if row["val/accuracy"]]
            epochs = [int(row["epoch"]) + 1 for row in rows]
            curves.plot(epochs, [float(row["val/accuracy"]) for row in rows], ".-", color=COLOURS[name], label=name)
            sums = received(models[name], batch.inputs, batch.mask)
            columns.semilogy(torch.linspace(0, 1, len(sums)), sums, color=COLOURS[name], label=name)
        curves.set(
            xlabel="epochs trained", ylabel="validation accuracy", ylim=(0, 1), title="learning curve, one seed each"
        )
        columns.set(xlabel="keys, sorted", ylabel="attention received (1 = even)", title="column sums, first layer")
        columns.axhline(1, color="grey", lw=0.6)
        for axes in (curves, columns):
            axes.legend(frameon=False)
            axes.title.set_fontsize(10)
    figure.savefig(Path(__file__).parent / "pointcloud.png", dpi=110)


if __name__ == "__main__":
    main()
