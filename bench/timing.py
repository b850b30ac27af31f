"""Times calls that compete: interleaved, so that a machine's mood hits all of them alike.

On a GPU each contender is a CUDA graph that goes through rotating inputs (together five times the
L2, so that no call finds its inputs there), timed by events; on a CPU single calls are timed.
"""

import statistics
import time
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch

Call = Callable[[int], object]  # runs on the i-th set of inputs


class Spread(NamedTuple):
    """Median, 20th and 80th percentile."""

    median: float
    p20: float
    p80: float

    @classmethod
    def of(cls, samples: Sequence[float]) -> "Spread":
        if len(samples) == 1:
            return cls(*[float(samples[0])] * 3)
        fifths = statistics.quantiles(samples, n=5, method="inclusive")
        return cls(statistics.median(samples), fifths[0], fifths[3])


class Timed(NamedTuple):
    """What the contenders took: one sample a round each, in microseconds."""

    samples: dict[str, list[float]]
    eager: frozenset[str]  # contenders that no graph could capture

    def spread(self, name: str) -> Spread:
        return Spread.of(self.samples[name])

    def ratio(self, name: str, to: str) -> Spread:
        """How many times longer ``name`` takes than ``to``, paired round by round."""
        return Spread.of([a / b for a, b in zip(self.samples[name], self.samples[to])])


def sets_of_inputs(bytes_a_set: int, device: torch.device) -> int:
    """How many sets of inputs to rotate through."""
    if device.type == "cpu":
        return 2 if bytes_a_set < 2**28 else 1
    gpu = torch.cuda.get_device_properties(device)
    cold = -(-5 * gpu.L2_cache_size // max(bytes_a_set, 1))
    room = int(0.4 * torch.cuda.mem_get_info(device)[0]) // max(bytes_a_set, 1)
    return max(1, min(cold, room, 256))


def race(
    contenders: dict[str, Call],
    *,
    sets: int,
    device: torch.device,
    rounds: int = 50,
    seconds: float = 2.0,
) -> Timed:
    """Times all contenders, ``rounds`` rounds or until ``seconds`` a contender have passed."""
    run = _race_gpu if device.type == "cuda" else _race_cpu
    return run(contenders, sets, device, rounds, seconds * len(contenders))


def _race_cpu(
    contenders: dict[str, Call], sets: int, device: torch.device, rounds: int, seconds: float
) -> Timed:
    samples: dict[str, list[float]] = {name: [] for name in contenders}
    for call in contenders.values():  # warm: compilation, allocator, caches
        for i in range(sets):
            call(i)
    begin = time.perf_counter()
    for i in range(rounds):
        for name, call in contenders.items():
            start = time.perf_counter()
            call(i % sets)
            samples[name].append((time.perf_counter() - start) * 1e6)
        took = time.perf_counter() - begin
        if took > seconds and (i >= 4 or took > 4 * seconds):  # five rounds, unless that is minutes
            break
    return Timed(samples, frozenset(contenders))


def _race_gpu(
    contenders: dict[str, Call], sets: int, device: torch.device, rounds: int, seconds: float
) -> Timed:
    runs, eager = {}, set()
    for name, call in contenders.items():
        runs[name], captured = _captured(call, sets)
        if not captured:
            eager.add(name)
    events: dict[str, list[tuple[torch.cuda.Event, torch.cuda.Event]]] = {n: [] for n in runs}
    for run in runs.values():
        for _ in range(3):
            run()
    torch.cuda.synchronize(device)
    end = time.perf_counter() + seconds
    for i in range(rounds):
        for name, run in runs.items():
            start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            run()
            stop.record()
            events[name].append((start, stop))
        torch.cuda.synchronize(device)  # so that the queue stays short and the clock is read
        if i >= 9 and time.perf_counter() > end:
            break
    samples = {
        name: [start.elapsed_time(stop) * 1e3 / sets for start, stop in pairs]
        for name, pairs in events.items()
    }
    return Timed(samples, frozenset(eager))


def _captured(call: Call, sets: int) -> tuple[Callable[[], None], bool]:
    """One pass over all sets of inputs as a graph; as plain calls if it cannot be captured."""

    def one_pass() -> None:
        for i in range(sets):
            call(i)

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        one_pass()
        one_pass()
    torch.cuda.current_stream().wait_stream(side)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.graph(graph):
            one_pass()
    except RuntimeError:  # it synchronises, or allocates by other means
        torch.cuda.synchronize()
        return one_pass, False
    return graph.replay, True


def host_microseconds(call: Call, device: torch.device, *, calls: int = 30) -> float:
    """Host time of one call that is not waited for: the fastest of three runs; 0 on a CPU."""
    if device.type != "cuda":
        return 0.0
    best = float("inf")
    for _ in range(3):
        torch.cuda.synchronize(device)
        start = time.perf_counter()
        for _ in range(calls):
            call(0)
        best = min(best, (time.perf_counter() - start) / calls)
    torch.cuda.synchronize(device)
    return best * 1e6


def launches(call: Call, device: torch.device) -> int | None:
    """Kernels, copies and fills of one call, as the profiler sees them; None on a CPU."""
    if device.type != "cuda":
        return None
    activity = torch.profiler.ProfilerActivity
    call(0)
    torch.cuda.synchronize(device)
    with torch.profiler.profile(activities=[activity.CPU, activity.CUDA]) as profile:
        call(0)
        torch.cuda.synchronize(device)
    on_device = torch.autograd.DeviceType.CUDA
    return sum(e.count for e in profile.key_averages() if e.device_type == on_device)
