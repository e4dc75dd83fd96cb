"""Populations seen at several times, nobody twice: likelihoods, bridges, learned velocities."""

from numpyro_sde.snapshots.cells import stack_snapshots
from numpyro_sde.snapshots.law import SnapshotLaw
from numpyro_sde.snapshots.particles import GuidedParticles

__all__ = ["GuidedParticles", "SnapshotLaw", "stack_snapshots"]
