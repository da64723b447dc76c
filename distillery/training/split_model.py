"""A model that is split between the ranks of a training: PyTorch's FSDP, by its `fully_shard`.

Each rank holds a share of every weight. While a layer computes, forward or backward, its weights
are gathered from all ranks; then each rank gets the sum of the gradients of its own share. All of
this happens in step: every rank must make the same passes in the same order, whatever its rows are.
"""

from collections.abc import Iterable, Iterator, Mapping
from itertools import repeat
from typing import TYPE_CHECKING, Any

from distillery.models.device import Device

if TYPE_CHECKING:
    import torch


def split_model(model: Any, device: Device, not_split: Iterable["torch.nn.Parameter"]) -> None:
    """Split `model`, which is in main memory, between all ranks. Its layers go to the ranks'
    devices one after another, so that no device holds more than its shares and one layer, or the
    embeddings and the head.

    `not_split`: parameters that every rank holds all of. The caller keeps no list of the others,
    which would keep their memory on the device."""
    import torch
    import torch.distributed as dist
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard

    mesh = init_device_mesh(device.name, (dist.get_world_size(),))
    ignored = set(not_split)
    layers = list(model.get_decoder().layers)
    within = {module for layer in layers for module in layer.modules()}
    # Embeddings, the last norm and the head. They are gathered where they run themselves, because
    # some passes go through the decoder alone, and together, because two may share their weights.
    others = []
    for module in model.modules():
        own = set(module.parameters(recurse=False))
        if module not in within and own - ignored:
            others.append(module)
    products = MixedPrecisionPolicy(
        param_dtype=torch.bfloat16, reduce_dtype=torch.float32, cast_forward_inputs=False
    )
    for layer in layers:
        if device.precision == "bfloat16" and not ignored:
            # Else autocast would keep a copy of all weights in bfloat16 until the backward pass.
            linear: list[torch.nn.Module] = []
            for module in layer.modules():
                if isinstance(module, torch.nn.Linear):
                    linear.append(module)
            fully_shard(linear, mesh=mesh, mp_policy=products)
        fully_shard(layer, mesh=mesh, ignored_params=ignored)
    fully_shard(others, mesh=mesh, ignored_params=ignored)
    fully_shard(model, mesh=mesh, ignored_params=ignored)
    for module in model.modules():
        if isinstance(module, FSDPModule):
            # A loss is a mean over rows and not over ranks: the sum of what the ranks have.
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)
    # What is not split: all that is left in main memory.
    model.to(device.name)
    # FSDP takes the module that makes the first pass for the whole model.
    token = torch.zeros(1, 1, dtype=torch.long, device=device.name)
    with torch.no_grad(), device.autocast():
        model(input_ids=token)


def are_ranks() -> bool:
    """Return whether this process is one of several that train together."""
    import torch.distributed as dist

    return dist.is_available() and dist.is_initialized()


def is_split(model: Any) -> bool:
    """Return whether `split_model` has split the model."""
    if not are_ranks():
        return False
    from torch.distributed.fsdp import FSDPModule

    return isinstance(model, FSDPModule)


def is_share(tensor: "torch.Tensor") -> bool:
    """Return whether a tensor is split between the ranks."""
    if not are_ranks():
        return False
    from torch.distributed.tensor import DTensor

    return isinstance(tensor, DTensor)


def in_step(model: Any, batches: Iterable[list[int]]) -> Iterator[list[int]]:
    """Give `batches`, of which each is a pass. Where the model is split, give the last one again
    until every rank has had as many."""
    if not is_split(model):
        yield from batches
        return
    import torch
    import torch.distributed as dist

    own = list(batches)
    most = torch.tensor(len(own))
    dist.all_reduce(most, dist.ReduceOp.MAX)
    yield from own
    yield from repeat(own[-1], int(most) - len(own))


def own_share(tensor: "torch.Tensor") -> "torch.Tensor":
    """Return what this rank holds of a tensor, in the same memory."""
    found: Any = tensor.detach()
    own: torch.Tensor = found.to_local() if is_share(tensor) else found
    return own


def share_of(whole: "torch.Tensor", weight: "torch.Tensor") -> "torch.Tensor":
    """Return `whole`, which every rank has, split as `weight` is."""
    if not is_share(weight):
        return whole
    from torch.distributed.tensor import distribute_tensor

    split: Any = weight
    return distribute_tensor(whole, split.device_mesh, split.placements, src_data_rank=None)


def shares_of(
    whole: Mapping[str, "torch.Tensor"], weights: Mapping[str, "torch.Tensor"]
) -> dict[str, "torch.Tensor"]:
    """Return this rank's shares of `whole`, which every rank has, in main memory. They are split as
    the `weights` of the same names are."""
    return {
        name: own_share(share_of(whole[name], weight)).cpu() for name, weight in weights.items()
    }


def joined(share: "torch.Tensor", weight: "torch.Tensor") -> "torch.Tensor":
    """Return the whole tensor of which this rank holds `share`, split as `weight` is: in main
    memory on the first rank, and empty on the others. If `weight` is not split, return `share`."""
    if not is_share(weight):
        return share
    import torch
    import torch.distributed as dist
    from torch.distributed.tensor import DTensor

    like: Any = weight
    split = DTensor.from_local(
        share.to(like.device),
        like.device_mesh,
        like.placements,
        shape=like.shape,
        stride=like.stride(),
    )
    whole = split.full_tensor()
    return whole.cpu() if dist.get_rank() == 0 else torch.empty(0)


def joined_weights(
    shares: Mapping[str, "torch.Tensor"], weights: Mapping[str, "torch.Tensor"]
) -> dict[str, "torch.Tensor"]:
    """Return the whole tensors of `shares`, as `joined` does, by the names of `weights`."""
    return {name: joined(own_share(shares[name]), weight) for name, weight in weights.items()}


def joined_state(state: dict[str, Any], weights: Iterable["torch.Tensor"]) -> dict[str, Any]:
    """Return an optimiser's state dict with whole moments of its `weights`, as `joined` does."""
    by_number, whole = list(weights), {}
    for number, moments in state["state"].items():
        whole[number] = {
            name: joined(own_share(moment), by_number[number]) if is_share(moment) else moment
            for name, moment in moments.items()
        }
    return state | {"state": whole}


def state_of(whole: dict[str, Any], weights: Iterable["torch.Tensor"]) -> dict[str, Any]:
    """Return an optimiser's state dict, of which every rank has all, split as its `weights` are."""
    by_number, split = list(weights), {}
    for number, moments in whole["state"].items():
        weight = by_number[number]
        # Beside the moments there is the number of steps.
        split[number] = {
            name: share_of(moment, weight) if moment.shape == weight.shape else moment
            for name, moment in moments.items()
        }
    return whole | {"state": split}


def join_model(model: Any) -> None:
    """Put whole weights into a split model, in main memory, to write them: on the first rank, while
    those of the others are empty. The model makes no pass any more."""
    import torch

    found: dict[torch.Tensor, torch.nn.Parameter] = {}
    for module in model.modules():
        for name, weight in module.named_parameters(recurse=False):
            if is_share(weight):
                if weight not in found:
                    whole = joined(own_share(weight), weight)
                    found[weight] = torch.nn.Parameter(whole, weight.requires_grad)
                module._parameters[name] = found[weight]
