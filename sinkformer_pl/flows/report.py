"""The tables and the pictures of a study."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from sinkformer_pl.flows.picture import LABELS, draw_energies, draw_heat, draw_trajectories
from sinkformer_pl.flows.study import Flow, Heat, HeatSettings
from sinkformer_pl.tables import markdown_table, write_csv

FILES = ("trajectories.png", "energies.png", "heat.png", "flow.csv", "heat.csv", "flow.md")
"""What a study writes."""


def write_flows(flows: Sequence[Flow], heat: Heat, settings: HeatSettings, *, folder: Path, command: str) -> str:
    """Write the `FILES` into the folder.

    Args:
        flows: one for each kernel.
        heat: the heat limit.
        settings: of the heat limit.
        folder: where to; made if it isn't there.
        command: what makes it.

    Returns:
        The content of `flow.md`.
    """
    folder.mkdir(parents=True, exist_ok=True)
    draw_trajectories(flows, folder / "trajectories.png")
    draw_energies(flows, folder / "energies.png")
    draw_heat(heat, settings, folder / "heat.png")
    _write_flows(flows, folder / "flow.csv")
    _write_heat(heat, folder / "heat.csv")
    text = _markdown(flows, heat, command)
    (folder / "flow.md").write_text(text, encoding="utf-8")
    return text


def _write_flows(flows: Sequence[Flow], path: Path) -> None:
    distances = [f"distance from -grad {name}" for name in flows[0].distances]
    energies = [f"{name} at the {end}" for name in flows[0].energies for end in ("start", "end")]
    rows = []
    for flow in flows:
        ends = [float(values[place]) for values in flow.energies.values() for place in (0, -1)]
        rows.append([flow.kernel, flow.asymmetry, *flow.distances.values(), flow.marginal_error, *ends])
    write_csv(path, ["kernel", "jacobian asymmetry", *distances, "column error", *energies], rows)


def _write_heat(heat: Heat, path: Path) -> None:
    rows: list[list[Any]] = []
    for (kernel, cost), errors in heat.drift_errors.items():
        rows += [["drift", kernel, cost, "", *pair] for pair in errors.items()]
    for particles, errors in heat.errors.items():
        rows += [["particles", "sinkhorn", "l2", particles, *pair] for pair in errors.items()]
    write_csv(path, ["what", "kernel", "cost", "particles", "epsilon", "error"], rows)


def _markdown(flows: Sequence[Flow], heat: Heat, command: str) -> str:
    lines = [f"    {command}", "", "At the start of the three flows, and the functionals from start to end:", ""]
    lines += markdown_table(
        ("attention", "Jacobian asymmetry", "from -grad F0", "from -grad Finf", "column error", "F0", "Finf"),
        [
            (
                LABELS[flow.kernel],
                *(f"{value:.1e}" for value in (flow.asymmetry, *flow.distances.values(), flow.marginal_error)),
                *(f"{float(values[0]):.4f} -> {float(values[-1]):.4f}" for values in flow.energies.values()),
            )
            for flow in flows
        ],
    )
    lines += ["", "Relative error of the drift of a Gaussian, on a grid:", ""]
    columns = list(heat.drift_errors)
    epsilons = sorted({epsilon for errors in heat.drift_errors.values() for epsilon in errors})
    lines += markdown_table(
        ("epsilon", *(f"{kernel}, {cost}" for kernel, cost in columns)),
        [(f"{epsilon:g}", *(_cell(heat.drift_errors[column], epsilon) for column in columns)) for epsilon in epsilons],
    )
    lines += ["", "Distance of Sinkhorn particles from the heat equation, and its fitted order in epsilon:", ""]
    epsilons = sorted(next(iter(heat.errors.values())))
    lines += markdown_table(
        ("particles", *(f"epsilon {epsilon:g}" for epsilon in epsilons), "order"),
        [
            (str(particles), *(_cell(errors, epsilon) for epsilon in epsilons), f"{heat.order(particles):.2f}")
            for particles, errors in heat.errors.items()
        ],
    )
    return "\n".join(lines) + "\n"


def _cell(errors: dict[float, float], epsilon: float) -> str:
    return f"{errors[epsilon]:.2e}" if epsilon in errors else "-"
