"""MCMC kernels with paths in them; they run under `numpyro.infer.MCMC`."""

from numpyro_sde.infer.conditional import ConditionalSMC, ConditionalSMCState
from numpyro_sde.infer.particle_gibbs import ParticleGibbs

__all__ = ["ConditionalSMC", "ConditionalSMCState", "ParticleGibbs"]
