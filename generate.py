"""Draw images from a distilled generative denoiser in one or a few steps, or from its teacher."""

from typing import Any

import click

from torch_utils.errors import user_errors
from torch_utils.options import COUNT, DTYPE, FOLDER, device_option, quiet_option, set_wait_policy

NETWORK = "PATH|URL|hf://ID[#sha256=HEX]"
TS = """Generative denoiser: increasing indices (0-39) of the 40-point Karras grid, n+1 for n steps. Published: 12,39 ·
10,22,39 · 0,10,20,30,39.  [default: one direct step at the highest level]"""
DTYPE_HELP = "Of the U-Nets; auto = fp16 on CUDA for networks trained with it, else float32."
GNET_NO_LABELS = "Guide with no labels (classifier-free); without --gnet, by the network itself."


def __getattr__(name: str) -> Any:
    """`generate_images`, loaded on first use: --help needs no PyTorch."""
    if name != "generate_images":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from generation.images import generate_images

    return generate_images


@click.command(context_settings={"show_default": True, "max_content_width": 120})
@click.option("--net", "net_path", metavar=NETWORK, required=True, help="Student or teacher; #sha256 checks the file.")
@click.option("--outdir", type=FOLDER, required=True, help="Where to write the images, one SEED.png each.")
@click.option("--seeds", metavar="LIST", default="0-15", help="One image each: 1,2,5-10.")
@click.option("--class", "class_idx", type=click.IntRange(min=0), help="Of every image.  [default: drawn per seed]")
@click.option("--batch", type=COUNT, default=32, help="Largest batch per process.")
@click.option("--subdirs", is_flag=True, help="One folder per 1000 seeds.")
@click.option("--grid", is_flag=True, help="Also write grid.png: the first 1024 seeds on one sheet.")
@click.option("--ts", metavar="LIST", help=TS)
@click.option("--zeta", type=click.FloatRange(0, 1), default=1.0, help="With --ts: share of fresh noise between steps.")
@click.option("--steps", type=click.IntRange(min=2), help="Teacher: noise levels N (2N-1 evaluations).  [default: 32]")
@click.option("--gnet", "gnet_path", metavar=NETWORK, help="Teacher: guiding network, weaker or unconditional.")
@click.option("--guidance", type=float, default=1.0, help="Teacher: guidance strength, 1 = none.")
@click.option("--gnet-no-labels", is_flag=True, help=GNET_NO_LABELS)
@device_option
@click.option("--dtype", type=DTYPE, default="auto", help=DTYPE_HELP)
@quiet_option
def main(**options: object) -> None:
    """Draw images with a generative denoiser (a few steps) or a teacher (Heun's method), chosen by the network's type.

    A seed gives the same image whatever the batch size and the number of processes.

    \b
    # Two steps, 16 images and a contact sheet
    python generate.py --net student.safetensors --ts 10,22,39 --grid --outdir out/two-steps
    \b
    # The teacher, 63 evaluations
    python generate.py --net teacher.safetensors --seeds 0-15 --outdir out/teacher
    \b
    # 50,000 images on 8 GPUs
    torchrun --standalone --nproc-per-node 8 generate.py --net student.safetensors --ts 10,22,39 --seeds 0-49999 \\
        --subdirs --outdir out/fid
    """
    with user_errors():
        from generation.command import generate

        generate(**options)


if __name__ == "__main__":
    set_wait_policy()
    main()
