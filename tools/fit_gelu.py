"""Fits the approximations of activations, and measures those in use: coefficients and errors, on the GPUs and on CPUs.

    python tools/fit_gelu.py            some three million float32
    python tools/fit_gelu.py --every    every float32 between 2**-20 and 16 in magnitude: most of a minute

GPUs     gelu(x) = max(x, 0) - |x| 2**(|x| p(|x|) - 1), p of degree 7: kernels/epilogue.py, csrc/cuda
CPUs     gelu(x) = x / 2 + x z P(z**2) / Q(z**2), P and Q of degree 5, z = x within +-5.5: csrc/cpu/activations.h
both     SiLU and GELU's tanh form, x times a logistic function by 2**r, r within +-0.5: kernels/epilogue.py,
         csrc/cpu/activations.h

GELU's coefficients in use stay, for the bits of results depend on them. They come from earlier minimax fits of the same forms
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
# What kernels/epilogue.py, csrc/cuda and csrc/cpu/activations.h promise. Half a unit in a float32's last place is 6e-8 of it.
FITS = {"gpu": 2.8e-8, "cpu": 2.6e-8, "2**r": 1.5e-8}
ERRORS = {
    "gpu, of gelu(x > 0)": 1.5e-7,
    "gpu, absolute below 0": 8e-8,
    "gpu, of gelu(x > 0), 2**x two units off": 3.8e-7,
    "gpu, absolute below 0, 2**x two units off": 1e-7,
    "cpu, of |x|": 2.2e-7,
    "silu, of itself": 2.4e-7,
    "gelu_tanh, of itself above 0, of |x| below": 1.5e-7,
}
CPU_EDGE = 5.5
LEAST_POWER = -125  # smaller powers of two count as 0 in the logistic function
mp.mp.dps = 30


# ---- where coefficients stand ---------------------------------------------------------------------------------------


def gpu_coefficients(path: Path) -> tuple[float, ...]:
    """Of p, the constant first: the numbers in the lines that begin with `p = ` in the function `gelu`."""
    body = path.read_text().partition("gelu(x")[2] or path.read_text().partition("gelu(float x")[2]
    steps = [line for line in body.splitlines() if re.match(r"\s*(?:float )?p = ", line)]
    return _float32s("".join(steps))[::-1]


def cpu_coefficients() -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Of P and Q, the constants first."""
    text = (ROOT / "csrc/cpu/activations.h").read_text()
    above, below = (re.findall(rf"kGelu{name}\[6\] = {{(.*?)}}", text)[0] for name in ("Above", "Below"))
    return _float32s(above), _float32s(below)


@dataclass(frozen=True)
class Logistic:
    """Constants of SiLU and GELU's tanh form.

    Attributes:
        exp2: of 2**r, the constant first.
        log2e: log2(e) in two parts.
        tanh: factors of x and x**3 in 2 sqrt(2 / pi) log2(e) (x + 0.044715 x**3).
    """

    exp2: tuple[float, ...]
    log2e: tuple[float, ...]
    tanh: tuple[float, ...]


def logistic_constants() -> dict[str, Logistic]:
    """File -> constants."""
    cpp, python = "csrc/cpu/activations.h", "kernels/epilogue.py"
    text = (ROOT / cpp).read_text()
    one = lambda name: _float32s(re.findall(rf"\bk{name} = (.*?)[,;]", text)[0])
    found = {
        cpp: Logistic(
            _float32s(re.findall(r"kExp2\[7\] = {(.*?)}", text)[0]), one("Log2EHigh") + one("Log2ELow"),
            one("TanhLinear") + one("TanhCubic"),
        )
    }  # fmt: skip
    text = (ROOT / python).read_text()
    constant = lambda name: _float32s(re.findall(rf"^{name} = tl.constexpr\((.*?)\)$", text, re.MULTILINE)[0])
    exp2 = tuple(constant(f"EXP2_{i}")[0] for i in range(7))
    log2e, tanh = constant("LOG2E_HIGH") + constant("LOG2E_LOW"), constant("TANH_LINEAR") + constant("TANH_CUBIC")
    return found | {python: Logistic(exp2, log2e, tanh)}


def logistic_best() -> Logistic:
    """What the constants must be, the fit of 2**r aside."""
    log2e = mp.log(mp.e, 2)
    high = np.float32(float(log2e))
    factor = 2 * mp.sqrt(2 / mp.pi) * log2e
    nearest = lambda value: float(np.float32(float(value)))
    return Logistic(
        (), (float(high), nearest(log2e - mp.mpf(float(high)))), (nearest(factor), nearest(factor * mp.mpf("0.044715")))
    )  # fmt: skip


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

# r = x - 1/2.
EXP2 = Form(
    target=lambda x: mp.power(2, x - mp.mpf(1) / 2), weight=lambda x: mp.power(2, mp.mpf(1) / 2 - x),
    variable=lambda x: x - mp.mpf(1) / 2, edge=1.0, above=6, below=0,
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
    """As csrc/cpu/activations.h computes it."""
    inside = np.clip(x, np.float32(-CPU_EDGE), np.float32(CPU_EDGE))
    above, below = (horner(each, inside * inside) for each in coefficients)
    return fma(x, inside * above / below, x * np.float32(0.5))


def power_of_two(n: np.ndarray, r: np.ndarray, constants: Logistic) -> np.ndarray:
    """2**(n + r)."""
    power = np.ldexp(horner(constants.exp2, r), np.maximum(n, LEAST_POWER).astype(np.int32))
    return np.where(n < LEAST_POWER, np.float32(0), power)


def times_logistic(x: np.ndarray, power: np.ndarray) -> np.ndarray:
    """x times the logistic function."""
    return np.where(x < 0, x * power, x) / (power + np.float32(1))


def silu(x: np.ndarray, constants: Logistic) -> np.ndarray:
    """As kernels/epilogue.py and csrc/cpu/activations.h compute it."""
    a, (high, low) = np.abs(x), (np.float32(-each) for each in constants.log2e)
    n = np.rint(a * high)
    return times_logistic(x, power_of_two(n, fma(a, low, fma(a, high, -n)), constants))


def gelu_tanh(x: np.ndarray, constants: Logistic) -> np.ndarray:
    """As kernels/epilogue.py and csrc/cpu/activations.h compute it."""
    linear, cubic = (np.float32(-each) for each in constants.tanh)
    z = np.abs(x) * fma(x * x, cubic, linear)
    n = np.rint(z)
    return times_logistic(x, power_of_two(n, z - n, constants))


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
    logistic = next(iter(logistic_constants().values()))
    for x in float32s(step):
        double = torch.from_numpy(x).double()
        exact = (double * 0.5 * torch.special.erfc(double / -(2**0.5))).numpy()
        side, size = ("gpu, of gelu(x > 0)", exact) if x[0] > 0 else ("gpu, absolute below 0", 1.0)
        results = [(side, size, gpu_gelu(x, coefficients)), ("cpu, of |x|", np.abs(x), cpu_gelu(x, rational))]
        results += [(f"{side}, 2**x two units off", size, gpu_gelu(x, coefficients, units)) for units in (-2, 2)]
        with_truth = [(name, size, found, exact) for name, size, found in results] + _logistic_results(x, logistic)
        for name, size, found, truth in with_truth:
            worst[name] = max(worst[name], float((np.abs(found - truth) / size).max()))
    return worst


def _logistic_results(x: np.ndarray, constants: Logistic) -> list[tuple[str, np.ndarray, np.ndarray, np.ndarray]]:
    """Name, what the error is relative to, result and truth."""
    double = x.astype(np.float64)
    wanted = double / (1 + np.exp(-double))
    by_tanh = double / (1 + np.exp(-2 * (2 / np.pi) ** 0.5 * (double + 0.044715 * double**3)))
    size = by_tanh if x[0] > 0 else np.abs(double)
    return [
        ("silu, of itself", np.abs(wanted), silu(x, constants), wanted),
        ("gelu_tanh, of itself above 0, of |x| below", size, gelu_tanh(x, constants), by_tanh),
    ]


def fit_errors() -> dict[str, float]:
    """The largest errors of the coefficients in use, rounded to float32 as they are, with exact arithmetic."""
    largest = lambda form, above, below: float(max(map(abs, form.errors(above, below, form.grid(500)))))
    return {
        "gpu": largest(GPU, next(iter(in_use().values())), (1.0,)),
        "cpu": largest(CPU, *cpu_coefficients()),
        "2**r": largest(EXP2, next(iter(logistic_constants().values())).exp2, (1.0,)),
    }


def broken(step: int) -> list[str]:
    """Promises that do not hold; prints what is found."""
    places = in_use()
    for place, coefficients in {**places, "csrc/cpu/activations.h": sum(cpu_coefficients(), ())}.items():
        print(f"{place}: {', '.join(f'{each:.8e}' for each in coefficients)}")
    wrong = [] if len(places) > 1 and len(set(places.values())) == 1 else [f"one fit in {' and '.join(places)}"]
    logistic, best = logistic_constants(), logistic_best()
    if len(set(logistic.values())) != 1:
        wrong.append(f"one logistic function in {' and '.join(logistic)}")
    wrong += [
        f"{place}: {best}" for place, each in logistic.items() if (each.log2e, each.tanh) != (best.log2e, best.tanh)
    ]
    for found, limits, of in ((fit_errors(), FITS, "fit, exact arithmetic"), (largest_errors(step), ERRORS, "float32")):
        for name, limit in limits.items():
            print(f"{name} ({of}): {found[name]:.3g}, at most {limit:.2g}")
            wrong += [] if found[name] <= limit else [f"{name} ({of}) within {limit:.2g}"]
    return wrong


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--every", action="store_true", help="every float32 that matters")
    step = 1 if parser.parse_args().every else 251
    for name, form, start in (("GPUs", GPU, (1.0,)), ("CPUs", CPU, cpu_coefficients()[1]), ("2**r", EXP2, (1.0,))):
        above, below, error = minimax(form, start)
        print(f"best for {name}: {mp.nstr(above, 9)} / {mp.nstr(below, 9)}, off by {mp.nstr(error, 3)}")
    wrong = broken(step)
    if wrong:
        sys.exit("does not hold: " + "; ".join(wrong))


if __name__ == "__main__":
    main()
