"""What `bench_gemm` times: everything that computes a linear layer, each with its arguments, its bound and its check.

A candidate's `Entry` says what it is; building it quantizes the weight the candidate's own way, puts as many copies of all
arguments side by side as the caches cannot hold, and says what the result must be. qbert's rows are held to the product of the
dequantized codes, element by element; a peer, whose codes are not known here, to the float32 product, by the norm of the error.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from qbert import ops
from qbert.formats import DICT3, DICT4, INT4, INT8, SCHEMES, Role
from qbert.ops import cuda, triton
from qbert.ops.kernel import Kernel, problem_of
from qbert.ops.operations import Linear, Out, QuantizeRows
from qbert.ops.table import select, select_layout
from qbert.quantizers import quantize
from qbert.target import Target, target_of
from qbert.tiles import select_tile, tile_key
from qbert.timing import Candidate, Unavailable, sets_beyond_caches
from qbert.weight import Layout, Weight
from qbert.weight.codec import decode

from .bert_models import realistic_weights
from .peers import bnb_peer, gemlite_peer
from .peers.ao_peer import configuration
from .peers.base import library
from .problems import INTEGER_SCHEMES, PRECISIONS, WEIGHT_ONLY_SCHEMES, WEIGHT_ONLY_TOKENS
from .results_schema import Precision, Work

_MAX_SETS = 256
_COMPILED_SHAPES = 64
_INT8_LIMIT, _INT4_LIMIT, _FLOAT_LIMIT = 0.04, 0.2, 0.02  # norm of the error over that of the result
_EXACT_LIMIT = 0.01  # largest error over the largest value: a result in bfloat16 has 0.002
_OUT_SCALE_RANGE = 127.0
_NF4_GROUP = 64

# A GPU's kernels, each past the operator, which takes what the tables say: side by side on every problem.
KERNELS: dict[str, tuple[Kernel, ...]] = {"triton": triton.KERNELS, "cuda": cuda.KERNELS}
_CODES = {INT8: "int8", INT4: "int4", DICT4: "dict4", DICT3: "dict3"}  # as the extension names them

Check = Callable[[Any], str | None]
ArgumentSet = tuple[Any, ...]


@dataclass
class Built:
    """A candidate, ready to be timed.

    Attributes:
        candidate: the call and its sets of arguments.
        work: its bound.
        check: why a result is wrong, or None.
        kernel, tile: what runs, as far as it is known.
        weight_bytes: of one copy, as the kernel reads it.
        out_dtype: of what leaves it.
    """

    candidate: Candidate
    work: Work
    check: Check
    kernel: str
    weight_bytes: int
    out_dtype: str
    tile: str | None = None


@dataclass(frozen=True)
class Entry:
    """What a candidate is, before it is built.

    Attributes:
        name, library, scheme, configuration: as in the results.
        build: may raise whatever a library raises.
    """

    name: str
    library: str
    build: Callable[[Problem], Built]
    scheme: str | None = None
    configuration: str = ""


class Weights:
    """One weight in every form that candidates read, each made once.

    Args:
        n, k: output and input channels.
    """

    def __init__(self, n: int, k: int, device: torch.device) -> None:
        self.n, self.k, self.device = n, k, device
        self._quantized: dict[tuple[str, Layout], tuple[Weight, Tensor]] = {}
        generator = torch.Generator().manual_seed(0)
        self.weight = realistic_weights(n, k, generator=generator).to(device)
        self.bias = torch.randn(n, generator=generator).to(device)

    def linear(self, dtype: torch.dtype) -> nn.Linear:
        """A fresh float layer."""
        made = nn.Linear(self.k, self.n, device=self.device, dtype=dtype)
        with torch.no_grad():
            made.weight.copy_(self.weight)
            made.bias.copy_(self.bias)
        return made.requires_grad_(False).eval()

    def quantized(self, scheme: str, target: Target | None = None) -> tuple[Weight, Tensor]:
        """In the layout that a target's kernel reads, by default this device's; and what it stands for: (n, k) float32."""
        layout = select_layout(SCHEMES[scheme], Role.LINEAR, target or target_of(self.device))
        if (scheme, layout) not in self._quantized:
            plain = quantize(self.weight, SCHEMES[scheme])
            self._quantized[scheme, layout] = plain.to_layout(layout), decode(plain).to(self.device)
        return self._quantized[scheme, layout]


@dataclass
class Problem:
    """A linear of `t` tokens with weights that are shared by all numbers of tokens.

    Attributes:
        cold: arguments come out of memory in every call.
        x: (t, k), in the float type that is usual on the device.
    """

    weights: Weights
    t: int
    cold: bool
    x: Tensor = field(init=False)

    def __post_init__(self) -> None:
        device = self.weights.device
        generator = torch.Generator(device).manual_seed(self.t)
        x = torch.randn(self.t, self.weights.k, generator=generator, device=device)
        self.x = x.to(torch.bfloat16 if device.type == "cuda" else torch.float32)

    @property
    def device(self) -> torch.device:
        """Where it is computed."""
        return self.weights.device

    @functools.cached_property
    def codes(self) -> tuple[Tensor, Tensor]:
        """int8 (t, k) and its scales (t,)."""
        q, s = ops.call(QuantizeRows(self.x))
        return q, s

    @functools.cached_property
    def expected(self) -> Tensor:
        """The float32 product, (t, n)."""
        return product(self.x.float(), self.weights.weight, self.weights.bias)

    def work(self, precision: Precision, weight_bytes: int, in_bytes: float, out_bytes: float) -> Work:
        """The bound; `in_bytes` and `out_bytes` are those of one element."""
        t, n, k = self.t, self.weights.n, self.weights.k
        moved = weight_bytes + in_bytes * t * k + out_bytes * t * n
        return Work(operations=2.0 * t * n * k, precision=precision, bytes=moved)

    def sets(self, first: ArgumentSet) -> list[ArgumentSet]:
        """So many copies of all arguments that take turns as the caches cannot hold together; one where warm is meant."""
        if not self.cold:
            return [first]
        count = min(_MAX_SETS, sets_beyond_caches(sum(map(bytes_of, first)), self.device))
        return [first, *(tuple(map(_copied, first)) for _ in range(count - 1))]


@contextmanager
def true_float32() -> Iterator[None]:
    """No TF32, whatever it is set to."""
    allowed = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = False
    try:
        yield
    finally:
        torch.backends.cuda.matmul.allow_tf32 = allowed


def product(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """x @ weight.T + bias in true float32."""
    with true_float32():
        return nn.functional.linear(x, weight, bias)


def bytes_of(argument: Any) -> int:
    """Of a tensor, or of the tensors of a layer, a weight, or an operation's record; 0 of anything else."""
    if isinstance(argument, nn.Module):
        return sum(map(bytes_of, (*argument.parameters(), *argument.buffers())))
    if isinstance(argument, tuple):
        return sum(map(bytes_of, argument))
    return argument.nbytes if isinstance(argument, Tensor | Weight) else 0


def _copied(argument: Any) -> Any:
    if isinstance(argument, Tensor):
        return argument.clone()
    if isinstance(argument, Weight):
        tensors = {name: tensor.clone() for name, tensor in argument.tensors.items()}
        return Weight(argument.scheme, argument.shape, argument.layout, tensors)
    if isinstance(argument, tuple):  # a record, and what is in it
        return type(argument)(*map(_copied, argument))
    return copy.deepcopy(argument) if isinstance(argument, nn.Module) else argument


# ---- checks ---------------------------------------------------------------------------------------------------------


def near(expected: Tensor, limit: float) -> Check:
    """By the norm of the error."""

    def check(found: Tensor) -> str | None:
        error = float((found.float() - expected).norm() / expected.norm())
        return None if error <= limit else f"wrong result: relative error {error:.3g}, allowed {limit:g}"

    return check


def everywhere(expected: Tensor, limit: float) -> Check:
    """By the largest error."""

    def check(found: Tensor) -> str | None:
        error = float((found.float() - expected).abs().max() / expected.abs().max())
        return (
            None
            if error <= limit
            else f"wrong result: an element is off by {error:.3g} of the largest, allowed {limit:g}"
        )

    return check


def codes_of(expected: Tensor, out_scale: float) -> Check:
    """int8 codes of a float result: one unit off is a tie that rounded the other way."""
    codes = (expected / out_scale).clamp(-_OUT_SCALE_RANGE, _OUT_SCALE_RANGE).round()

    def check(found: Tensor) -> str | None:
        error = float((found.float() - codes).abs().max())
        return None if error <= 1 else f"wrong result: a code is off by {error:.0f}"

    return check


# ---- candidates -----------------------------------------------------------------------------------------------------


def entries(device: torch.device, t: int) -> Iterator[Entry]:
    """Everything that is measured with so many tokens, the baseline first."""
    cuda = device.type == "cuda"
    dtypes = (torch.bfloat16, torch.float16) if cuda else (torch.float32, torch.bfloat16)
    for dtype in dtypes:
        yield Entry(f"torch {PRECISIONS[dtype]}", "torch", functools.partial(_torch_linear, dtype=dtype))
    yield Entry(
        "torch._int_mm", "torch", _torch_int_mm, "w8a8", "scaled in separate passes; activations quantized before"
    )
    if cuda:
        yield Entry("torch._int_mm compiled", "torch", functools.partial(_torch_int_mm, compiled=True), "w8a8",
                    "scaled by inductor, dynamic shapes; activations quantized before")  # fmt: skip
    yield from _peers(cuda)
    yield Entry("qbert quantize_per_token", "qbert", _quantize_alone, None, "what quantizing activations costs, alone")
    for name in INTEGER_SCHEMES:
        yield _qbert_entry(name, "activations quantized before")
        yield _qbert_entry(name, "quantize_per_token and the product", " + quantize", with_quantization=True)
    yield _qbert_entry("w8a8", "activations quantized before; leaves int8", " int8 out", requant=True)
    weight_only = WEIGHT_ONLY_SCHEMES if t <= WEIGHT_ONLY_TOKENS else ()
    for name in weight_only:
        yield _qbert_entry(name, "float activations")
    for kernels in KERNELS if cuda else ():
        what = f"{kernels}'s launcher"
        for name in (*INTEGER_SCHEMES, *weight_only):
            yield _qbert_entry(name, what, f" {kernels}", kernels=kernels)
        yield _qbert_entry("w8a8", f"{what}; leaves int8", f" int8 out {kernels}", requant=True, kernels=kernels)


def _peers(cuda: bool) -> Iterator[Entry]:
    within = "activations quantized inside"
    yield Entry("torchao int8 dynamic", "torchao", _torchao, "w8a8", f"compiled, dynamic shapes; {within}")
    int8 = functools.partial(_bitsandbytes, nf4=False)
    yield Entry("bitsandbytes int8", "bitsandbytes", int8, "w8a8", f"LLM.int8(), outlier features in float; {within}")
    yield Entry("bitsandbytes nf4", "bitsandbytes", functools.partial(_bitsandbytes, nf4=True), "w4a16", "NF4 weights")
    if cuda:
        for kind, scheme in (("a8w8", "w8a8"), ("a16w4", "w4a16")):
            build = functools.partial(_gemlite, kind=kind)
            yield Entry(f"gemlite {kind}", "gemlite", build, scheme, within if kind == "a8w8" else "float activations")


def _torch_linear(problem: Problem, dtype: torch.dtype) -> Built:
    weights = problem.weights
    first = (problem.x.to(dtype), weights.weight.to(dtype), weights.bias.to(dtype))
    size = first[1].element_size()
    return Built(
        Candidate(nn.functional.linear, problem.sets(first)),
        problem.work(PRECISIONS[dtype], bytes_of(first[1]), size, size),
        near(problem.expected, _FLOAT_LIMIT), "torch", bytes_of(first[1]), _name(dtype),
    )  # fmt: skip


def _torch_int_mm(problem: Problem, compiled: bool = False) -> Built:
    _, meant = problem.weights.quantized("w8a8")
    dtype = problem.x.dtype
    plain = quantize(problem.weights.weight, SCHEMES["w8a8"]).tensors
    first = (*problem.codes, plain["qdata"], plain["scale"], problem.weights.bias.to(dtype))
    call = _compiled(_scaled_int_mm) if compiled else _scaled_int_mm
    return Built(
        Candidate(call, problem.sets(first)), problem.work("int8", bytes_of(first[2]), 1, dtype.itemsize),
        everywhere(_of_codes(problem, meant), _EXACT_LIMIT), "torch._int_mm", bytes_of(first[2]), _name(dtype),
    )  # fmt: skip


def _scaled_int_mm(q: Tensor, s: Tensor, weight: Tensor, scale: Tensor, bias: Tensor) -> Tensor:
    return (torch._int_mm(q, weight.t()) * s[:, None] * scale + bias).to(bias.dtype)


def _called(layer: nn.Module, x: Tensor) -> Any:
    return layer(x)


@functools.cache
def _compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """Once for all problems, with dynamic shapes: compiling takes seconds, and a GPU may be borrowed for minutes."""
    torch._dynamo.config.recompile_limit = (
        _COMPILED_SHAPES  # torch.compile gives up on a function after 8 shapes of weights
    )
    compiled: Callable[..., Any] = torch.compile(function, dynamic=True)
    return compiled


@dataclass(frozen=True)
class _Layer:
    """A peer's layer, called as a module.

    Attributes:
        x: what it is given.
        limit: of the error, see `near`.
        weight_bytes: as it reads them; None where its tensors say so.
    """

    module: nn.Module
    x: Tensor
    kernel: str
    precision: Precision
    limit: float
    weight_bytes: int | None = None
    call: Callable[..., Any] = _called

    def built(self, problem: Problem) -> Built:
        """Ready to be timed."""
        weight_bytes = bytes_of(self.module) if self.weight_bytes is None else self.weight_bytes
        return Built(
            Candidate(self.call, problem.sets((self.module, self.x))),
            problem.work(self.precision, weight_bytes, self.x.element_size(), self.x.element_size()),
            near(problem.expected, self.limit), self.kernel, weight_bytes, _name(self.x.dtype),
        )  # fmt: skip


def _torchao(problem: Problem) -> Built:
    quantization = library("torchao.quantization")
    layer = problem.weights.linear(torch.bfloat16)
    quantization.quantize_(layer, configuration("int8"))
    weight_bytes = problem.weights.n * (problem.weights.k + 4)
    x, call = problem.x.bfloat16(), _compiled(_called)
    return _Layer(layer, x, "torchao", "int8", _INT8_LIMIT, weight_bytes, call).built(problem)


def _bitsandbytes(problem: Problem, nf4: bool) -> Built:
    # LLM.int8() computes in float16 and casts everything else to it.
    dtype = torch.bfloat16 if nf4 or problem.device.type == "cpu" else torch.float16
    layer = bnb_peer.layer_of(problem.weights.linear(dtype), nf4=nf4).to(problem.device).eval()
    limit = _INT4_LIMIT if nf4 else _INT8_LIMIT
    precision: Precision = PRECISIONS[dtype] if nf4 else "int8"
    weight_bytes = None
    if nf4:  # a float32 scale for each group
        weight_bytes = problem.weights.n * problem.weights.k * (_NF4_GROUP // 2 + 4) // _NF4_GROUP
    return _Layer(layer, problem.x.to(dtype), "bitsandbytes", precision, limit, weight_bytes).built(problem)


def _gemlite(problem: Problem, kind: str) -> Built:
    layer = gemlite_peer.layer_of(problem.weights.linear(torch.float16), kind)
    limit = _INT8_LIMIT if kind == "a8w8" else _INT4_LIMIT
    precision: Precision = "int8" if kind == "a8w8" else "fp16"
    n, k = problem.weights.n, problem.weights.k
    weight_bytes = n * k if kind == "a8w8" else n * k // 2
    return _Layer(layer, problem.x.half(), "gemlite", precision, limit, weight_bytes).built(problem)


def _quantize_alone(problem: Problem) -> Built:
    a = QuantizeRows(problem.x)
    t, k = problem.x.shape
    s = problem.codes[1].float()[:, None]
    expected = problem.x.float()

    def check(found: tuple[Tensor, Tensor]) -> str | None:
        error = float(((found[0].float() * found[1].float()[:, None] - expected).abs() / s).max())
        return None if error <= 0.51 else f"wrong result: a code is off by {error:.3g} steps"

    return Built(
        Candidate(ops.call, problem.sets((a,))),
        Work(operations=0.0, precision="int8", bytes=float(t * k * (problem.x.element_size() + 1) + 4 * t)),
        check, select("quantize_rows", problem_of(a), target_of(problem.device)).name, 0, "int8",
    )  # fmt: skip


def _qbert_entry(
    scheme: str, configuration: str, suffix: str = "", *, with_quantization: bool = False, requant: bool = False,
    kernels: str = "",
) -> Entry:  # fmt: skip
    build = functools.partial(
        _qbert, name=scheme, with_quantization=with_quantization, requant=requant, kernels=kernels
    )
    return Entry(f"qbert {scheme}{suffix}", "qbert", build, scheme, configuration)


def _qbert(
    problem: Problem, name: str, with_quantization: bool = False, requant: bool = False, kernels: str = ""
) -> Built:  # fmt: skip
    """`kernels`: a key of `KERNELS`; by default what the operator chooses."""
    scheme, weights = SCHEMES[name], problem.weights
    target = target_of(problem.device)
    target = replace(target, prefer=kernels) if kernels else target
    held, meant = weights.quantized(name, target)
    expected = _of_codes(problem, meant) if scheme.activation else product(problem.x.float(), meant, weights.bias)
    out_scale = float(expected.abs().max()) / _OUT_SCALE_RANGE
    x, s = problem.codes if scheme.activation else (problem.x, None)
    out: Out = out_scale if requant else problem.x.dtype
    a = Linear(x, s, held, weights.bias, ops.Activation.NONE, False, out)
    row = _launcher(a, kernels, target) if kernels else select("linear", problem_of(a), target)
    call: Callable[..., Any] = row.call if kernels else ops.call
    if with_quantization:
        call, a = _quantizing, a._replace(x=problem.x, s=None)
    if kernels == "cuda":
        tile: str | None = compiled_tile(problem, name)
    else:
        tile = tile_of(tile_key(scheme), problem) if target.device == "cuda" else None
    x_bytes = problem.x.element_size() if with_quantization or not scheme.activation else 1
    out_dtype = torch.int8 if requant else problem.x.dtype
    return Built(
        Candidate(call, problem.sets((a,))),
        problem.work("int8" if scheme.activation else PRECISIONS[problem.x.dtype], held.nbytes, x_bytes, out_dtype.itemsize),
        codes_of(expected, out_scale) if requant else everywhere(expected, _EXACT_LIMIT),
        row.name, held.nbytes, _name(out_dtype), tile,
    )  # fmt: skip


def _quantizing(a: Linear) -> Any:
    """A linear whose float tokens become codes first, as in a layer."""
    q, s = ops.call(QuantizeRows(a.x))
    return ops.call(a._replace(x=q, s=s))


def _launcher(a: Linear, kernels: str, target: Target) -> Kernel:
    """Raises `Unavailable` where these kernels do not take the problem."""
    obstacle: str | None = "no linears"
    for row in KERNELS[kernels]:
        if row.operation == "linear":
            obstacle = row.obstacle(problem_of(a), target)
            if obstacle is None:
                return row
    raise Unavailable(f"{kernels} has no kernel for this problem: {obstacle}")


def _of_codes(problem: Problem, meant: Tensor) -> Tensor:
    """Of the codes of both sides, which int32 sums give exactly: (t, n) float32."""
    q, s = problem.codes
    return product(q.float() * s.float()[:, None], meant, problem.weights.bias)


def tile_of(key: str, problem: Problem) -> str | None:
    """The tile that the tables choose, in a line; None for what has no table."""
    try:
        tile = select_tile(key, problem.t, problem.weights.n, problem.weights.k, target_of(problem.device))
    except KeyError:
        return None
    split = f", k / {tile.split_k}" if tile.split_k > 1 else ""
    return f"{tile.road} {tile.block_t}x{tile.block_n}x{tile.block_k}, {tile.warps} warps, {tile.stages} stages{split}"


def compiled_tile(problem: Problem, name: str) -> str:
    """The tile that the compiled extension chooses for a linear of a scheme."""
    compiled, scheme, count = cuda.extension(), SCHEMES[name], target_of(problem.device).sm_count
    sizes = problem.t, problem.weights.n, problem.weights.k
    if scheme.activation is None:
        return str(compiled.few_choose(*sizes, _CODES[scheme.weight], int8_activations=False, multiprocessors=count))
    if scheme.weight == INT8:
        return str(compiled.choose(*sizes, multiprocessors=count))
    return str(compiled.lowbit_choose(*sizes, _CODES[scheme.weight], multiprocessors=count))


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
