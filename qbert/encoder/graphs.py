"""CUDA graphs of a fused encoder: what a size of batch launches is recorded once and repeated by one call.

A forward of BERT-base is some ninety kernels, and a small batch keeps a GPU busy for less time than a CPU needs to launch
them. A graph is of one size, so sizes are rounded up to buckets. The tokens beyond the real ones belong to no sequence; every
operation of the encoder works token by token or sequence by sequence, so the real ones get the same bits as without a graph.

What is here runs on any device that has a `Recorder`, so tests need no GPU.
"""

from __future__ import annotations

import logging
import threading
from collections import Counter, OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from qbert.encoder import recording
from qbert.encoder.batch import Tokens
from qbert.encoder.recording import Recorder
from qbert.encoder.run import Encoder
from qbert.errors import QBertError

log = logging.getLogger(__name__)

_FEWEST = 16  # tokens of the smallest bucket
_TILE = 64  # tokens that a product computes together anyway
_STEPS = 8  # buckets between one power of two tokens and the next
_MIB = 2**20
_ID_TYPES = (torch.int64, torch.int32)


@dataclass(frozen=True, order=True)
class Bucket:
    """A size that a graph is of: up to so many tokens in up to so many sequences."""

    tokens: int
    sequences: int

    def __str__(self) -> str:
        return f"{self.tokens} tokens in {self.sequences}"


def bucket_of(tokens: int, sequences: int) -> Bucket:
    """The smallest bucket that holds a batch.

    16, 32 or 64 tokens, for whose products reading the weights is all that counts; then multiples of a tile's 64; from 512 on
    eight steps to the next power of two, of which at most a ninth is waste. Sequences go by powers of two: an empty one
    costs attention a few programs that end at once.

    Args:
        tokens, sequences: 1 or more.
    """
    if tokens <= _TILE:
        rounded = max(_FEWEST, _power_of_two(tokens))
    else:
        step = max(_TILE, _power_of_two(tokens) // (2 * _STEPS))
        rounded = -(-tokens // step) * step
    return Bucket(rounded, _power_of_two(sequences))


def _power_of_two(least: int) -> int:
    return 1 << (least - 1).bit_length()


@dataclass(frozen=True)
class GraphLimits:
    """What the graphs of one encoder may take.

    Attributes:
        max_tokens: larger batches run eagerly; of their time launching is a small part.
        max_graphs: for one more, the graph that was not used for longest goes.
        max_bytes: device memory of all graphs. They share theirs, so that is about what the largest bucket needs.

    Raises:
        QBertError: a limit that is no positive integer.
    """

    max_tokens: int = 16384
    max_graphs: int = 128
    max_bytes: int = 2048 * _MIB

    def __post_init__(self) -> None:
        for name in ("max_tokens", "max_graphs", "max_bytes"):
            value = getattr(self, name)
            if not isinstance(value, int) or value < 1:
                raise QBertError(f"{name} is {value!r}; allowed: integers from 1 on")

    @property
    def largest(self) -> Bucket:
        """Of as many sequences as tokens: more could only be rows that are padding from end to end."""
        return bucket_of(self.max_tokens, self.max_tokens)


@dataclass(frozen=True)
class GraphReport:
    """What was captured, and what ran.

    Attributes:
        replays: bucket -> how often its graph ran, for the graphs that are there now.
        eager: reason -> how many batches ran without a graph for it.
        evicted: graphs that made room for others.
        nbytes: device memory that the graphs hold now.
    """

    replays: dict[Bucket, int]
    eager: dict[str, int]
    evicted: int
    nbytes: int

    def __str__(self) -> str:
        evicted = f", {self.evicted} made room for others" if self.evicted else ""
        lines = [f"CUDA graphs: {len(self.replays)} captured, {self.nbytes / _MIB:.0f} MiB{evicted}"]
        lines += [f"{bucket} sequences: replayed {count} times" for bucket, count in sorted(self.replays.items())]
        lines += [f"no graph {count} times: {reason}" for reason, count in self.eager.items()]
        return "\n  ".join(lines)


class GraphCache:
    """The CUDA graphs of one fused encoder, captured when a bucket is first met. Any number of threads may call it.

    Copies and pickles have the limits and no graphs.
    """

    def __init__(self, limits: GraphLimits) -> None:
        self.__setstate__({"limits": limits})

    def __getstate__(self) -> dict[str, Any]:
        return {"limits": self.limits}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.limits: GraphLimits = state["limits"]
        self._lock = threading.RLock()
        self._graphs: _Graphs | None = None
        self._eager: Counter[str] = Counter()

    def run(self, encoder: Encoder, tokens: Tokens, take: Callable[[Tensor], Tensor]) -> Tensor | None:
        """The last hidden states by a graph, or None where the caller must run the batch eagerly.

        Args:
            encoder: as it is now; graphs of another one are dropped.
            tokens: of the batch, at least one.
            take: copies what the caller keeps out of the residual stream (t, h), to which the next call writes.

        Raises:
            QBertError: the limits do not go together.
            RuntimeError: something in the encoder cannot be captured.
        """
        with self._lock:
            try:
                return self._of(encoder).run(tokens, take)
            except _Eager as reason:
                self.decline(str(reason))
                return None

    def decline(self, reason: str) -> None:
        """Counts a batch that runs eagerly; the log hears of each reason once."""
        with self._lock:
            if reason not in self._eager:
                log.warning("a batch runs without a CUDA graph, others may follow: %s", reason)
            self._eager[reason] += 1

    def report(self) -> GraphReport:
        """What was captured so far, and what ran."""
        with self._lock:
            graphs = self._graphs
            if graphs is None:
                return GraphReport({}, dict(self._eager), 0, 0)
            replays = {bucket: graph.replays for bucket, graph in graphs.held.items()}
            return GraphReport(replays, dict(self._eager), graphs.evicted, graphs.nbytes)

    def _of(self, encoder: Encoder) -> _Graphs:
        if self._graphs is not None and self._graphs.encoder is not encoder:
            self._graphs.clear()
            self._graphs = None
        if self._graphs is None:
            recorder = recording.recorder_of(encoder.device)
            if recorder is None:
                raise _Eager(f"the model is on {encoder.device}")
            self._graphs = _Graphs(encoder, recorder, self.limits)
        return self._graphs


class _Eager(Exception):
    """Why a batch runs without a graph."""


@dataclass
class _Graph:
    replay: Callable[[], Any]
    replays: int = 0


class _Graphs:
    """Everything recorded of one prepared encoder. Whoever calls has the lock."""

    def __init__(self, encoder: Encoder, recorder: Recorder, limits: GraphLimits) -> None:
        self.encoder = encoder
        self.held: OrderedDict[Bucket, _Graph] = OrderedDict()  # the one used last is last
        self.evicted = 0
        self.nbytes = 0
        self._recorder = recorder
        self._limits = limits
        self._buffers: _Buffers | None = None
        self._most = limits.largest.tokens  # less once a bucket took too much memory

    def run(self, tokens: Tokens, take: Callable[[Tensor], Tensor]) -> Tensor:
        """By the batch's bucket's graph, captured if it is not there.

        Raises:
            _Eager: there can be none.
        """
        count = tokens.ids.shape[0]
        bucket = bucket_of(count, tokens.cu_seqlens.shape[0] - 1)
        self._check(tokens, bucket)
        with self._recorder.turn():
            if self._buffers is None:
                self._buffers = _Buffers(self.encoder, self._limits)
            self._buffers.fill(bucket, tokens)
            if bucket not in self.held:
                self._capture(bucket, self._buffers)
            self.held.move_to_end(bucket)
            graph = self.held[bucket]
            graph.replay()
            graph.replays += 1
            return take(self._buffers.hidden[:count])

    def clear(self) -> None:
        """Drops all graphs and their memory."""
        self._recorder.wait()
        self.held.clear()
        self._buffers, self.nbytes = None, 0
        self._recorder.reset()

    def _check(self, tokens: Tokens, bucket: Bucket) -> None:
        if any(each.dtype not in _ID_TYPES or each.device != self.encoder.device for each in tokens[:3]):
            raise _Eager("ids that operators refuse")  # and say why, where a copy would convert them
        if tokens.ids.shape[0] > self._limits.max_tokens:
            raise _Eager(f"more than {self._limits.max_tokens} tokens")
        if bucket.sequences > self._limits.largest.sequences:
            raise _Eager(f"more than {self._limits.largest.sequences} sequences")
        if bucket.tokens > self._most:
            raise self._too_large()
        why = self._recorder.unavailable()
        if why is not None:
            raise _Eager(why)

    def _capture(self, bucket: Bucket, buffers: _Buffers) -> None:
        tokens, hidden = buffers.tokens(bucket), buffers.hidden[: bucket.tokens]

        def run() -> None:
            hidden.copy_(self.encoder.last_hidden(tokens))

        graph, nbytes = None, 0
        try:
            with torch.inference_mode(False), torch.no_grad():
                graph = _Graph(self._recorder.record(run))
            nbytes = buffers.nbytes + self._recorder.nbytes()
        except torch.OutOfMemoryError:
            pass
        except Exception:
            self.clear()
            raise
        if graph is None or nbytes > self._limits.max_bytes:
            # The pool has grown for it: the other graphs go as well, and come back without it when they are met.
            self._most = bucket.tokens - 1
            self.clear()
            raise self._too_large()
        self.held[bucket], self.nbytes = graph, nbytes
        log.info("captured a CUDA graph of %s sequences; all graphs hold %.0f MiB", bucket, nbytes / _MIB)
        if len(self.held) > self._limits.max_graphs:
            self._evict()

    def _evict(self) -> None:
        """The graph that was not used for longest goes; it has run, for capturing waits for the device."""
        gone, _ = self.held.popitem(last=False)
        if not self.evicted:
            log.warning(
                "more buckets than max_graphs=%d: the graph of %s sequences goes", self._limits.max_graphs, gone
            )
        self.evicted += 1

    def _too_large(self) -> _Eager:
        return _Eager(f"graphs of more than {self._most} tokens take more memory than there is or max_bytes allows")


class _Buffers:
    """The memory that all graphs of an encoder read their batch from and write their result to, for the largest bucket.

    Raises:
        QBertError: that alone is more than all graphs may take.
    """

    def __init__(self, encoder: Encoder, limits: GraphLimits) -> None:
        tokens, sequences = limits.largest.tokens, limits.largest.sequences
        with torch.inference_mode(False):  # inference tensors could not be written to outside
            like = torch.empty(0, dtype=torch.int64, device=encoder.device)
            self.ids = like.new_zeros(3, tokens)  # of words, positions and token types
            self.cu_seqlens = like.new_zeros(sequences + 1, dtype=torch.int32)
            self.hidden = like.new_zeros(tokens, encoder.hidden_size, dtype=encoder.residual)
        self.nbytes = self.ids.nbytes + self.cu_seqlens.nbytes + self.hidden.nbytes
        if self.nbytes > limits.max_bytes:
            raise QBertError(
                f"max_bytes is {limits.max_bytes}, but batches of max_tokens={limits.max_tokens} go in and out through "
                f"{self.nbytes} bytes; allowed: more max_bytes or fewer max_tokens"
            )

    def tokens(self, bucket: Bucket) -> Tokens:
        """A bucket's part of them."""
        ids, positions, types = self.ids[:, : bucket.tokens].unbind()
        return Tokens(ids, positions, types, self.cu_seqlens[: bucket.sequences + 1])

    def fill(self, bucket: Bucket, tokens: Tokens) -> None:
        """Puts a batch there, then tokens of id 0, which every table has, and empty sequences."""
        count, bounds = tokens.ids.shape[0], tokens.cu_seqlens.shape[0]
        for held, given in zip(self.ids, tokens[:3], strict=True):
            held[:count].copy_(given)
        self.ids[:, count : bucket.tokens].zero_()
        self.cu_seqlens[:bounds].copy_(tokens.cu_seqlens)
        self.cu_seqlens[bounds : bucket.sequences + 1].fill_(count)
