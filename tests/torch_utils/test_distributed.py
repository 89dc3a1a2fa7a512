import os
import sys
from pathlib import Path

import pytest
import torch

from tests import warm
from torch_utils import distributed
from torch_utils.options import DTYPE

ROOT = Path(__file__).parents[2]

WORKER = """
import pathlib
import torch
import torch.distributed as dist
from torch_utils import distributed

device = distributed.init("cpu")
assert distributed.init("cpu") == device == torch.device("cpu")
assert dist.get_backend() == "gloo"
total = torch.tensor([distributed.rank() + 1])
dist.all_reduce(total)
distributed.print0(f"main of {distributed.world_size()}: {total.item()}")
assert distributed.is_main() == (distributed.rank() == 0)
distributed.barrier()
import torch.distributed.nn  # keeps the group where it is imported too late, and with it threads that can abort at exit
dist.destroy_process_group()
threads = [path.read_text() for path in pathlib.Path("/proc/self/task").glob("*/comm")]
assert not any("gloo" in name for name in threads), threads
assert (distributed.rank(), distributed.world_size()) == (0, 1)
"""


@pytest.fixture
def no_torchrun(monkeypatch):
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)


def test_a_single_process_needs_no_group(no_torchrun, capsys):
    assert distributed.init("cpu") == torch.device("cpu")
    assert not torch.distributed.is_initialized()
    assert (distributed.rank(), distributed.world_size()) == (0, 1)
    distributed.barrier()
    assert distributed.collective_device() == torch.device("cpu")
    distributed.print0("once")
    assert distributed.is_main() and capsys.readouterr().out == "once\n"


def test_device_names(no_torchrun):
    assert distributed.device_for("cpu") == distributed.device_for(torch.device("cpu")) == torch.device("cpu")
    wanted = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    assert distributed.device_for("auto").type == wanted


@pytest.mark.parametrize("name", ["gpu", "cuda:99", "cpu:x", "meta", ""])
def test_unknown_devices_are_refused(no_torchrun, name):
    with pytest.raises(ValueError, match="is not known|does not exist"):
        distributed.device_for(name)


def test_two_processes_form_a_gloo_group(tmp_path):
    script = tmp_path / "worker.py"
    script.write_text(WORKER)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(script)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    result = warm.run(command, env=environment, capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stderr
    assert result.stdout.splitlines() == ["main of 2: 3"]


@pytest.mark.parametrize(
    ("variables", "message"),
    [
        (dict(RANK="x", WORLD_SIZE="1"), "RANK is 'x', not a whole number"),
        (dict(RANK="0", WORLD_SIZE="two"), "WORLD_SIZE is 'two', not a whole number"),
        (dict(RANK="0", WORLD_SIZE="1", MASTER_PORT="p"), "MASTER_PORT is 'p', not a whole number"),
        (dict(RANK="2", WORLD_SIZE="2"), "RANK is '2', and WORLD_SIZE is '2'"),
    ],
)
def test_environments_of_no_group_name_the_variable(variables, message, monkeypatch):
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ValueError, match=message):
        distributed.init("cpu")


def test_every_choice_of_dtype_has_a_torch_dtype_and_fp16_is_for_cuda():
    cpu, cuda = torch.device("cpu"), torch.device("cuda", 0)
    dtypes = [None, torch.float32, torch.bfloat16, torch.float16]
    assert [distributed.compute_dtype(name, cuda) for name in DTYPE.choices] == dtypes
    assert [distributed.compute_dtype(name, cpu) for name in DTYPE.choices[:3]] == dtypes[:3]
    with pytest.raises(ValueError, match="--dtype fp16 needs a CUDA device, and this run is on cpu: use bf16"):
        distributed.compute_dtype("fp16", cpu)
