"""Settings of training runs: dataclasses with the published defaults, preset files, and command-line options.

Imports no torch, so that scripts show their help at once.
"""

import contextlib
import dataclasses
import difflib
import math
import typing
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, TypeVar

from dnnlib import ROOT
from dnnlib.files import read_json
from dnnlib.text import parse_si

PRESET_DIR = ROOT / "presets"
MAY_CHANGE = frozenset(  # settings that need not stay on resume
    "duration status snapshot checkpoint keep_every batch_gpu eval_ts eval_steps nonfinite nonfinite_limit".split()
)


class PresetError(ValueError):
    """A preset or a setting that does not exist or has no valid value."""


Check = tuple[Callable[[Any], bool], str]  # what holds of a value, and what is said where it does not


def at_least(least: int) -> Check:
    return lambda v: v >= least, f"must be at least {least}"


def between(least: float, most: float) -> Check:
    return lambda v: least <= v <= most, f"must lie between {least} and {most}"


def one_of(*names: str) -> Check:
    return lambda v: v in names, f"must be one of {', '.join(names)}"


NOT_NEGATIVE: Check = (lambda v: v >= 0, "must not be negative")
POSITIVE: Check = (lambda v: v > 0, "must be positive")
BELOW_ONE: Check = (lambda v: 0 <= v < 1, "must lie in [0, 1)")
LOG_MEAN, LOG_STD = between(-20, 20), between(0, 10)  # of levels: six deviations stay finite in float32


def setting(default: Any, text: str, *, si: bool = False, flags: tuple[str, ...] = ()) -> Any:
    """A dataclass field with its help text; `si`: an image count such as 64Mi."""
    return field(default=default, metadata={"help": text, "si": si, "flags": flags})


@dataclass(frozen=True, init=False, repr=False, eq=False)  # the kinds of training have theirs
class TrainingConfig:
    """What teacher pretraining and distillation share. Image counts n advance by `batch` per iteration."""

    duration: int = setting(64 << 20, "Train for this many images", si=True)
    batch: int = setting(2048, "Images per optimizer update, over all processes", si=True)
    batch_gpu: int = setting(64, "Images per process and forward pass; 0 = as many as the batch allows", si=True)
    cond: bool = setting(True, "Condition on the data set's labels")
    xflip: bool = setting(False, "Double the data set with mirrored images")
    ref_lr: float = setting(0.010, "Learning rate before the decay, EDM2's alpha_ref")
    ref_batches: float = setting(70000, "Start of the learning rate's decay, in batches, EDM2's t_ref; 0 = no decay")
    rampup_mimg: float = setting(10, "Learning rate ramp-up, in million images")
    cooldown_mimg: float = setting(0, "Linear fall of the learning rate to 0 at the end, in million images; 0 = none")
    loss_scaling: float = setting(1.0, "Factor on every loss, for float16", flags=("--ls", "--loss-scaling"))
    ema_stds: tuple[float, ...] = setting((0.05, 0.10), "Relative widths of the EMA profiles, comma-separated")
    dropout: float = setting(0.0, "Dropout probability of the network being trained")
    nonfinite: str = setting("zero", "Non-finite gradients: 'zero' them as published, or 'skip' the update")
    nonfinite_limit: int = setting(50, "Stop after this many affected updates of one network in a row")
    status: int = setting(128 << 10, "Write statistics every so many images", si=True)
    snapshot: int = setting(1 << 20, "Write EMA networks and sample grids every so many images", si=True)
    checkpoint: int = setting(4 << 20, "Write the training state every so many images", si=True)
    keep_every: int = setting(0, "Keep a state for good every so many images, beside the newest two; 0 = none", si=True)

    checks: ClassVar[dict[str, Check]] = {  # by names of settings
        "duration batch status snapshot checkpoint nonfinite_limit": at_least(1),
        "ref_batches rampup_mimg cooldown_mimg keep_every": NOT_NEGATIVE,
        "ref_lr loss_scaling": POSITIVE,
        "dropout": BELOW_ONE,
        "ema_stds": (lambda v: v and all(0 < std < 0.2886 for std in v), "must lie between 0 and 0.288"),
        "nonfinite": (lambda v: v in ("zero", "skip"), "must be 'zero' or 'skip'"),
    }

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if isinstance(value, float) and not math.isfinite(value):
                raise PresetError(f"{name} must be finite, got {value}")
        for kind in reversed(type(self).__mro__):
            for names, (holds, message) in vars(kind).get("checks", {}).items():
                for name in names.split():
                    if not holds(getattr(self, name)):
                        raise PresetError(f"{name} {message}, got {getattr(self, name)!r}")
        if self.batch_gpu < 0 or (self.batch_gpu and self.batch % self.batch_gpu):
            raise PresetError(f"batch {self.batch} must be a multiple of batch_gpu {self.batch_gpu}")
        if len({f"{std:.3f}" for std in self.ema_stds}) < len(self.ema_stds):
            raise PresetError(f"ema_stds must differ in their first three decimals, got {self.ema_stds}")

    def split_batch(self, world: int) -> tuple[int, int]:
        """Images per forward pass and accumulation rounds of each process. Raises ValueError where they do not fit."""
        batch_gpu = self.batch_gpu or self.batch // world
        rounds, rest = divmod(self.batch, max(batch_gpu, 1) * world)
        if rest or not rounds:
            raise ValueError(f"batch {self.batch} must be a multiple of batch_gpu {batch_gpu} times {world} processes")
        return batch_gpu, rounds

    def warnings(self) -> list[str]:
        """What is likely to be a mistake: parts of a run that take longer than it, and networks that never learn."""
        told, rise, fall = [], self.rampup_mimg, self.cooldown_mimg
        if (rise + fall) * 1e6 > self.duration:
            parts = f"rampup_mimg {rise:g} and cooldown_mimg {fall:g} take more than the run's {self.duration:,} images"
            told.append(f"the learning rate never reaches its full value: {parts}")
        if rise > 0 and self.duration <= self.batch:
            told.append("no network learns: the run has one update, and a ramp-up begins with learning rate 0")
        return told


Config = TypeVar("Config", bound=TrainingConfig)


@dataclass(frozen=True, init=False, repr=False, eq=False)
class Recipe:
    """How the generator is driven: the published way by default. Shared by images and the toy."""

    direction: str = setting("vsd", "Generator loss: 'vsd' as published, 'sid' through teacher and score network (SiD)")
    alpha: float = setting(1.0, "SiD's alpha")
    scale: str = setting("learned", "Generator loss over: 'learned', 'abs', 'square', 'output', 'unit' (see losses.py)")
    divergence: str = setting("reverse-kl", "Divergence, by the discriminator: 'reverse-kl', 'forward-kl', 'js'")
    gan_balance: bool = setting(False, "Adversarial weight relative to the norms of the two gradients at the image")
    levels: str = setting("lognormal", "Levels t of all losses: 'lognormal', or 'karras' between t_min and t_max")
    t_min: float = setting(0.002, "Smallest t of 'karras' levels")
    t_max: float = setting(80.0, "Largest t of 'karras' levels")
    t_cap: float = setting(0.0, "Largest t of all losses in units of the level of y; 0 = no limit")
    own_states: float = setting(0.0, "Share of y made from the student's own draws, in score and generator loss")
    score_updates: int = setting(1, "Updates of the score network per iteration")
    beta1: float = setting(0.9, "Adam's first beta")

    checks: ClassVar[dict[str, Check]] = {
        "direction": one_of("vsd", "sid"),
        "scale": one_of("learned", "abs", "square", "output", "unit"),
        "divergence": one_of("reverse-kl", "forward-kl", "js"),
        "levels": one_of("lognormal", "karras"),
        "own_states": (lambda v: 0 <= v <= 1, "is a share in [0, 1]"),
        "t_cap": NOT_NEGATIVE,
        "score_updates": at_least(1),
        "beta1": BELOW_ONE,
    }


@dataclass(frozen=True)
class NCVSDConfig(Recipe, TrainingConfig):
    """Distillation of a teacher into a generative denoiser (NCVSD, Tables 3 and 4)."""

    gamma: float = setting(0.414, "Extra noise of the generative denoiser, sigma_hat = (1+gamma)·sigma")
    init_sigma: float = setting(80.0, "Noise level of unconditional generation")
    g_lr_scaling: float = setting(0.01, "Learning rate of the generator, relative to the score network's")
    d_lr_scaling: float = setting(0.01, "Learning rate of the discriminator, relative to the score network's")
    g_delay_kimg: float = setting(0, "Generator updates from here on, in thousand images; others from the start")
    g_rampup_kimg: float = setting(0, "Linear rise of the generator's rate from there on, in thousand images")
    gan_loss_scaling: float = setting(1.0, "Weight of the adversarial loss")
    gan_warmup_kimg: float = setting(16778, "Adversarial loss from here on, in thousand images")
    g_p_mean: float = setting(-0.4, "Generator loss: mean of ln t")
    g_p_std: float = setting(1.0, "Generator loss: standard deviation of ln t")
    s_p_mean: float = setting(-0.4, "Score loss: mean of ln t")
    s_p_std: float = setting(1.0, "Score loss: standard deviation of ln t")
    d_p_mean: float = setting(-0.4, "Discriminator loss: mean of ln t")
    d_p_std: float = setting(1.0, "Discriminator loss: standard deviation of ln t")
    guidance: float = setting(1.0, "Of the target, by --gnet or by the teacher without labels; 1 = none")
    combined_score: bool = setting(False, "Score network at the combined observation of y and x_t; published: at x_t")
    d_head: str = setting(
        "linear", "Discriminator's head: 'linear' as published, 'joint' (hidden layers), 'local' (per place)"
    )
    sigma_rho: float = setting(7.0, "Levels of y: uniform over a Karras grid of this rho")
    sigma_steps: int = setting(1000, "Levels of y: points of that grid")
    eval_ts: tuple[tuple[int, ...], ...] = setting(
        ((10, 22, 39),), "Few-step schedule of sample grids, grid indices; may be repeated", flags=("--eval-ts", "--ts")
    )

    checks: ClassVar[dict[str, Check]] = {
        "gamma g_lr_scaling d_lr_scaling gan_loss_scaling gan_warmup_kimg g_delay_kimg g_rampup_kimg": NOT_NEGATIVE,
        "g_p_mean s_p_mean d_p_mean": LOG_MEAN,
        "g_p_std s_p_std d_p_std": LOG_STD,
        "init_sigma sigma_rho": POSITIVE,
        "d_head": one_of("linear", "joint", "local"),
        "sigma_steps": at_least(2),
    }

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.direction == "sid" and self.scale == "learned":
            raise PresetError("direction sid has no learned scale: set scale to abs, square, output or unit")
        if not 0 < self.t_min < self.t_max < 1e6:
            raise PresetError(f"t_min and t_max must be positive and increase, got {self.t_min} and {self.t_max}")

    def warnings(self) -> list[str]:
        parts = {"g_delay_kimg": "the generator never learns, and the student stays as it begins"}
        if self.gan_loss_scaling > 0:
            parts["gan_warmup_kimg"] = "the adversarial loss never begins"
        last = (self.duration - 1) // self.batch * self.batch  # images before the last update
        return super().warnings() + [
            f"{what}: {name} {getattr(self, name):g} is not below the run's {self.duration:,} images"
            for name, what in parts.items()
            if getattr(self, name) * 1e3 > last
        ]


@dataclass(frozen=True)
class EDM2Config(TrainingConfig):
    """Pretraining of a teacher with the EDM2 loss (EDM2, Section 2)."""

    p_mean: float = setting(-0.4, "Mean of ln sigma")
    p_std: float = setting(1.0, "Standard deviation of ln sigma")
    model_channels: int = setting(192, "Base width of the U-Net")
    channel_mult: tuple[int, ...] = setting((1, 2, 3, 4), "Width of each level, in units of the base width")
    num_blocks: int = setting(3, "Blocks per level")
    attn_resolutions: tuple[int, ...] = setting((16, 8), "Resolutions with self-attention")
    channels_per_head: int = setting(64, "Channels per attention head")
    eval_steps: int = setting(32, "Heun steps of the sample grids")

    checks: ClassVar[dict[str, Check]] = {
        "p_mean": LOG_MEAN,
        "p_std": LOG_STD,
        "model_channels channels_per_head": between(1, 8192),
        "num_blocks": between(1, 64),
        "eval_steps": between(2, 10_000),
        "channel_mult": (lambda v: 0 < len(v) <= 12 and {*v} <= {*range(1, 65)}, "takes up to 12 factors from 1 to 64"),
        "attn_resolutions": (lambda v: all(resolution > 0 for resolution in v), "must be positive"),
    }


def preset_names(kind: type) -> list[str]:
    """Names of the preset files made for this dataclass."""
    names = []
    for path in sorted(PRESET_DIR.glob("*.json")):
        with contextlib.suppress(PresetError):  # reported when it is asked for
            names += [path.stem] * (_read(path).get("kind") == _kind_name(kind))
    return names


def load_config(kind: type[Config], preset: str | None = None, overrides: Mapping[str, Any] | None = None) -> Config:
    """Settings of `kind` from a preset, a name in presets/ or a path, with overrides (None = not given).

    Settings that the preset names in "scale_with_duration" are shares of its run: they keep their proportion to the
    duration where only that is given. Raises PresetError for an unknown preset or setting and for values of the wrong
    type.
    """
    values: dict[str, Any] = {}
    if preset is not None:
        path = Path(preset) if preset.endswith(".json") else PRESET_DIR / f"{preset}.json"
        if not path.is_file():
            known = ", ".join(preset_names(kind))
            raise PresetError(f"there is no preset {preset!r}: use one of {known}, or a .json file")
        values = _read(path)
        if values.pop("kind", None) != _kind_name(kind):
            raise PresetError(f'{path} is no preset for this script: its "kind" is not {_kind_name(kind)!r}')
        values.pop("description", None)
    shares, own = values.pop("scale_with_duration", []), values.get("duration")
    given = {k: v for k, v in (overrides or {}).items() if v not in (None, ())}
    values |= given
    fields = {f.name: f for f in dataclasses.fields(kind)}
    if unknown := sorted(set(values) - set(fields)):
        near = difflib.get_close_matches(unknown[0], fields, 1)
        advice = f"did you mean {near[0]!r}?" if near else "--help lists those that there are"
        raise PresetError(f"unknown setting {unknown[0]!r} in preset {preset}: {advice}")
    types = typing.get_type_hints(kind)
    settings = {k: convert(k, types[k], fields[k].metadata["si"], v) for k, v in values.items()}
    if shares:
        reference = 0 if own is None else convert("duration", int, True, own)
        if not reference or not isinstance(shares, list) or not all(types.get(str(k)) is float for k in shares):
            raise PresetError(f'"scale_with_duration" in preset {preset} must list float settings, beside a "duration"')
        kept = {k: v for k, v in settings.items() if k in shares and k not in given}
        settings |= {k: v * settings["duration"] / reference for k, v in kept.items()}
    return kind(**settings)


def convert(name: str, kind: Any, si: bool, value: Any) -> Any:
    """Value of one setting from JSON or from the command line. Raises PresetError naming it."""
    try:
        if typing.get_origin(kind) is tuple:
            element, parts = typing.get_args(kind)[0], value.split(",") if isinstance(value, str) else value
            if typing.get_origin(element) is tuple:  # one or several
                several = not isinstance(value, str) and all(isinstance(part, (str, list, tuple)) for part in value)
                parts = value if several else [value]
            return tuple(convert(name, element, False, part) for part in parts)
        if kind is bool:
            return {"true": True, "1": True, "yes": True, "false": False, "0": False, "no": False}[str(value).lower()]
        if si:
            return parse_si(value)
        if kind is int and int(value) != float(value):
            raise ValueError
        return kind(value)
    except PresetError:  # of an element
        raise
    except (ValueError, TypeError, KeyError, OverflowError) as error:
        reasons = {bool: "write yes or no", int: "no whole number", float: "no number"}
        reason = error if si else reasons.get(kind, "write numbers with commas between them")
        raise PresetError(f"{name.replace('_', '-')}: {value!r} is not valid ({reason})") from None


def _kind_name(kind: type) -> str:
    return kind.__name__.removesuffix("Config").lower()


def _read(path: Path) -> dict[str, Any]:
    try:
        return read_json(path, max_bytes=1 << 20)
    except (OSError, ValueError) as error:
        told = f"{path}: {error.strerror or error}" if isinstance(error, OSError) else error
        raise PresetError(f"cannot read preset {told}") from None
