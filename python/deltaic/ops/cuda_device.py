"""Can this process compute on an NVIDIA GPU, and if not, what exactly is missing? One clear DeviceError per reason; the
facts that `deltaic info` shows; how much memory is free. torch is imported only when a card is asked for."""

from __future__ import annotations

import importlib
import importlib.util
from types import ModuleType
from typing import Any

from ..errors import DeviceError

_OTHERWISE = 'or use device="cpu"'


class OutOfDeviceMemory(DeviceError, MemoryError):
    """The card has too little memory, for something that would be allocated or that was about to be."""

    def __init__(self, needed: int, free: int, what: str = "this"):
        super().__init__(
            f"device: {what} needs {needed / 1e9:.1f} GB of GPU memory, {free / 1e9:.1f} GB are free; "
            f'close other programs, load the model as dtype="int4", use a smaller cache_bytes, {_OTHERWISE}'
        )


def _version(number: int) -> str:
    """13000 -> "13.0"."""
    return f"{number // 1000}.{number % 1000 // 10}"


def _extension() -> ModuleType:
    if importlib.util.find_spec("deltaic._cuda") is None:
        raise DeviceError(
            'device: "cuda" is not in this build of deltaic, which was made without the CUDA compiler; install deltaic '
            f"from source where nvcc is found (DELTAIC_CUDA=ON), {_OTHERWISE}"
        )
    try:
        return importlib.import_module("deltaic._cuda")
    except ImportError as error:
        raise DeviceError(f'device: "cuda": the extension cannot be loaded ({error}); install deltaic again') from error


def _torch() -> ModuleType:
    if importlib.util.find_spec("torch") is None:
        raise DeviceError(
            f'device: "cuda" needs torch, which is not installed; pip install "deltaic[cuda]", {_OTHERWISE}'
        )
    return importlib.import_module("torch")


def open_device() -> tuple[ModuleType, Any]:
    """(the extension, the current torch device). Raises DeviceError: built without CUDA, torch missing or without CUDA,
    no card, driver too old, or a card that this build has no kernels for."""
    module = _extension()
    torch = _torch()
    check_device(module, torch)
    index = torch.cuda.current_device()
    module.use_device(index)
    return module, torch.device("cuda", index)


def check_device(module: Any, torch: Any) -> None:
    """Raises DeviceError for the first reason that keeps `module` from running kernels on the current card."""
    problem = module.device_problem()
    driver, built = module.driver_version(), _version(module.toolkit_version)
    if problem == "cudaErrorInsufficientDriver" and driver:
        raise DeviceError(
            f'device: "cuda": the NVIDIA driver runs CUDA up to {_version(driver)}, this build needs {built}; '
            f"update the driver, {_OTHERWISE}"
        )
    if problem in ("cudaErrorNoDevice", "cudaErrorInsufficientDriver"):
        raise DeviceError(f'device: "cuda": no NVIDIA GPU is visible to this process; check nvidia-smi, {_OTHERWISE}')
    if problem:
        raise DeviceError(f'device: "cuda": the CUDA runtime cannot start ({problem}); check nvidia-smi, {_OTHERWISE}')
    if not torch.cuda.is_available():
        raise DeviceError(
            f'device: "cuda": torch {torch.__version__} cannot use the GPU (built for CUDA: {torch.version.cuda}); '
            f"install a torch build with CUDA, {_OTHERWISE}"
        )
    torch.cuda.init()
    if not module.has_kernels():
        major, minor = torch.cuda.get_device_capability()
        raise DeviceError(
            f'device: "cuda": {torch.cuda.get_device_name()} is sm_{major}{minor}, and this build holds kernels for '
            f"{module.architectures}; build deltaic with DELTAIC_CUDA_ARCHS={major}{minor}, {_OTHERWISE}"
        )


def facts() -> dict[str, Any]:
    """For `deltaic info`: what is built in, and the card with its driver or the reason why it cannot be used."""
    if importlib.util.find_spec("deltaic._cuda") is None:
        return {"cuda": "not in this build"}
    found: dict[str, Any] = {"cuda": "cannot be loaded"}
    try:
        module = _extension()
        driver = module.driver_version()
        found = {
            "cuda": f"toolkit {_version(module.toolkit_version)}, {module.architectures}",
            "cuda_driver": _version(driver) if driver else "none",
        }
        torch = _torch()
        check_device(module, torch)
    except DeviceError as error:
        return {**found, "gpu": f"none ({str(error).removeprefix('device: ')})"}
    major, minor = torch.cuda.get_device_capability()
    _, total = torch.cuda.mem_get_info()
    return {**found, "gpu": f"{torch.cuda.get_device_name()}, sm_{major}{minor}", "gpu_memory": int(total)}
