"""The training loop: what one step changes, exact resume, accumulation, non-finite gradients."""

import copy
import dataclasses
import json
import math

import pytest
import torch

import networks
from data.dataset import ImageDataset, InfiniteSampler
from tests.training.tiny_runs import (
    EDM2,
    NCVSD,
    compare_states,
    differing,
    load_newest_state,
    make_task,
    run_training,
    stats,
    weights,
)
from training import loop
from training.optim import DivergenceError
from training.run import state
from training.run.state import StateError, list_states
from training.tasks import distillation_task

# ----------------------------------------------------------------------------
# one step


@pytest.mark.parametrize("name", ["score", "disc", "gen"])
def test_one_step_of_a_phase_changes_its_network_alone(tmp_path, dataset, tiny_teacher, name):
    config = dataclasses.replace(NCVSD, gan_warmup_kimg=0)
    task = make_task(config, tiny_teacher)
    everyone = {phase.name: phase.net for phase in task.phases}
    with torch.no_grad():
        for key, p in [item for net in everyone.values() for item in net.named_parameters()]:
            if "additional_" in key:  # at their initial 0 no gradient reaches the control branch
                p.fill_(0.2)
    before = {key: weights(net.eval().requires_grad_(False)) for key, net in everyone.items()}
    task.phases = [phase for phase in task.phases if phase.name == name]
    run_training(task, dataset, config, tmp_path)
    for key, net in everyone.items():
        changed = differing(before[key], weights(net))
        if key != name:
            assert changed == [] and all(p.grad is None for p in net.parameters())
            continue
        learned = {key for key, _ in net.named_parameters()}
        assert set(changed) <= learned
        assert {key for key in learned - set(changed) if "logvar" not in key} == set()  # all of them moved


def test_one_step_of_pretraining_changes_every_parameter(tmp_path, dataset, tiny_teacher):
    task = make_task(EDM2, tiny_teacher)
    before = weights(task.result)
    with torch.no_grad():
        task.result.unet.out_gain.fill_(1)  # at its initial 0 no gradient reaches the layers before it
    run_training(task, dataset, EDM2, tmp_path)
    gains = {key for key in before if key.endswith("emb_gain")}  # these begin at 0 and shut the embedding off
    embedding = {"unet.emb_noise.weight", "unet.emb_label.weight"}
    learned = {key for key, _ in task.result.named_parameters()}
    embedding |= {key for key in learned if "emb_linear" in key}
    assert set(differing(before, weights(task.result))) >= learned - embedding
    assert gains <= learned


def test_the_first_update_has_rate_zero_while_ramping_up(tmp_path, dataset, tiny_teacher):
    config = dataclasses.replace(NCVSD, rampup_mimg=1, duration=8)
    task = make_task(config, tiny_teacher)
    nets = {phase.name: phase.net for phase in task.phases}
    before = {name: weights(net) for name, net in nets.items()}
    run_training(task, dataset, config, tmp_path)
    assert differing(before["disc"], weights(nets["disc"])) == []  # the others' weights are normalised in training
    assert stats(tmp_path)[-1]["Progress/lr"] == 0


def test_an_iteration_takes_three_batches_in_the_samplers_order(tmp_path, dataset, tiny_teacher, monkeypatch):
    seen, positions = [], []
    real_get, real_noise = ImageDataset.__getitem__, loop.training_noise
    monkeypatch.setattr(ImageDataset, "__getitem__", lambda self, i: (seen.append(i), real_get(self, i))[1])
    monkeypatch.setattr(loop, "training_noise", lambda s, p, d: (positions.extend(p), real_noise(s, p, d))[1])
    config = dataclasses.replace(NCVSD, duration=16, batch_gpu=4)
    run_training(make_task(config, tiny_teacher), dataset, config, tmp_path, seed=3)
    order = iter(InfiniteSampler(len(dataset), seed=3))
    assert seen == [next(order) for _ in range(2 * 3 * 8)]
    assert positions == list(range(2 * 3 * 8))


def test_the_adversarial_loss_begins_after_its_warm_up(tmp_path, dataset, tiny_teacher):
    config = dataclasses.replace(NCVSD, duration=32, gan_warmup_kimg=0.016)
    task = make_task(config, tiny_teacher)
    calls = []
    discriminator = next(phase.net for phase in task.phases if phase.name == "disc")
    discriminator.register_forward_hook(lambda *_: calls.append(1))
    run_training(task, dataset, config, tmp_path)
    lines = stats(tmp_path)
    assert [line["nimg"] for line in lines] == [8, 16, 24, 32]
    assert ["Loss/gan" in line for line in lines] == [False, False, True, True]
    assert all(math.isfinite(line[f"Loss/{name}"]) for line in lines for name in ("score", "vsd", "disc_real"))
    assert len(calls) == 4 * 2 + 2  # twice an iteration for its own loss, and for the generator's from 16 images on


# ----------------------------------------------------------------------------
# resume


RECIPE = dataclasses.replace(
    NCVSD,
    **dict(direction="sid", scale="output", t_cap=3.0, score_updates=2, own_states=0.5, combined_score=True),
    **dict(d_head="local", divergence="js", gan_balance=True, g_rampup_kimg=0.02, beta1=0.0),
)


@pytest.mark.parametrize("config", [NCVSD, EDM2, RECIPE], ids=["ncvsd", "edm2", "recipe"])
@pytest.mark.parametrize("dropout", [0.0, 0.2])
def test_resume_is_exact(tmp_path, dataset, tiny_teacher, config, dropout):
    config = dataclasses.replace(config, duration=40 if config is EDM2 else 32, dropout=dropout, batch_gpu=4)
    whole = run_training(make_task(config, tiny_teacher), dataset, config, tmp_path / "whole")
    for part in (8, 16, config.duration):
        short = dataclasses.replace(config, duration=part)
        task = make_task(short, tiny_teacher)
        with torch.no_grad():  # whatever a fresh process starts from is replaced
            for phase in task.phases:
                for tensor in phase.net.state_dict().values():
                    tensor.add_(float(part > 8))
        resumed = run_training(task, dataset, short, tmp_path / "parts")
    assert differing(weights(whole), weights(resumed)) == []
    compare_states(tmp_path / "whole", tmp_path / "parts")
    assert [line["nimg"] for line in stats(tmp_path / "parts")] == list(range(8, config.duration + 1, 8))


def test_a_run_that_is_done_stays_as_it_is(tmp_path, dataset, tiny_teacher):
    first = run_training(make_task(EDM2, tiny_teacher), dataset, EDM2, tmp_path)
    files = {path.name for path in tmp_path.glob("[!e]*")}
    again = run_training(make_task(EDM2, tiny_teacher), dataset, EDM2, tmp_path)
    assert differing(weights(first), weights(again)) == []
    assert {path.name for path in tmp_path.glob("[!e]*")} == files


@pytest.mark.parametrize(("duration", "snapshot"), [(8, 1 << 20), (32, 8)], ids=["the last", "one on the way"])
def test_a_run_cut_off_between_state_and_snapshot_makes_up_for_it(tmp_path, dataset, tiny_teacher, duration, snapshot):
    config = dataclasses.replace(NCVSD, snapshot=snapshot)
    run_training(make_task(config, tiny_teacher), dataset, config, tmp_path)
    path = tmp_path / "network-snapshot-000000008-0.100.safetensors"
    first = weights(networks.load(path).net)
    path.unlink()
    config = dataclasses.replace(config, duration=duration)
    run_training(make_task(config, tiny_teacher), dataset, config, tmp_path)
    assert differing(first, weights(networks.load(path).net)) == []


def test_a_process_that_does_not_see_the_main_ones_state_says_so(tmp_path, monkeypatch):
    monkeypatch.setattr(state.distributed, "is_main", lambda: False)
    monkeypatch.setattr(state.distributed, "from_main", lambda value: "training-state-000000016-01234567.pt")
    with pytest.raises(StateError, match="does not see .*training-state-000000016.*share that folder"):
        state.newest_state(tmp_path, print, writing=False)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (dict(ref_lr=0.02), "ref_lr"),
        (dict(batch=16), "batch"),
        (dict(gamma=0.3), "gamma"),
        (dict(dropout=0.1), "dropout"),
    ],
)
def test_other_settings_are_refused_on_resume(tmp_path, dataset, tiny_teacher, change, named):
    run_training(make_task(NCVSD, tiny_teacher), dataset, NCVSD, tmp_path)
    states = list_states(tmp_path)
    other = dataclasses.replace(NCVSD, duration=16, **change)
    with pytest.raises(StateError, match=f"other settings \\({named}") as error:
        run_training(make_task(other, tiny_teacher), dataset, other, tmp_path)
    assert "\n" not in str(error.value) and list_states(tmp_path) == states


def test_a_run_begun_before_a_setting_existed_had_its_default(tmp_path, dataset, tiny_teacher):
    run_training(make_task(NCVSD, tiny_teacher), dataset, NCVSD, tmp_path)
    path = tmp_path / "run.json"
    known = json.loads(path.read_text())
    del known["direction"], known["t_cap"]
    path.write_text(json.dumps(known))
    other = dataclasses.replace(NCVSD, duration=16, t_cap=3.0)
    with pytest.raises(StateError, match=r"other settings \(t_cap is 0.0, now 3.0\)"):
        run_training(make_task(other, tiny_teacher), dataset, other, tmp_path)
    same = dataclasses.replace(NCVSD, duration=16)
    run_training(make_task(same, tiny_teacher), dataset, same, tmp_path)
    assert json.loads(path.read_text())["direction"] == "vsd"
    path.write_text(json.dumps({k: v for k, v in known.items() if k != "seed"}))
    with pytest.raises(StateError, match="seed is None"):
        run_training(make_task(same, tiny_teacher), dataset, same, tmp_path)


def test_a_run_begun_in_another_order_of_the_images_is_refused(tmp_path, dataset, tiny_teacher):
    run_training(make_task(NCVSD, tiny_teacher), dataset, NCVSD, tmp_path)
    path = tmp_path / "run.json"
    known = json.loads(path.read_text())
    del known["image_order"]  # as before orders had versions
    path.write_text(json.dumps(known))
    longer = dataclasses.replace(NCVSD, duration=16)
    with pytest.raises(StateError, match="takes the training images in another order.*--force-resume") as error:
        run_training(make_task(longer, tiny_teacher), dataset, longer, tmp_path)
    assert "\n" not in str(error.value)
    run_training(make_task(longer, tiny_teacher), dataset, longer, tmp_path, force_resume=True)
    assert "image_order is 1, now 2" in (tmp_path / "log.txt").read_text()
    run_training(make_task(longer, tiny_teacher), dataset, longer, tmp_path)  # now the run's order


def test_other_data_or_another_seed_are_refused_on_resume(tmp_path, dataset, tiny_teacher, tiny_images):
    run_training(make_task(NCVSD, tiny_teacher), dataset, NCVSD, tmp_path / "run")
    longer = dataclasses.replace(NCVSD, duration=16)
    with pytest.raises(StateError, match="seed"):
        run_training(make_task(longer, tiny_teacher), dataset, longer, tmp_path / "run", seed=1)
    other = ImageDataset(tiny_images(tmp_path / "other.zip", (21, 8, 8), 3))
    with pytest.raises(StateError, match="data"):
        run_training(make_task(longer, tiny_teacher), other, longer, tmp_path / "run")


def test_generator_waits_for_its_start_and_resume_keeps_the_order(tmp_path, dataset, tiny_teacher):
    config = dataclasses.replace(NCVSD, duration=24, g_delay_kimg=0.016)
    short = dataclasses.replace(config, duration=16)
    start = weights(make_task(config, tiny_teacher).result)
    task = make_task(short, tiny_teacher)
    run_training(task, dataset, short, tmp_path / "parts")
    assert differing(weights(task.result), start) == []
    resumed = run_training(make_task(config, tiny_teacher), dataset, config, tmp_path / "parts")
    whole = run_training(make_task(config, tiny_teacher), dataset, config, tmp_path / "whole")
    assert differing(weights(whole), start) and differing(weights(whole), weights(resumed)) == []


def test_another_teacher_is_refused_on_resume(tmp_path, dataset, tiny_teacher):
    run_training(make_task(NCVSD, tiny_teacher), dataset, NCVSD, tmp_path / "run")
    teacher = networks.load(tiny_teacher).net
    with torch.no_grad():
        teacher.unet.out_conv.weight[0, 0, 0, 0] += 1
    with pytest.raises(StateError, match="other settings \\(teacher"):
        run_training(distillation_task(teacher, NCVSD), dataset, NCVSD, tmp_path / "run")


# ----------------------------------------------------------------------------
# accumulation and processes


def gradients_of(task, dataset, config, folder, monkeypatch):
    """Gradients that each network's optimizer receives."""
    found = {}
    real = loop.update_network

    def record(phase, *rest):
        found[phase.name] = {key: p.grad.clone() for key, p in phase.net.named_parameters() if p.grad is not None}
        return real(phase, *rest)

    monkeypatch.setattr(loop, "update_network", record)
    run_training(task, dataset, config, folder)
    monkeypatch.setattr(loop, "update_network", real)
    return found


@pytest.mark.parametrize("batch_gpu", [2, 0])
def test_accumulation_does_not_change_the_gradients(tmp_path, dataset, tiny_teacher, monkeypatch, batch_gpu):
    whole, split = (
        dataclasses.replace(NCVSD, gan_warmup_kimg=0, g_lr_scaling=0.01, batch_gpu=n) for n in (8, batch_gpu)
    )
    a = gradients_of(make_task(whole, tiny_teacher), dataset, whole, tmp_path / "a", monkeypatch)
    b = gradients_of(make_task(split, tiny_teacher), dataset, split, tmp_path / "b", monkeypatch)
    assert a["score"].keys() == b["score"].keys() and len(a) == 3
    for name in a:  # the generator's depend on the score network's update, which amplifies rounding
        bound = 1e-3 if name == "gen" else 1e-5
        total = torch.stack([g.norm() for g in a[name].values()]).norm()
        error = torch.stack([(b[name][key] - g).norm() for key, g in a[name].items()]).norm()
        assert 0 < total and error <= bound * total, name


def test_loss_scaling_scales_gradients_alone(tmp_path, dataset, tiny_teacher, monkeypatch):
    plain, scaled = EDM2, dataclasses.replace(EDM2, loss_scaling=0.25)
    a = gradients_of(make_task(plain, tiny_teacher), dataset, plain, tmp_path / "a", monkeypatch)["teacher"]
    b = gradients_of(make_task(scaled, tiny_teacher), dataset, scaled, tmp_path / "b", monkeypatch)["teacher"]
    assert all(torch.allclose(b[key], a[key] / 4, rtol=1e-5, atol=1e-9) for key in a)
    assert stats(tmp_path / "a")[0]["Loss/edm2"] == stats(tmp_path / "b")[0]["Loss/edm2"]


def test_a_batch_that_cannot_be_split_is_refused(tmp_path, dataset, tiny_teacher, monkeypatch):
    monkeypatch.setattr(loop.distributed, "world_size", lambda: 3)
    with pytest.raises(ValueError, match="batch 8 must be a multiple of batch_gpu 8 times 3 processes"):
        run_training(make_task(EDM2, tiny_teacher), dataset, EDM2, tmp_path)


# ----------------------------------------------------------------------------
# non-finite gradients


def poison(task, name, iterations):
    """Make a phase's loss NaN in the iterations that begin at the given image counts."""
    phase = next(phase for phase in task.phases if phase.name == name)
    real = phase.loss

    def loss(batch, net):
        terms = real(batch, net)
        if batch.nimg in iterations:
            terms.total = terms.total * float("nan")
        return terms

    phase.loss = loss
    return phase.net


def adam_steps(folder, name):
    return {int(entry["step"]) for entry in load_newest_state(folder)["optimizers"][name]["state"].values()}


@pytest.mark.parametrize(("mode", "steps"), [("zero", 3), ("skip", 2)])
def test_nonfinite_gradients_are_counted_and_do_not_reach_the_weights(tmp_path, dataset, tiny_teacher, mode, steps):
    config = dataclasses.replace(NCVSD, duration=24, nonfinite=mode, nonfinite_limit=2)
    task = make_task(config, tiny_teacher)
    net = poison(task, "score", [8])
    run_training(task, dataset, config, tmp_path)
    assert all(tensor.isfinite().all() for tensor in net.state_dict().values())
    affected = [line["Nonfinite/score_entries"] for line in stats(tmp_path)]
    trained = sum(p.numel() for p in net.parameters())
    assert affected[0] == affected[2] == 0 and 0.9 * trained <= affected[1] <= trained
    assert [line["Nonfinite/score_updates"] for line in stats(tmp_path)] == [0, 1, 0]
    assert all(line["Nonfinite/disc_updates"] == line["Nonfinite/gen_updates"] == 0 for line in stats(tmp_path))
    assert adam_steps(tmp_path, "score") == {steps} and adam_steps(tmp_path, "gen") == {3}


def test_a_skipped_update_leaves_the_weights(tmp_path, dataset, tiny_teacher):
    config = dataclasses.replace(EDM2, nonfinite="skip")
    task = make_task(config, tiny_teacher)
    net = poison(task, "teacher", [0])
    wanted = copy.deepcopy(net).train()
    wanted(torch.zeros(1, 1, 8, 8), 1.0, return_logvar=True)  # a training pass normalises weights and does no more
    run_training(task, dataset, config, tmp_path)
    for key, tensor in wanted.state_dict().items():
        assert torch.allclose(net.state_dict()[key], tensor, atol=1e-6), key


def test_training_stops_when_gradients_stay_nonfinite(tmp_path, dataset, tiny_teacher):
    config = dataclasses.replace(NCVSD, duration=80, nonfinite_limit=3, checkpoint=8)
    task = make_task(config, tiny_teacher)
    poison(task, "disc", [0, 8, 24, 32, 40, 48])  # two in a row are not three
    with pytest.raises(DivergenceError, match="of the disc network have been non-finite for 3 updates in a row"):
        run_training(task, dataset, config, tmp_path)
    assert [load_newest_state(tmp_path)["nimg"], len(list_states(tmp_path))] == [40, 2]  # the third began there
    assert all(t.isfinite().all() for net in load_newest_state(tmp_path)["nets"].values() for t in net.values())
