"""What `calculate_metrics.py` does: evaluate a network, or images on disk, and make the statistics to compare with."""

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import Any

import click
import torch
from tqdm import tqdm

from data.dataset import ImageDataset
from data.pictures import encode_png
from data.writer import DatasetWriter
from dnnlib.files import check_output, discard, file_sha256, temporary_beside, write_json
from generation.command import load_networks
from generation.images import GeneratedBatch, count_evaluations, generate_images
from metrics.collect import Collected, FeatureCollector, evaluate_dataset, evaluate_network
from metrics.features.detectors import LoadedDetector, load_custom_detector, load_detector
from metrics.kinds import Metric, parse_metrics
from metrics.references import MAX_FEATURES, Reference, check_reference, compute_metrics, load_reference, save_reference
from networks import GenerativeDenoiser, LoadedNetwork
from sampling.grids import parse_ts
from torch_utils import distributed
from torch_utils.options import about

Record = dict[str, Any]  # JSON data, or arguments by name
PIXEL_ROUNDING = {  # by the name of the encoder that turns a network's output x into uint8
    "rgb": "clip(127.5*x + 128, 0, 255), truncated",
    "sd-vae": "255*clip(x, 0, 1), truncated, of the autoencoder's output x",
}


def gen(
    *,
    net_path: str,
    ref_path: str,
    num: int,
    seed: int,  # the first; one per image
    schedules: Sequence[str],  # as in 10,22,39, each evaluated; () = one direct step, or a teacher
    zeta: float,
    sampler: str | None,  # few-step or heun; None = by the network's kind
    steps: int | None,  # teacher: noise levels
    gnet_path: str | None,
    guidance: float,
    class_idx: int | None,
    dtype: str,
    save_images: str | None,  # data set to keep the images in
    out: str | None,
    device: str,
    batch: int,
    quiet: bool,
    **detector_options: str | None,  # of `choose_detectors`
) -> None:
    """Draw images with a network and evaluate them, once per schedule."""
    with about("--ts"):
        grids = [parse_ts(text).ts for text in schedules] or [None]
    _check_report(out, [net_path, gnet_path, ref_path], detector_options, ".json")
    place = distributed.init(device)
    seeds = range(seed, seed + num)

    def prepare() -> tuple:
        """Everything that is needed, loaded and checked; nothing is drawn yet."""
        loaded, guiding = load_networks(net_path, gnet_path, place)
        options = dict(num_steps=steps, guidance=guidance, zeta=zeta, class_idx=class_idx, gnet=guiding and guiding.net)
        options |= dict(device=place, dtype=distributed.compute_dtype(dtype, place))
        settings = [options | dict(ts=ts) for ts in grids]
        _check_settings(loaded, settings, seeds, sampler, save_images)
        reference = load_reference(ref_path, quiet=quiet)
        return loaded, guiding, settings, reference, *choose_detectors(place, reference, **detector_options)

    loaded, guiding, settings, reference, metrics, detectors = distributed.main_first(prepare)
    hashes = [network and file_sha256(network.path) for network in (loaded, guiding) if distributed.is_main()]
    records = []
    keeping = nullcontext() if save_images is None else _image_archive(save_images)
    with _bar(num * len(settings), "sampling", quiet) as bar, keeping as keep:
        for setting in settings:
            how = dict(batch=batch, progress=bar.update, on_batch=keep, **setting)
            found = evaluate_network(loaded.net, loaded.encoder, metrics, detectors, seeds, **how)
            if distributed.is_main():
                facts = _describe_sampling(loaded, hashes, setting, seeds, found.seconds_per_image)
                records.append(facts | _evaluate(metrics, found.collected, num, reference))
    if records:
        _report(records, out)


def calc(*, images_path: str, ref_path: str, num: int | None, seed: int, out: str | None, **options: Any) -> None:
    """Evaluate images on disk, or a random subset of `num` of them that `seed` draws."""
    _check_report(out, [images_path, ref_path], options, ".json")
    dataset, reference, metrics, collected = _evaluate_images(images_path, ref_path, num, seed, **options)
    facts = {"images": dataset.path, "subset_seed": None if num is None else seed}
    facts["pixel_rounding"] = None  # as they are stored
    if distributed.is_main():
        _report([facts | _evaluate(metrics, collected, len(dataset), reference)], out)


def ref(*, data_path: str, dest: str, **options: Any) -> None:
    """Compute the statistics of a data set; with kid or pr among the metrics, its features as well."""
    _check_report(dest, [data_path], options, ".npz")
    dataset, _, _, collected = _evaluate_images(data_path, **options, max_features=MAX_FEATURES)
    if distributed.is_main():
        save_reference(dest, collected)
        counts = ", ".join(f"{name} [{len(part.moments.mean())}]" for name, part in collected.items())
        click.echo(f"statistics of {len(dataset)} images in the features of {counts}: {dest}", err=True)


def _evaluate_images(
    path: str,
    ref_path: str | None = None,  # None = nothing to compare with
    num: int | None = None,  # size of a random subset; None = all images
    seed: int = 0,  # of the subset
    *,
    device: str,
    batch: int,
    quiet: bool,
    max_features: int | None = None,  # as in `evaluate_dataset`
    **detector_options: str | None,  # of `choose_detectors`
) -> tuple[ImageDataset, Reference | None, list[Metric], dict[str, Collected]]:
    place = distributed.init(device)

    def prepare() -> tuple:
        dataset = ImageDataset(path, use_labels=False, max_size=num, random_seed=seed)
        if num is not None and num > len(dataset):
            raise ValueError(f"{path} holds {len(dataset)} images: --num {num} cannot be drawn")
        reference = None if ref_path is None else load_reference(ref_path, quiet=quiet)
        return dataset, reference, *choose_detectors(place, reference, **detector_options)

    dataset, reference, metrics, detectors = distributed.main_first(prepare)
    with _bar(len(dataset), "features", quiet) as bar:
        how = dict(batch=batch, device=place, max_features=max_features, progress=bar.update)
        return dataset, reference, metrics, evaluate_dataset(dataset, metrics, detectors, **how)


@contextmanager
def _image_archive(path: str) -> Iterator[Callable[[GeneratedBatch], None]]:
    """Give a function that keeps a batch; at the end all processes' images become one EDM2 data set at `path`, in the
    order of their seeds, with their classes as labels. Collective at both ends: every process leaves its images in a
    folder beside `path`. On error nothing remains.
    """
    with ExitStack() as stack:

        def begin() -> tuple[DatasetWriter | None, Path | None]:
            if not distributed.is_main():
                return None, None
            writer = stack.enter_context(DatasetWriter(path))  # refuses what stands there, before anything is drawn
            parts = stack.enter_context(temporary_beside(os.path.realpath(path), folder=True))
            stack.callback(discard, parts)
            return writer, parts

        writer, parts = distributed.main_first(begin)
        parts = distributed.from_main(parts)

        def add(batch: GeneratedBatch) -> None:
            classes = [None] * len(batch.seeds) if batch.labels is None else batch.labels.argmax(dim=1).tolist()
            for seed, image, label in zip(batch.seeds, batch.images.cpu().numpy(), classes, strict=True):
                name = f"{seed:020d}.png" if label is None else f"{seed:020d}-{label}.png"
                (parts / name).write_bytes(encode_png(image))

        yield add
        distributed.barrier()
        for i, file in enumerate(sorted(parts.iterdir()) if writer is not None else ()):
            _, dash, label = file.stem.partition("-")
            writer.add(f"{i // 1000:05d}/img{i:08d}.png", file.read_bytes(), int(label) if dash else None)


def choose_detectors(
    device: torch.device,
    reference: Reference | None,  # None = nothing to compare with
    *,
    metric_names: str | None,  # None = fid, or the distance of one's own detector
    detector_path: str | None,  # weights of the one published detector
    custom: str | None,  # file of a detector of one's own
    detector_name: str | None,  # of that
) -> tuple[list[Metric], dict[str, LoadedDetector]]:
    """Metrics, checked against what the reference holds, and their detectors on the device. Raises ValueError."""
    if detector_name is not None and custom is None:
        raise ValueError("--detector-name names the file of --detector: give that as well")
    own = () if custom is None else (load_custom_detector(custom, detector_name, device),)
    names = tuple(detector.name for detector in own)
    metrics = parse_metrics(metric_names if metric_names is not None else "".join(names) or "fid", names)
    for name in set(names) - {metric.detector for metric in metrics}:
        metrics += parse_metrics(name, names)
    if reference is not None:
        check_reference(metrics, reference)
    needed = list(dict.fromkeys(metric.detector for metric in metrics))
    published = [name for name in needed if name not in names]
    if detector_path is not None and len(published) != 1:
        need = f"names one detector's weights, and the metrics need {' and '.join(published) or 'none'}"
        raise ValueError(f"--detector-path {need}: put the files into a folder named by $NCVSD_DETECTORS")
    detectors = {name: load_detector(name, detector_path, device) if name in published else own[0] for name in needed}
    FeatureCollector(metrics, detectors)  # checks what they can give
    if reference is not None:
        check_reference(metrics, reference, detectors)
    return metrics, detectors


def _check_report(out: str | None, inputs: list[str | None], options: dict[str, str | None], suffix: str) -> None:
    """Refuse a report or statistics that could not be written at the end, or would destroy something."""
    if out is not None:
        check_output(out, suffix, [*inputs, options["detector_path"], options["custom"]])


def _bar(total: int, what: str, quiet: bool) -> tqdm:
    return tqdm(total=total, unit="img", desc=what, leave=False, disable=quiet or not distributed.is_main())


def _check_settings(
    loaded: LoadedNetwork, settings: list[Record], seeds: range, sampler: str | None, save_images: str | None
) -> None:
    """Raise ValueError for what does not fit the network."""
    few_step = isinstance(loaded.net, GenerativeDenoiser)
    if sampler is not None and few_step != (sampler == "few-step"):
        raise ValueError(f"--sampler {sampler} does not fit a {'generative denoiser' if few_step else 'teacher'}")
    if save_images is not None and len(settings) > 1:
        raise ValueError("--save-images keeps the images of one setting: give one --ts")
    for setting in settings:
        if few_step and (setting["num_steps"] is not None or setting["guidance"] != 1):
            raise ValueError("--steps and --guidance apply to teachers only")
        generate_images(loaded.net, loaded.encoder, seeds=[seeds[0], seeds[-1]], **setting)


def _describe_sampling(
    loaded: LoadedNetwork, hashes: list[str | None], setting: Record, seeds: range, seconds_per_image: float
) -> Record:
    """How images were drawn: `hashes` are of the networks' files, `setting` holds arguments of generate_images."""
    few_step, ts = isinstance(loaded.net, GenerativeDenoiser), setting["ts"]
    return {
        "net": loaded.config["source"],
        **dict(zip(("net_sha256", "gnet_sha256"), hashes, strict=True)),
        "sampler": "few-step" if few_step else "heun",
        "ts": None if ts is None else list(ts),
        "zeta": setting["zeta"] if few_step else None,
        "guidance": None if few_step else setting["guidance"],
        "class": setting["class_idx"],
        "evaluations": count_evaluations(loaded.net, ts=ts, num_steps=setting["num_steps"]),
        "compute_dtype": str(loaded.net.compute_dtype).removeprefix("torch."),
        "seeds": [seeds[0], seeds[-1]],
        "pixel_rounding": PIXEL_ROUNDING[loaded.encoder.name],
        "sampling_ms_per_image": 1000 * seconds_per_image,
        "processes": distributed.world_size(),
    }


def _evaluate(metrics: list[Metric], collected: dict[str, Collected], num_images: int, reference: Reference) -> Record:
    """The part of a record that all reports share."""
    values, warnings = compute_metrics(metrics, collected, reference)
    known = {"source": reference.source, "sha256": reference.sha256, "num_images": reference.num_images}
    return {"num_images": num_images, "reference": known, "metrics": list(map(asdict, values)), "warnings": warnings}


def _report(records: list[Record], out: str | None) -> None:
    """Write the JSON file, whole or not at all, then print the warnings, once each, and the table."""
    if out is not None:
        write_json(out, {"results": records})
    for warning in dict.fromkeys(w for record in records for w in record["warnings"]):
        click.echo(f"warning: {warning}", err=True)
    rows = [_row(record) for record in records]
    lines = [list(rows[0]), *(list(row.values()) for row in rows)]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    click.echo("\n".join("  ".join(map(str.rjust, line, widths)) for line in lines))


def _row(record: Record) -> dict[str, str]:
    """A record's line of the table, by column."""
    row = {}
    if "sampler" in record:
        few_step = ",".join(map(str, record["ts"])) if record["ts"] else "1 direct step"
        row |= {"setting": few_step if record["sampler"] == "few-step" else "heun", "NFE": str(record["evaluations"])}
    row["images"] = str(record["num_images"])
    for metric in record["metrics"]:
        values = {metric["name"]: metric["value"]}
        if "recall" in metric["details"]:
            pair = {"precision": metric["value"], "recall": metric["details"]["recall"]}
            values = {metric["name"].replace("pr", part, 1): value for part, value in pair.items()}
        row |= {name: f"{value:.4g}" for name, value in values.items()}
    if "sampling_ms_per_image" in record:
        row["ms/image"] = f"{record['sampling_ms_per_image']:.2f}"
    return row
