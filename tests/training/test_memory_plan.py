"""The memory plan against the tensors of a real run, and against the published sizes."""

import pytest
import torch

from networks import Discriminator, Precond, PrecondCondition
from tests.training.tiny_runs import NCVSD, make_task
from training.run.memory import memory_plan, tensor_bytes
from training.run.parallel import optimizer_state
from training.run.state import Trained


def plan_of(task, **options):
    phases = [(p.name, p.net) for p in task.phases]
    return memory_plan(phases, task.frozen.items(), task.result, len(NCVSD.ema_stds), **options)


def test_bytes_are_those_of_the_tensors(tiny_teacher):
    task = make_task(NCVSD, tiny_teacher)
    trained = Trained(task, NCVSD, 0, torch.device("cpu"))
    plan = plan_of(task)
    largest = 0
    for phase in task.phases:
        (row,) = (row for row in plan.rows if row.name == phase.name)
        assert row.weights == tensor_bytes(phase.net.state_dict())
        for p in phase.net.parameters():
            p.grad = torch.zeros_like(p)
        gradients = tensor_bytes([p.grad for p in phase.net.parameters()])
        trained.optimizers[phase.name].step()
        moments = optimizer_state(trained.optimizers[phase.name])["state"].values()
        assert row.gradients == gradients
        assert row.adam == sum(tensor_bytes([entry["exp_avg"], entry["exp_avg_sq"]]) for entry in moments)
        assert row.ema == (tensor_bytes(trained.ema.state_dict()) if phase.name == "gen" else 0)
        largest = max(largest, gradients)
    teacher = tensor_bytes(task.teacher.state_dict())
    assert plan.device == teacher + sum(row.weights + row.adam + row.ema for row in plan.rows[1:]) + largest
    assert plan.state == pytest.approx(tensor_bytes(trained.host_state()), rel=0.01)  # but for step counts


def test_dividing_saves_what_it_should(tiny_teacher):
    task = make_task(NCVSD, tiny_teacher)
    whole, divided = plan_of(task, world=8), plan_of(task, world=8, shard=True)
    host = plan_of(task, world=8, shard=True, ema_on_host=True)
    adam, ema = (sum(getattr(row, name) for row in whole.rows) for name in ("adam", "ema"))
    assert whole.device - divided.device == pytest.approx((adam + ema) * 7 / 8, rel=1e-3)
    assert divided.device - host.device == host.ema_host == pytest.approx(ema / 8, rel=1e-3)
    assert whole.state == divided.state  # states do not depend on the number of processes


def test_the_largest_published_network():
    arguments = dict(img_resolution=64, img_channels=4, label_dim=1000, model_channels=320)
    kinds = {"teacher": Precond, "score": PrecondCondition, "disc": Discriminator, "gen": PrecondCondition}
    with torch.device("meta"):
        nets = {name: kind(**arguments) for name, kind in kinds.items()}
    phases = [(name, nets[name]) for name in ("score", "disc", "gen")]
    counts = {name: sum(p.numel() for p in net.parameters()) for name, net in nets.items()}
    assert counts == {"teacher": 777498085, "score": 1020098117, "disc": 481823390, "gen": 1020098117}
    plans = [
        memory_plan(phases, [("teacher", nets["teacher"])], nets["gen"], 2, world=8, shard=shard)
        for shard in (False, True)
    ]
    assert [round(plan.device / 2**30, 1) for plan in plans] == [48.1, 25.0]  # as docs/scaling.md says
    assert "48.1 GiB on the device; activations come on top" in "\n".join(plans[0].lines())
