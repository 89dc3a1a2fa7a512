"""Distil a teacher into a generative denoiser: NCVSD."""

import click

from torch_utils.threads import wait_passively
from training.presets import NCVSDConfig, config_options
from training.run.launch import common_options, compute_dtype, launch


@click.command(context_settings={"show_default": True, "max_content_width": 120})
@click.option("--net", "net", metavar="PATH|URL|hf://…", required=True, help="Teacher: an EDM2 network.")
@common_options(NCVSDConfig)
@click.option("--ts", "ts", metavar="LIST", multiple=True, help="The same as --eval-ts.")
@config_options(NCVSDConfig)
def main(**options) -> None:
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
    ts = options.pop("ts")
    if ts and options["eval_ts"]:
        raise click.UsageError("--ts and --eval-ts are the same setting: give one of them")
    options["eval_ts"] = options["eval_ts"] or ts
    launch(NCVSDConfig, options, build)


def build(config: NCVSDConfig, options: dict, dataset, device):
    """Task of distilling the teacher in options["net"] on `dataset`, and the teacher's encoder.

    Raises ValueError where teacher and data do not fit.
    """
    import networks
    from networks import Precond
    from sampling.grids import parse_ts
    from training.tasks import distillation_task

    for ts in config.eval_ts:
        parse_ts(ts)
    loaded = networks.load(options["net"], device=device)
    teacher = loaded.net
    if not isinstance(teacher, Precond):
        raise ValueError(f"{options['net']} holds a {type(teacher).__name__}: --net takes a teacher (Precond)")
    if loaded.encoder.name == "sd-vae" and dataset.num_channels == 3:
        raise ValueError(f"{options['data']} holds pixels, the teacher works on latents: use dataset_tool.py encode")
    if loaded.encoder.name == "rgb" and dataset[0][0].dtype != "uint8":
        raise ValueError(
            f"{options['data']} holds latents, and the teacher {options['net']} works on pixels: "
            "name the images themselves"
        )
    channels = loaded.encoder.latent_channels(dataset.num_channels)
    found, wanted = (channels, dataset.resolution), (teacher.img_channels, teacher.img_resolution)
    if found != wanted:
        raise ValueError(
            f"{options['data']} has images of {found[0]} channels at {found[1]}x{found[1]}, "
            f"the teacher {options['net']} works on {wanted[0]} channels at {wanted[1]}x{wanted[1]}"
        )
    if dataset.label_dim != teacher.label_dim and (teacher.label_dim or config.cond) and dataset.label_dim:
        raise ValueError(f"{options['data']} has {dataset.label_dim} classes, the teacher has {teacher.label_dim}")
    if teacher.label_dim and not dataset.label_dim:
        raise ValueError(f"the teacher has {teacher.label_dim} classes and {options['data']} has no labels in use")
    teacher.compute_dtype = compute_dtype(options["dtype"], device)
    return distillation_task(teacher, config), loaded.encoder.to(device)


if __name__ == "__main__":
    wait_passively()
    main()
