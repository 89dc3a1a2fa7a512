"""Pretrain an EDM2 diffusion model: the teacher that train_ncvsd.py distils."""

from typing import Any

import click

from torch_utils.options import set_wait_policy
from training.presets import EDM2Config
from training.run.options import checked, training_options


@click.command(context_settings={"show_default": True, "max_content_width": 120})
@training_options(EDM2Config)
def main(**given: Any) -> None:
    """Train a denoiser on a data set with the EDM2 loss.

    Running the same command again resumes from the newest valid state in OUTDIR. The exit code is 0 at the end, and
    where --max-time, SIGTERM, SIGUSR1 or a closed terminal stopped training with its state saved; 130 after Ctrl-C,
    which saves too (pressed twice, it aborts); 1 or 2 after an error.

    \b
    python train_edm2.py --preset fashion16-teacher --data assets/fashion16.zip --outdir training-runs/teacher
    torchrun --standalone --nproc-per-node 8 train_edm2.py --data img512-sd.zip --outdir training-runs/img512-s
    """
    with checked(EDM2Config, given) as (config, options):
        from training.run.launch import pretrain

        pretrain(config, options)


if __name__ == "__main__":
    set_wait_policy()
    main()
