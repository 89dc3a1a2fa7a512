"""Samplers: noise schedules, few-step sampling, deterministic ODE sampling, per-image random streams, image grids."""
