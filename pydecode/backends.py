"""Which backends exist, which this machine has, and the error for the others."""

import importlib.util
from typing import NamedTuple

import torch

NAMES = ("reference", "cpu", "triton", "cuda", "cuda_host")


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
    has_triton = importlib.util.find_spec("triton") is not None
    no_triton = "" if has_triton else "; the package triton is not installed either"
    no_gpu = "" if torch.cuda.is_available() else "; torch sees no CUDA device either"
    return {
        "reference": Backend(True, "PyTorch, any device, any float dtype"),
        "cpu": Backend(False, no_kernels),
        "triton": Backend(False, no_kernels + no_triton),
        "cuda": Backend(False, no_kernels + no_gpu),
        "cuda_host": Backend(False, no_kernels),
    }


def choose(op: str, backend: str | None, has: tuple[str, ...] = ("reference",)) -> str:
    """The backend of a call: the fastest of ``has`` for None, else the named one or an error."""
    if backend is None:
        return has[0]
    if backend in has:
        return backend
    raise unavailable(op, backend, has)


def unavailable(op: str, backend: str, has: tuple[str, ...] = ("reference",)) -> Exception:
    """The error for a backend that an op does not have."""
    if backend not in NAMES:
        return ValueError(f"backend: expected None or one of {', '.join(NAMES)}, got {backend!r}")
    return BackendUnavailable(
        f"{op} has no {backend!r} backend: {backends()[backend].reason}. "
        f"It has {', '.join(has)}; backend=None picks the fastest of them."
    )
