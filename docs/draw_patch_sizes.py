"""Draw docs/experiments/patch_sizes.png: test accuracy against patch size, of comparisons that were made before.

python docs/draw_patch_sizes.py 4=runs/mnist_patch4 7=runs/mnist_patch7 14=runs/mnist_patch14 28=runs/mnist_patch28

"""

import csv
import statistics
import sys
from pathlib import Path

import matplotlib.pyplot as plt


def main() -> None:
    """Every run as a point, the mean over seeds as a line."""
    found: dict[str, dict[int, list[float]]] = {}
    for argument in sys.argv[1:]:
        size, _, folder = argument.partition("=")
        with (Path(folder) / "runs.csv").open(newline="", encoding="utf-8") as file:
            for row in csv.DictReader(file):
                arm = found.setdefault(row["normalization"], {})
                arm.setdefault(int(size), []).append(100 * float(row["test/accuracy"]))
    sizes = sorted({size for arm in found.values() for size in arm})
    figure, axes = plt.subplots(figsize=(7, 4), layout="constrained")
    for number, (name, arm) in enumerate(found.items()):
        colour = f"C{number}"
        places = {size: sizes.index(size) + 0.06 * (number - (len(found) - 1) / 2) for size in arm}
        means = [statistics.mean(values) for values in arm.values()]
        axes.plot(list(places.values()), means, "-" if len(arm) > 1 else "_", color=colour, label=name, markersize=14)
        for size, values in arm.items():
            axes.plot([places[size]] * len(values), values, "o", color=colour, alpha=0.5, markeredgewidth=0)
    axes.set_xticks(range(len(sizes)), [f"{size} x {size}" for size in sizes])
    axes.set(xlabel="patch size in pixels", ylabel="test accuracy, %", title="Each run, and the mean over seeds")
    axes.grid(alpha=0.3)
    axes.legend(frameon=False, loc="lower right")
    figure.savefig(Path(__file__).parent / "experiments/patch_sizes.png", dpi=100)


if __name__ == "__main__":
    main()
