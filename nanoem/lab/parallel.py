"""More than one process: torchrun starts them, torch.distributed connects them, each does a share.

    torchrun --nproc_per_node 2 -m nanoem.run --model PATH [--shard]

Data-parallel: every process holds the model and works on its rows of each batch; the adapter's
gradients, a few numbers, are summed. With --shard every block's frozen weights are also spread over
the processes (FSDP2) and gathered only while that block computes. In one process, nothing happens.
"""

import os
import sys
from contextlib import contextmanager, redirect_stdout

import torch
import torch.distributed as dist

from nanoem import UserError


def start(device):
    """Join the processes that torchrun started. Returns this process's device, such as cuda:1."""
    if n_started() == 1:
        return torch.device(device)
    if device == "mps":
        raise UserError("torchrun works on cuda and cpu; with --device mps start one process")
    if device == "cpu":
        dist.init_process_group("gloo")
        return torch.device(device)

    # a card of its own, taken before it connects
    local = int(os.environ["LOCAL_RANK"])
    if local >= torch.cuda.device_count():
        raise UserError(f"torchrun started more processes than the {torch.cuda.device_count()} "
                        "cuda devices of this machine; lower --nproc_per_node")
    card = torch.device("cuda", local)
    torch.cuda.set_device(card)
    dist.init_process_group("nccl", device_id=card)
    return card


@contextmanager
def started(device):
    """`start`, and leave at the end. In between only the first process's prints are seen."""
    device = start(device)
    try:
        with open(os.devnull, "w") as nowhere:
            with redirect_stdout(sys.stdout if rank() == 0 else nowhere):
                yield device
        wait()  # one that leaves while others still gather can crash as it ends
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


def n_started():
    """How many processes torchrun started; without all four of its variables, one."""
    told = all(os.environ.get(name) for name in ("WORLD_SIZE", "RANK", "LOCAL_RANK", "MASTER_ADDR"))
    return int(os.environ["WORLD_SIZE"]) if told else 1


def n_processes():
    return dist.get_world_size() if dist.is_initialized() else 1


def rank():
    """This process's number; 0 is the one that prints and writes."""
    return dist.get_rank() if dist.is_initialized() else 0


def wait():
    """Go on when every process is here: what one has written, the others may now read."""
    if dist.is_initialized():
        dist.barrier()


def my_rows(n):
    """This process's share of the n rows of a batch, a slice."""
    if n % n_processes():
        raise UserError(f"batch_size={n} cannot be shared by {n_processes()} processes; "
                        "make it a multiple")
    return slice(rank(), None, n_processes())


def total(x):
    """The sum of a tensor over all processes."""
    if dist.is_initialized():
        x = x.detach().clone()
        dist.all_reduce(x)
    return x


def sum_gradients(parameters):
    """Add up every process's gradients, in place."""
    if dist.is_initialized():
        for parameter in parameters:
            dist.all_reduce(parameter.grad)


def refuse_to_shard_alone():
    if not dist.is_initialized():
        raise UserError("--shard spreads the model over several processes; start them with "
                        "torchrun --nproc_per_node N -m nanoem.run ...")


def shard(model, device):
    """Spread every block's weights over the processes; embedding and output layer stay whole."""
    refuse_to_shard_alone()
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh(device.type, (n_processes(),))
    for layer in model.layers:  # each a root, which else stays gathered (with torch 2.7 it does)
        fully_shard(layer, mesh=mesh, reshard_after_forward=True)
    for name, module in model.named_children():
        if name != "layers":
            module.to(device)
    model.cos, model.sin = model.cos.to(device), model.sin.to(device)
    return model
