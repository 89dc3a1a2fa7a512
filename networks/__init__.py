"""Networks of NCVSD: the EDM2 teacher, the generative denoiser and what trains it."""

from networks.checkpoints import CheckpointError, LoadedNetwork, NonFiniteError, UnsafeCheckpointError, load, save
from networks.denoisers import CombinedScore, Discriminator, GenerativeDenoiser, Precond, PrecondCondition

__all__ = ["CheckpointError", "LoadedNetwork", "NonFiniteError", "UnsafeCheckpointError", "load", "save"]
__all__ += ["CombinedScore", "Discriminator", "GenerativeDenoiser", "Precond", "PrecondCondition"]
