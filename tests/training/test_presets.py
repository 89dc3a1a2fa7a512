"""Presets against the published settings, overrides, and mistakes in them."""

import dataclasses
import json

import pytest

from training.presets import (
    PRESET_DIR,
    EDM2Config,
    NCVSDConfig,
    PresetError,
    load_config,
    preset_names,
)

# p_mean, p_std, ref_lr, ref_batches, rampup_mimg, gan_warmup_kimg, batch, batch_gpu, teacher
PUBLISHED = {
    "img64-s": (-0.8, 1.6, 0.010, 35000, 10, 16778, 2048, 64, "edm2-img64-s-1073741-0.075.pkl"),
    "img64-m": (-0.8, 1.6, 0.009, 35000, 10, 16778, 2048, 32, "edm2-img64-m-2147483-0.060.pkl"),
    "img64-l": (-0.8, 1.6, 0.008, 35000, 10, 16778, 2048, 16, "edm2-img64-l-1073741-0.040.pkl"),
    "img512-s": (-0.4, 1.0, 0.010, 70000, 10, 16778, 2048, 64, "edm2-img512-s-2147483-0.130.pkl"),
    "img512-m": (-0.4, 1.0, 0.009, 70000, 10, 16778, 2048, 32, "edm2-img512-m-2147483-0.100.pkl"),
    "img512-l": (-0.4, 1.0, 0.008, 70000, 10, 16778, 2048, 8, "edm2-img512-l-1879048-0.085.pkl"),
    "ffhq256-xs": (-0.8, 1.6, 0.012, 35000, 1, 1049, 128, 16, "edm2-ffhq256-xs.pkl"),
}
MI, KI = 1 << 20, 1 << 10


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_presets(name):
    p_mean, p_std, ref_lr, ref_batches, rampup, warmup, batch, batch_gpu, teacher = PUBLISHED[name]
    ffhq = name.startswith("ffhq")
    wanted = dict(
        ref_lr=ref_lr,
        ref_batches=ref_batches,
        rampup_mimg=rampup,
        gan_warmup_kimg=warmup,
        batch=batch,
        batch_gpu=batch_gpu,
        gamma=0.414,
        init_sigma=80,
        g_lr_scaling=0.01,
        d_lr_scaling=0.01,
        gan_loss_scaling=1,
        dropout=0,
        sigma_steps=1000,
        sigma_rho=7,
        ema_stds=(0.05, 0.10),
        nonfinite="zero",
        cooldown_mimg=0,
        cond=not ffhq,
        loss_scaling=0.1 if ffhq else 1,
        duration=4 * MI if ffhq else 64 * MI,
        checkpoint=256 * KI if ffhq else 4 * MI,
        snapshot=64 * KI if ffhq else MI,
        eval_ts=((0, 14, 39),) if ffhq else ((10, 22, 39),),
        **{f"{sampler}_p_mean": p_mean for sampler in "gsd"},
        **{f"{sampler}_p_std": p_std for sampler in "gsd"},
    )
    settings = dataclasses.asdict(load_config(NCVSDConfig, name))
    assert {key: settings[key] for key in wanted} == wanted
    assert teacher in json.loads((PRESET_DIR / f"{name}.json").read_text())["description"]


def test_every_preset_file_loads_under_its_kind():
    kinds = {"ncvsd": NCVSDConfig, "edm2": EDM2Config}
    seen = set()
    for path in PRESET_DIR.glob("*.json"):
        kind = kinds[json.loads(path.read_text())["kind"]]
        assert isinstance(load_config(kind, path.stem), kind)
        assert path.stem in preset_names(kind)
        seen.add(path.stem)
    assert seen == set(preset_names(NCVSDConfig)) | set(preset_names(EDM2Config))
    assert set(PUBLISHED) <= set(preset_names(NCVSDConfig))


def test_overrides_as_given_on_a_command_line():
    given = dict(duration="2Mi", batch="4Ki", batch_gpu="32", ref_lr="1e-3", cond="no", eval_ts="0,14,39")
    config = load_config(NCVSDConfig, "img64-s", given | dict(ema_stds="0.05", gamma=None))
    assert (config.duration, config.batch, config.batch_gpu, config.ref_lr) == (2 * MI, 4096, 32, 1e-3)
    assert (config.cond, config.eval_ts, config.gamma, config.ema_stds) == (False, ((0, 14, 39),), 0.414, (0.05,))
    assert config.ref_batches == 35000  # the preset's


@pytest.mark.parametrize(
    "given", [("22,39", "10,22,39"), [[22, 39], [10, 22, 39]], [[22, 39], "10,22,39"], ["22,39", [10, 22, 39]]]
)
def test_several_schedules(given):
    assert load_config(NCVSDConfig, None, {"eval_ts": given}).eval_ts == ((22, 39), (10, 22, 39))
    assert load_config(NCVSDConfig, None, {"eval_ts": given[1]}).eval_ts == ((10, 22, 39),)
    assert load_config(NCVSDConfig, None, {"eval_ts": ()}).eval_ts == NCVSDConfig().eval_ts  # not given


def test_a_preset_of_ones_own(tmp_path):
    path = tmp_path / "mine.json"
    path.write_text('{"kind": "ncvsd", "batch": 8, "batch_gpu": 4, "duration": "1Ki"}')
    config = load_config(NCVSDConfig, str(path), {"duration": "2Ki"})
    assert (config.batch, config.batch_gpu, config.duration) == (8, 4, 2048)
    assert config == NCVSDConfig(batch=8, batch_gpu=4, duration=2048)


def test_shares_of_the_run_scale_with_its_duration_unless_they_are_given():
    whole, short = load_config(NCVSDConfig, "fashion16"), load_config(NCVSDConfig, "fashion16", {"duration": "6400"})
    for name in ("rampup_mimg", "cooldown_mimg", "g_delay_kimg", "gan_warmup_kimg"):
        assert getattr(short, name) == pytest.approx(getattr(whole, name) / 8) and getattr(whole, name) > 0, name
    assert (short.batch, short.snapshot, short.ref_lr) == (whole.batch, whole.snapshot, whole.ref_lr)
    given = load_config(NCVSDConfig, "fashion16", {"duration": 6400, "g_delay_kimg": "3"})
    assert (given.g_delay_kimg, given.gan_warmup_kimg) == (3, 2)
    teacher = load_config(EDM2Config, "fashion16-teacher", {"duration": "1280000"})
    assert (teacher.ref_batches, teacher.rampup_mimg, teacher.cooldown_mimg) == (4000, 0.04, 0.4)


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_presets_stay_absolute(name):
    whole, short = load_config(NCVSDConfig, name), load_config(NCVSDConfig, name, {"duration": "1Mi"})
    assert dataclasses.replace(short, duration=whole.duration) == whole


def test_runs_whose_parts_are_longer_than_they_are_have_warnings():
    for preset in preset_names(NCVSDConfig):
        assert load_config(NCVSDConfig, preset).warnings() == []
    assert load_config(NCVSDConfig, "fashion16", {"duration": 6400}).warnings() == []
    small = dict(duration=640, batch=64, rampup_mimg=0)
    assert NCVSDConfig(**small, gan_warmup_kimg=0.576, g_delay_kimg=0.576).warnings() == []  # the last update's
    (told,) = NCVSDConfig(**small, gan_warmup_kimg=0, g_delay_kimg=0.577).warnings()
    assert "the generator never learns" in told and "g_delay_kimg 0.577" in told
    (told,) = NCVSDConfig(**small, gan_warmup_kimg=1).warnings()
    assert "the adversarial loss never begins" in told
    assert NCVSDConfig(**small, gan_warmup_kimg=1, gan_loss_scaling=0).warnings() == []
    (told,) = EDM2Config(**small, cooldown_mimg=0.00065).warnings()
    assert "never reaches its full value" in told and "640 images" in told
    assert any("no network learns" in told for told in EDM2Config(duration=64, batch=64).warnings())


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"kind": "ncvsd", "scale_with_duration": ["gamma"], "gamma": 1}', 'beside a "duration"'),
        ('{"kind": "ncvsd", "scale_with_duration": ["gamma"], "duration": 0}', 'beside a "duration"'),
        ('{"kind": "ncvsd", "scale_with_duration": ["batch"], "duration": 1}', "must list float settings"),
        ('{"kind": "ncvsd", "scale_with_duration": [{}], "duration": 1}', "must list float settings"),
        ('{"kind": "ncvsd", "scale_with_duration": "gamma", "duration": 1}', "must list float settings"),
        ('{"kind": "edm2"}', "is no preset for this script"),
        ("{}", "is no preset for this script"),
        ("[" * 100_000, "mine.json: not valid JSON .lists within lists, too deep"),
        ('{"kind": "ncvsd", "ref_lr": %s}' % ("1" * 400), "ref_lr must be finite"),
        (" " * (2 << 20), "too large"),
        ("[1]", "not a JSON object"),
        ('{"kind": "ncvsd", ', "cannot read preset"),
        ('{"kind": "ncvsd", "learning_rate": 1}', "unknown setting 'learning_rate'"),
        ('{"kind": "ncvsd", "batch": "many"}', "batch: 'many' is not valid"),
        ('{"kind": "ncvsd", "eval_ts": 5}', "eval-ts: 5 is not valid"),
        ('{"kind": "ncvsd", "cond": "perhaps"}', "cond: 'perhaps' is not valid"),
        ('{"kind": "ncvsd", "sigma_steps": 1.5}', "sigma-steps: 1.5 is not valid"),
    ],
)
def test_broken_preset_files(tmp_path, text, message):
    path = tmp_path / "mine.json"
    path.write_text(text)
    with pytest.raises(PresetError, match=message) as error:
        load_config(NCVSDConfig, str(path))
    assert "\n" not in str(error.value)


def test_an_unknown_preset_is_refused_with_the_known_ones():
    with pytest.raises(PresetError, match="no preset 'img65-s'.*ffhq256-xs.*img64-s"):
        load_config(NCVSDConfig, "img65-s")
    with pytest.raises(PresetError, match="no preset"):
        load_config(NCVSDConfig, "absent.json")


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (dict(batch=0), "batch must be at least 1"),
        (dict(duration=-1), "duration: -1 is not valid"),
        (dict(batch=64, batch_gpu=48), "multiple of batch_gpu"),
        (dict(batch_gpu=-1), "batch-gpu: -1 is not valid"),
        (dict(ref_lr=0), "ref_lr must be positive"),
        (dict(ref_lr="nan"), "ref_lr must be"),
        (dict(loss_scaling=-1), "loss_scaling must be positive"),
        (dict(rampup_mimg=-1), "rampup_mimg must not be negative"),
        (dict(dropout=1.0), "dropout must lie in"),
        (dict(ema_stds=""), "^ema-stds: '' is not valid \\(no number\\)$"),
        (dict(ema_stds=","), "^ema-stds: '' is not valid \\(no number\\)$"),
        (dict(eval_ts=("abc",)), "^eval-ts: 'abc' is not valid \\(no whole number\\)$"),
        (dict(ema_stds="0.5"), "ema_stds must lie between"),
        (dict(nonfinite="ignore"), "nonfinite must be 'zero' or 'skip'"),
        (dict(nonfinite_limit=0), "nonfinite_limit must be at least 1"),
    ],
)
def test_impossible_settings_are_refused(overrides, message):
    with pytest.raises(PresetError, match=message):
        load_config(NCVSDConfig, "img64-s", overrides)


@pytest.mark.parametrize(
    ("kind", "name", "value"),
    [
        *((NCVSDConfig, name, "nan") for name in ("gamma", "rampup_mimg", "gan_loss_scaling", "gan_warmup_kimg")),
        *((NCVSDConfig, name, -1) for name in ("gamma", "g_lr_scaling", "d_lr_scaling", "gan_loss_scaling")),
        *((NCVSDConfig, f"{sampler}_p_std", -1) for sampler in "gsd"),
        (NCVSDConfig, "ref_lr", "inf"),
        (NCVSDConfig, "init_sigma", 0),
        (NCVSDConfig, "sigma_steps", 1),
        (NCVSDConfig, "sigma_rho", 0),
        *((NCVSDConfig, f"{sampler}_p_mean", value) for sampler in "gsd" for value in ("1e5", "-21")),
        *((NCVSDConfig, f"{sampler}_p_std", 11) for sampler in "gsd"),
        (EDM2Config, "p_mean", 1000),
        (EDM2Config, "p_std", -1),
        (EDM2Config, "p_std", "1e9"),
        (EDM2Config, "eval_steps", 1),
    ],
)
def test_settings_without_meaning_are_refused_before_training(kind, name, value):
    with pytest.raises(PresetError, match=f"{name} must"):
        load_config(kind, None, {name: value})
