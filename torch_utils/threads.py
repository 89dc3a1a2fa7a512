"""Threads beside other processes. Imports no PyTorch: OpenMP reads its settings when PyTorch is first imported."""

import os


def wait_passively() -> None:
    """Let OpenMP's threads sleep while they wait for one another, unless the user has set OMP_WAIT_POLICY. They spin
    otherwise, and where another process holds one of the cores, that is most of the time. Scripts call it before
    anything imports PyTorch; importing them changes nothing.
    """
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
