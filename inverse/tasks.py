"""Tasks: a measurement operator with the settings of its sampler, from YAML files.

Imports no torch, so that scripts show their help at once.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from dnnlib import ROOT
from dnnlib.files import read_regular
from dnnlib.text import printable

TASK_DIR = ROOT / "presets" / "task"
LIKELIHOODS = ("auto", "exact", "langevin")
_MAX_BYTES = 1 << 16
_MAX_DEPTH = 20  # of lists and mappings within each other
_MAX_INT = 1 << 64
_NESTING = {
    **dict.fromkeys((f"{kind}{part}StartToken" for kind in ("Flow", "Block") for part in ("Mapping", "Sequence")), 1),
    **dict.fromkeys(("FlowMappingEndToken", "FlowSequenceEndToken", "BlockEndToken"), -1),
}


class TaskError(ValueError):
    """A task that does not exist, cannot be read or holds a setting that makes no sense."""


@dataclass(frozen=True)
class LangevinSettings:
    """Settings of `inverse.likelihood.langevin_step`; the defaults are the published ones."""

    steps: int = 100
    c1: float = 0.1  # step size of the prior's scale
    c2: float = 0.1  # smaller = longer steps where the likelihood dominates
    max_retries: int = 4  # attempts with smaller steps for chains that diverged

    def __post_init__(self) -> None:
        _check(self, int, "langevin: ", steps=(1, 100_000), max_retries=(0, 20))
        _check(self, float, "langevin: ", c1=(1e-12, 1e6), c2=(1e-12, 1e6))


@dataclass(frozen=True)
class Task:
    """One inverse problem, y = A(x) + noise·n on images in [-1, 1], and how it is solved (NCVSD, Appendix)."""

    operator: Mapping[str, Any]  # name and parameters, for `inverse.get_operator`
    beta: float  # 2·(measurement noise std)², as the sampler assumes it; larger = y is trusted less
    name: str = "custom"
    description: str = ""
    noise: float = 0.05  # standard deviation of the simulated measurement noise
    ema_decay: float = 0.0  # share of the previous running estimate
    ema_sigma: float = 0.0  # the estimate is averaged below this noise level
    steps: int = 50  # noise levels
    sigma_min: float = 0.002
    sigma_max: float = 80.0
    rho: float = 2.0  # of the Karras grid
    likelihood: str = "auto"  # auto (exact where the operator allows it), exact or langevin
    langevin: LangevinSettings = field(default_factory=LangevinSettings)
    ts: tuple[int, ...] | None = None  # few-step prior steps; None = one evaluation each
    zeta: float = 1.0  # share of fresh noise between those
    runs: int = 1  # samples of the posterior per image

    def __post_init__(self) -> None:
        if not isinstance(self.operator, Mapping) or not isinstance(self.operator.get("name"), str):
            raise TaskError("operator must hold a name, as in `operator: {name: super_resolution, factor: 4}`")
        if not all(isinstance(key, str) for key in self.operator):
            raise TaskError("operator: the names of parameters must be text")
        for name in ("name", "description"):
            if not isinstance(getattr(self, name), str):
                raise TaskError(f"{name} must be text, not {_shown(getattr(self, name))}")
        _check(self, int, steps=(2, 10_000), runs=(1, 1000))
        _check(self, float, beta=(1e-12, 1e12), sigma_min=(1e-6, 1e6), sigma_max=(1e-6, 1e6), rho=(0.1, 100))
        _check(self, float, noise=(0, 1e6), ema_decay=(0, 1), ema_sigma=(0, 1e6), zeta=(0, 1))
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


def task_names() -> list[str]:
    """Names of the task files that come with the project, such as super_resolution and demo/super_resolution."""
    return sorted(path.relative_to(TASK_DIR).with_suffix("").as_posix() for path in TASK_DIR.rglob("*.yaml"))


def load_task(task: str | Path, overrides: Mapping[str, Any] | None = None) -> Task:
    """Return the task of a YAML file, or of a bare name from `task_names`, with some settings replaced.

    `overrides` are fields of `Task` and, as langevin_steps, langevin_c1 and langevin_c2, of LangevinSettings.
    Raises TaskError for what cannot be read and for settings that do not exist or make no sense, naming the file where
    they are its own.
    """
    path = _find(str(task))
    try:
        settings = _parse(read_regular(path, _MAX_BYTES).decode("utf-8"))
        settings.setdefault("name", path.stem)
        base = _build(settings)
    except UnicodeDecodeError:
        raise TaskError(f"{path}: not a text file") from None
    except OSError as error:
        raise TaskError(f"{path}: cannot be read ({error.strerror})") from None
    except TaskError as error:
        raise TaskError(f"{path}: {error}") from None
    return _override(base, overrides) if overrides else base


def _find(task: str) -> Path:
    if Path(task).is_file():
        return Path(task)
    if task in task_names():
        return TASK_DIR / f"{task}.yaml"
    raise TaskError(f"there is no task {_shown(task)}: give a .yaml file or one of {', '.join(task_names())}")


def _parse(text: str) -> dict[str, Any]:
    import yaml

    try:
        depth = 0
        for token in yaml.scan(text):
            if isinstance(token, yaml.AliasToken):
                raise TaskError("YAML aliases (*name) are not accepted")
            depth += _NESTING.get(type(token).__name__, 0)
            if depth > _MAX_DEPTH:
                raise TaskError(f"lists and mappings within each other more than {_MAX_DEPTH} deep")
        settings = yaml.safe_load(text)
    except (yaml.YAMLError, ValueError) as error:
        if isinstance(error, TaskError):
            raise
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
    for missing in {"operator", "beta"} - set(settings):
        raise TaskError(f"{missing} is missing")
    if "langevin" in settings:
        if not isinstance(settings["langevin"], dict):
            raise TaskError("langevin must hold settings, as in `langevin: {steps: 100, c1: 0.1, c2: 0.1}`")
        settings["langevin"] = LangevinSettings(**_known(settings["langevin"], LangevinSettings, "langevin: "))
    if settings.get("ts") is not None:
        if not isinstance(settings["ts"], list | tuple) or not all(type(t) is int for t in settings["ts"]):
            raise TaskError(f"ts must be a list of whole numbers, not {_shown(settings['ts'])}")
        settings["ts"] = tuple(settings["ts"])
    return Task(**settings)


def _known(settings: Mapping[str, Any], kind: type, where: str = "") -> dict[str, Any]:
    """The settings, checked for names that do not exist; '1e-4', which is text in YAML, becomes a number."""
    known = {f.name: f.type for f in fields(kind)}
    for name in settings:
        if name not in known:
            raise TaskError(f"{where}there is no setting {_shown(name)}; known are {', '.join(known)}")
    return {name: _as_number(value) if known[name] == "float" else value for name, value in settings.items()}


def _as_number(value: Any) -> Any:
    try:
        return float(value) if isinstance(value, str) else value
    except ValueError:
        return value


def _override(task: Task, overrides: Mapping[str, Any]) -> Task:
    prefix = "langevin_"
    inner = {name.removeprefix(prefix): value for name, value in overrides.items() if name.startswith(prefix)}
    outer = {name: value for name, value in overrides.items() if not name.startswith(prefix)}
    return replace(task, **outer, langevin=replace(task.langevin, **inner))


def _check(settings: Any, kind: type, where: str = "", **limits: tuple[float, float]) -> None:
    """Raise TaskError unless these settings are numbers, whole ones for `int`, within their limits."""
    for name, (low, high) in limits.items():
        value = getattr(settings, name)
        if type(value) not in (int, kind) or not low <= value <= high:
            what = "a whole number" if kind is int else "a number"
            raise TaskError(f"{where}{name} must be {what} from {low:g} to {high:g}, not {_shown(value)}")


def _shown(value: Any) -> str:
    return printable(repr(value))[:60]
