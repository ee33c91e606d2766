"""`qbert bench`: hands what was typed to a benchmark's own command, and imports nothing of it before."""

from __future__ import annotations

import importlib
from collections.abc import Callable

import typer

# Command -> module of qbert.benchmarks with a `main` for typer, and what help says.
BENCHMARKS: dict[str, tuple[str, str]] = {
    "gemm": ("bench_gemm", "linears: every scheme beside torch and other libraries, BERT's shapes, 1 to 16384 tokens"),
    "attention": ("bench_attention", "int8 attention beside scaled_dot_product_attention, padded and ragged"),
    "bert": ("bench_bert", "whole encoders beside their peers, each in a process of its own"),
    "overhead": ("bench_overhead", "what Python, launches and norms take of a fused forward of few tokens"),
    "readers": ("bench_readers", "what a classifier saves by computing only the token that is read"),
    "embed": ("bench_embed", "files of sentences to files of vectors, beside sentence-transformers in float32"),
    "quantize": ("bench_quantize", "seconds and peak memory of quantizing, scheme by scheme"),
    "accuracy": (
        "bench_accuracy",
        "size, bits and accuracy of every scheme, beside other libraries and published rows",
    ),
    "survey": ("survey", "the survey's table, measured again: its rows that there is a method for, on one model"),
    "modelled": (
        "modelled",
        "the cost model of `qbert study --target` beside stored measurements; nothing is measured",
    ),
    "report": ("report", "one page from stored results"),
    "predict": ("predict", "what a GPU that is not here could do at best; nothing is measured"),
    "tune": ("tune", "tiles of the GPU kernels, tried out on this GPU"),
    "ceilings": ("ceilings", "what this device reaches at best: bytes and operations a second"),
    "suite": ("device_suite", "everything that a borrowed GPU can tell in so many minutes"),
}
_FORWARD = {"ignore_unknown_options": True, "allow_extra_args": True}

app = typer.Typer(
    name="bench", help="Measure speed, memory and accuracy beside peers and bounds.", no_args_is_help=True
)


def _forward(name: str, module: str) -> Callable[[typer.Context], None]:
    def run(context: typer.Context) -> None:
        own = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
        own.command(name)(importlib.import_module(f"qbert.benchmarks.{module}").main)
        command = typer.main.get_command(own)
        code = command.main(list(context.args), prog_name=f"qbert bench {name}", standalone_mode=False)
        if isinstance(code, int) and code:
            raise typer.Exit(code)

    return run


for _name, (_module, _help) in BENCHMARKS.items():
    app.command(_name, help=_help, context_settings=_FORWARD, add_help_option=False)(_forward(_name, _module))
