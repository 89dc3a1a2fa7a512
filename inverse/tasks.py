"""Tasks: an operator and the settings of its sampler, from YAML files and options. Imports no torch, for --help."""

from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import MISSING, Field, asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import click

from dnnlib import ROOT
from dnnlib.files import read_regular
from dnnlib.text import printable
from torch_utils.options import about

TASK_DIR = ROOT / "presets" / "task"
LIKELIHOODS = ("auto", "exact", "langevin")
_MAX_BYTES = 1 << 16
_MAX_DEPTH = 20  # of lists and mappings within each other
_MAX_INT = 1 << 64
_MAX_STEPS = 40  # entries of a few-step schedule: the levels there are


class TaskError(ValueError):
    """A task that does not exist, cannot be read or holds a setting that makes no sense."""


def grid_indices(text: str) -> tuple[int, ...]:
    """A few-step schedule on the command line. Raises click.BadParameter."""
    from sampling.grids import parse_ts  # imports torch

    with about("--ts"):
        if text.count(",") >= _MAX_STEPS:
            raise ValueError(f"{text.count(',') + 1} entries, and there are {_MAX_STEPS} grid indices")
        return parse_ts(text).ts


def setting(default: Any = MISSING, limits: tuple[float, float] | None = None, **option: Any) -> Any:
    """A field of a task: a number within `limits`, and an option of scripts where there are arguments of click's."""
    return field(default=default, metadata={"limits": limits, "option": option})


@dataclass(frozen=True)
class LangevinSettings:
    """Settings of `inverse.likelihood.langevin_step`; the defaults are the published ones."""

    steps: int = setting(100, (1, 100_000), help="Task: Langevin iterations per likelihood step.")
    c1: float = setting(0.1, (1e-12, 1e6), help="Task: Langevin step size on the prior's scale.")
    c2: float = setting(0.1, (1e-12, 1e6), help="Task: smaller = longer Langevin steps under a strong likelihood.")
    max_retries: int = setting(4, (0, 20))  # attempts with smaller steps for chains that diverged

    def __post_init__(self) -> None:
        _check_limits(self, "langevin: ")


@dataclass(frozen=True)
class Task:
    """One inverse problem, y = A(x) + noise·n on images in [-1, 1], and how it is solved (NCVSD, Appendix)."""

    operator: Mapping[str, Any]  # name and parameters, for `inverse.get_operator`
    beta: float = setting(limits=(1e-12, 1e12), help="Task: 2·(noise std)² that the sampler assumes.")
    name: str = "custom"
    description: str = ""
    noise: float = setting(
        0.05, (0, 1e6), help="Task: standard deviation of simulated measurement noise.", type=click.FloatRange(0)
    )
    ema_decay: float = setting(0.0, (0, 1), help="Task: share of the previous running estimate.")
    ema_sigma: float = setting(0.0, (0, 1e6), help="Task: noise level below which the estimate is averaged.")
    steps: int = setting(50, (2, 10_000), help="Task: noise levels.")
    sigma_min: float = setting(0.002, (1e-6, 1e6), help="Task: last noise level.")
    sigma_max: float = setting(80.0, (1e-6, 1e6), help="Task: first noise level.")
    rho: float = setting(2.0, (0.1, 100), help="Task: exponent of the Karras grid of noise levels.")
    likelihood: str = setting("auto", help="Task: auto is exact where it can be.", type=click.Choice(LIKELIHOODS))
    langevin: LangevinSettings = field(default_factory=LangevinSettings)
    ts: tuple[int, ...] | None = setting(  # None = one evaluation each
        None, help="Few-step prior steps: grid indices, as 10,22,39.", type=grid_indices, metavar="LIST"
    )
    zeta: float = setting(
        1.0, (0, 1), help="With --ts: share of fresh noise between steps.", type=click.FloatRange(0, 1)
    )
    runs: int = setting(1, (1, 1000), help="Samples per image.  [default: the task's]")

    def __post_init__(self) -> None:
        if not isinstance(self.operator, Mapping) or not isinstance(self.operator.get("name"), str):
            raise TaskError("operator must hold a name, as in `operator: {name: super_resolution, factor: 4}`")
        if not all(isinstance(key, str) for key in self.operator):
            raise TaskError("operator: the names of parameters must be text")
        for name, value in (("name", self.name), ("description", self.description)):
            if not isinstance(value, str):
                raise TaskError(f"{name} must be text, not {_shown(value)}")
        _check_limits(self)
        if self.ema_decay == 1:
            raise TaskError("ema_decay is a share and must be below 1, or nothing new would count")
        if self.sigma_min >= self.sigma_max:
            raise TaskError(f"sigma_min {self.sigma_min} must be below sigma_max {self.sigma_max}")
        if self.likelihood not in LIKELIHOODS:
            raise TaskError(f"likelihood must be one of {', '.join(LIKELIHOODS)}, not {_shown(self.likelihood)}")

    def sampler_options(self) -> dict[str, Any]:
        """The arguments of `inverse.pnp_sample` that a task decides."""
        names = ("beta", "ema_decay", "ema_sigma", "likelihood", "langevin", "ts", "zeta")
        return {name: getattr(self, name) for name in names}

    def to_dict(self) -> dict[str, Any]:
        """Every setting as JSON data."""
        return {**asdict(self), "operator": dict(self.operator)}


def task_options(function: Callable) -> Callable:
    """Decorator of a click command: one option per setting that has a help text, None where it is not given."""
    for name, f in reversed(_options().items()):
        kind = click.IntRange(min=f.metadata["limits"][0]) if f.type is int else float
        option = {"type": kind, **f.metadata["option"]}
        function = click.option(f"--{name.replace('_', '-')}", name, **option)(function)
    return function


def pop_overrides(options: dict[str, Any]) -> dict[str, Any]:
    """Take what `task_options` added out of a command's arguments; return what was given."""
    return {name: value for name in _options() if (value := options.pop(name)) is not None}


def _options() -> dict[str, Field]:
    """Fields by the name of their option."""
    found: dict[str, Field] = {}
    for f in fields(Task):
        inner = {f"langevin_{part.name}": part for part in fields(LangevinSettings)}
        found |= inner if f.name == "langevin" else {f.name: f}
    return {name: f for name, f in found.items() if f.metadata.get("option")}


def task_names() -> list[str]:
    """Names of the task files that come with the project, such as super_resolution and demo/super_resolution."""
    return sorted(path.relative_to(TASK_DIR).with_suffix("").as_posix() for path in TASK_DIR.rglob("*.yaml"))


def load_task(task: str | Path, overrides: Mapping[str, Any] | None = None) -> Task:
    """Return the task of a YAML file, or of a name from `task_names`, with some fields replaced: `overrides` of `Task`
    and, as langevin_steps, langevin_c1 and langevin_c2, of its LangevinSettings. Raises TaskError for what cannot be
    read and for settings that do not exist or make no sense, naming the file where they are its own.
    """
    known, path = task_names(), Path(task)
    if not path.is_file():
        if str(task) not in known:
            raise TaskError(f"there is no task {_shown(str(task))}: give a .yaml file or one of {', '.join(known)}")
        path = TASK_DIR / f"{task}.yaml"
    try:
        base = _build({"name": path.stem, **_parse(read_regular(path, _MAX_BYTES))})
    except OSError as error:
        raise TaskError(f"{path}: cannot be read ({error.strerror})") from None
    except TaskError as error:
        raise TaskError(f"{path}: {error}") from None
    outer, inner = dict(overrides or {}), {}
    for name in [name for name in outer if name.startswith("langevin_")]:
        inner[name.removeprefix("langevin_")] = outer.pop(name)
    return replace(base, **outer, langevin=replace(base.langevin, **inner))


def _parse(data: bytes) -> dict[str, Any]:
    import yaml  # would take a fifth of the time of --help

    try:
        text = data.decode("utf-8")
        depth = 0
        for event in yaml.parse(text):
            if isinstance(event, yaml.AliasEvent):
                raise TaskError("YAML aliases (*name) are not accepted")
            depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
            if depth > _MAX_DEPTH:
                raise TaskError(f"lists and mappings within each other more than {_MAX_DEPTH} deep")
        settings = yaml.safe_load(text)
    except TaskError:
        raise
    except UnicodeDecodeError:
        raise TaskError("not a text file in UTF-8") from None
    except (yaml.YAMLError, ValueError) as error:
        raise TaskError(f"not valid YAML ({' '.join(str(error).split())[:200]})") from None
    if not isinstance(settings, dict) or not all(isinstance(key, str) for key in settings):
        raise TaskError("a task is a list of `setting: value` lines")
    for name, value in settings.items():
        _check_sizes(name, value)
    return settings


def _check_sizes(name: str, value: Any) -> None:
    """Raise TaskError for a whole number that nothing can hold, wherever it is."""
    if isinstance(value, dict | list | set):
        for part in [*value, *value.values()] if isinstance(value, dict) else value:
            _check_sizes(name, part)
    elif isinstance(value, int) and abs(value) >= _MAX_INT:
        raise TaskError(f"{printable(name)}: a whole number of {value.bit_length()} bits is too large")


def _build(settings: Mapping[str, Any]) -> Task:
    settings = _known(settings, Task)
    for missing in (name for name in ("operator", "beta") if name not in settings):
        raise TaskError(f"{missing} is missing")
    if "langevin" in settings:
        if not isinstance(settings["langevin"], dict):
            raise TaskError("langevin must hold settings, as in `langevin: {steps: 100, c1: 0.1, c2: 0.1}`")
        settings["langevin"] = LangevinSettings(**_known(settings["langevin"], LangevinSettings, "langevin: "))
    if (ts := settings.get("ts")) is not None:
        if not isinstance(ts, list | tuple) or len(ts) > _MAX_STEPS or not all(type(t) is int for t in ts):
            raise TaskError(f"ts must be a list of at most {_MAX_STEPS} whole numbers, not {_shown(ts)}")
        settings["ts"] = tuple(ts)
    return Task(**settings)


def _known(settings: Mapping[str, Any], kind: type, where: str = "") -> dict[str, Any]:
    """The settings, checked for names that do not exist; '1e-4', which is text in YAML, becomes a number."""
    known, found = {f.name: f.type for f in fields(kind)}, dict(settings)
    for name, value in settings.items():
        if name not in known:
            raise TaskError(f"{where}there is no setting {_shown(name)}; known are {', '.join(known)}")
        if known[name] is float and isinstance(value, str):
            with suppress(ValueError):
                found[name] = float(value)
    return found


def _check_limits(settings: Task | LangevinSettings, where: str = "") -> None:
    """Raise TaskError unless the settings that have limits are numbers, whole ones for `int`, within them."""
    for f in fields(settings):
        if f.metadata.get("limits"):
            value, (low, high) = getattr(settings, f.name), f.metadata["limits"]
            if not (type(value) is int or (type(value) is float and f.type is float)) or not low <= value <= high:
                what = "a whole number" if f.type is int else "a number"
                raise TaskError(f"{where}{f.name} must be {what} from {low:g} to {high:g}, not {_shown(value)}")


def _shown(value: Any) -> str:
    return printable(repr(value))[:60]
