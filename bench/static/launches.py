"""What is compiled, and whether the launches of public calls stay within it.

Signature, constants and attributes are made by Triton's own specialisation of a launch's arguments,
so they follow ``do_not_specialize``, odd strides and offsets as a real launch does.
"""

import importlib
import pkgutil
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from types import ModuleType
from typing import Any, NamedTuple

from pydecode.triton_kernels.static_call import StaticCall
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.compiler import make_backend
from triton.runtime.jit import JITFunction, create_function_from_signature

from pydecode import triton_kernels

from .targets import TARGETS, Target


class Specialised(NamedTuple):
    """A launch as the compiler sees it."""

    kernel: JITFunction
    options: Any  # the backend's: num_warps, num_stages, ...
    signature: dict[str, str]
    constants: dict[tuple[int, ...], Any]
    attributes: dict[tuple[int, ...], Any]

    @property
    def exact(self) -> str:
        """Equal for launches that run the same binary."""
        return f"{self.configuration} {self.signature} {self.constants} {self.attributes}"

    @property
    def configuration(self) -> str:
        """Equal for launches with the same table entry and dtypes, however they are aligned."""
        declared = {i: p.name for i, p in enumerate(self.kernel.params) if p.is_constexpr}
        constants = {declared[k[0]]: v for k, v in self.constants.items() if k[0] in declared}
        pointers = {k: t for k, t in self.signature.items() if "*" in t or "desc" in t}
        name = f"{self.kernel.module}.{self.kernel.__name__}"
        return f"{name} {constants} {pointers} {self.options}"


class Launch(NamedTuple):
    """One launch that a launcher made while ``recorded``."""

    kernel: JITFunction
    positional: tuple[Any, ...]
    keywords: dict[str, Any]


def gpu_target(target: Target) -> GPUTarget:
    return GPUTarget(target.backend, target.arch, target.warp_size)


def specialise(launch: Launch, target: Target) -> Specialised:
    kernel, backend = launch.kernel, make_backend(gpu_target(target))
    bind = create_function_from_signature(kernel.signature, kernel.params, backend)
    keywords = dict(launch.keywords, debug=launch.keywords.get("debug", kernel.debug) or False)
    bound, values, options = bind(*launch.positional, **keywords)
    options, signature, constants, attributes = kernel._pack_args(
        backend, keywords, bound, values, options
    )
    return Specialised(kernel, options, signature, constants, attributes)


def launch_of(call: StaticCall, table: Mapping[Any, Mapping[str, Any]]) -> Launch:
    """The launch of a static call: its arguments, and its entry of the table."""
    if not isinstance(call.kernel, JITFunction):
        raise TypeError(f"kernel: expected a @triton.jit function, got {call.kernel!r}")
    if call.configuration not in table:
        raise ValueError(f"configuration: {call.configuration!r} is not in CONFIGURATIONS")
    entry = table[call.configuration]
    if typed := sorted(set(entry) & set(call.arguments)):
        raise ValueError(f"arguments: {typed} come from CONFIGURATIONS, they are not given again")
    return Launch(call.kernel, (), {**call.arguments, **entry})


def static_calls(module: ModuleType, target: Target) -> list[StaticCall]:
    return list(module.static_calls(target.name))


def modules() -> list[str]:
    """Names of all of pydecode's modules that may hold kernels."""
    package = triton_kernels.__name__
    found = pkgutil.walk_packages(triton_kernels.__path__, package + ".")
    return sorted(m.name for m in found if m.name != StaticCall.__module__)


def gaps(module: ModuleType) -> list[str]:
    """What the static calls of a module leave out: kernels never launched, entries never used."""
    defined = {
        name: f
        for name, f in vars(module).items()
        if isinstance(f, JITFunction) and f.module == module.__name__
    }
    missing = [n for n in ("CONFIGURATIONS", "static_calls") if not hasattr(module, n)]
    if missing:  # a module of shared pieces, which other modules' kernels call
        alone = set(defined.values()) - (_reached_by_all() if defined else set())
        return [f"has {len(defined)} kernels and no {', no '.join(missing)}"] if alone else []
    calls = [c for target in TARGETS.values() for c in static_calls(module, target)]
    launched = {c.kernel for c in calls}
    reached: set[JITFunction] = set()
    for kernel in launched:
        _reach(kernel, reached)
    found = [f"kernel {name} is never compiled" for name, f in defined.items() if f not in reached]
    used = {c.configuration for c in calls}
    unused = [key for key in module.CONFIGURATIONS if key not in used]
    return found + [f"CONFIGURATIONS[{key!r}] is never compiled" for key in unused]


def _reached_by_all() -> set[JITFunction]:
    """Functions that some static call of pydecode compiles."""
    reached: set[JITFunction] = set()
    for name in modules():
        module = importlib.import_module(name)
        if hasattr(module, "static_calls"):
            for call in (c for target in TARGETS.values() for c in static_calls(module, target)):
                _reach(call.kernel, reached)
    return reached


def _reach(kernel: Any, reached: set[JITFunction]) -> None:
    """Adds a kernel and all the functions that it calls."""
    if not isinstance(kernel, JITFunction) or kernel in reached:
        return
    reached.add(kernel)
    for name in set(re.findall(r"\w+", kernel.src)):
        _reach(kernel.fn.__globals__.get(name), reached)


class _NotRun:
    """What a launch returns while recorded: takes any use of a compiled kernel."""

    def __getattr__(self, name: str) -> "_NotRun":
        return self

    def __getitem__(self, grid: object) -> "_NotRun":
        return self

    def __call__(self, *args: object, **kwargs: object) -> "_NotRun":
        return self


@contextmanager
def recorded() -> Iterator[list[Launch]]:
    """Launches of Triton kernels are noted and not run, so no GPU is needed and outputs stay empty.

    A launcher that keeps compiled kernels must get them from the kernel itself
    (``kernel.warmup`` or ``kernel[grid]``), and forget them first.
    """
    if knobs.runtime.interpret:
        raise RuntimeError("recorded: TRITON_INTERPRET is set, so there is nothing to specialise")
    launches: list[Launch] = []
    real: Callable[..., Any] = JITFunction.run

    def note(self: JITFunction, *args: Any, grid: Any, warmup: bool, **keywords: Any) -> _NotRun:
        launches.append(Launch(self, args, keywords))
        return _NotRun()

    JITFunction.run = note  # type: ignore[method-assign]
    try:
        yield launches
    finally:
        JITFunction.run = real  # type: ignore[method-assign]


def uncovered(
    launches: list[Launch], target: Target, *names: str, exact: bool = False
) -> list[str]:
    """Launches that the report does not compile for this target; names: modules, default all.

    exact: the very binary, with every attribute; otherwise table entry, constants and dtypes.
    """
    known = set()
    for name in names or modules():
        module = importlib.import_module(name)
        if hasattr(module, "static_calls"):
            for call in static_calls(module, target):
                made = specialise(launch_of(call, module.CONFIGURATIONS), target)
                known.add(made.exact if exact else made.configuration)
    made = [specialise(launch, target) for launch in launches]
    keys = [m.exact if exact else m.configuration for m in made]
    return sorted({key for key in keys if key not in known})
