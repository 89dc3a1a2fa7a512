"""The training loop of teachers and students: data, phases, averages."""

from contextlib import closing

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from data.dataset import ImageDataset, InfiniteSampler
from networks.encoders import Encoder
from sampling.seeds import SeededNoise, stream_seed
from torch_utils import distributed
from training.noise import training_noise
from training.optim import learning_rate, update_network
from training.presets import TrainingConfig
from training.run.options import RunOptions
from training.run.parallel import accumulate, replicate
from training.run.session import Run
from training.run.stop import ignore_signals
from training.tasks import Batch, Task


def train(
    task: Task,
    dataset: ImageDataset,
    encoder: Encoder,
    config: TrainingConfig,
    options: RunOptions,
    device: torch.device,
) -> nn.Module:
    """Train until `config.duration` images, resuming from the newest valid state; return the first average.

    A step runs every phase on a fresh batch and counts as `config.batch` images. The noise of an image depends on the
    seed and on its position in the run's image sequence alone. A signal or the deadline ends training after the step
    that is going on, with its state written; after Ctrl-C KeyboardInterrupt is raised then. Raises ValueError where
    batch sizes do not fit the number of processes, the state belongs to another run or another run is using the folder,
    DivergenceError if gradients stay non-finite, OSError if states cannot be written.
    """
    batch_gpu, rounds = config.split_batch(distributed.world_size())
    for phase in task.phases:
        phase.net.eval().requires_grad_(False)  # but for the one whose turn it is
    run = Run(task, dataset, encoder, config, options, device)
    with run.opened():
        trained = run.trained
        nets = {phase.name: replicate(phase.net) for phase in task.phases}  # what is called in training
        first = trained.nimg * len(task.order)  # position in the run's image sequence
        with closing(ImageBatches(dataset, batch_gpu, first, options, device)) as batches:
            while not run.over:
                seed_dropout(options.seed, trained.nimg // config.batch)
                for phase in task.order:
                    if trained.nimg < phase.start:
                        batches.skip(rounds)  # each step takes as many from the sequence
                        continue
                    phase.net.train().requires_grad_(True)
                    for k in range(rounds):
                        raw, labels, noise = next(batches)
                        images = encoder.encode(raw.to(device), randn_like=noise.randn_like)
                        images = images.contiguous(memory_format=torch.channels_last)
                        with accumulate(nets[phase.name], last=k == rounds - 1):
                            terms = phase.loss(Batch(images, labels, noise, trained.nimg), nets[phase.name])
                            scale = config.loss_scaling * distributed.world_size() / config.batch
                            terms.total.sum().mul(scale).backward()
                        run.means.add_losses(phase, terms)
                    lr = learning_rate(trained.nimg, config) * phase.rate(trained.nimg)
                    optimizer, health = trained.optimizers[phase.name], trained.health[phase.name]
                    for name, value in update_network(phase, optimizer, lr, health, config).items():
                        run.means.add(name, value)
                    phase.net.eval().requires_grad_(False)
                images = noise = terms = None  # their memory is free while a state is copied and snapshots are drawn
                trained.nimg += config.batch
                trained.ema.update(trained.nimg, config.batch)
                run.after_step()
    return trained.ema.network(0)


class ImageBatches:
    """This process's endless batches: raw images as stored, labels [N,label_dim], the random stream of each image."""

    def __init__(
        self, dataset: ImageDataset, batch_gpu: int, first: int, options: RunOptions, device: torch.device
    ) -> None:
        """Batches of `batch_gpu` images, from position `first` of the run's image sequence over all processes."""
        self.seed, self.device, self.size = options.seed, device, batch_gpu
        self.rank, self.world, self.position = distributed.rank(), distributed.world_size(), first
        workers = options.workers if options.workers is not None else 2 * (device.type == "cuda")
        split = dict(start_index=first, rank=self.rank, num_replicas=self.world)
        sampler = InfiniteSampler(len(dataset), seed=options.seed, **split)
        given = dict(num_workers=workers, prefetch_factor=2 if workers else None, worker_init_fn=ignore_signals)
        pinned = device.type == "cuda"
        self.loaded = iter(DataLoader(dataset, batch_gpu, sampler=sampler, pin_memory=pinned, **given))

    def __next__(self) -> tuple[Tensor, Tensor, SeededNoise]:
        raw, labels = next(self.loaded)
        first, step = self.position + self.rank, self.size * self.world
        self.position += step
        noise = training_noise(self.seed, range(first, first + step, self.world), self.device)
        return raw, labels.to(self.device), noise

    def skip(self, count: int) -> None:
        """Pass over so many batches."""
        for _ in range(count):
            next(self.loaded)
        self.position += count * self.size * self.world

    def close(self) -> None:
        """End the loader's processes, which ignore signals."""
        getattr(self.loaded, "_shutdown_workers", lambda: None)()


def seed_dropout(seed: int, iteration: int) -> None:
    """Seed what has no stream of its own, apart for each process and iteration."""
    torch.manual_seed(stream_seed((seed + 1 << 32) + iteration * distributed.world_size() + distributed.rank()))
