"""Power-function EMA of weights and post-hoc reconstruction of other profiles (EDM2, Section 3)."""

import copy
from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import nn

from torch_utils import distributed


def std_to_exp(std: float | np.ndarray) -> np.ndarray:
    """Exponent gamma >= 0 of the profile of relative width std: std² = (γ+1)/((γ+2)²(γ+3)) (EDM2, Section 3). Raises
    ValueError unless 0 < std <= 1/sqrt(12), the width at gamma = 0.
    """
    std = np.asarray(std, dtype=np.float64)
    if not np.all((std > 0) & (std <= 12**-0.5)):
        raise ValueError(f"the relative width of an EMA profile must lie in (0, 0.2886], got {std}")
    # With u = γ+1 and s = 1/std² the widths are the largest roots of u³ + 4u² + (5-s)u + 2, which is convex for u > 0
    # and positive at sqrt(s): Newton's steps from there come down to the root and stay.
    u = 1 / np.maximum(std, 1e-100)  # narrower ones average nothing either, and would overflow
    s = u * u
    for _ in range(20):
        u = u - (((u + 4) * u + 5 - s) * u + 2) / ((3 * u + 8) * u + 5 - s)
    return np.maximum(u - 1, 0)


def power_function_beta(std: float, t_next: float, t_delta: float) -> float:
    """Decay of the update from t_next - t_delta to t_next images: (1 - t_delta/t_next)^(γ+1) (EDM2, Eq. 127)."""
    return float((1 - t_delta / t_next) ** (std_to_exp(std) + 1))


def profile_product(t_a: np.ndarray, exp_a: np.ndarray, t_b: np.ndarray, exp_b: np.ndarray) -> np.ndarray:
    """Inner product of two power-function profiles ending at t_a and t_b images (EDM2, Algorithm 3). Written with
    ratios, since raw powers of image counts overflow.
    """
    t_min = np.minimum(t_a, t_b)
    scale = (exp_a + 1) * (exp_b + 1) / (exp_a + exp_b + 1)
    return scale * (t_min / t_a) ** exp_a * (t_min / t_b) ** exp_b / np.maximum(t_a, t_b)


def solve_posthoc_coefficients(
    in_nimg: Sequence[float],  # images seen at each stored snapshot, [stored]
    in_std: Sequence[float],  # relative width of each stored snapshot, [stored]
    out_nimg: Sequence[float],  # images at which each wanted profile ends, [wanted]
    out_std: Sequence[float],  # relative width of each wanted profile, [wanted]
) -> np.ndarray:
    """Weights [stored, wanted] of the least-squares reconstruction, each column summing to 1 (EDM2, Section 3.2)."""
    stored, mixed, _ = _inner_products(in_nimg, in_std, out_nimg, out_std)
    x = np.linalg.solve(stored, mixed)
    return x / x.sum(axis=0)


def profile_errors(x: np.ndarray, *profiles: Sequence[float]) -> np.ndarray:
    """Relative errors |p - Σ x_i p_i| / |p| [wanted] of the profiles p that coefficients x [stored, wanted] make of
    stored ones p_i; `profiles` are the arguments of `solve_posthoc_coefficients`.
    """
    stored, mixed, wanted = _inner_products(*profiles)
    square = wanted - 2 * (x * mixed).sum(axis=0) + (x * (stored @ x)).sum(axis=0)
    return np.sqrt(np.maximum(square, 0) / wanted)


def _inner_products(*profiles: Sequence[float]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Those of stored with stored profiles, of stored with wanted ones, and of each wanted one with itself."""
    a, b = (
        np.broadcast_arrays(np.atleast_1d(np.asarray(t, dtype=np.float64)), std_to_exp(np.atleast_1d(std)))
        for t, std in (profiles[:2], profiles[2:])
    )
    column = [v[:, None] for v in a]
    return profile_product(*column, *a), profile_product(*column, *b), profile_product(*b, *b)


def divide(sizes: Mapping[str, int], world: int) -> dict[str, int]:
    """Owner of each named tensor, such that all processes hold about as much: the largest first, to the least laden."""
    owners, load = {}, [0] * world
    for name in sorted(sizes, key=lambda name: (-sizes[name], name)):
        owners[name] = load.index(min(load))
        load[owners[name]] += sizes[name]
    return owners


def spread(tensor: torch.Tensor, owner: int) -> torch.Tensor:
    """The owner's tensor in every process; the others' says shape, dtype and device. Collective."""
    message = tensor.detach().contiguous().clone()
    torch.distributed.broadcast(message, src=owner)
    return message


class PowerFunctionEMA:
    """Averages of one network's parameters under several profiles, in float32, on `device` (None = the network's; the
    CPU saves GPU memory). Buffers are constants: they stay those of the network.

    With `shard` each process keeps and updates its share of the parameters only; averages are elementwise, so that
    takes no messages until a whole network is asked for.
    """

    def __init__(
        self, net: nn.Module, stds: Sequence[float] = (0.05, 0.1), *, device: str | None = None, shard: bool = False
    ) -> None:
        self.net, self.stds, self.device = net, tuple(stds), device
        self._parameters = dict(net.named_parameters())
        self._sharded = shard and distributed.world_size() > 1
        sizes = {name: p.numel() for name, p in self._parameters.items()}
        self._owners = divide(sizes, distributed.world_size() if shard else 1)
        rank = distributed.rank() if shard else 0
        self._own = {name: p for name, p in self._parameters.items() if self._owners[name] == rank}
        kind = dict(dtype=torch.float32, copy=True)
        self._shares = [{k: p.detach().to(device or p.device, **kind) for k, p in self._own.items()} for _ in self.stds]

    @torch.no_grad()
    def update(self, nimg: int, batch: int) -> None:
        """Take in the network's weights after the update that reached `nimg` images."""
        weights = [p.detach().to(self.device or p.device) for p in self._own.values()]
        for std, share in zip(self.stds, self._shares, strict=True):
            torch._foreach_lerp_(list(share.values()), weights, 1 - power_function_beta(std, nimg, batch))

    def _average(self, index: int, name: str) -> torch.Tensor:
        """One profile's average of a parameter; where shared out on the parameter's device, and collective."""
        p = self._parameters[name]
        share = self._shares[index].get(name, p)
        return spread(share.to(p.device), self._owners[name]) if self._sharded else share

    @torch.no_grad()
    def network(self, index: int) -> nn.Module:
        """A new network on the trained one's device with one profile's average. Collective if sharded."""
        net = copy.deepcopy(self.net).eval().requires_grad_(False)
        for name, p in net.named_parameters():
            p.copy_(self._average(index, name))
        return net

    def state_dict(self) -> dict:
        """Profiles, and copies of their averages in host memory, in the main process alone. Collective if sharded."""
        main, averages = distributed.is_main(), []
        for index in range(len(self.stds)):
            whole = ((name, self._average(index, name)) for name in self._parameters if self._sharded or main)
            averages.append({name: tensor.detach().to("cpu", copy=True) for name, tensor in whole if main})
        return {"stds": list(self.stds), "averages": averages}

    @torch.no_grad()
    def load_state_dict(self, state: dict, *, force: bool = False) -> None:
        """Restore the averages, whatever the number of processes was. Raises ValueError if profiles differ; with
        `force`, a new one begins with the network's present weights.
        """
        if tuple(state["stds"]) != self.stds and not force:
            raise ValueError(f"the state holds EMA profiles {state['stds']}, this run asks for {list(self.stds)}")
        stored = dict(zip(state["stds"], state["averages"], strict=True))
        for std, share in zip(self.stds, self._shares, strict=True):
            for name, tensor in share.items():
                average = stored.get(std, self._own)[name]
                if average.shape != tensor.shape:
                    raise ValueError(f"the average of {name} is {list(average.shape)}, not {list(tensor.shape)}")
                tensor.copy_(average)
