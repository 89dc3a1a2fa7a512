"""What each process of `test_processes.py` does: torchrun … -m tests.training.two_processes OUT DATA TEACHER."""

import dataclasses
import os
import signal
import sys
from pathlib import Path

import torch

from data.dataset import ImageDataset
from tests.training.tiny_runs import NCVSD, make_task, run_training
from torch_utils import distributed

GRADIENTS = dataclasses.replace(NCVSD, batch_gpu=2, rampup_mimg=1, gan_warmup_kimg=0)  # its first update has rate 0
STEPS = dataclasses.replace(NCVSD, batch_gpu=4, duration=24, ref_lr=1e-3, dropout=0.1, checkpoint=8)


def main(out: Path, data: str, teacher: str) -> None:
    torch.set_num_threads(1)
    distributed.init("cpu")
    dataset = ImageDataset(data)
    run_training(make_task(GRADIENTS, teacher), dataset, GRADIENTS, out / "gradients")
    run_training(make_task(STEPS, teacher), dataset, STEPS, out / "whole")
    run_training(make_task(STEPS, teacher), dataset, STEPS, out / "divided", shard=True)
    for duration in (16, 24):
        config = dataclasses.replace(STEPS, duration=duration)
        run_training(make_task(config, teacher), dataset, config, out / "resumed", shard=True)

    config = dataclasses.replace(STEPS, duration=800)
    task = make_task(config, teacher)
    real = task.phases[0].loss

    def loss(batch, net):
        if batch.nimg == 8 and distributed.rank() == 1:
            os.kill(os.getpid(), signal.SIGUSR1)
        return real(batch, net)

    task.phases[0].loss = loss
    run_training(task, dataset, config, out / "signal")
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]), *sys.argv[2:])
