"""Models whose parameters are divided among processes (FSDP2), and their tensors, whole or in parts.

torch's fully_shard keeps 1/N of each parameter, gradient and optimizer state on each of N ranks; a block's parameters are whole
only while it computes. They are DTensors, divided by rows.
"""

import sys

import torch
import torch.distributed as dist
from torch import Tensor, nn

from papagaio import runtime
from papagaio.errors import UserError
from papagaio.training.options import RunOptions
from papagaio.training.parallel import World

BYTES = 16  # of a trained parameter in training: itself, its gradient and two moments, in float32


def place(model: nn.Module, config: RunOptions, device: torch.device, world: World) -> nn.Module:
    """Move a model to its device, or divide it among the ranks, in place, as --parallel says; auto divides a model that does not
    fit into one GPU.

    The model has been built whole in the memory of each process. Raises UserError for options that do not go with FSDP.
    """
    size = sum(BYTES * p.numel() if p.requires_grad else p.nbytes for p in model.parameters())
    large = device.type == "cuda" and size > 0.6 * torch.cuda.get_device_properties(device).total_memory
    if world.size == 1 or not (config.parallel == "fsdp" or (config.parallel == "auto" and large)):
        return model.to(device)
    dtype = runtime.pick_dtype(config.dtype, device)
    if dtype == torch.float16:
        raise UserError(
            "--parallel=fsdp: float16 needs a common loss scale, which is not there; give --dtype bfloat16 or float32"
        )
    if config.auto_microbatch:
        raise UserError("--parallel=fsdp: --auto_microbatch cannot repeat a step that ranks compute together; leave it out")
    print(f"the model is divided among {world.size} processes; no texts are shown, because none has it whole", file=sys.stderr)
    return shard(model, device, world, dtype)


def shard(model: nn.Module, device: torch.device, world: World, dtype: torch.dtype = torch.float32) -> nn.Module:
    """Divide the parameters of each block, and then those outside of the blocks, among all ranks, in place. On a GPU, blocks
    compute in `dtype`; gradients are added up in float32, and not divided by the number of ranks."""
    from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard

    mesh = dist.init_device_mesh(device.type, (world.size,))
    # Embeddings and the head stay in float32: the head's gradient is added up piece by piece (papagaio/kernels.py).
    mixed = {"param_dtype": dtype, "reduce_dtype": torch.float32, "cast_forward_inputs": False}
    policy = MixedPrecisionPolicy(**mixed if device.type == "cuda" and dtype != torch.float32 else {})
    for block in model.blocks:
        fully_shard(block, mesh=mesh, mp_policy=policy)
    # By default, what is outside of the blocks stays whole after a forward pass: then an evaluation would leave other parameters.
    fully_shard(model, mesh=mesh, reshard_after_forward=True)
    model.to(device)  # buffers
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(device.type == "cpu")  # gloo has no other
    return model


def is_sharded(model: nn.Module) -> bool:
    return any(is_divided(p) for p in model.parameters())


def is_divided(tensor: Tensor) -> bool:
    """Whether a tensor is a DTensor, whose module takes half a second to import: most runs and all generation need none."""
    return hasattr(tensor, "device_mesh")


def local(tensor: Tensor) -> Tensor:
    """The part of a tensor that this rank has; of an undivided one, all."""
    return tensor.to_local() if is_divided(tensor) else tensor


def part_for(tensor: Tensor, like: Tensor) -> Tensor:
    """The part of a whole tensor that this rank has of `like`, which has the same shape."""
    if not is_divided(like):
        return tensor
    rows = -(-len(tensor) // like.device_mesh.size())
    first = rows * like.device_mesh.get_local_rank()
    return tensor[first : first + rows]


def divided(tensor: Tensor, like: Tensor) -> Tensor:
    """A whole tensor, divided as `like` is."""
    if not is_divided(like):
        return tensor
    from torch.distributed.tensor import DTensor

    own = part_for(tensor, like).to(like.device).contiguous()
    return DTensor.from_local(own, like.device_mesh, like.placements, shape=like.shape, stride=like.stride())


def whole(tensor: Tensor) -> Tensor:
    """A divided tensor put together on every rank, which all must call."""
    return tensor.full_tensor() if is_divided(tensor) else tensor


def holders(tensors: list[Tensor], world: World) -> list[int]:
    """The first rank that has each of these tensors, or its part; the others have placeholders on the meta device."""
    if world.size == 1:
        return [0] * len(tensors)
    found = torch.tensor([world.size if tensor.is_meta else world.rank for tensor in tensors])
    dist.all_reduce(found, dist.ReduceOp.MIN)
    return found.tolist()


def to_rank_0(tensor: Tensor, holder: int, device: torch.device, world: World) -> Tensor:
    """On rank 0 the whole tensor, which is divided or which the rank `holder` has. All ranks must call this."""
    if is_divided(tensor) or holder == 0:
        return whole(tensor)
    if world.rank == holder:
        dist.send(tensor.contiguous(), 0)
    elif world.rank == 0:
        tensor = torch.empty(tensor.shape, dtype=tensor.dtype, device=device)
        dist.recv(tensor, holder)
    return tensor
