"""All that posterior_sample.py does: check a request, draw and write what is missing, judge and show the results."""

import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click
import torch
from tqdm import tqdm

import networks
from dnnlib.files import file_sha256
from dnnlib.text import redact
from generation.command import load_networks
from inverse.evaluation import evaluate, format_summary, write_metrics
from inverse.inputs import ImageFolder, InputError, Inputs, MeasurementFolder, read_mask
from inverse.operators import Operator, get_operator
from inverse.pnp import LangevinWarning, resolve_likelihood
from inverse.report import write_report
from inverse.results import ResultsFolder
from inverse.solve import Problem, simulate, solve
from inverse.tasks import Task
from metrics.features.weights import DetectorError
from metrics.image_quality import LPIPS, LPIPS_MIN_SIZE, load_lpips
from networks.encoders import RGBEncoder
from sampling.grids import few_step_sigmas
from torch_utils import distributed

Options = dict[str, Any]  # of posterior_sample.py, by name


def run(task: Task, options: Options) -> None:
    """Do what is asked, in all processes of torchrun. Raises ValueError, OSError or click.UsageError of one line."""
    device = distributed.init(options["device"])
    job = distributed.main_first(lambda: Job(task, options, device))
    job.sample()
    distributed.barrier()
    if distributed.is_main():
        job.report()


class Job:
    """A request that was checked: all it names is loaded, nothing is drawn."""

    def __init__(self, task: Task, options: Options, device: torch.device) -> None:
        """The main process takes the output folder. Raises as `run`."""
        data, measurements, outdir = options["data"], options["measurements"], options["outdir"]
        if (data is None) == (measurements is None) or "" in (data, measurements):
            raise click.UsageError("give either --data, images to measure, or --measurements, real ones")
        self.task, self.options, self.device, self.has_truth = task, options, device, data is not None
        self.operator = _load_operator(task, options["mask"])
        self.net, path = _load_net(task, options, device)
        channels, size = self.net.img_channels, self.net.img_resolution
        self.lpips = _load_lpips(options, size, device) if self.has_truth else None
        shape = (1, channels, size, size)
        self.operator.forward(torch.zeros(shape))  # a mask or box that does not fit is told before anything is written
        if self.has_truth:
            kind = {"resolution": size, "channels": channels, "resize": options["resize"]}
            self.source: Inputs = ImageFolder(data, num=options["num"], **kind)
        else:
            kind = {"shape": self.operator.measurement_shape(shape)[1:], "pictures": self.operator.measures_images}
            self.source = MeasurementFolder(measurements, num=options["num"], **kind)
        inputs = Path(data or measurements).resolve()
        if inputs.is_dir() and Path(outdir).resolve().is_relative_to(inputs):
            raise InputError(f"{outdir} lies in {inputs}, and results would be taken for input: use another --outdir")
        self.classes = _classes(options["net"], options["class_idx"], self.net.label_dim, self.source)
        self.folder = ResultsFolder(outdir, task.runs)
        if distributed.is_main():
            for name in self.source.names:  # what cannot be used is told before anything is drawn
                self.source.read(name)
            kept = ("data", "measurements", "mask", "resize", "class_idx", "seed", "dtype", "num", "batch")
            self.facts = {"task": task.to_dict(), "net": redact(options["net"]), "net_sha256": file_sha256(path)}
            self.facts |= {name.removesuffix("_idx"): options[name] for name in kept} | {"device": str(device)}
            self.folder.begin(self.facts, self.operator, shape[2:])

    def sample(self) -> None:
        """Draw and write what this process's share of the images lacks."""
        task, names, seed = self.task, self.source.names, self.options["seed"]
        todo = [name for name in names if self.folder.record(name) is None]
        distributed.barrier()  # all have looked before anyone writes
        finished = f"; {len(names) - len(todo)} were finished before" if len(todo) < len(names) else ""
        work = f"{task.runs} sample(s) each of {len(names)} images, {task.steps} noise levels"
        distributed.print0(f"{task.name}: {work}{finished}", file=sys.stderr)
        mine = todo[distributed.rank() :: distributed.world_size()]
        total = len(mine) * task.runs

        def problems() -> Iterator[Problem]:
            for name in mine:
                y, truth = self.source.read(name), None
                if self.has_truth:
                    y, truth = simulate(self.operator, y, task.noise, seed=seed, name=name), y
                yield Problem(name, y, truth, self.classes[name])

        layout = "{l_bar}{bar}| {n:.0f}/{total_fmt} [{elapsed}<{remaining}, {rate_fmt}]"
        disable = self.options["quiet"] or not total or not distributed.is_main()
        bar = tqdm(total=total, unit="sample", bar_format=layout, disable=disable)
        with warnings.catch_warnings(), bar:
            warnings.simplefilter("ignore", LangevinWarning)  # recorded with each image, and told at the end
            how = {"seed": seed, "batch": self.options["batch"], "device": self.device}
            how["progress"] = lambda samples: bar.update(min(samples, total - bar.n))
            for solution in solve(self.net, self.operator, task, problems(), **how):
                self.folder.write(solution, self.operator)

    def report(self) -> None:
        """Judge the results, write the measures and the page, and print the averages; of the main process."""
        results = evaluate(self.folder, self.source.names, self.task.name, self.has_truth, self.lpips)
        write_metrics(self.folder.path, results)
        page = write_report(self.folder.path, results, self.task, self.operator, self.facts)
        click.echo(format_summary(results))
        click.echo(f"results: {self.folder.path}; page: {page}", err=True)


def _load_operator(task: Task, mask: str | None) -> Operator:
    parameters = dict(task.operator)
    name = parameters.pop("name")
    if mask is not None:
        if name != "inpainting":
            raise click.UsageError(f"--mask belongs to inpainting, and the task's operator is {name}")
        parameters = {"mask": read_mask(mask)}
    operator = get_operator(name, **parameters)
    resolve_likelihood(operator, task.likelihood)
    return operator


def _load_net(task: Task, options: Options, device: torch.device) -> tuple[networks.GenerativeDenoiser, Path]:
    """The network, ready to run, and its file."""
    loaded, _ = load_networks(options["net"], None, device)
    net = loaded.net
    if not isinstance(net, networks.GenerativeDenoiser):
        raise ValueError(f"{options['net']}: a {type(net).__name__}; inverse problems need a generative denoiser")
    if not isinstance(loaded.encoder, RGBEncoder):
        raise ValueError(f"{options['net']}: works on latents; inverse problems need a network of pixels")
    if task.ts is not None:
        few_step_sigmas(task.ts, sigma_max=net.init_sigma)
    net.compute_dtype = distributed.compute_dtype(options["dtype"], device)
    return net, loaded.path


def _load_lpips(options: Options, resolution: int, device: torch.device) -> LPIPS | str:
    """LPIPS, or the reason why it is not computed."""
    if options["lpips"] == "off":
        return "switched off"
    if resolution < LPIPS_MIN_SIZE:
        return f"it needs images of at least {LPIPS_MIN_SIZE}x{LPIPS_MIN_SIZE} pixels"
    path, download = options["lpips_path"], options["lpips"] == "download"
    try:
        return load_lpips(path, variant=options["lpips_pooling"], device=device, download=download)
    except DetectorError as error:
        if path is not None or download:
            raise
        return str(error)


def _classes(net: str, class_idx: int | str | None, label_dim: int, source: Inputs) -> dict[str, int | None]:
    """The class of every image by name. Raises ValueError where the network and the request do not fit."""
    has_images = isinstance(source, ImageFolder)
    if label_dim == 0 and class_idx is not None:
        raise ValueError(f"{net} has no classes: leave out --class")
    known = f"{net} has classes 0 to {label_dim - 1}"
    if label_dim and class_idx is None:
        raise ValueError(f"{known}: give one with --class" + ", or --class data" * has_images)
    if class_idx == "data" and not has_images:
        raise ValueError("--class data needs --data: measurements carry no classes")
    classes = source.labels() if class_idx == "data" else dict.fromkeys(source.names, class_idx)
    if wrong := [c for c in classes.values() if c is not None and c >= label_dim]:
        raise ValueError(f"{known}, and not {wrong[0]}")
    return classes
