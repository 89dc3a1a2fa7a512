"""Pretrain an EDM2 diffusion model: the teacher that train_ncvsd.py distils."""

import click

from torch_utils.threads import wait_passively
from training.presets import EDM2Config, config_options
from training.run.launch import common_options, launch


@click.command(context_settings={"show_default": True, "max_content_width": 120})
@common_options(EDM2Config)
@config_options(EDM2Config)
def main(**options) -> None:
    """Train a denoiser on a data set with the EDM2 loss.

    Running the same command again resumes from the newest valid state in OUTDIR. The exit code is 0 at the end, and
    where --max-time, SIGTERM, SIGUSR1 or a closed terminal stopped training with its state saved; 130 after Ctrl-C,
    which saves too (pressed twice, it aborts); 1 or 2 after an error.

    \b
    python train_edm2.py --preset fashion16-teacher --data assets/fashion16.zip --outdir training-runs/teacher
    torchrun --standalone --nproc-per-node 8 train_edm2.py --data img512-sd.zip --outdir training-runs/img512-s
    """
    launch(EDM2Config, options, build)


def build(config: EDM2Config, options: dict, dataset, device):
    """Task of pretraining a fresh network on `dataset`, and the encoder that the data asks for.

    Raises ValueError for latents that are not Stable Diffusion's.
    """
    from networks import Precond
    from networks.encoders import RGBEncoder, StabilityVAEEncoder
    from training.tasks import pretraining_task

    if dataset.num_channels != 8 and dataset[0][0].dtype != "uint8":
        raise ValueError(
            f"{options['data']} holds latents of {dataset.num_channels} channels, not 8 (mean and standard deviation "
            "of Stable Diffusion's autoencoder): make them with dataset_tool.py encode"
        )
    encoder = StabilityVAEEncoder() if dataset.num_channels == 8 else RGBEncoder()
    net = Precond(
        dataset.resolution,
        encoder.latent_channels(dataset.num_channels),
        dataset.label_dim,
        model_channels=config.model_channels,
        channel_mult=list(config.channel_mult),
        num_blocks=config.num_blocks,
        attn_resolutions=list(config.attn_resolutions),
        channels_per_head=config.channels_per_head,
        dropout=config.dropout,
    )
    return pretraining_task(net.to(device), config), encoder


if __name__ == "__main__":
    wait_passively()
    main()
