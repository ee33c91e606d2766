"""Number formats and quantization schemes as data: every number stands here once, everything else is derived.

`elements` says what the bits of one number mean, `schemes` what kernels compute with, `blocks` and `named` the formats of a
study: element x scale x granularity x rounding x clipping x outliers.
"""

from qbert.formats.blocks import SCALES, BlockFormat, Clipping, Keep, Rounding, ScaleFormat, block_format
from qbert.formats.elements import (
    DICT3,
    DICT4,
    FLOAT4_E2M1FN,
    FLOAT6_E2M3FN,
    FLOAT6_E3M2FN,
    FLOAT8_E4M3FN,
    FLOAT8_E5M2,
    FORMATS,
    INT2,
    INT3,
    INT4,
    INT8,
    LOG4,
    NF4,
    POSIT6,
    POSIT8,
    Format,
    Kind,
    Specials,
    dictionary,
    fixed,
    get_element,
    integer,
    logarithmic,
    minifloat,
    posit,
    table,
)  # fmt: skip
from qbert.formats.named import NAMED, as_format, describe, get_format, load_format, sweep, usable_codes
from qbert.formats.schemes import (
    DEFAULT_GROUP_SIZE,
    GROUP_SIZES,
    SCHEME_ALIASES,
    SCHEMES,
    W4A8_GROUP_SCALE_MAX,
    EmulatedScheme,
    Granularity,
    PerGroup,
    PerRow,
    PerTensor,
    Role,
    Scheme,
    add_scheme,
    check_activations,
    emulated_scheme,
    get_scheme,
    native_scheme,
    scheme_names,
    tied_linear_scheme,
)  # fmt: skip

__all__ = [
    "DEFAULT_GROUP_SIZE", "DICT3", "DICT4", "FLOAT4_E2M1FN", "FLOAT6_E2M3FN", "FLOAT6_E3M2FN", "FLOAT8_E4M3FN",
    "FLOAT8_E5M2", "FORMATS", "GROUP_SIZES", "INT2", "INT3", "INT4", "INT8", "LOG4", "NAMED", "NF4", "POSIT6", "POSIT8",
    "SCALES", "SCHEMES", "SCHEME_ALIASES", "W4A8_GROUP_SCALE_MAX", "BlockFormat", "Clipping", "EmulatedScheme",
    "Format", "Granularity", "Keep", "Kind", "PerGroup", "PerRow", "PerTensor", "Role", "Rounding", "ScaleFormat",
    "Scheme", "Specials", "add_scheme", "as_format", "block_format", "check_activations", "describe", "dictionary",
    "emulated_scheme", "fixed", "get_element", "get_format", "get_scheme", "integer", "load_format", "logarithmic",
    "minifloat", "native_scheme", "posit", "scheme_names", "sweep", "table", "tied_linear_scheme", "usable_codes",
]  # fmt: skip
