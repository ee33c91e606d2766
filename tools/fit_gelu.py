"""Fits GELU's approximations, and measures those in use: coefficients and errors, on the GPUs and on CPUs.

    python tools/fit_gelu.py            some three million float32
    python tools/fit_gelu.py --every    every float32 between 2**-20 and 16 in magnitude: most of a minute

GPUs     gelu(x) = max(x, 0) - |x| 2**(|x| p(|x|) - 1), p of degree 7: kernels/epilogue.py, csrc/cuda
CPUs     gelu(x) = x / 2 + x z P(z**2) / Q(z**2), P and Q of degree 5, z = x within +-5.5: csrc/cpu/simd.h

The coefficients in use stay, for the bits of results depend on them. They come from earlier minimax fits of the same forms
that cannot be run again; the best ones are derived here to compare. Exits with 1 where those in use are off by more than they
promise, or where two places differ.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import mpmath as mp
import numpy as np
import torch

ROOT = Path(__file__).resolve().parents[1]
NUMBER = re.compile(r"-?\d+\.\d+(?:e-?\d+)?(?=f?\b)")
# What kernels/epilogue.py, csrc/cuda and csrc/cpu/simd.h promise. Half a unit in the last place of a float32 is 6e-8 of it.
FITS = {"gpu": 2.8e-8, "cpu": 2.6e-8}
ERRORS = {
    "gpu, of gelu(x > 0)": 1.5e-7,
    "gpu, absolute below 0": 8e-8,
    "gpu, of gelu(x > 0), 2**x two units off": 3.8e-7,
    "gpu, absolute below 0, 2**x two units off": 1e-7,
    "cpu, of |x|": 2.2e-7,
}
CPU_EDGE = 5.5
mp.mp.dps = 30


# ---- where coefficients stand ---------------------------------------------------------------------------------------


def gpu_coefficients(path: Path) -> tuple[float, ...]:
    """Of p, the constant first: the numbers in the lines that begin with `p = ` in the function `gelu`."""
    body = path.read_text().partition("gelu(x")[2] or path.read_text().partition("gelu(float x")[2]
    steps = [line for line in body.splitlines() if re.match(r"\s*(?:float )?p = ", line)]
    return _float32s("".join(steps))[::-1]


def cpu_coefficients() -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Of P and Q, the constants first."""
    text = (ROOT / "csrc/cpu/simd.h").read_text()
    above, below = (re.findall(rf"kGelu{name}\[6\] = {{(.*?)}}", text)[0] for name in ("Above", "Below"))
    return _float32s(above), _float32s(below)


def _float32s(text: str) -> tuple[float, ...]:
    return tuple(float(np.float32(number)) for number in NUMBER.findall(text))


def in_use() -> dict[str, tuple[float, ...]]:
    """File -> p's coefficients."""
    files = [
        Path("kernels/epilogue.py"),
        *sorted(path.relative_to(ROOT) for path in ROOT.glob("csrc/cuda/**/gelu.cuh")),
    ]
    return {str(file): gpu_coefficients(ROOT / file) for file in files}


# ---- the best fits --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Form:
    """What is fitted: `target(x)` by P(variable(x)) / Q(variable(x)), with an error that counts `weight(x)` times."""

    target: Callable[[mp.mpf], mp.mpf]
    weight: Callable[[mp.mpf], mp.mpf]
    variable: Callable[[mp.mpf], mp.mpf]
    edge: float
    above: int  # degrees
    below: int

    def grid(self, points: int = 1500) -> list[mp.mpf]:
        return [mp.mpf(self.edge) * i / points for i in range(1, points + 1)]

    def errors(self, above: Sequence[float], below: Sequence[float], grid: Sequence[mp.mpf]) -> list[mp.mpf]:
        """Weighted, with exact arithmetic; coefficients begin with the constant."""
        value = lambda c, x: mp.polyval(list(c)[::-1], self.variable(x))
        return [self.weight(x) * (value(above, x) / value(below, x) - self.target(x)) for x in grid]


def tail(a: mp.mpf) -> mp.mpf:
    return mp.erfc(a / mp.sqrt(2)) / 2


# p(a) = log2(2 tail(a)) / a; an error e of it moves gelu(a) = a (1 - tail(a)) by ln(2) a**2 tail(a) e.
GPU = Form(
    target=lambda a: mp.log(2 * tail(a), 2) / a,
    weight=lambda a: mp.log(2) * a * tail(a) / (1 - tail(a)),
    variable=lambda a: a, edge=6.0, above=7, below=0,
)  # fmt: skip
CPU = Form(
    target=lambda x: (mp.mpf(1) / 2 - tail(x)) / x, weight=lambda x: x,
    variable=lambda x: x * x, edge=CPU_EDGE, above=5, below=5,
)  # fmt: skip


def minimax(form: Form, start: Sequence[float]) -> tuple[list[mp.mpf], list[mp.mpf], mp.mpf]:
    """P, Q (of constant 1, near `start`) and the largest weighted error, by Remez's exchange."""
    grid = form.grid()
    targets, weights = [form.target(x) for x in grid], [form.weight(x) for x in grid]
    count = form.above + form.below + 2
    chosen = [int((1 - mp.cos(mp.pi * (2 * i + 1) / (2 * count))) / 2 * len(grid)) for i in range(count)]
    below = list(start)
    for _ in range(40):
        above, below = _through(form, [(form.variable(grid[i]), targets[i], weights[i]) for i in chosen], below)
        errors = form.errors(above, below, grid)
        before, chosen = chosen, _extremes(errors, count)
        if chosen == before:
            break
    return above, below, max(map(abs, errors))


def _through(
    form: Form, points: Sequence[tuple[mp.mpf, mp.mpf, mp.mpf]], below: Sequence[float]
) -> tuple[list[mp.mpf], list[mp.mpf]]:
    """P and Q whose weighted errors at the points are of one size and of alternating signs; `below` is near Q."""
    for _ in range(1 if form.below == 0 else 8):  # P - target Q = +- size Q / weight is linear but for the last Q
        rows, right = [], []
        for i, (v, target, weight) in enumerate(points):
            off = (-1) ** i / weight * mp.polyval(list(below)[::-1], v)
            rows.append(
                [*(v**j for j in range(form.above + 1)), *(-target * v**j for j in range(1, form.below + 1)), -off]
            )
            right.append(target)
        found = list(mp.lu_solve(mp.matrix(rows), mp.matrix(right)))
        below = [mp.mpf(1), *found[form.above + 1 : -1]]
    return found[: form.above + 1], list(below)


def _extremes(errors: Sequence[mp.mpf], count: int) -> list[int]:
    """Where the error is largest between changes of its sign: `count` places in a row."""
    found: list[int] = []
    for i, error in enumerate(errors):
        if not found or (error > 0) != (errors[found[-1]] > 0):
            found.append(i)
        elif abs(error) > abs(errors[found[-1]]):
            found[-1] = i
    while len(found) > count:
        found.pop(0 if abs(errors[found[0]]) < abs(errors[found[-1]]) else -1)
    return found


# ---- the ones in use, in float32 ------------------------------------------------------------------------------------


def fma(a: np.ndarray, b: np.ndarray | np.float32, c: np.ndarray | np.float32) -> np.ndarray:
    """a * b + c in float64, rounded to float32: a fused multiply-add, but for its rounding of rare halves."""
    return (a.astype(np.float64) * np.float64(b) + np.float64(c)).astype(np.float32)


def horner(coefficients: Sequence[float], x: np.ndarray) -> np.ndarray:
    """With fused multiply-adds, the constant first."""
    total = np.full_like(x, coefficients[-1])
    for each in coefficients[-2::-1]:
        total = fma(total, x, np.float32(each))
    return total


def gpu_gelu(x: np.ndarray, coefficients: Sequence[float], units_off: int = 0) -> np.ndarray:
    """As kernels/epilogue.py and csrc/cuda compute it, the power of two rounded once or off by so many units besides."""
    a = np.abs(x)
    exponent = fma(a, horner(coefficients, a), np.float32(-1)).astype(np.float64)
    power = (np.exp2(exponent) * (1 + units_off * 2.0**-23)).astype(np.float32)
    return fma(-a, power, np.maximum(x, np.float32(0)))


def cpu_gelu(x: np.ndarray, coefficients: tuple[Sequence[float], Sequence[float]]) -> np.ndarray:
    """As csrc/cpu/simd.h computes it."""
    inside = np.clip(x, np.float32(-CPU_EDGE), np.float32(CPU_EDGE))
    above, below = (horner(each, inside * inside) for each in coefficients)
    return fma(x, inside * above / below, x * np.float32(0.5))


def float32s(step: int) -> Iterator[np.ndarray]:
    """Every `step`-th float32 of magnitude 2**-20 ... 16, a million at a time; nearer to 0 GELU is x / 2 to the last bit."""
    first, last = (int(np.float32(value).view(np.uint32)) for value in (2.0**-20, 16.0))
    for start in range(first, last, step << 20):
        positive = np.arange(start, min(start + (step << 20), last), step, dtype=np.uint32).view(np.float32)
        yield from (positive, -positive)


def largest_errors(step: int) -> dict[str, float]:
    """Of results in float32, by the names in ERRORS; PTX lets a GPU's 2**x be off by two units in the last place."""
    worst = dict.fromkeys(ERRORS, 0.0)
    coefficients, rational = next(iter(in_use().values())), cpu_coefficients()
    for x in float32s(step):
        double = torch.from_numpy(x).double()
        exact = (double * 0.5 * torch.special.erfc(double / -(2**0.5))).numpy()
        side, size = ("gpu, of gelu(x > 0)", exact) if x[0] > 0 else ("gpu, absolute below 0", 1.0)
        results = [(side, size, gpu_gelu(x, coefficients)), ("cpu, of |x|", np.abs(x), cpu_gelu(x, rational))]
        results += [(f"{side}, 2**x two units off", size, gpu_gelu(x, coefficients, units)) for units in (-2, 2)]
        for name, size, found in results:
            worst[name] = max(worst[name], float((np.abs(found - exact) / size).max()))
    return worst


def fit_errors() -> dict[str, float]:
    """The largest errors of the coefficients in use, rounded to float32 as they are, with exact arithmetic."""
    largest = lambda form, above, below: float(max(map(abs, form.errors(above, below, form.grid(500)))))
    return {"gpu": largest(GPU, next(iter(in_use().values())), (1.0,)), "cpu": largest(CPU, *cpu_coefficients())}


def broken(step: int) -> list[str]:
    """Promises that do not hold; prints what is found."""
    places = in_use()
    for place, coefficients in {**places, "csrc/cpu/simd.h": sum(cpu_coefficients(), ())}.items():
        print(f"{place}: {', '.join(f'{each:.8e}' for each in coefficients)}")
    wrong = [] if len(places) > 1 and len(set(places.values())) == 1 else [f"one fit in {' and '.join(places)}"]
    for found, limits, of in ((fit_errors(), FITS, "fit, exact arithmetic"), (largest_errors(step), ERRORS, "float32")):
        for name, limit in limits.items():
            print(f"{name} ({of}): {found[name]:.3g}, at most {limit:.2g}")
            wrong += [] if found[name] <= limit else [f"{name} ({of}) within {limit:.2g}"]
    return wrong


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--every", action="store_true", help="every float32 that matters")
    step = 1 if parser.parse_args().every else 251
    for name, form, start in (("GPUs", GPU, (1.0,)), ("CPUs", CPU, cpu_coefficients()[1])):
        above, below, error = minimax(form, start)
        print(f"best for {name}: {mp.nstr(above, 9)} / {mp.nstr(below, 9)}, off by {mp.nstr(error, 3)}")
    wrong = broken(step)
    if wrong:
        sys.exit("does not hold: " + "; ".join(wrong))


if __name__ == "__main__":
    main()
