"""Settings of the whole suite: one thread per process, so that tests behave the same on a busy machine."""

import torch

torch.set_num_threads(1)
