"""Networks of NCVSD: the EDM2 teacher, the generative denoiser and what trains it."""

from networks.checkpoints import CheckpointError, LoadedNetwork, UnsafeCheckpointError, load, save
from networks.denoisers import CombinedScore, Discriminator, GenerativeDenoiser, Precond, PrecondCondition

__all__ = [
    "CheckpointError",
    "CombinedScore",
    "Discriminator",
    "GenerativeDenoiser",
    "LoadedNetwork",
    "Precond",
    "PrecondCondition",
    "UnsafeCheckpointError",
    "load",
    "save",
]
