"""Populations seen at several times, nobody twice: likelihoods, bridges, learned velocities."""

from numpyro_sde.snapshots.bridge import BridgeResult, schrodinger_bridge
from numpyro_sde.snapshots.cells import stack_snapshots
from numpyro_sde.snapshots.identifiability import IdentifiabilityReport, identifiability
from numpyro_sde.snapshots.interpolant import Interpolant, interpolant
from numpyro_sde.snapshots.law import SnapshotLaw
from numpyro_sde.snapshots.particles import GuidedParticles
from numpyro_sde.snapshots.pinned import BridgePaths
from numpyro_sde.snapshots.plots import plot_snapshots
from numpyro_sde.snapshots.refine import RefinedReference, refine_reference

__all__ = [
    "BridgePaths",
    "BridgeResult",
    "GuidedParticles",
    "IdentifiabilityReport",
    "Interpolant",
    "RefinedReference",
    "SnapshotLaw",
    "identifiability",
    "interpolant",
    "plot_snapshots",
    "refine_reference",
    "schrodinger_bridge",
    "stack_snapshots",
]
