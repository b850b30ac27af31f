"""Which backends exist, which this machine has, and the error for the others."""

import functools
import importlib
import importlib.util
import os
from typing import Any, NamedTuple

import torch
from torch import Tensor

NAMES = ("reference", "cpu", "triton", "cuda", "cuda_host")


HAS_TRITON = importlib.util.find_spec("triton") is not None
LARGEST_HEAD = 256  # of the Triton kernels


class BackendUnavailable(RuntimeError):
    """The named backend cannot run this call; the message says why and what can."""


class Backend(NamedTuple):
    """One backend of this machine."""

    available: bool
    reason: str  # what it is, or why it is missing


def backends() -> dict[str, Backend]:
    """Tells what this machine has.

    Returns a dict from backend name to ``Backend(available, reason)``, in the order ``reference``,
    ``cpu``, ``triton``, ``cuda``, ``cuda_host``. No device is initialised.

    >>> import pydecode
    >>> pydecode.backends()["reference"].available
    True
    """
    no_kernels = "no kernel of this backend has landed in this version"
    no_gpu = "" if torch.cuda.is_available() else "; torch sees no CUDA device either"
    return {
        "reference": Backend(True, "PyTorch, any device, any float dtype"),
        "cpu": Backend(False, no_kernels),
        "triton": _triton(),
        "cuda": Backend(False, no_kernels + no_gpu),
        "cuda_host": Backend(False, no_kernels),
    }


def _triton() -> Backend:
    if not HAS_TRITON:
        return Backend(False, "the package triton is not installed")
    if _interpreted():
        return Backend(True, "Triton kernels, interpreted on CPU tensors (slow: for tests)")
    if torch.cuda.is_available():
        return Backend(True, "Triton kernels, NVIDIA sm_80 and newer, AMD")
    return Backend(False, f"torch sees no GPU; {_CPU}")


_CPU = "CPU tensors need TRITON_INTERPRET=1 (for tests), set before Triton is imported"


def _interpreted() -> bool:
    return os.environ.get("TRITON_INTERPRET") == "1"


def choose(
    op: str,
    backend: str | None,
    has: tuple[str, ...] = ("reference",),
    q: Tensor | None = None,
    *head_dims: int,
) -> str:
    """The backend of a call: the named one or an error; None: the first of ``has``.

    An op with Triton kernels also hands in the tensor that the call computes with, and head dims.
    """
    if backend is None:  # by name only until a GPU has run and timed them
        return has[0]
    if backend not in has:
        raise unavailable(op, backend, has)
    if backend == "triton" and q is not None and (why := no_triton(op, q, *head_dims)):
        raise BackendUnavailable(f"{op}: 'triton' cannot run this call: {why}")
    return backend


def no_triton(op: str, q: Tensor, *head_dims: int) -> str:
    """Why the Triton kernels cannot compute with q; "" if they can."""
    if not HAS_TRITON:
        return "the package triton is not installed"
    if q.dtype == torch.float64:
        return "it accumulates in fp32; the reference computes in fp64"
    if any(d > LARGEST_HEAD for d in head_dims):
        return f"head dims up to {LARGEST_HEAD}, got {max(head_dims)}"
    if q.is_cuda:
        index = q.device.index
        capability = _CAPABILITIES.get(index) or _capability(index)
        if capability < (8, 0):
            return f"compute capability 8.0 or newer, got {capability}"
        return ""
    if q.device.type != "cpu":
        return f"CUDA and ROCm tensors, got one on {q.device.type}"
    return "" if _interpreted() else _CPU


@functools.cache  # an import inside a function costs 2 us a call
def triton_kernels(name: str) -> Any:
    """A module of ``pydecode.triton_kernels``, imported when it is first called."""
    return importlib.import_module(f"pydecode.triton_kernels.{name}")


_CAPABILITIES: dict[int | None, tuple[int, int]] = {}


def _capability(index: int | None) -> tuple[int, int]:
    """Of a CUDA device, asked once; an AMD one counts as new enough."""
    found = (9, 0) if torch.version.hip else torch.cuda.get_device_capability(index)
    return _CAPABILITIES.setdefault(index, found)


def unavailable(op: str, backend: str, has: tuple[str, ...] = ("reference",)) -> Exception:
    """The error for a backend that an op does not have."""
    if backend not in NAMES:
        return ValueError(f"backend: expected None or one of {', '.join(NAMES)}, got {backend!r}")
    return BackendUnavailable(
        f"{op} has no {backend!r} backend: {backends()[backend].reason}. "
        f"It has {', '.join(has)}; backend=None picks the fastest of them."
    )
