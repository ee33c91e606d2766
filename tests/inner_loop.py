"""The innermost loop of a kernel's machine code, which is where its time goes: for Triton's kernels and for compiled ones."""

from __future__ import annotations

import re
from collections import Counter


def inner_loop(sass: str, instruction: str) -> Counter[str]:
    """How often each instruction stands in the innermost loop that one is in, by their names up to a dot."""
    found = re.findall(r"/\*([0-9a-f]{4,5})\*/\s+(?:@!?U?P\w+\s+)?([A-Z0-9_]+)([^;]*);", sass)
    places = {int(address, 16): index for index, (address, _, _) in enumerate(found)}
    loops = []
    for index, (_, opcode, rest) in enumerate(found):
        target = re.search(r"0x([0-9a-f]+)\s*$", rest)
        start = places.get(int(target.group(1), 16)) if opcode == "BRA" and target else None
        if start is not None and start < index:
            loops.append(Counter(name for _, name, _ in found[start : index + 1]))
    return min((loop for loop in loops if loop[instruction]), key=Counter.total)
