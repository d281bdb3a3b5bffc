"""Draw docs/experiments/patch_sizes.png: test accuracy against patch size, of comparisons that were made before.

python docs/draw_patch_sizes.py 4=runs/mnist_patch4 7=runs/mnist_patch7 14=runs/mnist_patch14 28=runs/mnist_patch28

"""

import argparse
import csv
import statistics
from pathlib import Path

import matplotlib.pyplot as plt


def comparison(argument: str) -> tuple[int, Path]:
    """A patch size and the runs of its comparison."""
    size, _, folder = argument.partition("=")
    path = Path(folder) / "runs.csv"
    if not (size.isdecimal() and folder and path.is_file()):
        raise argparse.ArgumentTypeError(f"{argument}: give SIZE=FOLDER, the folder that compare wrote runs.csv into")
    return int(size), path


def main() -> None:
    """Every run as a point, the mean over seeds as a line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("comparisons", nargs="+", type=comparison, metavar="SIZE=FOLDER")
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "experiments/patch_sizes.png")
    options = parser.parse_args()
    found: dict[str, dict[int, list[float]]] = {}
    for size, path in options.comparisons:
        with path.open(newline="", encoding="utf-8") as file:
            for row in csv.DictReader(file):
                arm = found.setdefault(row["normalization"], {})
                arm.setdefault(size, []).append(100 * float(row["test/accuracy"]))
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
    axes.legend(frameon=False, loc="best")
    figure.savefig(options.output, dpi=100)


if __name__ == "__main__":
    main()
