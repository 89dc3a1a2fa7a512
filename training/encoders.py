"""Encoders between stored images, pixels and latents, for training code.

They are defined in `networks.encoders`, because a checkpoint carries its encoder and `networks` imports nothing of
`training`; this module gives them the name under which training code looks for them.
"""

from networks.encoders import Encoder, RGBEncoder, StabilityVAEEncoder, encoder_from_config

__all__ = ["Encoder", "RGBEncoder", "StabilityVAEEncoder", "encoder_from_config"]
