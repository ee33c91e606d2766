"""The one timer: candidates in turns, medians and quartiles over rounds, on the CPU and on a GPU.

    samples = measure({"torch": Candidate(torch.mm, sets), "qbert": Candidate(run, sets)}, device)
    samples["qbert"].median, ratio(samples["torch"], samples["qbert"]), samples.failures

Every candidate runs once a round, each round begins with another one, and a ratio is the median of the ratios within a round: a
disturbance longer than a round meets all alike and cancels. One turn is a burst of calls long enough for the clock.

On a CPU a turn begins only when no thread of this process is busy, because idle threads of torch's pool spin for a while.

On a GPU the clock is a pair of events in the stream. A short call is captured, with as many others as make a burst, into a
CUDA graph whose replay is timed: the host's launches, tens of microseconds each, are not in the figure, as they are not where
a model runs as a graph. What cannot be captured is launched call by call, and its row says so. Clocks, power, temperature and
what throttled them are read before and after, and never set.

Caches: one set of arguments again and again ("warm"), several that take turns and together hold more than the caches
("rotate"), or a cache that is overwritten before each call ("flush").
"""

from __future__ import annotations

import functools
import itertools
import math
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import nullcontext, suppress
from dataclasses import dataclass
from typing import Any, Literal, Protocol, TypeVar

import numpy as np
import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor

from qbert.clocks import GpuState, gpu_state
from qbert.errors import QBertError
from qbert.target import bytes_beyond_caches

Caches = Literal["warm", "rotate", "flush"]
Graphs = Literal["auto", "never"]
Result = TypeVar("Result")

MIN_ROUNDS, MAX_ROUNDS = 5, 100
BURST_SECONDS = 2e-3  # of one turn: against it, the clock's own error and a graph's launch (some 5 us) are small
_MAX_CALLS = 2000  # in a burst
_ESTIMATE_CALLS = 3
_GRAPH_BELOW = 5e-4  # seconds: the host launches longer calls faster than the GPU runs them
_CAPTURE_WARMUP = 2  # calls before a capture, as torch asks for
_FLUSHED_CALLS = 5  # in a turn with flushed caches, each timed by itself; the median counts
_REWARM_BELOW = 0.1  # seconds: a shorter turn feels what others left in the caches, and clocks that fell meanwhile
# A process is at rest when it used less than a tenth of one core over a window; it is waited for that long at most.
_WINDOW, _REST_SHARE, REST_LIMIT = 0.005, 0.1, 2.0
_MS = 1e-3


class Sample(BaseModel):
    """Seconds of one call.

    Attributes:
        median, p25, p75: over the rounds; a round's figure is that of its burst, divided by its calls.
        repeats: rounds that counted.
        calls: in each round's burst.
        how: clock, caches, threads, and what fell back to what.
        before, after: the GPU's state around all rounds of all candidates; None on a CPU.
        rounds: each round's figure; not stored.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    median: float
    p25: float
    p75: float
    repeats: int
    calls: int = 1
    how: str = ""
    before: GpuState | None = None
    after: GpuState | None = None
    rounds: tuple[float, ...] = Field(default=(), exclude=True, repr=False)

    @classmethod
    def of(cls, rounds: Sequence[float], calls: int = 1, how: str = "", **states: GpuState | None) -> Sample:
        """From each round's seconds."""
        low, middle, high = (float(each) for each in np.quantile(rounds, (0.25, 0.5, 0.75)))
        return cls(
            median=middle, p25=low, p75=high, repeats=len(rounds), calls=calls, how=how, rounds=tuple(rounds), **states
        )

    @property
    def spread(self) -> float:
        """Half the distance of the quartiles over the median: a difference below it is noise."""
        return (self.p75 - self.p25) / 2 / self.median if self.median else 0.0


@dataclass(frozen=True)
class Candidate:
    """What is timed.

    Attributes:
        call: takes the values of one set.
        sets: sets of arguments, which take turns.
        graph: False where a capture is known to go wrong (a library that captures by itself).
        note: goes into `how`.
    """

    call: Callable[..., object]
    sets: Sequence[Sequence[Any]] = ((),)
    graph: bool = True
    note: str = ""


class Samples(dict[str, Sample]):
    """Samples by candidate. `failures`: the others, each with its reason."""

    def __init__(self, samples: Mapping[str, Sample], failures: Mapping[str, str]) -> None:
        super().__init__(samples)
        self.failures = dict(failures)


class Unavailable(Exception):
    """What cannot be measured here. The message is the reason that its row shows."""


class DeviceLost(QBertError):
    """A kernel has broken the GPU's context: nothing more can be measured in this process."""


@dataclass(frozen=True)
class Rules:
    """How `measure` goes about it.

    Attributes:
        seconds: for the rounds of each candidate; as many rounds as fit, within the two limits.
        warmup: seconds that each runs before anything counts; once at least.
        caches: see above. For "rotate", give sets that hold more than the caches (`sets_beyond_caches`).
        graphs: "never" leaves the host's launches in the figure: what a model that runs eagerly would meet.
        burst: seconds of one turn.
    """

    seconds: float = 0.5
    warmup: float = 0.05
    min_rounds: int = MIN_ROUNDS
    max_rounds: int = MAX_ROUNDS
    caches: Caches = "warm"
    graphs: Graphs = "auto"
    burst: float = BURST_SECONDS


def measure(
    candidates: Mapping[str, Callable[[], object] | Candidate], device: torch.device | str = "cpu", rules: Rules = Rules()
) -> Samples:  # fmt: skip
    """Times all candidates in turns.

    Args:
        candidates: by name; a plain callable is one whose only set is empty.
        device: where they run.

    Returns:
        Samples. What raised (while it was warmed up, captured or timed) is in their `failures`.

    Raises:
        DeviceLost: after a failure the GPU does not answer any more.
        QBertError: an argument is a tensor of zeros: they run faster than data does, and hide what is not written.
    """
    device = torch.device(device)
    named = {name: each if isinstance(each, Candidate) else Candidate(each) for name, each in candidates.items()}
    for name, candidate in named.items():
        refuse_zeros(name, candidate)
    with torch.cuda.device(device) if device.type == "cuda" else nullcontext():
        engine: _Engine = _Gpu(device, rules) if device.type == "cuda" else _Cpu(rules)
        turns, failures = _prepared(engine, named, rules.warmup)
        before = engine.state()
        rounds, failed = in_rounds(
            {name: turn.run for name, turn in turns.items()}, rules.seconds * len(turns), rules.min_rounds, rules.max_rounds,
            check=engine.check,
        )  # fmt: skip
        after = engine.state()
    samples = {
        name: Sample.of(times, turns[name].calls, turns[name].how, before=before, after=after)
        for name, times in rounds.items()
    }
    return Samples(samples, {**failures, **failed})


def medians(
    calls: Mapping[str, Callable[[], object]], device: torch.device | str = "cpu", rounds: int = 7
) -> dict[str, float]:
    """Median seconds of each call, in so many rounds.

    Raises:
        QBertError: one of them raised.
    """
    samples = measure(calls, device, Rules(0.0, 0.0, rounds, rounds))
    for name, reason in samples.failures.items():
        raise QBertError(f"{name} cannot be timed: {reason}")
    return {name: sample.median for name, sample in samples.items()}


def _nothing() -> None:
    return None


def elapsed(call: Callable[[], object], device: torch.device | str = "cpu") -> float:
    """Seconds of one call until its result is there."""
    wait = functools.partial(torch.cuda.synchronize, device) if torch.device(device).type == "cuda" else _nothing
    wait()
    start = time.perf_counter()
    call()
    wait()
    return time.perf_counter() - start


def ratio(above: Sample, below: Sample) -> float:
    """How many times longer `above` took: median of the ratios within rounds; of the medians where rounds are not known."""
    pairs = list(zip(above.rounds, below.rounds, strict=False))
    if not pairs:
        return above.median / below.median
    return statistics.median(a / b for a, b in pairs)


def reason_of(error: BaseException) -> str:
    """What the row of a system that raised this says: our own reasons as they are, others with their kind."""
    return str(error) if isinstance(error, Unavailable) else one_line(error)


def one_line(error: BaseException, limit: int = 200) -> str:
    """The kind of an error and the beginning of its message, in one line."""
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text[:limit]}" if text else type(error).__name__


# ---- rounds ---------------------------------------------------------------------------------------------------------


def in_rounds(
    turns: Mapping[str, Callable[[], Result]], seconds: float, least: int, most: int, *,
    refusal: type[Exception] | tuple[()] = Exception, check: Callable[[], None] = lambda: None,
) -> tuple[dict[str, list[Result]], dict[str, str]]:  # fmt: skip
    """Each turn once a round, each round beginning with another one: what everything that is compared runs in.

    Args:
        turns: by name.
        seconds: of all rounds; as many as fit, but no fewer than `least` and no more than `most`.
        refusal: what a turn that cannot go on raises, and is left out from then on; () where everything is passed on.
        check: called after each refusal.

    Returns:
        Each turn's results, round by round, and the reasons of those that are left out.
    """
    rounds: dict[str, list[Result]] = {name: [] for name in turns}
    failures: dict[str, str] = {}
    begin, last = time.perf_counter(), 0.0
    for done in range(most):
        start = time.perf_counter()
        if not rounds or (done >= least and start - begin + last > seconds):
            break
        names = list(rounds)
        first = done % len(names)
        for name in names[first:] + names[:first]:
            try:
                rounds[name].append(turns[name]())
            except refusal as error:
                failures[name] = reason_of(error)
                del rounds[name]
                check()
        last = time.perf_counter() - start
    return rounds, failures


@dataclass
class Turn:
    """A candidate, ready: `run` gives the seconds of one call, over a burst of `calls`."""

    run: Callable[[], float]
    calls: int
    how: str


class _Engine(Protocol):
    def prepare(self, candidate: Candidate, warmup: float) -> Turn: ...

    def state(self) -> GpuState | None: ...

    def check(self) -> None: ...


def _prepared(engine: _Engine, named: Mapping[str, Candidate], warmup: float) -> tuple[dict[str, Turn], dict[str, str]]:
    turns: dict[str, Turn] = {}
    failures: dict[str, str] = {}
    for name, candidate in named.items():
        try:
            turns[name] = engine.prepare(candidate, warmup)
        except Exception as error:  # whatever a library raises is a row with a reason
            failures[name] = reason_of(error)
            engine.check()
    return turns, failures


def _calls_for(burst: float, once: float) -> int:
    """Calls in a burst."""
    return min(_MAX_CALLS, max(1, math.ceil(burst / max(once, 1e-9))))


# ---- CPU ------------------------------------------------------------------------------------------------------------


class _Cpu:
    def __init__(self, rules: Rules) -> None:
        self._caches = rules.caches
        self._burst = rules.burst
        self._flush = _filler(torch.device("cpu")) if rules.caches == "flush" else None

    def prepare(self, candidate: Candidate, warmup: float) -> Turn:
        sets = itertools.cycle(candidate.sets)
        begin, times = time.perf_counter(), [_seconds(candidate, sets, 1)]
        while len(times) < _ESTIMATE_CALLS or time.perf_counter() - begin < warmup:
            times.append(_seconds(candidate, sets, 1))
        once = min(times)
        calls = _FLUSHED_CALLS if self._flush is not None else _calls_for(self._burst, once)
        how = _how("wall clock", self._caches, candidate, f"threads: {torch.get_num_threads()}")
        return Turn(lambda: self._turn(candidate, sets, calls, once), calls, how)

    def _turn(self, candidate: Candidate, sets: Iterator[Sequence[Any]], calls: int, once: float) -> float:
        if self._flush is not None:
            return statistics.median(self._flushed(candidate, sets) for _ in range(calls))
        come_to_rest()
        if self._caches == "warm" and once < _REWARM_BELOW:
            _seconds(candidate, sets, 1)  # brings the data back that other candidates have pushed out
        return _seconds(candidate, sets, calls) / calls

    def _flushed(self, candidate: Candidate, sets: Iterator[Sequence[Any]]) -> float:
        assert self._flush is not None
        self._flush.add_(1)
        come_to_rest()
        return _seconds(candidate, sets, 1)

    def state(self) -> None:
        return None

    def check(self) -> None:
        return None


def _seconds(candidate: Candidate, sets: Iterator[Sequence[Any]], calls: int) -> float:
    """Seconds of so many calls, each with the next set."""
    call, turn = candidate.call, [next(sets) for _ in range(calls)]
    start = time.perf_counter()
    for each in turn:
        call(*each)
    return time.perf_counter() - start


def come_to_rest(limit: float | None = None) -> float:
    """Waits until no thread of this process uses the processor; how many seconds that took.

    Raises:
        Unavailable: threads still spin after the limit: next to this system no other could be measured.
    """
    limit = REST_LIMIT if limit is None else limit
    start = time.perf_counter()
    while (waited := time.perf_counter() - start) < limit:
        used = time.process_time()
        time.sleep(_WINDOW)
        if time.process_time() - used < _REST_SHARE * _WINDOW:
            return waited
    raise Unavailable(f"its threads still use the processor {limit:g} s after a forward")


def sets_beyond_caches(one_set: int, device: torch.device | str = "cpu") -> int:
    """How many sets of so many bytes hold twice the last level cache together, so that each comes out of memory in its turn."""
    return 1 + _beyond(torch.device(device)) // max(1, one_set)


def _filler(device: torch.device) -> Tensor:
    """What is written over to empty the caches."""
    return torch.ones(_beyond(device) // 4, device=device)


def _beyond(device: torch.device) -> int:
    if device.type != "cuda":
        return bytes_beyond_caches()
    return 2 * int(torch.cuda.get_device_properties(device).L2_cache_size)


# ---- GPU ------------------------------------------------------------------------------------------------------------


class _Gpu:
    def __init__(self, device: torch.device, rules: Rules) -> None:
        self._device = device
        self._caches = rules.caches
        self._graphs = rules.graphs
        self._burst = rules.burst
        self._flush = _filler(device) if rules.caches == "flush" else None

    def prepare(self, candidate: Candidate, warmup: float) -> Turn:
        once = self._warm_up(candidate, warmup)
        run, calls, clock = self._launcher(candidate, once)
        how = _how(clock, self._caches, candidate)
        if self._flush is not None:
            return Turn(
                lambda: statistics.median(self._flushed(run) for _ in range(_FLUSHED_CALLS)), _FLUSHED_CALLS, how
            )
        twice = once * calls < _REWARM_BELOW
        return Turn(lambda: self._elapsed(run, run if twice else _nothing) / calls, calls, how)

    def _warm_up(self, candidate: Candidate, warmup: float) -> float:
        """Seconds of one eager call, after the first has loaded and compiled what it needs."""
        sets = itertools.cycle(candidate.sets)
        candidate.call(*next(sets))
        self._synchronize()
        begin, times = time.perf_counter(), [math.inf]
        while len(times) <= _ESTIMATE_CALLS or time.perf_counter() - begin < warmup:
            times.append(self._elapsed(lambda: candidate.call(*next(sets))))
        return min(times)

    def _launcher(self, candidate: Candidate, once: float) -> tuple[Callable[[], object], int, str]:
        """What a turn runs, how many calls that is, and its name: a graph's replay for short calls, else the calls."""
        calls = 1 if self._flush is not None else _calls_for(self._burst, once)
        if self._graphs == "never" or not candidate.graph or once >= _GRAPH_BELOW:
            return _eager(candidate, calls), calls, "events, eager"
        try:
            graph, calls = self._graph_of(candidate, calls)
        except Exception as error:  # some call synchronizes, or allocates where it may not
            self._recover()
            return _eager(candidate, calls), calls, f"events, eager: no CUDA graph ({one_line(error, 80)})"
        return graph.replay, calls, "events, CUDA graph"

    def _graph_of(self, candidate: Candidate, calls: int) -> tuple[torch.cuda.CUDAGraph, int]:
        """A graph that takes as long as a burst, and how many calls it holds."""
        if self._flush is not None:
            return self._capture(candidate, 1), 1
        sets = len(candidate.sets)
        calls = math.ceil(calls / sets) * sets  # a replay begins with the first set again
        graph = self._capture(candidate, calls)
        once = self._elapsed(graph.replay) / calls  # without the launches that the estimate had in it
        longer = math.ceil(_calls_for(self._burst, once) / sets) * sets
        return (self._capture(candidate, longer), longer) if longer > 2 * calls else (graph, calls)

    def _capture(self, candidate: Candidate, calls: int) -> torch.cuda.CUDAGraph:
        stream = torch.cuda.Stream(self._device)
        stream.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(stream):  # libraries take their work space for a stream in the first call on it
            _eager(candidate, _CAPTURE_WARMUP)()
        torch.cuda.current_stream(self._device).wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream):
            _eager(candidate, calls)()
        graph.replay()  # the first one uploads it
        self._synchronize()
        return graph

    def _recover(self) -> None:
        """After a capture that was broken off torch's generator still believes in it, and would refuse to draw numbers."""
        self._synchronize()
        with suppress(Exception):
            default = torch.cuda.default_generators[torch.cuda.current_device()]
            default.graphsafe_set_state(torch.Generator(self._device).graphsafe_get_state())

    def _flushed(self, run: Callable[[], object]) -> float:
        flush = self._flush
        assert flush is not None
        return self._elapsed(run, lambda: flush.add_(1))

    def _elapsed(self, run: Callable[[], object], first: Callable[[], object] = _nothing) -> float:
        """Seconds of `run` between two events; `first` keeps the GPU busy while the host launches."""
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        first()
        start.record()
        run()
        end.record()
        end.synchronize()
        return float(start.elapsed_time(end)) * _MS

    def _synchronize(self) -> None:
        torch.cuda.synchronize(self._device)

    def state(self) -> GpuState:
        return gpu_state(self._device)

    def check(self) -> None:
        try:
            self._synchronize()
        except Exception as error:
            raise DeviceLost(f"the GPU does not answer any more: {one_line(error)}") from None


def _eager(candidate: Candidate, calls: int) -> Callable[[], None]:
    """So many calls; a later burst goes on where this one stopped, so that all sets come out of memory in turn."""
    sets = itertools.cycle(candidate.sets)

    def burst() -> None:
        for _ in range(calls):
            candidate.call(*next(sets))

    return burst


def _how(clock: str, caches: Caches, candidate: Candidate, *more: str) -> str:
    kept = {"warm": "warm caches", "rotate": f"{len(candidate.sets)} sets in turn", "flush": "caches flushed"}[caches]
    return "; ".join(filter(None, (clock, kept, *more, candidate.note)))


# ---- inputs and conditions ------------------------------------------------------------------------------------------

_DATA = (
    torch.float64,
    torch.float32,
    torch.bfloat16,
    torch.float16,
    torch.int8,
    torch.uint8,
)  # int32, int64: ids, places


def refuse_zeros(name: str, candidate: Candidate) -> None:
    """Looks at the tensors in the sets, in what `functools.partial` holds, and in the call's closure.

    Raises:
        QBertError: one of floats or bytes, with more than one element, is all zeros.
    """
    call = candidate.call
    held = [*getattr(call, "args", ()), *getattr(call, "keywords", {}).values()]
    held += [cell.cell_contents for cell in getattr(call, "__closure__", None) or () if _filled(cell)]
    for tensor in itertools.chain(_tensors(candidate.sets), _tensors(held)):
        if tensor.dtype in _DATA and tensor.numel() > 1 and not bool(tensor.any()):
            raise QBertError(
                f"{name}: a {tensor.dtype} argument of shape {tuple(tensor.shape)} is all zeros; give it data"
            )


def _filled(cell: Any) -> bool:
    try:
        return cell.cell_contents is not None
    except ValueError:  # a name that is not bound yet
        return False


def _tensors(value: object) -> Iterator[Tensor]:
    if type(value) in (Tensor, torch.nn.Parameter):  # libraries' subclasses may not know `any`
        yield value  # type: ignore[misc]
    elif isinstance(value, Mapping):
        yield from _tensors(list(value.values()))
    elif isinstance(value, list | tuple):
        for each in value:
            yield from _tensors(each)
