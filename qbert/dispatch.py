"""L4. Which kernel runs and which layout it reads: pure data in, data out, so every choice is tested with no such machine.

The tables below are the whole truth: `ops` asks the same function as `qbert.explain`, so what is shown is what runs.
"""

from __future__ import annotations

from dataclasses import dataclass

from qbert.formats import DICT3, INT4, INT8, Role, Scheme
from qbert.layout import Layout
from qbert.target import Target
from qbert.tiles import MIN_SM, prefers_compiled, select_tile


@dataclass(frozen=True)
class KernelChoice:
    """What runs for an operation, and why that one."""

    name: str
    reason: str


# Operation -> how torch itself computes it best on a CPU.
_INTEGER_PRODUCTS = (
    "w8a8_linear", "w8a8_linear_requant", "w4a8_linear", "w4a8_linear_requant", "gobo_linear", "gobo_linear_requant",
)  # fmt: skip
_FLOAT_PRODUCTS = ("w8a16_linear", "w4a16_linear", "gobo_a16_linear")
_ROW_OPERATIONS = (
    "quantize_per_token", "w8_embedding", "w4_embedding", "gobo_embedding", "attention_int8", "attention_int8_requant",
    "add_layer_norm_quantize", "embed_layer_norm_quantize",
)  # fmt: skip
# What two operations compute one after the other, wherever no kernel computes both.
COMPOSED = {"w8a8_linear_add_norm": ("w8a8_linear", "add_layer_norm_quantize")}
OPERATIONS = (*_INTEGER_PRODUCTS, *_FLOAT_PRODUCTS, *_ROW_OPERATIONS, *COMPOSED)

TORCH_INT_MM = "torch._int_mm"
TORCH_FLOAT32_CHUNKS = "torch float32 in exact chunks"
TORCH_EXPAND_LINEAR = "torch expand + linear"
TORCH_ROWS = "torch"
REFERENCE = "reference"
# Layouts that the native kernels read, by operation; operations that are not here read tensors as they are.
_PANELS = frozenset({Layout.INT8_PANELS, Layout.INT4_PANELS, Layout.INT3_PANELS})
NATIVE_LAYOUTS: dict[str, frozenset[Layout]] = {
    **dict.fromkeys(("w8a8_linear", "w8a8_linear_requant"), frozenset({Layout.INT8_PANELS, Layout.PLAIN})),
    **dict.fromkeys(("w4a8_linear", "w4a8_linear_requant"), frozenset({Layout.INT4_PANELS, Layout.INT8_EXPANDED})),
    **dict.fromkeys(("gobo_linear", "gobo_linear_requant", *_FLOAT_PRODUCTS), _PANELS),
    **dict.fromkeys(
        ("w8_embedding", "w4_embedding", "gobo_embedding", "embed_layer_norm_quantize"), frozenset({Layout.PLAIN})
    ),
}
# Layouts that the Triton kernels read. Weight-only products read every layout: what they cannot stream they expand first.
_WEIGHT_ONLY = frozenset(
    {Layout.INT8_ROWS, Layout.NIBBLE_HALVES, Layout.SELECT_HALVES, Layout.DICT3_WORDS, Layout.PLAIN}
)
TRITON_LAYOUTS: dict[str, frozenset[Layout]] = {
    **dict.fromkeys(("w8a8_linear", "w8a8_linear_requant"), frozenset({Layout.INT8_ROWS, Layout.PLAIN})),
    **dict.fromkeys(("w4a8_linear", "w4a8_linear_requant"), frozenset({Layout.NIBBLE_HALVES})),
    **dict.fromkeys(("gobo_linear", "gobo_linear_requant"), frozenset({Layout.SELECT_HALVES})),
    **dict.fromkeys(_FLOAT_PRODUCTS, _WEIGHT_ONLY),
    **dict.fromkeys(_ROW_OPERATIONS, frozenset({Layout.PLAIN})),
}

# What the compiled extension for GPUs (csrc/cuda) computes too: of the tensors that Triton's kernels read ...
_COMPILED_ROWS = ("add_layer_norm_quantize",)
_COMPILED_SHARED = ("w8a8_linear", "w8a8_linear_requant", *_COMPILED_ROWS)
# ... and of weights in a layout of its own.
COMPILED_LAYOUTS: dict[str, Layout] = {
    **dict.fromkeys(("w4a8_linear", "w4a8_linear_requant", "gobo_linear", "gobo_linear_requant"), Layout.FRAGMENTS_S8),
    **dict.fromkeys(_FLOAT_PRODUCTS, Layout.FRAGMENTS_F16),
}
CUDA_OPERATIONS = (*_COMPILED_SHARED, *COMPILED_LAYOUTS)
_NORMS = (*_COMPILED_ROWS, *COMPOSED)
# Compute capabilities: code for sm_90a runs on nothing newer either; row kernels need nothing of it (csrc/cuda/device.h).
COMPILED_SM, COMPILED_ROWS_SM = 90, 80

_CUDA_REASONS: dict[str, str] = {
    **dict.fromkeys(("w4a8_linear", "gobo_linear"), "codes lie as wgmma's registers take them and become int8 there"),
    **dict.fromkeys(
        _FLOAT_PRODUCTS, "codes lie as wgmma's registers take them: decoded there for 64 tokens, expanded for more"
    ),
}
_TRITON_REASONS: dict[str, str] = {
    **dict.fromkeys(_ROW_OPERATIONS, "one pass over memory"),
    **dict.fromkeys(
        _FLOAT_PRODUCTS,
        "weights decoded in registers for few tokens (256, in float32 16), expanded for torch's product above",
    ),
    "w8a8_linear": "int8 matrix units",
    "w4a8_linear": "codes become int8 in registers, int8 matrix units",
    "gobo_linear": "codes become int8 in registers, int8 matrix units",
    "attention_int8": "int8 matrix units for the scores, float16 ones for the values",
}


def select_kernel(operation: str, target: Target, layout: Layout | None = None) -> KernelChoice:
    """The kernel that runs `operation` on `target`.

    Args:
        layout: of the weight; by default one that the best kernel reads.

    Raises:
        KeyError: an operation that is not in `OPERATIONS` (a mistake in qbert, not in its input).
    """
    if operation not in OPERATIONS:
        raise KeyError(operation)
    if operation in COMPOSED:
        return _select_composed(operation, target, layout)
    if target.device == "cuda":
        return _select_cuda(operation, target, layout)
    if target.device != "cpu":
        return KernelChoice(REFERENCE, f"no {target.device} kernel for {operation} in this version; exact but slow")
    readable = NATIVE_LAYOUTS.get(operation)
    if target.native and (layout is None or readable is None or layout in readable):
        return KernelChoice(f"native {target.isa}", "compiled kernel for this CPU")
    if operation in _INTEGER_PRODUCTS:
        if target.int_mm_exact:
            return KernelChoice(TORCH_INT_MM, "torch's int8 product is exact on this CPU")
        return KernelChoice(TORCH_FLOAT32_CHUNKS, "torch's int8 product saturates on this CPU (no VNNI)")
    if operation in _FLOAT_PRODUCTS:
        return KernelChoice(TORCH_EXPAND_LINEAR, "weight expanded to float for each call: saves memory, not time")
    return KernelChoice(TORCH_ROWS, "plain torch")


def _select_composed(operation: str, target: Target, layout: Layout | None) -> KernelChoice:
    first, then = COMPOSED[operation]
    if runs_compiled(operation, 0, 0, 0, target):
        return KernelChoice(f"cuda {operation}", f"one launch where that is faster by a model, else {first} and {then}")
    return select_kernel(first, target, layout)  # the product is what takes time


def _select_cuda(operation: str, target: Target, layout: Layout | None) -> KernelChoice:
    if target.sm < MIN_SM:
        return KernelChoice(REFERENCE, f"no kernel for compute capability {target.sm / 10:.1f}; exact but slow")
    own = COMPILED_LAYOUTS.get(operation)
    preferred = operation in CUDA_OPERATIONS and prefers_extension(operation, target)
    if own is not None and (layout is own or (layout is None and preferred)):
        return _select_compiled(operation, target, own)
    if layout is not None and layout not in TRITON_LAYOUTS[operation]:
        return KernelChoice(REFERENCE, f"no CUDA kernel reads layout {layout.value}; exact but slow")
    if preferred and own is None:
        if target.prefer == "cuda":
            return KernelChoice(
                f"cuda {operation}", "QBERT_KERNEL=cuda; Triton's kernel where the compiled one has no tile"
            )
        return KernelChoice(f"triton or cuda {operation}", "the table of tiles says which, problem by problem")
    return KernelChoice(
        f"triton {operation}", _why_not_compiled(operation, target) + _TRITON_REASONS[_float_twin(operation)]
    )


def _select_compiled(operation: str, target: Target, layout: Layout) -> KernelChoice:
    obstacle = compiled_obstacle(operation, target)
    if obstacle is not None:
        return KernelChoice(REFERENCE, f"the weight lies in {layout.value}, but {obstacle}; exact but slow")
    asked = "QBERT_KERNEL=cuda; " if target.prefer == "cuda" else ""
    return KernelChoice(f"cuda {operation}", asked + _CUDA_REASONS[_float_twin(operation)])


def _why_not_compiled(operation: str, target: Target) -> str:
    """The beginning of a reason where QBERT_KERNEL asks for the extension and Triton runs; else nothing."""
    if target.prefer != "cuda" or operation not in CUDA_OPERATIONS:
        return ""
    obstacle = compiled_obstacle(operation, target) or "the weight lies in a layout that only Triton's kernels read"
    return f"QBERT_KERNEL=cuda, but {obstacle}; "


def _float_twin(operation: str) -> str:
    return operation.removesuffix("_requant")


def compiled_obstacle(operation: str, target: Target) -> str | None:
    """Why the compiled extension cannot compute one of `CUDA_OPERATIONS` on a CUDA target; None where it can."""
    if operation in _COMPILED_ROWS:
        if target.sm < COMPILED_ROWS_SM:
            least = COMPILED_ROWS_SM / 10
            return f"the CUDA row kernels run from compute capability {least:.1f} on, this GPU has {target.sm / 10:.1f}"
    elif target.sm != COMPILED_SM:
        return f"the CUDA kernels are compiled for compute capability {COMPILED_SM / 10:.1f}, this GPU has {target.sm / 10:.1f}"
    return None if target.native else target.native_missing or "the CUDA kernels (qbert._cuda) are missing"


def missing_extension(target: Target) -> str | None:
    """Why a GPU that the compiled extension is for runs without it; None on all others, and where Triton is asked for."""
    if target.device != "cuda" or target.sm != COMPILED_SM or target.prefer == "triton":
        return None
    return compiled_obstacle("w8a8_linear", target)


def prefers_extension(operation: str, target: Target) -> bool:
    """Whether the extension can compute an operation of `CUDA_OPERATIONS`, and QBERT_KERNEL or the tiles' table asks for it."""
    if target.prefer == "triton" or compiled_obstacle(operation, target) is not None:
        return False
    return target.prefer == "cuda" or prefers_compiled(operation, target)


def runs_compiled(operation: str, t: int, n: int, k: int, target: Target, layout: str = "") -> bool:
    """Whether a problem goes to the compiled extension before Triton.

    Where the extension has a layout of its own the weight's layout says it, chosen once for all its problems; elsewhere
    QBERT_KERNEL or the table's tile for the problem.

    Args:
        layout: of the weight, where there is one.
    """
    if operation in COMPILED_LAYOUTS:
        return layout == COMPILED_LAYOUTS[operation].value
    if operation in _NORMS:
        return _norms_run_compiled(target) and compiled_obstacle(operation, target) is None
    if (
        operation not in CUDA_OPERATIONS
        or target.prefer == "triton"
        or compiled_obstacle(operation, target) is not None
    ):
        return False
    return target.prefer == "cuda" or (n > 0 and select_tile(operation, t, n, k, target).road == "cuda")


def _norms_run_compiled(target: Target) -> bool:
    """One answer for all problems and both operations, or a token's norm would have other bits in another batch."""
    return target.device == "cuda" and prefers_extension("add_layer_norm_quantize", target)


def linear_operation(scheme: Scheme) -> str:
    """The operation that a linear of that scheme calls."""
    if scheme.has_dictionary:
        return "gobo_linear" if scheme.activation else "gobo_a16_linear"
    return f"w{scheme.weight_bits}a{scheme.activation_bits or 16}_linear"


def embedding_operation(scheme: Scheme) -> str:
    """The operation that an embedding of that scheme calls."""
    return "gobo_embedding" if scheme.has_dictionary else f"w{scheme.weight_bits}_embedding"


def select_layout(scheme: Scheme, role: Role, target: Target) -> Layout:
    """The layout that the kernel for a weight of that scheme reads on `target`."""
    if role is Role.EMBEDDING:
        return Layout.PLAIN  # a look-up unpacks the rows it needs
    if target.device == "cuda" and target.sm >= MIN_SM:
        compiled = COMPILED_LAYOUTS.get(linear_operation(scheme))
        if compiled is not None and prefers_extension(linear_operation(scheme), target):
            return compiled
        if scheme.weight == DICT3 and scheme.activation is None:
            return Layout.DICT3_WORDS  # bound by bytes, so all three bits count
        return {INT8: Layout.INT8_ROWS, INT4: Layout.NIBBLE_HALVES}.get(scheme.weight, Layout.SELECT_HALVES)
    if target.device != "cpu":
        return Layout.PLAIN
    if target.native:
        return {8: Layout.INT8_PANELS, 4: Layout.INT4_PANELS, 3: Layout.INT3_PANELS}[scheme.weight_bits]
    if scheme.weight_bits == 8:
        return Layout.PLAIN  # an int8 row is its own operand
    if scheme.activation is not None:
        return Layout.INT8_EXPANDED  # torch multiplies int8 matrices only: expand once, at load
    return Layout.BYTES  # unpacking bits in torch costs more than the product; a byte a code is the compromise


# A BERT-base layer's activations for so many tokens are about 15 MB and stay in the last-level cache. Reading the weights
# once a portion costs 1% of its time.
_CPU_TOKENS_AT_ONCE = 1024


def tokens_at_once(target: Target) -> int | None:
    """How many tokens a fused encoder takes through all layers together; None for as many as there are."""
    return _CPU_TOKENS_AT_ONCE if target.device == "cpu" else None
