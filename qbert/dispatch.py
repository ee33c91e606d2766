"""L4. Which kernel runs and which layout it reads: pure data in, data out, so every choice is tested with no such machine.

The tables below are the whole truth: `ops` asks the same function as `qbert.explain`, so what is shown is what runs.
"""

from __future__ import annotations

from dataclasses import dataclass

from qbert.formats import DICT3, INT4, INT8, Role, Scheme
from qbert.layout import Layout
from qbert.target import Target
from qbert.tiles import MIN_SM, select_tile


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
OPERATIONS = _INTEGER_PRODUCTS + _FLOAT_PRODUCTS + _ROW_OPERATIONS

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


def _select_cuda(operation: str, target: Target, layout: Layout | None) -> KernelChoice:
    if target.sm < MIN_SM:
        return KernelChoice(REFERENCE, f"no kernel for compute capability {target.sm / 10:.1f}; exact but slow")
    if layout is not None and layout not in TRITON_LAYOUTS[operation]:
        return KernelChoice(REFERENCE, f"no CUDA kernel reads layout {layout.value}; exact but slow")
    if target.prefer == "cuda" and operation in CUDA_OPERATIONS:
        return KernelChoice(
            f"cuda {operation}", "QBERT_KERNEL=cuda; Triton's kernel where the compiled one has no tile"
        )
    return KernelChoice(f"triton {operation}", _TRITON_REASONS[operation.removesuffix("_requant")])


# What the compiled extension for GPUs computes too (csrc/cuda).
CUDA_OPERATIONS = ("w8a8_linear", "w8a8_linear_requant", "add_layer_norm_quantize")


def runs_compiled(operation: str, t: int, n: int, k: int, target: Target) -> bool:
    """Whether a problem goes to the compiled extension before Triton: where QBERT_KERNEL or the tile's table says so."""
    if operation not in CUDA_OPERATIONS or target.prefer == "triton":
        return False
    return target.prefer == "cuda" or (
        n > 0 and target.native and select_tile(operation, t, n, k, target).road == "cuda"
    )


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
        if scheme.weight is DICT3 and scheme.activation is None:
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
