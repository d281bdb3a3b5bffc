"""Attention as a flow of particles: gradient flows and the heat limit."""

from sinkformer_pl.flows.attention import Cost, Kernel, ParticleAttention
from sinkformer_pl.flows.functionals import (
    interaction_energy,
    jacobian_asymmetry,
    transport_energy,
    wasserstein_gradient,
)
from sinkformer_pl.flows.heat import (
    Mixture,
    fitted_order,
    follow_heat,
    gaussian_slope,
    heat_drift,
    heat_error,
    measured_slope,
)
from sinkformer_pl.flows.integrators import Integrator, euler, integrate, rk4
from sinkformer_pl.flows.potentials import potentials
from sinkformer_pl.flows.report import FILES, write_flows
from sinkformer_pl.flows.study import Flow, FlowSettings, Heat, HeatSettings, follow_attention, reach_heat_limit

__all__ = [
    "FILES",
    "Cost",
    "Flow",
    "FlowSettings",
    "Heat",
    "HeatSettings",
    "Integrator",
    "Kernel",
    "Mixture",
    "ParticleAttention",
    "euler",
    "fitted_order",
    "follow_attention",
    "follow_heat",
    "gaussian_slope",
    "heat_drift",
    "heat_error",
    "integrate",
    "interaction_energy",
    "jacobian_asymmetry",
    "measured_slope",
    "potentials",
    "reach_heat_limit",
    "rk4",
    "transport_energy",
    "wasserstein_gradient",
    "write_flows",
]
