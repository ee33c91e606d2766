"""Cost of an encoder in any formats on a machine that is data: time, energy, utilization, and what bounds each step.

`target` reads a machine's file, `work` an encoder's program, `operands` says which units take which formats, `tiling` cuts
products, `model` adds it all up. Modelled, never measured: a time is a floor where a target's rates are peaks.
"""

from qbert.cost.model import Formats, encoder_cost
from qbert.cost.result import Beside, EncoderCost, LayerCost, OperationCost
from qbert.cost.target import SHIPPED, Hardware, load_hardware, parse_hardware
from qbert.cost.work import EncoderWork, read_work

__all__ = [
    "SHIPPED", "Beside", "EncoderCost", "EncoderWork", "Formats", "Hardware", "LayerCost", "OperationCost", "encoder_cost",
    "load_hardware", "parse_hardware", "read_work",
]  # fmt: skip
