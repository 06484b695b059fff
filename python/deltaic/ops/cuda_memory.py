"""Where do the CUDA operators compute, and how do arrays get there? The device (torch's, or a test's emulator), its
memory, and the checks that every operator makes on its tensors."""

from __future__ import annotations

import math
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

import ml_dtypes
import numpy as np

from ..errors import ArgumentError
from .cuda_device import OutOfDeviceMemory

if TYPE_CHECKING:
    import torch

Tensor = Any  # torch.Tensor; torch is imported late
Result = TypeVar("Result")
PINNED_BYTES = 1 << 20  # larger arrays are copied while the host waits
_threads = 1


class Device(Protocol):
    """Where the kernels run: the compiled module, the torch device, and how memory is made and filled."""

    module: Any
    torch_device: Any

    def stream(self) -> int: ...  # that work goes to; called before torch or a kernel is given any
    def empty(self, shape: Sequence[int], dtype: torch.dtype) -> Tensor: ...
    def fill(self, target: Tensor, host: Tensor) -> None: ...  # host may change as soon as it returns
    def host_bytes(self, n: int) -> Tensor: ...  # of the host, that `send` and `receive` are fast with
    def send(self, target: Tensor, host: Tensor) -> None: ...  # host may change when `wait` or `receive` has returned
    def receive(self, host: Tensor, source: Tensor) -> None: ...  # waits
    def capture(
        self, run: Callable[[], Result], pool: Any
    ) -> tuple[Graph, Result]: ...  # `run` has been called before; pool: of graphs before, or None
    def free_bytes(self) -> int: ...
    def wait(self) -> None: ...


class Graph(Protocol):
    """Launches that were captured, and their memory. Graphs of one pool overwrite each other's results."""

    def replay(self) -> None: ...
    def pool(self) -> Any: ...


class _Cuda:
    """The GPU. Work goes to torch's current stream; where that changes, the new one waits for what the last one was
    given, so that weights, states and graphs may be used on any."""

    def __init__(self) -> None:
        import torch

        from .cuda_device import open_device

        self.module, self.torch_device = open_device()
        self._stream = torch.cuda.default_stream(self.torch_device)
        self._capture_stream: Any = None

    def stream(self) -> int:
        return int(self._current().cuda_stream)

    def _current(self) -> Any:
        import torch

        stream = torch.cuda.current_stream(self.torch_device)
        if stream != self._stream and not torch.cuda.is_current_stream_capturing():
            stream.wait_stream(self._stream)
            self._stream = stream
        return stream

    def capture(self, run: Callable[[], Result], pool: Any) -> tuple[Graph, Result]:
        import torch

        with torch.cuda.device(self.torch_device):
            torch.cuda.synchronize()
            if self._capture_stream is None:  # one for all: a pool gives memory back to the stream that it came from
                self._capture_stream = torch.cuda.Stream(self.torch_device)
            graph, before = torch.cuda.CUDAGraph(), torch.cuda.current_stream()
            try:
                with torch.cuda.graph(graph, pool=pool, stream=self._capture_stream, capture_error_mode="thread_local"):
                    result = run()
            finally:
                torch.cuda.set_stream(before)  # where a capture fails, torch leaves its own stream as the current one
        return graph, result

    def empty(self, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        import torch

        try:
            return torch.empty(tuple(shape), dtype=dtype, device=self.torch_device)
        except torch.cuda.OutOfMemoryError:
            needed = math.prod(shape) * dtype.itemsize
            raise OutOfDeviceMemory(needed, self.free_bytes()) from None

    def fill(self, target: Tensor, host: Tensor) -> None:
        self.stream()
        if host.numel() == 0:
            return
        if host.numel() * host.element_size() <= PINNED_BYTES:
            target.copy_(host.pin_memory(), non_blocking=True)  # torch keeps the pinned copy until it has been read
        else:
            target.copy_(host)

    def host_bytes(self, n: int) -> Tensor:
        import torch

        return torch.empty(n, dtype=torch.uint8, device="cpu", pin_memory=True)  # whatever torch's default device is

    def send(self, target: Tensor, host: Tensor) -> None:
        self.stream()
        target.copy_(host, non_blocking=True)

    def receive(self, host: Tensor, source: Tensor) -> None:
        stream = self._current()
        host.copy_(source, non_blocking=True)
        stream.synchronize()

    def free_bytes(self) -> int:
        import torch

        free, _ = torch.cuda.mem_get_info(self.torch_device)
        reserved = torch.cuda.memory_reserved(self.torch_device) - torch.cuda.memory_allocated(self.torch_device)
        return int(free + reserved)

    def wait(self) -> None:
        self._current().synchronize()


_device: Device | None = None


def device() -> Device:
    """The device in use, opened on first call. Raises DeviceError if there is none that can be used."""
    global _device
    if _device is None:
        _device = _Cuda()
    return _device


def use_device(new: Device | None) -> None:
    """Compute on `new` from now on (tests: the emulator); None: open the GPU again when needed."""
    global _device
    _device = new
    _vectors.clear()
    _recent.clear()


def set_num_threads(n: int) -> None:
    """Remember `n` >= 1; the host threads of this process do no arithmetic here."""
    global _threads
    if n < 1:
        raise ArgumentError(f"set_num_threads: n is {n}, expected at least 1")
    _threads = int(n)


def num_threads() -> int:
    """The number last given to `set_num_threads` (1 at first)."""
    return _threads


def isa() -> str:
    """The compute capability in use, such as "sm_90"; "emulated" in tests."""
    dev = device()
    if dev.module.emulated:
        return "emulated"
    import torch

    major, minor = torch.cuda.get_device_capability(dev.torch_device)
    return f"sm_{major}{minor}"


def zeros(shape: Sequence[int], dtype: Any) -> Tensor:
    """A zeroed tensor on the device; dtype np.float32, or np.uint16 for bfloat16. MemoryError if the card is full."""
    import torch

    device().stream()
    return new(shape, torch.float32 if np.dtype(dtype) == np.float32 else torch.bfloat16).zero_()


def to_numpy(x: Tensor) -> np.ndarray:
    """A float32 copy in the host's memory; waits for the device."""
    device().stream()
    return x.float().cpu().numpy()


def to_host(x: Tensor) -> np.ndarray:
    """A copy of an array of a state in the host's memory: bfloat16 as uint16 bits, other types as they are."""
    import torch

    device().stream()
    host = x.to("cpu", copy=True)
    bits: np.ndarray = host.view(torch.int16).numpy().view(np.uint16) if x.dtype == torch.bfloat16 else host.numpy()
    return bits


def from_host(array: np.ndarray) -> Tensor:
    """A copy on the device of an array of a state: float32, or bfloat16 as uint16 bits."""
    return upload(array.view(ml_dtypes.bfloat16) if array.dtype == np.uint16 else array)


def free_bytes() -> int:
    """Bytes of the device's memory that can be had."""
    return device().free_bytes()


def require_memory(nbytes: int) -> None:
    """DeviceError if the device has not `nbytes` free, before anything is allocated."""
    free = device().free_bytes()
    if nbytes > free:
        raise OutOfDeviceMemory(nbytes, free, "the model")


def new(shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    return device().empty(shape, dtype)


def copy(x: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """A contiguous copy on the device, in another dtype where that is given."""
    device().stream()
    return new(x.shape, dtype or x.dtype).copy_(x)


def upload(array: np.ndarray) -> Tensor:
    """A copy of a numpy array on the device, in the dtype of the same name (bfloat16 included)."""
    import torch

    array = np.ascontiguousarray(array)
    if not array.flags.writeable:  # a mapped file, or shared by forks: torch would warn
        array = array.copy()
    if array.dtype == ml_dtypes.bfloat16:
        host = torch.from_numpy(array.view(np.int16)).view(torch.bfloat16)
    elif array.dtype == np.uint16:
        host = torch.from_numpy(array.view(np.int16))
    else:
        host = torch.from_numpy(array)
    tensor = new(host.shape, host.dtype)
    device().fill(tensor, host)
    return tensor


_vectors: dict[int, tuple[weakref.ref[np.ndarray], Tensor]] = {}
_recent: list[tuple[int, np.ndarray, Tensor]] = []  # latest first: the stream that fills it, numbers, where they are
_constants: Constants | None = None  # of the graph that is being made

Constants = dict[tuple[str, tuple[int, ...], bytes], Tensor]  # numbers of the host by dtype, shape and contents


def vector(value: Any) -> Tensor:
    """A float32 vector or matrix on the device: a tensor as it is, a numpy array uploaded once while it lives."""
    if not isinstance(value, np.ndarray):
        return value
    if _constants is not None:
        return small(value, np.float32)
    known = _vectors.get(id(value))
    if known is not None and known[0]() is value:
        return known[1]
    key = id(value)
    tensor = upload(value.astype(np.float32, copy=False))
    _vectors[key] = (weakref.ref(value, lambda _: _vectors.pop(key, None)), tensor)
    return tensor


def small(value: Any, dtype: Any = np.int64) -> Tensor:
    """Numbers of one call (lengths, positions, tables) on the device; layers that pass equal ones share the upload."""
    if not isinstance(value, np.ndarray):
        return value
    value = np.ascontiguousarray(value, dtype)
    if _constants is not None:
        key = value.dtype.str, value.shape, value.tobytes()
        if key not in _constants:
            _constants[key] = upload(value)
        return _constants[key]
    stream = device().stream()
    for i, entry in enumerate(_recent):
        filled_by, known, tensor = entry
        if (filled_by, known.dtype, known.shape) == (stream, value.dtype, value.shape) and np.array_equal(known, value):
            _recent[: i + 1] = [entry, *_recent[:i]]
            return tensor
    tensor = upload(value)
    _recent.insert(0, (stream, value.copy(), tensor))
    del _recent[16:]
    return tensor


@contextmanager
def keeping(constants: Constants) -> Iterator[None]:
    """What `small` and `vector` put on the device inside is put into `constants`, and found there: a graph reads it as
    long as it lives."""
    global _constants
    before, _constants = _constants, constants
    try:
        yield
    finally:
        _constants = before


def type_of(x: Tensor) -> int:
    import torch

    return 1 if x.dtype == torch.bfloat16 else 0


def address(tensor: Tensor | None) -> int:
    return 0 if tensor is None else int(tensor.data_ptr())


def check(op: str, name: str, value: Any, shape: Sequence[int | None], dtypes: Sequence[str]) -> None:
    """ArgumentError unless `value` is a contiguous tensor on the device, of this shape (None: any) and dtype."""
    import torch

    wanted = f"{' or '.join(dtypes)}[{','.join('_' if n is None else str(n) for n in shape)}]"
    if not isinstance(value, torch.Tensor):
        raise ArgumentError(f"{op}: {name} is a {type(value).__name__}, expected a torch tensor {wanted}")
    found = f"{str(value.dtype).removeprefix('torch.')}[{','.join(map(str, value.shape))}]"
    fits = value.ndim == len(shape) and all(n is None or n == m for n, m in zip(shape, value.shape, strict=False))
    if not fits or str(value.dtype).removeprefix("torch.") not in dtypes:
        raise ArgumentError(f"{op}: {name} is {found}, expected {wanted}")
    if value.device != torch.device(device().torch_device):
        raise ArgumentError(f"{op}: {name} is on {value.device}, expected {device().torch_device}")
    if not value.is_contiguous():
        raise ArgumentError(f"{op}: {name} is not contiguous; call .contiguous() on it")


ACTIVATION_DTYPES = ("float32", "bfloat16")
