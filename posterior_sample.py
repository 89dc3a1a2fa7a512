"""Solve inverse problems (deblurring, super-resolution, inpainting, phase retrieval ...) with a generative denoiser."""

import click

from inverse.tasks import load_task, pop_overrides, task_names, task_options
from torch_utils.errors import user_errors
from torch_utils.options import COUNT, DTYPE, FOLDER, SEED, device_option, quiet_option, set_wait_policy

NETWORK = "PATH|URL|hf://ID[#sha256=HEX]"
BATCH = """Samples at once, per process. With 1 an image is the same, bit for bit, whatever else is drawn; more round
otherwise: float32 by less than a grey level (more where beta is far below 2·noise²), bf16 and fp16 by several."""
LPIPS = "auto computes it where VGG-16's weights are at hand; download fetches them (528 MB)."
POOLING = "average: published tables; max: original."


def class_index(text: str) -> int | str:
    """A whole number, or the word data. Raises click.BadParameter."""
    if text != "data" and not (text.isdecimal() and len(text) < 20):
        advice = "give a class index, or 'data' for the classes in the data's dataset.json"
        raise click.BadParameter(f"{text[:40]!r}: {advice}")
    return text if text == "data" else int(text)


@click.command(context_settings={"show_default": True, "max_content_width": 120})
@click.option("--net", metavar=NETWORK, required=True, help="Generative denoiser; #sha256 checks the file.")
@click.option("--task", metavar="NAME|FILE", required=True, help=f"{', '.join(task_names())}, or a .yaml.")
@click.option("--data", metavar="DIR|ZIP", help="Images to measure and to find again.")
@click.option("--measurements", metavar="DIR|ZIP", help="Real ones instead of --data: .npz (array y), .npy, or images.")
@click.option("--outdir", type=FOLDER, required=True, help="Results; a second call finishes what is missing.")
@click.option("--num", type=click.IntRange(min=1), help="The first so many images.  [default: all]")
@click.option("--resize", is_flag=True, help="Crop the centre of images of another size and resize it.")
@click.option("--mask", metavar="IMAGE", help="Inpainting: black pixels are removed; replaces the task's.")
@click.option("--class", "class_idx", metavar="INT|data", type=class_index, help="Of conditional networks.")
@click.option("--seed", type=SEED, default=0, help="Of measurement noise and samples.")
@click.option("--batch", type=COUNT, default=16, help=BATCH)
@task_options
@click.option("--lpips", type=click.Choice(["auto", "download", "off"]), default="auto", help=LPIPS)
@click.option("--lpips-path", metavar="FILE|DIR", help="VGG-16's weights, vgg16-397923af.pth.")
@click.option("--lpips-pooling", type=click.Choice(["max", "average"]), default="average", help=POOLING)
@device_option
@click.option("--dtype", type=DTYPE, default="auto", help="Of the U-Net.")
@quiet_option
def main(task: str, **options: object) -> None:
    """Draw samples of p(image | measurement) by plug-and-play sampling, and judge them.

    Writes samples, measurements, mean and std maps, metrics.json, metrics.csv and report.html, which shows them all.

    \b
    # 4x super-resolution of the first 10 images of a folder, 4 samples each
    python posterior_sample.py --net ncvsd-ffhq256-xs.pkl --task super_resolution --data ffhq_val \\
        --num 10 --runs 4 --outdir out/sr
    \b
    # Real measurements, on 8 GPUs
    torchrun --standalone --nproc-per-node 8 -- posterior_sample.py --net student.safetensors --task my_task.yaml \\
        --measurements scans --outdir out/scans
    """
    with user_errors():
        loaded = load_task(task, pop_overrides(options))
        from inverse.command import run  # with torch, which --help and mistakes in tasks do not wait for

        run(loaded, options)


if __name__ == "__main__":
    set_wait_policy()
    main()
