"""Several processes of one run on one machine, started by torchrun: who does what, what they tell each other, how one's failure ends all.

    torchrun --standalone --nproc-per-node 2 run_experiment.py --adapter checkpoints/my-recall --out results/my-recall
    torchrun --standalone --nproc-per-node 2 train_minimal.py --arm my-recall

Each process has a GPU of its own (NCCL), or with --device cpu a share of the cores (gloo). Without torchrun a run is a group of one, which talks to nobody.
"""
from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.rendezvous import rendezvous

from manifests import UserError

PATIENCE = timedelta(hours=2)  # how long one process waits for another: for the last batch of questions, or a checkpoint of a large base


class Group:
    """The processes of a run, of which rank 0 leads: it alone prints and writes what there is one of. store: torchrun's, None where there is one process."""

    def __init__(self, rank: int = 0, size: int = 1, store=None):
        self.rank, self.size, self.store = rank, size, store

    @property
    def leads(self) -> bool:
        return self.rank == 0

    def say(self, text: str) -> None:
        if self.leads:
            print(text)

    def speaks(self) -> bool:
        """Whether this process is the one that says why the run ends: the first that asks. Where torchrun itself is gone each does."""
        if self.size == 1:
            return True
        try:
            return self.store.compare_set("speaks", "", str(self.rank)) == str(self.rank).encode()
        except dist.DistError:
            return True

    def once(self, make: Callable):
        """What make() gives on the leader, on every process; what it refuses (UserError, OSError) is raised on every process."""
        if self.size == 1:
            return make()
        told = [None, None]
        if self.leads:
            try:
                told[0] = make()
            except (UserError, OSError) as refused:
                told[1] = refused
        self._together(lambda: dist.broadcast_object_list(told, src=0))
        if told[1] is not None:
            raise told[1]
        return told[0]

    def sum(self, tensor: torch.Tensor) -> torch.Tensor:
        """The tensor, of one shape on every process, summed over them in place."""
        if self.size > 1:
            self._together(lambda: dist.all_reduce(tensor))
        return tensor

    def summed(self, tensor: torch.Tensor) -> torch.Tensor:
        """The sum over the processes as a function of each one's tensor: gradients flow back to all of them."""
        return tensor if self.size == 1 else Summed.apply(tensor, self)

    def sum_gradients(self, parameters: list[torch.nn.Parameter]) -> None:
        """Each process's gradients become those of the sum of their losses. The same parameters have one on every process."""
        grads = [p.grad for p in parameters if p.grad is not None]
        if self.size > 1:
            flat = self.sum(torch.cat([grad.flatten() for grad in grads]))
            for grad, whole in zip(grads, flat.split([grad.numel() for grad in grads])):
                grad.copy_(whole.view_as(grad))

    def agree(self, make: Callable) -> bool:
        """Whether make() gives every process what it gives the leader; it is not called where there is one process."""
        if self.size == 1:
            return True
        value = make()
        return not self.sum(torch.tensor([float(self.once(lambda: value) != value)]))

    def wait(self) -> None:
        """Go on when all processes have come here."""
        self.sum(torch.zeros(1))

    def turns(self, name: str, count: int) -> Iterator[int]:
        """Of the numbers below count those that are this process's: whoever is free takes the next one. name: of what is shared out, once a run."""
        if self.size == 1:
            yield from range(count)
            return
        while (number := self._together(lambda: self.store.add(name, 1)) - 1) < count:
            yield number

    def take_gpu(self, device: str) -> None:
        """Make this process's own GPU the one that "cuda" names; UserError where there are fewer than processes. device: as on the command line."""
        if self.size == 1 or device == "cpu" or not torch.cuda.is_available():
            return
        if self.size > torch.cuda.device_count():
            raise UserError(f"--nproc-per-node {self.size}: torch sees {torch.cuda.device_count()} GPUs here; start as many processes, or use --device cpu")
        torch.cuda.set_device(self.rank)

    def _together(self, call: Callable):
        try:
            return call()
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:
            said = next(iter(str(error).splitlines()), "no reason given")
            raise UserError(f"another process of this run, or torchrun, has ended before its time, or they cannot reach each other ({said}); "
                            "what is in the run's folder is kept, go on with --resume") from error


class Summed(torch.autograd.Function):
    """Group.sum with a gradient: a tensor is in every process's sum, so its gradient is the sum of theirs."""

    @staticmethod
    def forward(ctx, tensor, group):
        ctx.group = group
        return group.sum(tensor.clone())

    @staticmethod
    def backward(ctx, grad):
        return ctx.group.sum(grad.clone()), None


@contextmanager
def process_group() -> Iterator[Group]:
    """The Group that this process belongs to; a script's main runs inside. An error is told once, by the process that meets it first: torchrun
    then ends the others."""
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        yield Group()
        return
    store, rank, size = next(rendezvous("env://"))
    group = Group(rank, size, store)
    try:
        if os.environ.get("LOCAL_WORLD_SIZE") != os.environ["WORLD_SIZE"]:
            raise UserError("several machines in one run are not supported, since its folder is locked and written on one; "
                            "use torchrun --standalone --nproc-per-node N")
        backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"  # in words: left out, torch takes NCCL alone, and counts and flags are sums on the CPU
        dist.init_process_group(backend, store=dist.PrefixStore("collectives", store), rank=rank, world_size=size, timeout=PATIENCE)
        yield group
    except (Exception, KeyboardInterrupt):
        if not group.speaks():  # the same error on every process, or what follows from another one's
            sys.exit(1)
        raise
    dist.destroy_process_group()


def check_sharding(group: Group, joint: bool, compiled: bool) -> None:
    """UserError where a base cannot be spread over the group's processes."""
    if group.size == 1:
        raise UserError("--shard-base: there is one process to spread the base over; start several with torchrun --standalone --nproc-per-node N")
    if compiled:
        raise UserError("--shard-base: a base that is spread over processes gathers each layer as it is called; leave --compile or --shard-base out")
    if joint:  # FSDP2 brings a layer's weights back when a gradient comes to its output; that of a write comes in between, at the MLP's input
        raise UserError("--shard-base: the gradient of a joint arm's write enters a layer where its weights are not there; leave --joint or --shard-base out")


def shard_base(loaded, device: torch.device, group: Group) -> None:
    """Spread a frozen base that was loaded on the CPU over the processes' devices: each holds a slice of every decoder layer, and the whole of one layer
    only while that runs (FSDP2). Embeddings, the last norm and the head stay whole on each. To be done before anything is attached.

    From here on all processes make the same forward calls, in step. What may not be spread: check_sharding.
    """
    decoder, mesh = loaded.model.get_decoder(), init_device_mesh(device.type, (group.size,))
    for layer in decoder.layers:
        fully_shard(layer, mesh=mesh)
    in_layers = {id(p) for p in decoder.layers.parameters()}
    fully_shard(decoder, mesh=mesh, ignored_params={p for p in decoder.parameters() if id(p) not in in_layers})
    loaded.model.to(device)
    with torch.no_grad():  # the first call makes the decoder the root of its layers: of all of them, which a call of decoding.lowest would not
        decoder(input_ids=torch.zeros(1, 1, dtype=torch.long, device=device), use_cache=False)
