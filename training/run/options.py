"""What the command lines of training share. Imports no torch: scripts answer --help at once, and listen to signals."""

import dataclasses
import os
import typing
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import click

from dnnlib.text import parse_duration
from torch_utils.errors import user_errors
from torch_utils.options import DTYPE, FOLDER, options
from training.presets import Config, TrainingConfig, load_config, preset_names
from training.run.stop import StopRequest


def option(text: str, default: Any = None, flags: tuple[str, ...] = (), **settings: Any) -> Any:
    """A dataclass field with its command-line option, whose settings are click's."""
    shown = settings if settings.get("required") else {"default": default, **settings}
    return field(default=default, metadata={"option": {"help": text, **shown}, "flags": flags})


@dataclass(frozen=True)
class RunOptions:
    """Where and how to train: all that does not change the result, but for the seed."""

    outdir: str = option("Run folder: snapshots, statistics, states.", type=FOLDER, required=True)
    data: str = option("Training images or latents.", metavar="DIR|ZIP", required=True)
    preset: str | None = option("Settings to start from: {presets}, or a .json file.", metavar="NAME|FILE")
    seed: int = option("Of weights, order and noise.", 0, type=click.IntRange(0, 2**31 - 2))
    device: str = option("auto, cpu, cuda, cuda:N or mps.", "auto")
    dtype: str = option("Of the U-Nets; auto = fp16 on CUDA, else float32.", "auto", type=DTYPE)
    workers: int | None = option("Loader processes.  [default: 2 on CUDA, else 0]", type=click.IntRange(0))
    dry_run: bool = option("Check options, networks and data, print the settings and stop.", False, ("-n", "--dry-run"))
    quiet: bool = option("No progress bar.", False)
    max_time: str | None = option("Save and stop in time before so much has passed, as in 11h30m.", metavar="TIME")
    force_resume: bool = option("Resume although settings or data are not those of the run.", False)
    shard: bool = option("Divide Adam's moments and the averages between the processes.", False)
    ema_device: str = option(
        "Where averages are kept: with the networks, or in host memory.", "same", type=click.Choice(("same", "cpu"))
    )
    checkpoint_activations: bool = option("Compute activations again going backward: less memory, more time.", False)
    eval_metric: str | None = option("Measure each snapshot: fd_demo, fid, ...  [default: none]", metavar="LIST")
    eval_num: int = option("Images drawn for that.", 2000, type=click.IntRange(2))
    eval_ref: str | None = option("Statistics to compare with.  [default: the data's]", metavar="FILE|URL")
    deterministic: bool = option("Use no operation whose result varies from run to run on a GPU.", False)

    # what no command line says
    stop: StopRequest = field(default_factory=StopRequest)  # what may end training early
    evaluate: Callable[..., dict[str, float]] | None = None  # (network, encoder) -> metrics of a snapshot; collective
    provenance: Mapping[str, Any] = field(default_factory=dict)  # facts to keep in snapshots
    description: tuple[str, ...] = ()  # lines to begin log.txt with

    @property
    def run_dir(self) -> Path:
        """The run's folder."""
        return Path(self.outdir)


def training_options(kind: type[TrainingConfig]) -> Callable[[Callable], Callable]:
    """Click decorator with the options of `RunOptions`, and one for each setting of `kind` (None = the preset's)."""
    added, presets = [], ", ".join(preset_names(kind))
    types, names = typing.get_type_hints(kind), {bool: "BOOL", float: "FLOAT", int: "INT"}
    for f in (*dataclasses.fields(RunOptions), *dataclasses.fields(kind)):
        flags = f.metadata.get("flags") or (f"--{f.name.replace('_', '-')}",)
        if "option" in f.metadata:
            given = {"is_flag": f.default is False, **f.metadata["option"]}
            added.append(click.option(*flags, f.name, **given | {"help": given["help"].format(presets=presets)}))
        elif "help" in f.metadata:
            metavar = "COUNT" if f.metadata["si"] else names.get(types[f.name], "TEXT")
            text = f"{f.metadata['help']}  [default: preset's]"
            several = types[f.name] == tuple[tuple[int, ...], ...]
            added.append(click.option(*flags, f.name, metavar=metavar, help=text, multiple=several))
    return options(*added)


@contextmanager
def checked(kind: type[Config], given: dict[str, Any]) -> Iterator[tuple[Config, RunOptions]]:
    """Settings and options of a command line, listening to signals and to --max-time from here on. Every mistake of the
    user's ends in one line and a non-zero exit.
    """
    with user_errors("--batch-gpu"):
        with StopRequest(None if given["max_time"] is None else parse_duration(given["max_time"])) as stop:
            settings = {f.name: given.pop(f.name) for f in dataclasses.fields(kind)}
            config = load_config(kind, given["preset"], settings)
            if given["deterministic"]:  # before torch: else replicas remark on what `parallel` wants of them
                os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
            yield config, RunOptions(**given, stop=stop)
