"""Threads beside other processes. Imports no PyTorch: OpenMP reads its settings when PyTorch is first imported."""

import os


def wait_passively() -> None:
    """Let OpenMP's threads sleep while they wait, unless OMP_WAIT_POLICY is set. Call it before importing PyTorch."""
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
