"""A pretend GPU: tensors on a device "gpu" that compute in host memory and refuse what CUDA refuses.

A tensor of it may not meet a CPU tensor, but for single numbers in elementwise operators, and for indices, as on CUDA.
`PretendGpu` counts, by line of the package:

    launches    operators that run on the device; views and empty tensors are none. One each, whatever CUDA makes of it
    uploads     copies from the host, all of them
    downloads   copies to the host, all of them
    waits       places where the host waits for the device: `item()`, `nonzero`, boolean indices, `equal`, and copies
                that are blocking or whose host memory is not pinned

`pin_memory` works as far as it is counted, in every thread. Streams and events do nothing, since all happens in order.
Registering a device is for a process and for good, so tests run this in processes of their own (`run_ranks`).
"""

from __future__ import annotations

import contextlib
import sys
from collections import Counter
from collections.abc import Iterator
from types import FrameType
from typing import Any, Optional

import torch
from torch import Tensor, nn
from torch.__future__ import get_swap_module_params_on_conversion, set_swap_module_params_on_conversion
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.backend_registration import _setup_privateuseone_for_python_backend

NAME, PACKAGE = "gpu", "megatron_switchlora"
aten = torch.ops.aten
INDEXING = {aten.index.Tensor, aten.index_put_.default, aten.index_put.default, aten._index_put_impl_.default}
TAKES_NUMBERS = {*INDEXING, aten.fill_.Tensor, aten.fill.Tensor, aten.masked_fill.Tensor, aten.masked_fill_.Tensor}
WAITING = {
    aten._local_scalar_dense.default, aten.nonzero.default, aten.equal.default, aten.masked_select.default,
    aten.is_nonzero.default, aten.unique_dim.default, aten._unique2.default, aten.repeat_interleave.Tensor,
    aten.bincount.default, aten._linalg_svd.default, aten.linalg_eigh.default, aten._linalg_eigh.default,
}  # fmt: skip
NO_KERNEL = {
    aten.empty.memory_format, aten.empty_strided.default, aten.empty_like.default, aten.new_empty.default,
    aten.new_empty_strided.default, aten.detach.default, aten.alias.default, aten.lift_fresh.default,
    aten.set_.source_Storage_storage_offset, aten.set_.source_Tensor, aten.resize_.default,
    aten._unsafe_view.default, aten._reshape_alias.default,
}  # fmt: skip


class MixedDevices(RuntimeError):
    """A tensor of the GPU met one of the CPU."""


class GpuTensor(Tensor):
    """A tensor of the pretend GPU; `held` has its values, on the CPU."""

    held: Tensor

    @staticmethod
    def __new__(cls, held: Tensor) -> GpuTensor:
        made = Tensor._make_wrapper_subclass(  # type: ignore[attr-defined]
            cls,
            held.size(),
            strides=held.stride(),
            storage_offset=held.storage_offset(),
            dtype=held.dtype,
            device=torch.device(NAME, 0),
        )
        made.held = held
        return made

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        return f"GpuTensor({self.held!r})"

    def tolist(self) -> Any:
        return self.cpu().tolist()

    def untyped_storage(self) -> torch.UntypedStorage:
        return self.held.untyped_storage()

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore[override]
        raise AssertionError(f"{func} outside of PretendGpu")


class Counts:
    """What a stretch of code asked of the GPU, each by the line of the package that asked."""

    def __init__(self) -> None:
        self.launches: Counter[str] = Counter()
        self.uploads: Counter[str] = Counter()
        self.downloads: Counter[str] = Counter()
        self.waits: Counter[str] = Counter()

    def totals(self, under: str = "") -> dict[str, int]:
        """Sums over the lines of files under a path of the package, by default over all lines."""
        return {
            kind: sum(count for line, count in lines.items() if line.startswith(under))
            for kind, lines in vars(self).items()
        }


def line_of_package() -> str:
    """Return the innermost line of the package on the stack, as file:line, else of the tests; autograd has none."""
    frame: Optional[FrameType] = sys._getframe(1)
    tests = "elsewhere"
    while frame is not None:
        file = frame.f_code.co_filename
        if f"/{PACKAGE}/" in file:
            return f"{file.split(f'/{PACKAGE}/')[-1]}:{frame.f_lineno}"
        if tests == "elsewhere" and "/tests/" in file and file != __file__:
            tests = f"tests/{file.split('/tests/')[-1]}:{frame.f_lineno}"
        frame = frame.f_back
    return tests


def on_gpu(device: Any) -> bool:
    return device is not None and torch.device(device).type == NAME


class DeviceModule:
    """What torch asks of `torch.gpu`; activation checkpointing keeps a state of random numbers."""

    def is_initialized(self) -> bool:
        return True

    def is_available(self) -> bool:
        return True

    def _is_in_bad_fork(self) -> bool:
        return False

    def current_device(self) -> int:
        return 0

    def device_count(self) -> int:
        return 1

    def manual_seed_all(self, seed: int) -> None:
        pass

    def get_amp_supported_dtype(self) -> list[torch.dtype]:
        return [torch.bfloat16]

    def device(self, index: int) -> contextlib.AbstractContextManager[None]:
        return contextlib.nullcontext()

    def get_rng_state(self, device: Any = None) -> Tensor:
        return torch.get_rng_state()

    def set_rng_state(self, state: Tensor, device: Any = None) -> None:
        torch.set_rng_state(state)


def register() -> torch.device:
    """Register the device in this process; return it."""
    if torch._C._get_privateuse1_backend_name() != NAME:
        _setup_privateuseone_for_python_backend(NAME, backend_module=DeviceModule())
    return torch.device(NAME, 0)


class PretendGpu(TorchDispatchMode):
    """Run operators on the pretend GPU, and count them in `counts`."""

    def __init__(self) -> None:
        super().__init__()
        self.device, self.counts = register(), Counts()
        self._pinned: dict[int, torch.UntypedStorage] = {}  # by address; held, so that no other takes the address

    def __enter__(self) -> PretendGpu:
        self._lifted, self._swaps = torch._C._only_lift_cpu_tensors(), get_swap_module_params_on_conversion()
        set_swap_module_params_on_conversion(True)
        nn.Module._apply = apply_keeping_attributes  # type: ignore[method-assign,assignment]
        Tensor.pin_memory = lambda tensor: self._pin(tensor.clone())  # type: ignore[method-assign,assignment,misc]
        Tensor.data = property(TORCHS_DATA.__get__, set_data)  # type: ignore[assignment,misc]
        torch._C._set_only_lift_cpu_tensors(True)  # torch.tensor([..], device=gpu) is made on the host and copied
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        del Tensor.data, Tensor.pin_memory
        nn.Module._apply = TORCHS_APPLY  # type: ignore[method-assign]
        set_swap_module_params_on_conversion(self._swaps)
        torch._C._set_only_lift_cpu_tensors(self._lifted)

    def fresh(self) -> Counts:
        """Start new counts, and return them."""
        self.counts = Counts()
        return self.counts

    @contextlib.contextmanager
    def part(self) -> Iterator[Counts]:
        """Count what happens inside also by itself."""
        whole, part = self.counts, Counts()
        self.counts = part
        try:
            yield part
        finally:
            for kind, lines in vars(part).items():
                getattr(whole, kind).update(lines)
            self.counts = whole

    def is_pinned(self, tensor: Tensor) -> bool:
        return tensor.untyped_storage().data_ptr() in self._pinned

    def _pin(self, tensor: Tensor) -> Tensor:
        self._pinned[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage()
        return tensor

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        flat = tensors_in((*args, *kwargs.values()))
        here = [leaf for leaf in flat if isinstance(leaf, GpuTensor)]
        if func is aten.is_pinned.default:
            return not here and self.is_pinned(args[0])
        if func is aten.record_stream.default:
            return None
        if func is aten._to_copy.default:
            return self._to_copy(bool(here), args, kwargs)
        if func is aten.copy_.default and here:
            return self._copy(*args, **kwargs)
        if not here and not on_gpu(kwargs.get("device")):
            pins = kwargs.pop("pin_memory", False)
            result = func(*args, **kwargs)
            return self._pin(result) if pins else result
        self._check(func, args, kwargs, flat if here else [])
        self._count(func, args)
        return self._run(func, args, kwargs)

    def _to_copy(self, from_gpu: bool, args: Any, kwargs: dict[str, Any]) -> Tensor:
        to_gpu = on_gpu(kwargs["device"]) if kwargs.get("device") is not None else from_gpu
        lets_run = kwargs.pop("non_blocking", False)
        pins = kwargs.pop("pin_memory", None)
        source = args[0].held if from_gpu else args[0]
        target = {**kwargs, "device": torch.device("cpu")} if "device" in kwargs else kwargs
        made = aten._to_copy.default(source, **target)
        if from_gpu and not to_gpu:
            self._copied("downloads", lets_run)  # torch takes pinned memory for the copy itself if it may run on
            return self._pin(made) if lets_run or pins else made
        if not from_gpu and to_gpu:
            self._copied("uploads", lets_run and self.is_pinned(source))
        elif to_gpu:
            self.counts.launches[line_of_package()] += 1
        return GpuTensor(made) if to_gpu else made

    def _copy(self, target: Tensor, source: Tensor, non_blocking: bool = False) -> Tensor:
        to_gpu, from_gpu = isinstance(target, GpuTensor), isinstance(source, GpuTensor)
        inner_target, inner_source = held_by(target), held_by(source)
        inner_target.copy_(inner_source)
        if to_gpu and from_gpu:
            self.counts.launches[line_of_package()] += 1
        elif to_gpu:
            self._copied("uploads", non_blocking and self.is_pinned(inner_source))
        else:
            self._copied("downloads", non_blocking and self.is_pinned(inner_target))
        return target

    def _copied(self, kind: str, runs_on: bool) -> None:
        line = line_of_package()
        getattr(self.counts, kind)[line] += 1
        if not runs_on:
            self.counts.waits[line] += 1

    def _check(self, func: Any, args: Any, kwargs: Any, tensors: list[Tensor]) -> None:
        """Raise where CUDA raises: at tensors of both devices."""
        takes_numbers = func in TAKES_NUMBERS or torch.Tag.pointwise in func.tags
        for tensor in tensors:
            if isinstance(tensor, GpuTensor):
                continue
            index = func in INDEXING and any(tensor is each for each in args[1])
            if not index and not (tensor.dim() == 0 and takes_numbers):
                shape = tuple(tensor.shape)
                raise MixedDevices(f"{func} got a CPU tensor {shape} among the GPU's, at {line_of_package()}")
        if func in INDEXING and not isinstance(args[0], GpuTensor):
            raise MixedDevices(f"{func} got the GPU's indices for a CPU tensor, at {line_of_package()}")

    def _count(self, func: Any, args: Any) -> None:
        line = None
        if func in INDEXING:
            line = line_of_package()
            indices = [index for index in args[1] if index is not None]
            if any(index.dtype in (torch.bool, torch.uint8) for index in indices):
                self.counts.waits[line] += 1
            for index in indices:
                if not isinstance(index, GpuTensor) and index.dim() > 0:
                    self._copied("uploads", False)
        if func in WAITING:
            self.counts.waits[line or line_of_package()] += 1
        elif func not in NO_KERNEL and not is_view(func):
            self.counts.launches[line or line_of_package()] += 1

    def _run(self, func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        inner_args, inner_kwargs = held_by(args), {key: held_by(value) for key, value in kwargs.items()}
        if "device" in inner_kwargs:
            inner_kwargs["device"] = torch.device("cpu")
        made = func(*inner_args, **inner_kwargs)
        if func._schema.is_mutable:
            return written(func, args, kwargs, made)
        return on_gpu_as_made(made)


def tensors_in(values: Any) -> list[Tensor]:
    """Return the tensors among an operator's arguments, which are values or flat lists of them."""
    found = []
    for value in values:
        if isinstance(value, Tensor):
            found.append(value)
        elif isinstance(value, (list, tuple)):
            found += [each for each in value if isinstance(each, Tensor)]
    return found


def held_by(value: Any) -> Any:
    if isinstance(value, GpuTensor):
        return value.held
    return type(value)(map(held_by, value)) if isinstance(value, (list, tuple)) else value


def on_gpu_as_made(value: Any) -> Any:
    if isinstance(value, Tensor):
        return GpuTensor(value)
    return type(value)(map(on_gpu_as_made, value)) if isinstance(value, (list, tuple)) else value


def is_view(func: Any) -> bool:
    return any(each.alias_info is not None and not each.alias_info.is_write for each in func._schema.returns)


def written(func: Any, args: Any, kwargs: dict[str, Any], made: Any) -> Any:
    """Return what an operator that writes to its arguments returns: those arguments, in order."""
    targets = []
    for place, argument in enumerate(func._schema.arguments):
        if argument.alias_info is not None and argument.alias_info.is_write:
            targets.append(args[place] if place < len(args) else kwargs.get(argument.name))
    if not func._schema.returns:
        return None
    others = list(on_gpu_as_made(made if isinstance(made, (list, tuple)) else [made]))
    returns = [
        targets.pop(0) if each.alias_info is not None and targets else others[place]
        for place, each in enumerate(func._schema.returns)
    ]
    return returns[0] if len(returns) == 1 else tuple(returns)


def set_data(target: Tensor, value: Tensor) -> None:
    """Let `tensor.data = other` change a tensor's device, which torch does for its own devices alone."""
    if isinstance(target, GpuTensor) == isinstance(value, GpuTensor):
        TORCHS_DATA.__set__(target, value)
        if isinstance(target, GpuTensor) and isinstance(value, GpuTensor):
            target.held = value.held
        return None
    made = value.detach()
    if isinstance(target, nn.Parameter):
        made = nn.Parameter(made, requires_grad=target.requires_grad)
    made.__dict__.update({key: each for key, each in target.__dict__.items() if key != "held"})
    torch.utils.swap_tensors(target, made)


TORCHS_DATA = torch._C.TensorBase.data


def apply_keeping_attributes(module: nn.Module, act: Any, recurse: bool = True) -> nn.Module:
    """What `Module.to` and its kin call: as torch's, parameters stay the same objects with their attributes."""
    kept = {param: dict(param.__dict__) for param in module.parameters()}
    TORCHS_APPLY(module, act, recurse)
    for param, attributes in kept.items():
        param.__dict__.update({key: each for key, each in attributes.items() if key != "held"})
    return module


TORCHS_APPLY = nn.Module._apply
