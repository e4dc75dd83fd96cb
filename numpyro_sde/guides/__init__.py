"""Variational guides: normalizing flows over the latent sites of a model."""

from numpyro_sde.guides.auto import AutoFlow

__all__ = ["AutoFlow"]
