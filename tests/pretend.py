"""A pretend accelerator: tensors that say they are on cuda:0, over real numbers in host memory.

    with card(64 * 2**20) as gpu:
        model.to("cuda")
        assert gpu.used == bytes_of(model)
        model(x.to("cuda")).cpu()  # bitwise what the CPU gives

Inside, `torch.cuda` tells of one card with so many bytes, and each operation for which a GPU would launch a
kernel is run by the CPU on the same memory. It proves where tensors are and what they take: mixing devices
raises as on a card, bytes are counted by storage from the allocation to the death of the last tensor on it,
and an allocation past the capacity raises `torch.OutOfMemoryError`. It holds in every thread. Random numbers
on the card come from the CPU's generators, so a run equals one on the CPU.

Give it 2 GiB or more where transformers loads with a device map: its warm-up counts on that, as it would on a
real card. Where less must be free, set `gpu.elsewhere`.

It is no GPU: it says nothing of kernels and their workspace, of speed, streams and overlap, of the
allocator's rounding and fragments, or of half precision as a card computes it; and nothing can be trained on
it. It needs a build of torch without CUDA (`AVAILABLE`). Afterwards the process is as before; a tensor that
outlives its context can only be dropped.
"""

from __future__ import annotations

import ctypes
import functools
import importlib
import sys
import threading
import weakref
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import pytest
import torch
from torch.utils._device import _device_constructors

AVAILABLE = not torch.backends.cuda.is_built()
needed = pytest.mark.skipif(not AVAILABLE, reason="the pretend card needs a build of torch without CUDA")
CPU, CUDA = torch.device("cpu"), torch.device("cuda:0")

aten = torch.ops.aten
_current: Gpu | None = None


class Gpu:
    """The memory of the pretend card. All figures in bytes.

    Attributes:
        total: the card's capacity.
        used: held by tensors now; storages count once, however many tensors view them.
        peak: the most that was held since `reset_peak`.
        elsewhere: taken by other processes, as far as this one can tell; set it to play a second program.
        share: the part of the capacity that this process may take (`set_per_process_memory_fraction`).
    """

    def __init__(self, total: int) -> None:
        self.total = total
        self.used = self.peak = self.elsewhere = 0
        self.share = 1.0
        self._memory: dict[int, torch.UntypedStorage] = {}  # by card storage: the host storage it stands for
        self._counts: dict[int, tuple[int, int]] = {}  # by host storage: card storages over it, bytes
        self._lock = threading.RLock()  # storages die in any thread, also while this one allocates

    @property
    def free(self) -> int:
        return max(0, self.total - self.used - self.elsewhere)

    @property
    def storages(self) -> int:
        """How many allocations are alive."""
        return len(self._counts)

    def reset_peak(self) -> None:
        self.peak = self.used

    def lift(self, host: torch.Tensor) -> torch.Tensor:
        """A tensor on the card over the memory of a host tensor, which is counted from now on."""
        storage = host.untyped_storage()
        self._allocate(storage)
        count = storage.nbytes() // host.itemsize
        with _below_autograd():
            flat = torch.empty(0, dtype=host.dtype).set_(storage, 0, (count,), (1,))
            lifted = _relabelled(flat)
        card = lifted.untyped_storage()
        self._memory[card._cdata] = storage
        weakref.finalize(card, self._free, card._cdata, storage._cdata).atexit = False
        return _view(lifted, host)

    def lower(self, tensor: torch.Tensor) -> torch.Tensor:
        """The host tensor over the same memory as a tensor on the card."""
        with _below_autograd():
            host = torch.empty(0, dtype=tensor.dtype).set_(
                self.memory_of(tensor.untyped_storage()),
                tensor.storage_offset(),
                tensor.shape,
                tensor.stride(),
            )
        return _with_bits_of(tensor, host)

    def memory_of(self, card: torch.UntypedStorage) -> torch.UntypedStorage:
        try:
            return self._memory[card._cdata]
        except KeyError:
            raise RuntimeError("This tensor lies on another pretend card, whose context has ended.") from None

    def _allocate(self, storage: torch.UntypedStorage) -> None:
        with self._lock:
            holders, size = self._counts.get(storage._cdata, (0, 0))
            more = storage.nbytes() - size
            allowed = min(int(self.total * self.share), self.total - self.elsewhere)
            if self.used + more > allowed:
                raise torch.OutOfMemoryError(
                    f"CUDA out of memory. Tried to allocate {more} bytes. GPU 0 has a total capacity of "
                    f"{self.total} bytes of which {max(0, allowed - self.used)} bytes is free. (pretend card)"
                )
            self._counts[storage._cdata] = holders + 1, size + more
            self.used += more
            self.peak = max(self.peak, self.used)

    def _free(self, card: int, storage: int) -> None:
        with self._lock:
            del self._memory[card]
            holders, size = self._counts.pop(storage)
            if holders > 1:
                self._counts[storage] = holders - 1, size
            else:
                self.used -= size


@contextmanager
def card(total: int) -> Iterator[Gpu]:
    """Put a card of `total` bytes into this process for the length of the context."""
    global _current
    if not AVAILABLE:
        raise RuntimeError("The pretend card needs a build of torch without CUDA.")
    if _current:
        raise RuntimeError("There is one pretend card at a time.")
    # Some library will import it, and it lists torch's functions as it finds them: let it find the real ones.
    importlib.import_module("torch._dynamo")
    gpu = Gpu(total)
    with ExitStack() as stack:
        stack.enter_context(_kernels())
        stack.enter_context(_device_guard())
        stack.enter_context(_said_by_torch(gpu))
        stack.enter_context(_loading(gpu))
        stack.enter_context(_looking_again())
        _current = gpu
        try:
            yield gpu
        finally:
            _current = None


# Tensors. A card's storage is a host storage under another label: DLPack carries memory between devices'
# owners, and the label is one field of its header (dlpack.h: void *data, then DLDevice {int32 type, id}).

_DL_CUDA = 2
_pointer_in = ctypes.pythonapi.PyCapsule_GetPointer
_pointer_in.restype, _pointer_in.argtypes = ctypes.c_void_p, [ctypes.py_object, ctypes.c_char_p]


def _relabelled(host: torch.Tensor) -> torch.Tensor:
    capsule = torch._C._to_dlpack(host)
    header = _pointer_in(capsule, b"dltensor")
    ctypes.c_int32.from_address(header + ctypes.sizeof(ctypes.c_void_p)).value = _DL_CUDA
    return torch._C._from_dlpack(capsule)


def _view(anchor: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """A tensor over the storage of `anchor`, laid out as `like`."""
    inside = torch._C._meta_in_tls_dispatch_include()
    # The meta kernels of views know no device and touch no data, so they serve the card's tensors too.
    torch._C._set_meta_in_tls_dispatch_include(True)
    try:
        with _below_autograd():
            if anchor.dtype != like.dtype:
                count = anchor.untyped_storage().nbytes() // anchor.itemsize
                flat = aten.view.dtype(aten.as_strided.default(anchor, (count,), (1,), 0), torch.uint8)
                whole = flat.numel() // like.itemsize * like.itemsize
                anchor = aten.view.dtype(aten.as_strided.default(flat, (whole,), (1,), 0), like.dtype)
            view = aten.as_strided.default(anchor, like.shape, like.stride(), like.storage_offset())
    finally:
        torch._C._set_meta_in_tls_dispatch_include(inside)
    return _with_bits_of(like, view)


def _with_bits_of(source: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    if source.is_conj() != target.is_conj():
        torch._C._set_conj(target, source.is_conj())
    if source.is_neg() != target.is_neg():
        torch._C._set_neg(target, source.is_neg())
    return target


def _below_autograd() -> Any:
    return torch._C._AutoDispatchBelowADInplaceOrView()


# Kernels. The dispatcher sends what a GPU would run to the key CUDA; there each operation is run by the CPU.

# These choose a kernel by the device before the dispatcher is asked again; the choice must be the CPU's.
_WHOLE = {
    *("lstm.input", "lstm.data", "gru.input", "gru.data", "rnn_tanh.input", "rnn_tanh.data"),
    *("rnn_relu.input", "rnn_relu.data", "lstm_cell", "gru_cell", "rnn_tanh_cell", "rnn_relu_cell"),
    "scaled_dot_product_attention",
}
# These run on any tensor, and must: nn.Parameter wants from them a tensor without a Python object.
_NATIVE = {"detach", "alias"}
_ACROSS = {"copy_", "copy", "_foreach_copy_", "set_", "resize_as_", "_copy_from", "_copy_from_and_resize"}
_INDEXING = {"index", "_unsafe_index", "index_put", "index_put_", "_index_put_impl_", "_unsafe_index_put"}
# Arguments, and results, by their place, that stay in host memory: the lengths of packed sequences.
_ON_HOST = {"_pack_padded_sequence": 1, "lstm.data": 1, "gru.data": 1, "rnn_tanh.data": 1, "rnn_relu.data": 1}
_HOST_RESULTS = {"aten::_pack_padded_sequence": 1}


@contextmanager
def _kernels() -> Iterator[None]:
    rest, mine = torch.library.Library("_", "IMPL"), torch.library.Library("aten", "IMPL")
    try:
        rest.fallback(_run, "CUDA")
        for name, op in _covered():
            mine.impl(name, functools.partial(_run, op), "CUDA")
        yield
    finally:
        mine._destroy()
        rest._destroy()


@functools.cache
def _covered() -> list[tuple[str, Any]]:
    """Operations that the fallback would not see, since they have a kernel for any device."""
    has = torch._C._dispatch_has_kernel_for_dispatch_key
    generic = ("CompositeExplicitAutograd", "CompositeExplicitAutogradNonFunctional")
    found = []
    for full in torch._C._dispatch_get_all_op_names():
        space, _, name = full.partition("::")
        if space != "aten" or name in _NATIVE or has(full, "CUDA"):
            continue
        if name in _WHOLE or any(has(full, key) for key in generic):
            packet, _, overload = name.partition(".")
            found.append((name, getattr(getattr(aten, packet), overload or "default")))
    return found


def _run(op: Any, *args: Any, **kwargs: Any) -> Any:
    """One operation on the card: by the CPU, on the host memory of its arguments."""
    gpu = _current
    if gpu is None:
        raise RuntimeError("The context of this tensor's pretend card has ended.")
    device = kwargs.get("device")
    if device is not None and device.index not in (None, 0):
        raise torch.AcceleratorError("CUDA error: invalid device ordinal (pretend card)")
    _check_devices(op, args, kwargs)
    call = _Call(gpu, device is None or device.type == "cuda")
    result = op(*map(call.lower, args), **{name: call.lower(value) for name, value in kwargs.items()})
    if op._schema.is_mutable:
        call.follow()
    return call.lift(result, _HOST_RESULTS.get(op._schema.name))


class _Call:
    """The tensors of one operation, on both sides."""

    def __init__(self, gpu: Gpu, to_card: bool) -> None:
        self.gpu = gpu
        self.to_card = to_card
        self.hosts: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}  # by id: host tensor, given tensor
        self.over: dict[int, torch.Tensor] = {}  # by host storage: a given tensor over it

    def lower(self, value: Any) -> Any:
        if isinstance(value, torch.Tensor):
            host = value
            if value.is_cuda:
                host = self.gpu.lower(value)
                self.over[host.untyped_storage()._cdata] = value
            self.hosts[id(host)] = host, value
            return host
        if isinstance(value, torch.UntypedStorage):
            return self.gpu.memory_of(value) if value.device.type == "cuda" else value
        if isinstance(value, torch.device):
            return CPU if value.type == "cuda" else value
        return type(value)(map(self.lower, value)) if isinstance(value, (list, tuple)) else value

    def lift(self, value: Any, on_host: int | None = None) -> Any:
        """A result; one at the place `on_host` of several stays in host memory."""
        if isinstance(value, torch.Tensor):
            if id(value) in self.hosts:
                return self.hosts[id(value)][1]
            if not self.to_card:
                return value
            anchor = self.over.get(value.untyped_storage()._cdata)
            return self.gpu.lift(value) if anchor is None else _view(anchor, value)
        if isinstance(value, (list, tuple)):
            lifted = (part if place == on_host else self.lift(part) for place, part in enumerate(value))
            return type(value)(lifted)
        return value

    def follow(self) -> None:
        """Give each tensor the layout and storage that an operation in place gave to its host tensor."""
        for host, given in self.hosts.values():
            if not given.is_cuda:
                continue
            storage, card = host.untyped_storage(), given.untyped_storage()
            grown = storage.nbytes() > card.nbytes()
            if storage._cdata == self.gpu.memory_of(card)._cdata and not grown:
                if _layout(host) != _layout(given):
                    given.data = _view(given, host)
            else:
                anchor = self.over.get(storage._cdata)
                given.data = self.gpu.lift(host) if anchor is None or grown else _view(anchor, host)


def _layout(tensor: torch.Tensor) -> tuple[Any, ...]:
    return tensor.shape, tensor.stride(), tensor.storage_offset()


def _check_devices(op: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Refuse what a card refuses: a tensor in host memory beside one on the card.

    Most kernels want one device; the wrapper that torchgen writes around each checks it. Those marked NoCheck
    check for themselves: TensorIterator takes numbers, that is tensors without dimensions, from the host, but
    writes to none there; indexing takes its indices from there. Copies go across.
    """
    name = op._schema.name.removeprefix("aten::")
    full = f"{name}.{op._schema.overload_name}".rstrip(".")
    generator = kwargs.get("generator")
    if generator is not None and generator._cdata not in _CardGenerator.made:
        raise RuntimeError("Expected a 'cuda' device type for generator but found 'cpu'")
    if name in _ACROSS:
        return
    if name in _INDEXING and not args[0].is_cuda:
        raise RuntimeError(
            "indices should be either on cpu or on the same device as the indexed tensor (cpu)"
        )
    beside = 1 if name in _INDEXING else _ON_HOST.get(full)
    checked = [value for place, value in enumerate(args) if place != beside]
    tensors = list(_tensors([*checked, *kwargs.values()]))
    on_host = [tensor for tensor in tensors if tensor.device.type == "cpu"]
    if not on_host or not any(tensor.is_cuda for tensor in tensors):
        return
    numbers = full in _checking_themselves() and all(tensor.dim() == 0 for tensor in on_host)
    if not numbers or any(tensor.device.type == "cpu" for tensor in _tensors(_written(op, args, kwargs))):
        raise RuntimeError(
            "Expected all tensors to be on the same device, but found at least two devices, cuda:0 and cpu! "
            f"(when running {full} on the pretend card)"
        )


def _tensors(values: Iterable[Any]) -> Iterator[torch.Tensor]:
    for value in values:
        if isinstance(value, torch.Tensor):
            yield value
        elif isinstance(value, (list, tuple)):
            yield from _tensors(value)


def _written(op: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Iterator[Any]:
    for place, argument in enumerate(op._schema.arguments):
        if argument.alias_info is not None and argument.alias_info.is_write:
            yield args[place] if place < len(args) else kwargs.get(argument.name)


@functools.cache
def _checking_themselves() -> frozenset[str]:
    """Operations marked `device_check: NoCheck` in the list from which torchgen writes torch's kernels."""
    listed = Path(torch.__path__[0]).parent / "torchgen/packaged/ATen/native/native_functions.yaml"
    entries = listed.read_text("utf-8").split("\n- func: ")[1:]
    return frozenset(entry.split("(")[0] for entry in entries if "device_check: NoCheck" in entry)


# What C++ asks of a device before it dispatches anything: which one is current.


class _Guard(torch._C._acc.DeviceGuard):
    def type_(self) -> Any:
        return torch._C._autograd.DeviceType.CUDA


_GUARD = _Guard()  # torch keeps a bare pointer to it
_PLACES = {"CUDA": 1, "PrivateUse1": 20}  # c10/core/DeviceType.h


@contextmanager
def _device_guard() -> Iterator[None]:
    """Torch takes a guard in Python only for a backend of one's own: register it as that, then move it."""
    library = ctypes.CDLL(str(next((Path(torch.__path__[0]) / "lib").glob("libc10.*"))))
    registry = (ctypes.c_void_p * (_PLACES["PrivateUse1"] + 1)).in_dll(
        library, "_ZN3c104impl26device_guard_impl_registryE"
    )
    before = {place: registry[place] for place in _PLACES.values()}
    torch._C._acc.register_python_privateuseone_device_guard(_GUARD)
    registry[_PLACES["CUDA"]] = registry[_PLACES["PrivateUse1"]]
    registry[_PLACES["PrivateUse1"]] = before[_PLACES["PrivateUse1"]]
    try:
        yield
    finally:
        for place, guard in before.items():
            registry[place] = guard


# What Python asks of torch.


class _CardGenerator(torch.Generator):
    """Random numbers for the card, drawn by the CPU's generator of the same seed."""

    device = CUDA
    made: set[int] = set()  # noqa: RUF012  # by address, for kernels get them without their class

    def __init__(self) -> None:
        super().__init__()
        self.made.add(self._cdata)

    def __del__(self) -> None:
        self.made.discard(self._cdata)


def _generator(device: Any = "cpu") -> torch.Generator:
    return _CardGenerator() if torch.device(device).type == "cuda" else torch._C.Generator(device)


def _stand_in(real: type, make: Callable[..., Any]) -> type:
    """In place of a class written in C: calls `make`, and takes the real one's instances for its own."""

    class Kind(type):
        def __call__(cls, *args: Any, **kwargs: Any) -> Any:
            return make(*args, **kwargs)

        def __instancecheck__(cls, instance: object) -> bool:
            return isinstance(instance, real)

    return Kind(real.__name__, (), {})


def _numbered(function: Callable[..., Any], place: int | None = None) -> Callable[..., Any]:
    """Take a bare number for a card, by keyword or at a place, and pin: C++ wants an accelerator for both."""

    def named(device: Any) -> Any:
        return f"cuda:{device}" if type(device) is int else device

    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        if "device" in kwargs:
            kwargs["device"] = named(kwargs["device"])
        if place is not None:
            args = (*args[:place], *map(named, args[place : place + 1]), *args[place + 1 :])
        pinned = kwargs.pop("pin_memory", False)
        made = function(*args, **kwargs)
        return made.pin_memory() if pinned else made

    return call


class _Stream:
    """Everything has happened by the time it was asked for, so a stream, or an event, has nothing to do."""

    device, device_index, priority, cuda_stream = CUDA, 0, 0, 0

    def __init__(self, *_: Any, **__: Any) -> None: ...

    def synchronize(self, *_: Any) -> None: ...

    wait = wait_event = wait_stream = record = synchronize

    def record_event(self, event: Any = None) -> Any:
        return event or _Event()

    def query(self) -> bool:
        return True

    def __enter__(self) -> Any:
        return self

    def __exit__(self, *_: Any) -> None: ...


class _Event(_Stream):
    def elapsed_time(self, _end: Any) -> float:
        return 0.0


def _torch_cuda(gpu: Gpu) -> dict[str, Any]:
    properties = SimpleNamespace(
        name="Pretend card",
        total_memory=gpu.total,
        major=8,
        minor=0,
        multi_processor_count=1,
        is_integrated=False,
    )
    stream = _Stream()

    def nothing(*_: Any, **__: Any) -> None: ...

    def share(fraction: float, device: Any = None) -> None:
        gpu.share = fraction

    return {
        **dict.fromkeys(("init", "_lazy_init", "set_device", "synchronize", "empty_cache"), nothing),
        **dict.fromkeys(("ipc_collect", "manual_seed", "manual_seed_all", "set_stream"), nothing),
        **dict.fromkeys(("is_available", "is_initialized", "is_bf16_supported"), lambda *_, **__: True),
        **dict.fromkeys(("memory_allocated", "memory_reserved"), lambda device=None: gpu.used),
        **dict.fromkeys(("max_memory_allocated", "max_memory_reserved"), lambda device=None: gpu.peak),
        **dict.fromkeys(
            ("reset_peak_memory_stats", "reset_max_memory_allocated"), lambda device=None: gpu.reset_peak()
        ),
        **dict.fromkeys(("current_stream", "default_stream"), lambda device=None: stream),
        **dict.fromkeys(("_exchange_device", "_maybe_exchange_device"), lambda index: 0),
        "device_count": lambda: 1,
        "current_device": lambda: 0,
        "get_device_name": lambda device=None: properties.name,
        "get_device_properties": lambda device=None: properties,
        "get_device_capability": lambda device=None: (properties.major, properties.minor),
        "mem_get_info": lambda device=None: (gpu.free, gpu.total),
        "memory_stats": lambda device=None: {
            "allocated_bytes.all.current": gpu.used,
            "allocated_bytes.all.peak": gpu.peak,
        },
        "set_per_process_memory_fraction": share,
        "get_rng_state": lambda device=None: torch.get_rng_state(),
        "get_rng_state_all": lambda: [torch.get_rng_state()],
        "set_rng_state": lambda state, device=None: torch.set_rng_state(state),
        "set_rng_state_all": lambda states: torch.set_rng_state(states[0]),
        "Stream": _Stream,
        "Event": _Event,
        "stream": lambda stream: nullcontext(stream),
    }


def _torch_accelerator(cuda: dict[str, Any]) -> dict[str, Any]:
    return {
        **{name: value for name, value in cuda.items() if hasattr(torch.accelerator, name)},
        "current_accelerator": lambda check_available=False: torch.device("cuda"),
        "current_device_index": cuda["current_device"],
        "set_device_index": cuda["set_device"],
        "get_memory_info": cuda["mem_get_info"],
        "empty_host_cache": cuda["empty_cache"],
    }


@contextmanager
def _said_by_torch(gpu: Gpu) -> Iterator[None]:
    cuda = _torch_cuda(gpu)
    pinned: set[int] = set()

    def pin(tensor: torch.Tensor, device: Any = None) -> torch.Tensor:
        if tensor.is_cuda:
            raise RuntimeError("cannot pin 'torch.cuda.FloatTensor' only dense CPU tensors can be pinned")
        if is_pinned(tensor):
            return tensor
        copied = tensor.clone()
        storage = copied.untyped_storage()
        pinned.add(storage._cdata)
        weakref.finalize(storage, pinned.discard, storage._cdata).atexit = False
        return copied

    def is_pinned(tensor: torch.Tensor, device: Any = None) -> bool:
        return tensor.device.type == "cpu" and tensor.untyped_storage()._cdata in pinned

    deepcopy = torch.Tensor.__deepcopy__

    def copied(tensor: torch.Tensor, memo: dict[int, Any]) -> torch.Tensor:
        if not tensor.is_cuda or id(tensor) in memo or type(tensor) is not torch.Tensor:
            return deepcopy(tensor, memo)
        memo[id(tensor)] = tensor.detach().clone().requires_grad_(tensor.requires_grad)
        return memo[id(tensor)]

    changes: dict[Any, dict[str, Any]] = {
        torch.cuda: cuda,
        torch.accelerator: _torch_accelerator(cuda),
        torch.Tensor: {
            "pin_memory": pin,
            "is_pinned": is_pinned,
            "record_stream": lambda *_: None,
            "__deepcopy__": copied,
            "to": _numbered(torch.Tensor.to, 1),
            "cuda": _numbered(torch.Tensor.cuda, 1),
        },
        torch: {
            "device": _stand_in(torch.device, _numbered(torch.device, 0)),
            "Generator": _stand_in(torch.Generator, _generator),
            **{f.__name__: _numbered(f) for f in _device_constructors() if f.__name__ in vars(torch)},
        },
        torch._C._nn: {"_parse_to": _numbered(torch._C._nn._parse_to, 0)},
        # It would warn at each LSTM that torch has no cuDNN.
        torch.backends.cudnn: {"is_acceptable": lambda _tensor: False},
    }
    with ExitStack() as stack:
        for owner, values in changes.items():
            for name, value in values.items():
                stack.enter_context(patch.object(owner, name, value))
        yield


@contextmanager
def _loading(gpu: Gpu) -> Iterator[None]:
    """`torch.load(..., map_location="cuda")` moves storages, which are no tensors and dispatch nothing."""
    registry = torch.serialization._package_registry

    def restore(storage: Any, location: str) -> Any:
        if not location.startswith("cuda"):
            return None
        host = torch.empty(0, dtype=torch.uint8).set_(storage)
        return gpu.lift(host).untyped_storage()

    entry = (5, lambda _storage: None, restore)
    registry.insert(0, entry)
    try:
        yield
    finally:
        registry.remove(entry)


@contextmanager
def _looking_again() -> Iterator[None]:
    """What libraries remember of there being a card is forgotten, and found out anew, here and afterwards."""
    state = _accelerate_state()
    kept = dict(state)
    try:
        _forget()
        state.clear()
        yield
    finally:
        _forget()
        _accelerate_state().clear()
        _accelerate_state().update(kept)


def _forget() -> None:
    for name, module in list(sys.modules.items()):
        if name.startswith(("accelerate.", "diffusers.utils", "transformers.utils")):
            for value in list(vars(module).values()):
                members = vars(value).values() if isinstance(value, type) else [value]
                for member in members:
                    function = (
                        getattr(member, "__func__", None) if isinstance(member, staticmethod) else member
                    )
                    if isinstance(function, functools._lru_cache_wrapper):
                        function.cache_clear()


def _accelerate_state() -> dict[str, Any]:
    module = sys.modules.get("accelerate.state")
    return module.PartialState._shared_state if module else {}
