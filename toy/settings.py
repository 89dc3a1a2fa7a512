"""Settings of a training run on points. Imports no torch, so that the script shows its help at once."""

from __future__ import annotations

from dataclasses import dataclass, fields

from training.presets import NCVSDConfig, PresetError, Recipe, setting


@dataclass(frozen=True)
class ToySettings(Recipe):
    """One training run. Raises PresetError for values that make no sense."""

    iterations: int = setting(6500, "Iterations of distillation")
    pretraining: int = setting(600, "Iterations that fit the start network to the exact denoiser")
    batch: int = setting(512, "Points per update")
    width: int = setting(96, "Width of the layers")
    blocks: int = setting(1, "Residual blocks in each of encoder, control branch and decoder")
    lr: float = setting(0.01, "Learning rate of the score network")
    g_lr_scaling: float = setting(0.1, "Learning rate of the generator, relative to the score network's")
    d_lr_scaling: float = setting(0.3, "Learning rate of the discriminator, relative to the score network's")
    g_delay: float = setting(0.05, "Share of the iterations before the generator moves")
    g_rampup: float = setting(0.0, "Share of the iterations in which its rate then rises")
    gan_start: float = setting(0.1, "Share of the iterations before the adversarial loss joins")
    gan_weight: float = setting(3.0, "Weight of the adversarial loss")
    t_mean: float = setting(-1.2, "Mean of ln t in the score and discriminator losses")
    t_std: float = setting(1.8, "Standard deviation of ln t in the score and discriminator losses")
    g_t_mean: float = setting(-1.0, "Mean of ln t in the generator's loss")
    g_t_std: float = setting(1.6, "Standard deviation of ln t in the generator's loss")
    gamma: float = setting(0.414, "Extra noise of the generative denoiser; 0 leaves it deterministic")
    adversarial: bool = setting(True, "Train with the adversarial loss")
    combined_score: bool = setting(True, "Score network at the combined observation; without, at x_t as published")
    joint: bool = setting(True, "Hidden layers in the discriminator's head; without, the published linear one")
    control: bool = setting(True, "Let the networks see y through the control branch")
    identity: bool = setting(True, "Take the score of p(x_t | y) by the identity; without, that of p(x_t)")
    seed: int = setting(0, "Seed of weights, data and noise")

    def __post_init__(self) -> None:
        for name, most in {
            "iterations": 10**8,
            "pretraining": 10**8,
            "batch": 10**6,
            "width": 8192,
            "blocks": 64,
        }.items():
            if not 1 <= getattr(self, name) <= most:
                raise PresetError(f"{name} must lie between 1 and {most}, got {getattr(self, name)}")
        for name in ("g_delay", "gan_start", "g_rampup"):
            if not 0 <= getattr(self, name) <= 1:
                raise PresetError(f"{name} is a share of the iterations from 0 to 1, got {getattr(self, name)}")
        if self.seed < 0 or self.seed >= 1 << 63:
            raise PresetError(f"seed must lie in 0..2^63-1, got {self.seed}")
        self.config()

    def config(self) -> NCVSDConfig:
        """The same in the terms of image training. Raises PresetError for values that make no sense there."""
        images = self.iterations * self.batch
        return NCVSDConfig(
            duration=images,
            batch=self.batch,
            batch_gpu=self.batch,
            ref_lr=self.lr,
            ref_batches=0,
            rampup_mimg=min(100, 0.1 * self.iterations) * self.batch / 1e6,
            cooldown_mimg=0.5 * images / 1e6,
            gamma=self.gamma,
            g_lr_scaling=self.g_lr_scaling,
            d_lr_scaling=self.d_lr_scaling,
            g_delay_kimg=self.g_delay * images / 1e3,
            g_rampup_kimg=self.g_rampup * images / 1e3,
            gan_warmup_kimg=(self.gan_start if self.adversarial else 2) * images / 1e3,
            gan_loss_scaling=self.gan_weight,
            g_p_mean=self.g_t_mean,
            g_p_std=self.g_t_std,
            s_p_mean=self.t_mean,
            s_p_std=self.t_std,
            d_p_mean=self.t_mean,
            d_p_std=self.t_std,
            **{field.name: getattr(self, field.name) for field in fields(Recipe)},
        )
