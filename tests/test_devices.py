"""Every script on a machine that pretends to have a GPU: nothing computes with tensors of two devices.

torch tells torch.device("cpu", 0) from torch.device("cpu"), and computes on the CPU with both. So the first one plays
the GPU here: which tensors lie on it is noted, tensor by tensor, and what CUDA would refuse is refused. What only a GPU
can show (its kernels, memory, speed) is not tested.
"""
import shutil
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from conftest import SCRIPTS, script
from torch.multiprocessing.reductions import StorageWeakRef
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

CPU, GPU, META = torch.device("cpu"), torch.device("cpu", 0), torch.device("meta")
aten = torch.ops.aten
INDEX = (aten.index.Tensor, aten.index_put.default, aten.index_put_.default, aten._index_put_impl_.default)
NO_SCALARS = (aten.cat.default, aten.stack.default)
inside = []     # for each call that is under way: has it tensors of the GPU? What torch itself makes in it (the zeros of a
                # backward pass) it makes on the real device: such tensors are on none here, and go with all others
places = {}     # address of a storage: (the storage, lest its address is used again; its device)


def tensors_in(tree):
    return [x for x in tree_leaves(tree) if isinstance(x, torch.Tensor)]


def device_of(tensor):
    """CPU, GPU, meta (a model's weights before they are loaded); or None: what torch made for itself inside a call."""
    return tensor.device if tensor.is_meta else places.get(tensor.untyped_storage()._cdata, (None, CPU))[1]


def put(tensor, device):
    storage = tensor.untyped_storage()
    places[storage._cdata] = StorageWeakRef(storage), device


def wanted(device):
    """CPU, GPU or meta: what a script means by a device, or by the name of one."""
    device = torch.device(device)
    return device if device in (CPU, META) else GPU


class Operations(TorchDispatchMode):
    """Sees every operation, those of the backward pass too."""

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        tensors = tensors_in((args, kwargs))
        if operation in INDEX:                                # its index may be a tensor of the CPU
            tensors = [x for x in tensors if device_of(x) == GPU or all(x is not index for index in args[1])]
        # A single number may be on the CPU.
        on = {device_of(x) for x in tensors if x.dim() or device_of(x) == GPU or operation in NO_SCALARS} - {None}
        if len(on) > 1 and operation != aten.copy_.default:
            raise RuntimeError(f"{operation}: tensors on two devices")
        if kwargs.get("device") is not None and not any(inside):
            target = wanted(kwargs["device"])
        else:
            target = GPU if GPU in on else None if any(inside) and not on else CPU
        if target == GPU and any(isinstance(x, torch.Generator) for x in tree_leaves((args, kwargs))):
            raise RuntimeError(f"{operation}: a generator of the CPU for a tensor of the GPU")
        found = operation(*args, **kwargs)
        for x in tensors_in(found):
            if not x.is_meta and x.untyped_storage()._cdata not in places:     # else a view, or the same tensor
                put(x, target)
        return found


class Python(TorchFunctionMode):
    """Sees every call from Python: what asks for a tensor's device, or moves it."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs, tensor = dict(kwargs or {}), args[0] if args else None
        if isinstance(kwargs.get("device"), (str, torch.device)):
            kwargs["device"] = wanted(kwargs["device"])       # "cuda", which torch refuses here
        if function == torch.Tensor.device.__get__:
            return device_of(tensor)
        if function in (torch.Tensor.numpy, torch.Tensor.__array__) and device_of(tensor) == GPU:
            raise TypeError("a tensor of the GPU cannot become an array of numpy")
        if function in (torch.Tensor.to, torch.Tensor.cpu):
            device, dtype = CPU if function == torch.Tensor.cpu else None, None
            for x in (*args[1:], *kwargs.values()):
                device = wanted(x) if isinstance(x, (str, torch.device)) else device_of(x) if isinstance(x, torch.Tensor) else device
                dtype = x if isinstance(x, torch.dtype) else x.dtype if isinstance(x, torch.Tensor) else dtype
            device = device or device_of(tensor)
            moved = tensor.to(dtype or tensor.dtype, copy=device != device_of(tensor) or kwargs.get("copy", False))
            put(moved, device)
            return moved
        inside.append(any(device_of(x) == GPU for x in tensors_in((args, kwargs))))
        try:
            found = function(*args, **kwargs)
        finally:
            inside.pop()
        if function in (torch.tensor, torch.as_tensor) and kwargs.get("device") is not None:
            put(found, wanted(kwargs["device"]))
        return found


@contextmanager
def pretended_gpu(monkeypatch):
    def reduce(accelerator, tensor, *more):
        if device_of(tensor) != GPU:                          # with several GPUs, NCCL would refuse it
            raise RuntimeError("processes cannot sum up a tensor of the CPU")
        return real(accelerator, tensor, *more)

    real = Accelerator.reduce
    monkeypatch.setattr(Accelerator, "reduce", reduce)
    monkeypatch.setattr(Accelerator, "device", GPU)
    places.clear()
    with Operations(), Python():
        yield


def test_what_a_gpu_refuses(monkeypatch):
    """The pretended GPU refuses what CUDA refuses, and takes what CUDA takes."""
    here, there = torch.ones(3), lambda *shape: torch.ones(*shape, device=GPU)
    for work in (lambda: here + there(3), lambda: here + there(()), lambda: here[there(3) > 0], lambda: there(3).to("cpu") + there(3),
                 lambda: there(3).index_put_((torch.tensor([0, 1]),), torch.ones(2)), lambda: there(3).gather(0, torch.tensor([0])),
                 lambda: torch.cat([there(3), here]), lambda: torch.nn.Linear(3, 3).to(GPU)(here), lambda: there(3).numpy(),
                 lambda: torch.nn.functional.embedding(torch.tensor([0]), there(3, 3)),
                 lambda: torch.randn(3, device=GPU, generator=torch.Generator())):
        with pretended_gpu(monkeypatch), pytest.raises((RuntimeError, TypeError)):
            work()
    with pretended_gpu(monkeypatch):
        x = torch.nn.Linear(3, 3).to(GPU)(there(2, 3))
        x.sum().backward()
        assert x.device == x.new_zeros(3).device == torch.zeros(2, device=x.device).device == (x * 2.0).device == GPU
        assert (x.cpu() + torch.tensor(1.0)).device == here.device == CPU
        assert (x[torch.tensor([1])] + torch.tensor(1.0)).device == torch.where(x > 0, x, 0.0).device == GPU
        x.detach()[torch.tensor([0])] = here.to(x)


@pytest.mark.parametrize("name", SCRIPTS)
def test_training_and_resuming(name, args, monkeypatch):
    """As on a GPU: in bfloat16, with gradient checkpointing."""
    given = args(name, save_steps=1, gradient_checkpointing=True, **({"steps": 2} if "steps" in script(name).Args.__dataclass_fields__ else {"epochs": 1}))
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    AcceleratorState._reset_state()
    with pretended_gpu(monkeypatch):
        script(name).main(given)
        assert any(device == GPU for _, device in places.values())
        (Path(given.output) / "model.safetensors").unlink()
        shutil.rmtree(sorted(Path(given.output).glob("checkpoints/*"))[-1])
        script(name).main(replace(given, resume=True))
