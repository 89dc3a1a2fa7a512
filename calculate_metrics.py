"""Fréchet distances and their relatives: of a network's images, of images on disk, and of a data set as reference."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import click

from metrics.specs import parse_metrics
from torch_utils.errors import user_errors
from torch_utils.options import SEED
from torch_utils.threads import wait_passively

PUBLISHED_SEED = 123456789  # the first of 50,000


def _schedules(ctx: click.Context, param: click.Parameter, values: tuple[str, ...]) -> list[Any]:
    from sampling.grids import parse_ts

    try:
        return [parse_ts(value) for value in values]
    except ValueError as error:
        raise click.BadParameter(str(error)) from error


def common_options(command: Callable) -> Callable:
    """Options of all commands."""
    for option in (
        click.option("--quiet", is_flag=True, help="No progress bar."),
        click.option("--device", default="auto", help="auto, cpu, cuda, cuda:N or mps."),
        click.option("--batch", type=click.IntRange(min=1), default=64, help="Images at once, per process."),
        click.option("--detector-name", metavar="NAME", help="Of --detector.  [default: the file's name]"),
        click.option(
            "--detector",
            "custom",
            metavar="FILE",
            help="A detector of your own, a TorchScript program (of a source that you trust) from uint8 images to "
            "features; its distance is reported as fd_NAME.",
        ),
        click.option(
            "--detector-path",
            metavar="PATH",
            help="Weights of the published detector, or their folder.  [default: $NCVSD_DETECTORS, else downloaded]",
        ),
        click.option(
            "--metrics",
            "metric_names",
            metavar="LIST",
            help="Of fid, fd_dinov2, fd_demo, kid, pr (precision and recall), is (inception score); kid:fd_demo takes "
            "another detector's features.  [default: fid; with --detector its distance]",
        ),
    ):
        command = option(command)
    return command


@click.group(context_settings={"show_default": True, "max_content_width": 120})
def cli() -> None:
    """Compare images with a data set in the features of a pretrained network.

    \b
    # Statistics of a data set
    python calculate_metrics.py ref --data imagenet64.zip --dest img64.npz --metrics fid,fd_dinov2
    \b
    # 50,000 images of a network in one, two and four steps, on 8 GPUs
    torchrun --standalone --nproc-per-node 8 calculate_metrics.py gen --net student.safetensors --ref img64.npz \\
        --ts 12,39 --ts 10,22,39 --ts 0,10,20,30,39 --out fid.json
    (behind torchrun say --num-images for --num, which it takes for its own)
    \b
    # Images on disk
    python calculate_metrics.py calc --images out/fid --ref img64.npz
    """


@cli.command()
@click.option("--net", "net_path", metavar="PATH|URL|hf://ID", required=True, help="Student or teacher.")
@click.option("--ref", "ref_path", metavar="FILE|URL", required=True, help="Reference: .npz, or EDM2's .pkl.")
@common_options
@click.option("--num", "--num-images", "num", type=click.IntRange(min=2), default=50000, help="Images.")
@click.option("--seed", type=SEED, default=PUBLISHED_SEED, help="First seed; one seed per image.")
@click.option("--ts", "schedules", metavar="LIST", multiple=True, callback=_schedules, help="Indices; repeatable.")
@click.option("--zeta", type=click.FloatRange(0, 1), default=1.0, help="With --ts: share of fresh noise between steps.")
@click.option("--sampler", type=click.Choice(["few-step", "heun"]), help="[default: by the network's kind]")
@click.option("--steps", type=click.IntRange(min=2), help="Teacher: noise levels N (2N-1 evaluations).  [default: 32]")
@click.option("--gnet", "gnet_path", metavar="PATH|URL|hf://ID", help="Teacher: guiding network.")
@click.option("--guidance", type=float, default=1.0, help="Teacher: guidance strength, 1 = none.")
@click.option("--class", "class_idx", type=click.IntRange(min=0), help="Of every image.  [default: drawn per seed]")
@click.option("--dtype", type=click.Choice(["auto", "float32", "bf16", "fp16"]), default="auto", help="Of the U-Nets.")
@click.option("--save-images", metavar="ZIP", help="Also keep the images, as a data set (one --ts only).")
@click.option("--out", metavar="JSON", help="Write the report here.")
def gen(device: str, out: str | None, **options: Any) -> None:
    """Draw images with a network and evaluate them."""
    from torch_utils import distributed

    with user_errors():
        _check_output(out, options, "net_path", "gnet_path")
        resolved = distributed.init(device)
        request = distributed.main_first(lambda: _prepare_gen(resolved, **options))
        records = _run_gen(request)
        if distributed.is_main():
            _report(records, out)


@cli.command()
@click.option("--images", "images_path", metavar="DIR|ZIP", required=True, help="Square images of one size.")
@click.option("--ref", "ref_path", metavar="FILE|URL", required=True, help="Reference: .npz, or EDM2's .pkl.")
@common_options
@click.option(
    "--num", "--num-images", "num", type=click.IntRange(min=2), help="Size of a random subset.  [default: all images]"
)
@click.option("--seed", type=SEED, default=0, help="Of the subset.")
@click.option("--out", metavar="JSON", help="Write the report here.")
def calc(device: str, out: str | None, **options: Any) -> None:
    """Evaluate images on disk."""
    from torch_utils import distributed

    with user_errors():
        _check_output(out, options, "images_path")
        resolved = distributed.init(device)
        records = _run_calc(*distributed.main_first(lambda: _prepare_calc(resolved, **options)))
        if distributed.is_main():
            _report(records, out)


@cli.command()
@click.option("--data", "data_path", metavar="DIR|ZIP", required=True, help="Square images of one size.")
@click.option("--dest", metavar="NPZ", required=True, help="The statistics; replaced if it exists.")
@common_options
def ref(device: str, dest: str, **options: Any) -> None:
    """Compute the statistics of a data set, for --ref; with kid or pr among the metrics, its features as well."""
    from metrics.references import save_reference
    from torch_utils import distributed

    with user_errors():
        _check_output(dest, options, "data_path", suffix=".npz")
        resolved = distributed.init(device)
        collected = _collect(*distributed.main_first(lambda: _prepare_ref(resolved, **options)))
        if distributed.is_main():
            save_reference(dest, collected)
            counts = ", ".join(f"{name} [{len(part.moments.mean())}]" for name, part in collected.items())
            images = next(iter(collected.values())).moments.count
            click.echo(f"statistics of {images} images in the features of {counts}: {dest}", err=True)


def _check_output(out: str | None, options: dict[str, Any], *inputs: str, suffix: str = ".json") -> None:
    """Refuse a report or statistics that could not be written at the end, or would destroy something."""
    from dnnlib.files import check_output

    if out is not None:
        check_output(out, suffix, [options.get(name) for name in (*inputs, "ref_path", "detector_path", "custom")])


def _prepare_metrics(
    device: Any,
    reference: Any,  # None = nothing to compare with
    *,
    metric_names: str | None,
    detector_path: str | None,
    custom: str | None,
    detector_name: str | None,
) -> tuple[list[Any], dict[str, Any]]:
    """Metrics, checked against what the reference holds, and their detectors on the device."""
    from metrics.collect import FeatureCollector
    from metrics.compute import check_dimensions, check_reference
    from metrics.features.detectors import load_custom_detector, load_detector

    if detector_name is not None and custom is None:
        raise ValueError("--detector-name names the file of --detector: give that as well")
    own = load_custom_detector(custom, detector_name, device) if custom is not None else None
    if metric_names is None:
        metric_names = "fid" if own is None else own.name
    metrics = parse_metrics(metric_names, () if own is None else (own.name,))
    if own is not None and own.name not in {m.detector for m in metrics}:
        metrics += parse_metrics(own.name, (own.name,))
    if reference is not None:
        check_reference(metrics, reference)
    names = list(dict.fromkeys(m.detector for m in metrics))
    published = [n for n in names if own is None or n != own.name]
    if detector_path is not None and len(published) != 1:
        raise ValueError(
            f"--detector-path names one detector's weights, and the metrics need {' and '.join(published) or 'none'}: "
            "put the files into a folder named by $NCVSD_DETECTORS"
        )
    detectors = {n: own if n not in published else load_detector(n, detector_path, device) for n in names}
    FeatureCollector(metrics, detectors)  # checks what they can give
    if reference is not None:
        check_dimensions(metrics, detectors, reference)
    return metrics, detectors


def _prepare_gen(
    device: Any,
    net_path: str,
    ref_path: str,
    gnet_path: str | None,
    num: int,
    seed: int,
    schedules: list[Any],
    zeta: float,
    sampler: str | None,
    steps: int | None,
    guidance: float,
    class_idx: int | None,
    dtype: str,
    batch: int,
    save_images: str | None,
    quiet: bool,
    **metric_options: Any,
) -> dict[str, Any]:
    """Everything that is needed, loaded and checked; nothing is drawn yet."""
    import torch

    import networks
    from generation.images import generate_images
    from metrics.references import load_reference

    loaded = networks.load(net_path, device=device)
    gnet = networks.load(gnet_path, device=device) if gnet_path is not None else None
    few_step = isinstance(loaded.net, networks.GenerativeDenoiser)
    if sampler is not None and few_step != (sampler == "few-step"):
        raise ValueError(f"--sampler {sampler} does not fit a {'generative denoiser' if few_step else 'teacher'}")
    if save_images is not None and len(schedules) > 1:
        raise ValueError("--save-images keeps the images of one setting: give one --ts")
    if device.type == "cpu":
        for net in [loaded.net] if gnet is None else [loaded.net, gnet.net]:
            net.to(memory_format=torch.channels_last)
    compute = {"auto": None, "float32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[dtype]
    settings = []
    for ts in [s.ts for s in schedules] or [None]:
        sampling = dict(ts=ts, zeta=zeta) if few_step else dict(ts=ts, zeta=zeta, num_steps=steps, guidance=guidance)
        if few_step and (steps is not None or guidance != 1):
            raise ValueError("--steps and --guidance apply to teachers only")
        sampling |= dict(gnet=None if gnet is None else gnet.net, class_idx=class_idx, device=device, dtype=compute)
        generate_images(loaded.net, loaded.encoder, seeds=[seed, seed + num - 1], **sampling)  # checks the request
        settings.append(sampling)
    reference = load_reference(ref_path, quiet=quiet)
    metrics, detectors = _prepare_metrics(device, reference, **metric_options)
    return dict(
        loaded=loaded,
        gnet=gnet,
        settings=settings,
        reference=reference,
        metrics=metrics,
        detectors=detectors,
        seeds=range(seed, seed + num),
        batch=batch,
        save_images=save_images,
        quiet=quiet,
    )


def _run_gen(request: dict[str, Any]) -> list[dict[str, Any]]:
    """One record per setting."""
    from contextlib import ExitStack

    from tqdm import tqdm

    from dnnlib.files import file_sha256
    from generation.images import count_evaluations
    from metrics.archive import ImageArchive
    from metrics.compute import compute_metrics
    from metrics.evaluate import evaluate_network
    from metrics.report import PIXEL_ROUNDING, describe
    from torch_utils import distributed

    loaded, gnet, seeds, reference = (request[k] for k in ("loaded", "gnet", "seeds", "reference"))
    hashes = [file_sha256(n.path) if n is not None and distributed.is_main() else None for n in (loaded, gnet)]
    records = []
    total = len(seeds) * len(request["settings"])
    with ExitStack() as stack:
        hidden = request["quiet"] or not distributed.is_main()
        bar = stack.enter_context(tqdm(total=total, unit="img", desc="sampling", leave=False, disable=hidden))
        path = request["save_images"]
        archive = stack.enter_context(ImageArchive(path)) if path is not None else None
        for sampling in request["settings"]:
            result = evaluate_network(
                loaded.net,
                loaded.encoder,
                request["metrics"],
                request["detectors"],
                seeds,
                batch=request["batch"],
                progress=bar.update,
                on_batch=None if archive is None else archive.add,
                **sampling,
            )
            if not distributed.is_main():
                continue
            values, warnings = compute_metrics(request["metrics"], result.collected, reference)
            few_step = "num_steps" not in sampling
            records.append(
                {
                    "net": loaded.config["source"],
                    "net_sha256": hashes[0],
                    "gnet_sha256": hashes[1],
                    "sampler": "few-step" if few_step else "heun",
                    "ts": None if sampling["ts"] is None else list(sampling["ts"]),
                    "zeta": sampling["zeta"] if few_step else None,
                    "guidance": None if few_step else sampling["guidance"],
                    "class": sampling["class_idx"],
                    "evaluations": count_evaluations(
                        loaded.net, ts=sampling["ts"], num_steps=sampling.get("num_steps")
                    ),
                    "compute_dtype": str(loaded.net.compute_dtype).removeprefix("torch."),
                    "seeds": [seeds[0], seeds[-1]],
                    "pixel_rounding": PIXEL_ROUNDING[loaded.encoder.name],
                    "sampling_ms_per_image": 1000 * result.seconds_per_image,
                    "processes": distributed.world_size(),
                    **describe(result.num_images, reference, values, warnings),
                }
            )
    return records


def _prepare_calc(
    device: Any,
    images_path: str,
    ref_path: str,
    num: int | None,
    seed: int,
    batch: int,
    quiet: bool,
    **metric_options: Any,
) -> tuple[Any, ...]:
    from data.dataset import ImageDataset
    from metrics.references import load_reference

    dataset = ImageDataset(images_path, use_labels=False, max_size=num, random_seed=seed)
    if num is not None and num > len(dataset):
        raise ValueError(f"{images_path} holds {len(dataset)} images: --num {num} cannot be drawn")
    reference = load_reference(ref_path, quiet=quiet)
    metrics, detectors = _prepare_metrics(device, reference, **metric_options)
    options = dict(batch=batch, device=device, quiet=quiet)
    return dataset, metrics, detectors, reference, None if num is None else seed, options


def _run_calc(
    dataset: Any,
    metrics: list[Any],
    detectors: dict[str, Any],
    reference: Any,
    subset_seed: int | None,  # None = all images
    options: dict[str, Any],
) -> list[dict[str, Any]]:
    from metrics.compute import compute_metrics
    from metrics.report import describe
    from torch_utils import distributed

    collected = _collect(dataset, metrics, detectors, options)
    if not distributed.is_main():
        return []
    values, warnings = compute_metrics(metrics, collected, reference)
    facts = {"images": dataset.path, "subset_seed": subset_seed, "pixel_rounding": None}  # as they are stored
    return [{**facts, **describe(len(dataset), reference, values, warnings)}]


def _prepare_ref(device: Any, data_path: str, batch: int, quiet: bool, **metric_options: Any) -> tuple[Any, ...]:
    from data.dataset import ImageDataset
    from metrics.references import MAX_FEATURES

    dataset = ImageDataset(data_path, use_labels=False)
    options = dict(batch=batch, device=device, max_features=MAX_FEATURES, quiet=quiet)
    return dataset, *_prepare_metrics(device, None, **metric_options), options


def _collect(dataset: Any, metrics: list[Any], detectors: dict[str, Any], options: dict[str, Any]) -> dict:
    from tqdm import tqdm

    from metrics.evaluate import evaluate_dataset
    from torch_utils import distributed

    hidden = options.pop("quiet") or not distributed.is_main()
    with tqdm(total=len(dataset), unit="img", desc="features", leave=False, disable=hidden) as bar:
        return evaluate_dataset(dataset, metrics, detectors, progress=bar.update, **options)


def _report(records: list[dict[str, Any]], out: str | None) -> None:
    """Write the JSON file, then print the warnings, once each, and the table."""
    from metrics.report import format_table, write_report

    if out is not None:
        write_report(out, records)
    for warning in dict.fromkeys(w for record in records for w in record["warnings"]):
        click.echo(f"warning: {warning}", err=True)
    click.echo(format_table(records))


if __name__ == "__main__":
    wait_passively()
    cli()
