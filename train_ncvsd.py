"""Distil a teacher into a generative denoiser: NCVSD."""

from typing import Any

import click

from torch_utils.options import set_wait_policy
from training.presets import NCVSDConfig
from training.run.options import checked, training_options


@click.command(context_settings={"show_default": True, "max_content_width": 120})
@click.option("--net", metavar="PATH|URL|hf://…", required=True, help="Teacher: an EDM2 network.")
@click.option("--gnet", metavar="PATH|URL|hf://…", help="Guides the teacher; with --guidance.")
@training_options(NCVSDConfig)
def main(net: str, gnet: str | None, **given: Any) -> None:
    """Train a generative denoiser G(y, sigma), a sampler of p(x0 | y), from a teacher.

    Running the same command again resumes from the newest valid state in OUTDIR. The exit code is 0 at the end, and
    where --max-time, SIGTERM, SIGUSR1 or a closed terminal stopped training with its state saved; 130 after Ctrl-C,
    which saves too (pressed twice, it aborts); 1 or 2 after an error.

    \b
    python train_ncvsd.py --preset fashion16 --net assets/demo/teacher.safetensors --data assets/fashion16.zip \\
        --outdir training-runs/fashion16
    torchrun --standalone --nproc-per-node 8 train_ncvsd.py --preset img512-m --net edm2-img512-m-2147483-0.100.pkl \\
        --data img512-sd.zip --outdir training-runs/img512-m
    """
    with checked(NCVSDConfig, given) as (config, options):
        from training.run.launch import distil

        distil(config, options, net, gnet)


if __name__ == "__main__":
    set_wait_policy()
    main()
