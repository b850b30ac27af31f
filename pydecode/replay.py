"""Calls that were made before are launched again, without their checks and plans.

An op reads no device data, so what it launches follows from its arguments' metadata alone: shapes,
strides, dtypes, devices, 16-byte alignment, and numbers and strings by value. The second call of
the same metadata is recorded, and later ones do what was recorded: the same empty tensors, views
and launches, with their own tensors in the places of the recorded call's. That is a third of the
host's time. A call that did anything else (a copy, a fill, a kernel of PyTorch) is never replayed,
nor one whose arguments are not plain tensors and numbers, nor one that is traced or checked.
"""

import functools
import threading
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, ParamSpec, TypeVar

import torch
from torch import Tensor
from torch.nn import Parameter
from torch.utils._python_dispatch import TorchDispatchMode

from .triton_kernels.devices import on_device_of
from .validation import checking

P = ParamSpec("P")
R = TypeVar("R")
Key = tuple[Any, ...]
Put = list[tuple[Any, Any]]  # where a launch's arguments go, and a tensor's index or a builder

MOST = 4096  # kept calls; a number that changes every step fills them, and is not worth keeping
LONGEST = 8  # list of tensors: to read more of them takes longer than it saves
NUMBERS = (int, float, bool)
_aten = torch.ops.aten
_FRESH = frozenset(
    (
        *(_aten.empty.memory_format, _aten.new_empty.default, _aten.empty_like.default),
        *(_aten.empty_strided.default, _aten.new_empty_strided.default),
    )
)
_replays: dict[Key, "Replay | None"] = {}
_seen: set[Key] = set()


class _State(threading.local):
    recorder: "Recorder | None" = None


_state = _State()


def launch(kernel: Any, grid: tuple[int, ...], /, *args: Any, **keywords: Any) -> None:
    """``kernel[grid](...)``, noted where the call is recorded."""
    recorder = _state.recorder
    if recorder is None:
        kernel[grid](*args, **keywords)
        return
    recorder.launches.append((kernel, grid, args, keywords))
    recorder.resting = True  # what a launch does is its own affair: the interpreter copies a lot
    try:
        kernel[grid](*args, **keywords)
    finally:
        recorder.resting = False


def recording() -> bool:
    """Whether this call runs as always, under a dispatch mode of our own."""
    return _state.recorder is not None


def forget() -> None:
    """Forgets all calls: for those who change what a call launches, as tuning does."""
    _replays.clear()
    _seen.clear()


def replayed(op: Callable[P, R]) -> Callable[P, R]:
    """A public op whose calls by the Triton backend are replayed."""
    name = op.__name__

    @functools.wraps(op)
    def call(*args: P.args, **kwargs: P.kwargs) -> R:
        if (
            kwargs.get("backend") != "triton"
            or torch.compiler.is_compiling()
            or torch._C._len_torch_dispatch_stack() > 0
            or checking()
        ):
            return op(*args, **kwargs)
        met: list[Any] = [name, tuple(kwargs)]
        tensors: list[Tensor] = []
        if not _read((*args, *kwargs.values()), met, tensors):
            return op(*args, **kwargs)
        ids = list(map(id, tensors))
        if len(set(ids)) < len(ids):  # one is given twice: which is which
            met += map(ids.index, ids)
        key = tuple(met)
        replay = _replays.get(key)
        if replay is not None:
            return replay(tensors)
        if key in _replays:  # as None: there is no replay of it
            return op(*args, **kwargs)
        if key in _seen:
            return _record(key, tensors, functools.partial(op, *args, **kwargs))
        if len(_seen) >= MOST:
            _seen.clear()
        _seen.add(key)
        return op(*args, **kwargs)

    return call


def _read(values: Sequence[Any], met: list[Any], tensors: list[Tensor]) -> bool:
    """Adds the values' metadata to ``met``; False: one of them is nothing that can be known."""
    for x in values:
        kind = x.__class__
        if kind is Tensor or kind is Parameter:
            tensors.append(x)
            met += (x.shape, x.stride(), x.dtype, x.device, x.data_ptr() & 15)
        elif x is None or kind is str:
            met.append(x)
        elif kind in NUMBERS:
            met += (kind, x)  # 1, 1.0 and True are equal
        elif isinstance(x, (list, tuple)):
            met += (kind, len(x))
            if len(x) > LONGEST or not _read(x, met, tensors):
                return False
        elif kind is torch.dtype:
            met.append(x)
        else:
            return False
    return True


def _record(key: Key, tensors: list[Tensor], call: Callable[[], R]) -> R:
    recorder = Recorder(tensors)
    _state.recorder = recorder
    try:
        with recorder:
            result = call()
    finally:
        _state.recorder = None
    _seen.discard(key)
    if len(_replays) >= MOST:
        _replays.clear()
    _replays[key] = recorder.replay(result)
    return result


class View(NamedTuple):
    """A view, or several at once as of ``unbind``, of a tensor by its index."""

    make: Any
    of: int
    args: tuple[Any, ...]
    keywords: dict[str, Any]


class Empty(NamedTuple):
    shape: torch.Size
    dtype: torch.dtype
    device: torch.device


class Launch(NamedTuple):
    run: Any  # kernel[grid]
    args: list[Any]  # all that the kernel names, in its order
    put: Put
    options: dict[str, Any]


class Recorder(TorchDispatchMode):
    """Notes a call's fresh tensors, views and launches; ``known`` is False after anything else."""

    def __init__(self, tensors: list[Tensor]) -> None:
        super().__init__()
        self.index = {id(x): i for i, x in enumerate(tensors)}
        self.known = len(tensors) > 0
        self.count = len(tensors)
        self.alive: list[Any] = [tensors]  # ids stay theirs while the tensors live
        self.made: list[tuple[int, Empty | View]] = []
        self.used: set[int] = set()
        self.resting = False
        self.launches: list[tuple[Any, tuple[int, ...], tuple[Any, ...], dict[str, Any]]] = []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        if self.resting:
            return result
        if func in _FRESH:
            shape, dtype, device = result.shape, result.dtype, result.device
            self.known &= result.is_contiguous()
            self._keep(Empty(shape, dtype, device), [result])
        elif func is _aten.detach.default and id(args[0]) in self.index:
            self.index[id(result)] = self.index[id(args[0])]
            self.alive.append(result)
        elif func.is_view and id(args[0]) in self.index:
            self.known &= not any(isinstance(x, Tensor) for x in (*args[1:], *kwargs.values()))
            made = View(func, self.index[id(args[0])], args[1:], kwargs)
            self._keep(made, [result] if isinstance(result, Tensor) else list(result))
        else:
            self.known = False
        return result

    def _keep(self, made: Empty | View, tensors: list[Tensor]) -> None:
        self.made.append((self.count, made))
        self.alive.append(tensors)
        if isinstance(made, View):
            self.used |= {self.count, made.of}
        for x in tensors:
            self.index[id(x)] = self.count
            self.count += 1

    def replay(self, result: Any) -> "Replay | None":
        """None: not all that the call did is known."""
        launches: list[tuple[Any, ...]] = []
        for kernel, grid, args, keywords in self.launches:
            options, given = dict(keywords), list(args)
            for name in kernel.arg_names[len(args) :]:  # in order they are bound sooner
                if name not in options:
                    break
                given.append(options.pop(name))
            self.known &= not any(map(_holds, options.values()))
            launches.append((kernel, grid, *self._places(given), options))
        source = self._source(result)
        if not self.known:
            return None
        made = [x if at in self.used else None for at, x in self.made]
        runs = [Launch(x[0][x[1]], *x[2:]) for x in launches]
        return Replay(made, runs, source)

    def _places(self, values: Sequence[Any]) -> tuple[list[Any], Put]:
        """The values without tensors, and where those belong."""
        put = [(at, self._source(x)) for at, x in enumerate(values) if _holds(x)]
        return [None if _holds(x) else x for x in values], put

    def _source(self, x: Any) -> Any:
        """A tensor's index, or what builds x from all tensors."""
        if isinstance(x, Tensor):
            self.known &= id(x) in self.index
            self.used.add(self.index.get(id(x), -1))
            return self.index.get(id(x))
        if not _holds(x):
            return lambda tensors: x
        fixed, put = self._places(x)
        whole = getattr(type(x), "_make", type(x))

        def build(tensors: list[Any]) -> Any:
            return whole(_filled(fixed, put, tensors))

        return build


class Replay(NamedTuple):
    """What a call does: with the tensors that it is given, in their order."""

    made: list[Empty | View | None]
    launches: list[Launch]
    result: Any

    def __call__(self, tensors: list[Any]) -> Any:
        first = tensors[0]
        for make in self.made:
            if make is None:  # nothing uses it
                tensors.append(None)
            elif isinstance(make, Empty):
                tensors.append(torch.empty(make.shape, dtype=make.dtype, device=make.device))
            else:
                view = make.make(tensors[make.of], *make.args, **make.keywords)
                tensors += (view,) if isinstance(view, Tensor) else view
        with on_device_of(first):
            for run, fixed, put, options in self.launches:
                run(*_filled(fixed, put, tensors), **options)
        return _from(self.result, tensors)


def _filled(fixed: list[Any], put: Put, tensors: list[Any]) -> list[Any]:
    values = fixed.copy()
    for at, source in put:
        values[at] = tensors[source] if source.__class__ is int else source(tensors)
    return values


def _from(source: Any, tensors: list[Any]) -> Any:
    return tensors[source] if source.__class__ is int else source(tensors)


def _holds(x: Any) -> bool:
    """Whether x is a tensor, or a tuple or list with one."""
    return isinstance(x, Tensor) or (isinstance(x, (list, tuple)) and any(map(_holds, x)))
