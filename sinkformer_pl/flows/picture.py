"""Pictures of the flows and of the heat limit."""

from collections.abc import Sequence
from pathlib import Path

import torch
from matplotlib.axes import Axes
from matplotlib.collections import LineCollection
from matplotlib.figure import Figure

from sinkformer_pl.flows.attention import Kernel
from sinkformer_pl.flows.heat import gaussian_slope
from sinkformer_pl.flows.study import Flow, Heat, HeatSettings, drift_error

LABELS: dict[Kernel, str] = {"exponential": "K⁰, not normalized", "softmax": "softmax", "sinkhorn": "Sinkhorn"}
COLOURS: dict[Kernel, str] = {"exponential": "#8a8a8a", "softmax": "#d1495b", "sinkhorn": "#1b6ca8"}
ENERGY_LABELS = {"F0": "F⁰ (interaction energy)", "Finf": "F∞ (minus half the transport cost)"}
OWN: dict[str, Kernel] = {"F0": "exponential", "Finf": "sinkhorn"}


def draw_trajectories(flows: Sequence[Flow], path: Path) -> None:
    """Draw where particles go, a panel for each kernel."""
    figure = Figure(figsize=(11, 3.9), layout="constrained")
    panels = figure.subplots(1, len(flows), sharex=True, sharey=True)
    for axes, flow in zip(panels, flows, strict=True):
        lines = LineCollection(list(flow.path.transpose(0, 1).numpy()), colors=COLOURS[flow.kernel], linewidths=0.8)
        lines.set_alpha(0.7)
        axes.add_collection(lines)
        axes.scatter(*flow.path[0].T, s=10, facecolor="white", edgecolor="black", linewidth=0.6, zorder=2)
        axes.scatter(*flow.path[-1].T, s=12, color=COLOURS[flow.kernel], zorder=3)
        mean = flow.path.mean(1)
        axes.plot(*mean.T, color="black", linewidth=2, zorder=4)
        axes.plot(*mean[-1], "D", color="black", markersize=5, zorder=4)
        axes.set(title=LABELS[flow.kernel], xlabel="first coordinate", aspect="equal")
        axes.grid(alpha=0.2)
    panels[0].set_ylabel("second coordinate")
    start = panels[0].scatter([], [], s=10, facecolor="white", edgecolor="black", linewidth=0.6)
    end = panels[0].scatter([], [], s=12, color="black")
    (mean_line,) = panels[0].plot([], [], "D-", color="black", linewidth=2, markersize=5)
    figure.legend(
        [start, end, mean_line],
        ["start", f"after time {float(flows[0].times[-1]):g}", "mean of the particles"],
        loc="outside lower center",
        ncols=3,
        frameon=False,
    )
    figure.savefig(path, dpi=110)


def draw_energies(flows: Sequence[Flow], path: Path) -> None:
    """Draw both functionals along all flows, that of the functional's own kernel thick."""
    figure = Figure(figsize=(9, 3.3), layout="constrained")
    for axes, (name, label) in zip(figure.subplots(1, 2), ENERGY_LABELS.items(), strict=True):
        for flow in flows:
            own = flow.kernel == OWN[name]
            axes.plot(
                flow.times,
                flow.energies[name],
                color=COLOURS[flow.kernel],
                linewidth=2.5 if own else 1.2,
                linestyle="-" if own else "--",
                label=LABELS[flow.kernel] + " (its gradient flow)" * (own and flow.distances[name] < 1e-6),
            )
        axes.set(xlabel="time (depth times step)", ylabel="value", title=label)
        axes.grid(alpha=0.3)
        axes.legend(frameon=False, fontsize="small")
    figure.savefig(path, dpi=110)


def draw_heat(heat: Heat, settings: HeatSettings, path: Path) -> None:
    """Draw particles over the solution of the heat equation, and the errors against epsilon."""
    figure = Figure(figsize=(13, 3.8), layout="constrained")
    density, drift, distance = figure.subplots(1, 3)
    _density(density, heat, settings)
    _drift(drift, heat, settings)
    _distance(distance, heat)
    figure.savefig(path, dpi=110)


def _density(axes: Axes, heat: Heat, settings: HeatSettings) -> None:
    wide = 3.5 * heat.solution.std
    x = torch.linspace(min(settings.centres) - wide, max(settings.centres) + wide, 400, dtype=torch.float64)
    axes.plot(x, heat.start.density(x), color="0.6", linewidth=1, label="start")
    axes.plot(x, heat.solution.density(x), color="black", linewidth=1.2, label=f"heat equation, time {settings.time:g}")
    particles = heat.final[:, 0].sort().values
    # Between neighbours lies 1/n of the mass.
    gaps, middles = particles.diff(), (particles[1:] + particles[:-1]) / 2
    every = max(1, len(middles) // 50)
    axes.plot(
        middles[::every],
        1 / (len(particles) * gaps[::every]),
        ".",
        markersize=4,
        color=COLOURS["sinkhorn"],
        label=f"{len(particles)} particles, ε = {min(settings.epsilons):g}",
    )
    axes.set(xlabel="x", ylabel="density", title="Sinkhorn particles against the heat equation")
    axes.set_ylim(0, 1.45 * axes.get_ylim()[1])
    axes.legend(frameon=False, fontsize="small", loc="upper left")
    axes.title.set_fontsize(10)


def _drift(axes: Axes, heat: Heat, settings: HeatSettings) -> None:
    epsilons = sorted(settings.drift_epsilons)
    for (kernel, cost), errors in heat.drift_errors.items():
        label, marker, line = f"{LABELS[kernel]}, L2: order {heat.drift_order(kernel):.2f}", "o", "-"
        if cost == "dot":
            label, marker, line = "softmax, dot products: diverges", "x", "--"
        exact = [
            drift_error(kernel, settings.std, epsilon, gaussian_slope(kernel, cost, settings.std, epsilon))
            for epsilon in epsilons
        ]
        axes.plot(epsilons, exact, color=COLOURS[kernel], linewidth=1, linestyle=line)
        axes.plot(list(errors), list(errors.values()), marker, color=COLOURS[kernel], label=label)
    title = f"drift of N(0, {settings.std:g}²): points on a grid, lines exact"
    _against_epsilon(axes, epsilons, "relative error", title)


def _distance(axes: Axes, heat: Heat) -> None:
    for number, (particles, errors) in enumerate(heat.errors.items()):
        shade = 0.75 - 0.75 * number / max(1, len(heat.errors) - 1)
        label = f"n = {particles}: order {heat.order(particles):.2f}"
        colour = (0.11 + 0.8 * shade, 0.42 + 0.5 * shade, 0.66 + 0.3 * shade)
        axes.plot(list(errors), list(errors.values()), "o-", markersize=4, linewidth=1.2, color=colour, label=label)
    largest = heat.errors[max(heat.errors)]
    epsilons, middle = sorted(largest), sorted(largest)[len(largest) // 2]
    guide = [1.5 * largest[middle] * epsilon / middle for epsilon in epsilons]
    axes.plot(epsilons, guide, color="0.5", linewidth=1, linestyle=":", label="slope 1")
    _against_epsilon(axes, epsilons, "W₂ distance (unit of x)", "Sinkhorn particles: distance from the solution")


def _against_epsilon(axes: Axes, epsilons: Sequence[float], label: str, title: str) -> None:
    axes.set(xscale="log", yscale="log", xlabel="ε (unit of x²)", ylabel=label)
    axes.set_title(title, fontsize=10)
    axes.set_xticks(epsilons, [f"{epsilon:g}" for epsilon in epsilons], fontsize="small")
    axes.minorticks_off()
    axes.grid(alpha=0.3)
    axes.legend(frameon=False, fontsize="small")
