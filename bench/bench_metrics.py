"""Where the time of an evaluation goes: drawing images, Inception features, PNG files. Random weights throughout.

python bench/bench_metrics.py --device cuda --preset img64-s --num 5000 --out bench/results/gpu_metrics.json
"""

from __future__ import annotations

import sys
import time
from pathlib import Path

import click
from bench_options import out_option

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "bench")]

PRESETS = ("img64-s", "ffhq256-xs", "fashion16")  # those of pixels, which Inception takes


@click.command(context_settings={"show_default": True})
@click.option("--device", default="auto", help="auto, cpu, cuda, cuda:N or mps.")
@click.option("--preset", type=click.Choice(PRESETS), default="img64-s", help="Whose network draws.")
@click.option("--num", type=click.IntRange(2), default=5000, help="Images.")
@click.option("--batch", type=click.IntRange(1), default=64, help="Images at once.")
@click.option("--ts", default="10,22,39", help="As in generate.py.")
@click.option("--dtype", type=click.Choice(["float32", "bf16", "fp16"]), default="fp16", help="Of the U-Nets.")
@out_option()
def main(device: str, preset: str, num: int, batch: int, ts: str, dtype: str, out: str | None) -> None:
    """Print seconds and images per second of each stage, and name the slowest."""
    import torch
    from bench_train import TEACHERS

    from data.pictures import encode_png
    from dnnlib.files import write_json
    from generation.images import generate_images
    from metrics.distances import FeatureMoments
    from metrics.features.inception import InceptionV3
    from networks import GenerativeDenoiser, PrecondCondition
    from sampling.grids import parse_ts
    from torch_utils.distributed import device_for
    from torch_utils.errors import user_errors

    with user_errors():
        resolved = device_for(device)
        torch.manual_seed(0)
        net = GenerativeDenoiser(PrecondCondition(**TEACHERS[preset])).to(resolved, memory_format=torch.channels_last)
        compute = {"float32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[dtype]
        detector = InceptionV3().fold_batch_norm().to(resolved, memory_format=torch.channels_last)
        moments = FeatureMoments(detector.feature_dim, resolved)
        seconds = {"generation": 0.0, "detection": 0.0, "png": 0.0}

        def lap(stage: str, started: float) -> float:
            if resolved.type == "cuda":
                torch.cuda.synchronize(resolved)
            now = time.perf_counter()
            seconds[stage] += now - started
            return now

        options = dict(ts=parse_ts(ts).ts, batch=batch, device=resolved, dtype=compute)
        for result in generate_images(net.eval(), seeds=range(batch), **options):  # warm-up
            with torch.no_grad():
                detector(result.images)
        clock = time.perf_counter()
        for result in generate_images(net, seeds=range(num), **options):
            clock = lap("generation", clock)
            with torch.no_grad():
                moments.add(detector(result.images))
            clock = lap("detection", clock)
            for image in result.images.cpu().numpy():
                encode_png(image)
            clock = lap("png", clock)
        rates = {stage: num / value for stage, value in seconds.items()}
        name = torch.cuda.get_device_name(resolved) if resolved.type == "cuda" else resolved.type
        print(f"{preset}, {num} images, ts {ts}, {dtype}, {name}, random weights")
        for stage, value in seconds.items():
            print(f"{stage:>10} {value:9.2f} s {rates[stage]:10.1f} img/s")
        print(f"bottleneck: {min(rates, key=rates.get)}")
        if out is not None:
            report = {"preset": preset, "num": num, "ts": ts, "dtype": dtype, "device": name, "img_per_s": rates}
            write_json(out, report)


if __name__ == "__main__":
    from torch_utils.options import set_wait_policy

    set_wait_policy()
    main()
