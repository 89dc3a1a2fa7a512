"""Training one network in several processes: replicated gradients, and what can be divided between the processes."""

import warnings
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Adam, Optimizer
from torch.utils._pytree import tree_map_only

from torch_utils import distributed
from training.phema import spread

GO_ON, STOP, INTERRUPT, FAIL = range(4)  # verdicts of a process on how training should proceed


class Replica(DistributedDataParallel):
    """A network whose gradients, views of the messages' buffers, are averaged over the processes while computed."""

    def __init__(self, net: nn.Module) -> None:
        exact = torch.are_deterministic_algorithms_enabled()  # a resumed run then adds up in the same order
        # buffers are constants
        options = dict(broadcast_buffers=False, gradient_as_bucket_view=True, find_unused_parameters=exact)
        with warnings.catch_warnings():  # later releases rename the option, earlier ones know no other name
            warnings.filterwarnings("ignore", message=".broadcast_buffers. is deprecated", category=FutureWarning)
            super().__init__(net, **options)

    @property
    def sigma_data(self) -> float:
        return self.module.sigma_data


def replicate(net: nn.Module) -> nn.Module:
    """The network to call in training: a Replica where there are several processes, else `net` itself. `net` must not
    require gradients, nor does it afterwards.
    """
    replica = net if distributed.world_size() == 1 else Replica(net.requires_grad_(True))
    net.requires_grad_(False)
    return replica


def accumulate(net: nn.Module, last: bool) -> AbstractContextManager:
    """Context of one accumulation round: processes exchange gradients in the last one only."""
    return nullcontext() if last or not isinstance(net, Replica) else net.no_sync()


def gravest(verdict: int, device: torch.device) -> int:
    """The gravest verdict (GO_ON to FAIL) of any process. Collective."""
    if distributed.world_size() == 1:
        return verdict
    shared = torch.tensor(verdict, dtype=torch.int32, device=device)
    torch.distributed.all_reduce(shared, op=torch.distributed.ReduceOp.MAX)
    return int(shared)


def to_host(tree: Any) -> Any:
    """The same nested dicts and lists with copies of all tensors in host memory, so that training may go on."""
    return tree_map_only(Tensor, lambda tensor: tensor.detach().to("cpu", copy=True), tree)


def build_optimizer(net: nn.Module, device: torch.device, *, beta1: float = 0.9, shard: bool = False) -> Optimizer:
    """Adam on all parameters; with `shard` its moments are divided between the processes (ZeRO, stage 1)."""
    betas = (beta1, 0.99)
    if not shard or distributed.world_size() == 1:
        return Adam(net.parameters(), betas=betas, fused=device.type in ("cpu", "cuda"))
    from torch.distributed.optim import ZeroRedundancyOptimizer  # not there on every system

    fused = device.type == "cpu"  # elsewhere fused Adam wants its step counts on the device, and gets them on the CPU
    parameters = net.requires_grad_(True).parameters()  # as when it steps
    optimizer = ZeroRedundancyOptimizer(parameters, Adam, betas=betas, fused=fused)
    net.requires_grad_(False)
    return optimizer


def optimizer_state(optimizer: Optimizer) -> dict[str, Any]:
    """Copies of moments and step counts by parameter in host memory, in the main process alone. Collective."""
    if hasattr(optimizer, "consolidate_state_dict"):
        return {"state": _collect(optimizer)}
    return {"state": to_host(optimizer.state_dict()["state"]) if distributed.is_main() else {}}


def _collect(optimizer: Optimizer) -> dict[int, dict[str, Tensor]]:
    """Moments of a divided optimizer (ZeroRedundancyOptimizer) in the main process, tensor by tensor. torch's own way
    sends pickled shards to every process, which takes 40 times as long and several times the memory.
    """
    params = optimizer.param_groups[0]["params"]
    index = {p: i for i, p in enumerate(params)}
    own = {index[p]: entry for p, entry in optimizer.optim.state.items()}
    parts: list[dict[int, list[str]]] = [{}] * distributed.world_size()
    torch.distributed.all_gather_object(parts, {i: sorted(entry) for i, entry in own.items()})
    state: dict[int, dict[str, Tensor]] = {}
    for i, owner, keys in sorted((i, owner, keys) for owner, part in enumerate(parts) for i, keys in part.items()):
        for key in keys:
            like = params[i].new_empty([] if key == "step" else params[i].shape)
            value = spread(own[i][key].to(like.device) if i in own else like, owner)
            if distributed.is_main():
                state.setdefault(i, {})[key] = value.cpu()
    return state


def load_optimizer_state(optimizer: Optimizer, state: dict[str, Any]) -> None:
    """Take in what `optimizer_state` returned, whatever the number of processes was then."""
    (group,) = optimizer.param_groups
    settings = group | {"params": list(range(len(group["params"])))}
    own = {id(p) for g in getattr(optimizer, "optim", optimizer).param_groups for p in g["params"]}
    moments = {}
    for i, entry in state["state"].items():
        p = group["params"][i]
        shapes = {key: list(value.shape) for key, value in entry.items()}
        if shapes != {"step": [], "exp_avg": list(p.shape), "exp_avg_sq": list(p.shape)}:
            raise ValueError(f"moments of parameter {i} are {shapes}, where its shape is {list(p.shape)}")
        if id(p) in own:  # copies, in the memory layout of the parameter, as fused Adam presumes; ZeRO drops the others
            made = {k: torch.empty_like(p, device="cpu").copy_(v) for k, v in entry.items() if k != "step"}
            entry = {"step": entry["step"].clone(), **made}
        moments[i] = entry
    optimizer.load_state_dict({"state": moments, "param_groups": [settings]})
    if hasattr(optimizer, "optim"):
        optimizer.state.clear()  # the wrapped one has the moments; these are copies that nobody uses
