"""Unknown functions of a state: drifts, diffusions, potentials and read-outs to be learned."""

from numpyro_sde.fields.bounded import Bounded
from numpyro_sde.fields.field import AbstractField, LinearField, Product, Sum
from numpyro_sde.fields.hilbert import HSGP
from numpyro_sde.fields.inducing import InducingGP
from numpyro_sde.fields.monotone import MonotoneField
from numpyro_sde.fields.network import Network, NetworkField
from numpyro_sde.fields.random_features import RFF

__all__ = [
    "HSGP",
    "RFF",
    "AbstractField",
    "Bounded",
    "InducingGP",
    "LinearField",
    "MonotoneField",
    "Network",
    "NetworkField",
    "Product",
    "Sum",
]
