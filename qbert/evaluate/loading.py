"""The plain way to load a model and its tokenizer; transformers is imported when it is used."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn

from qbert.errors import QBertError
from qbert.evaluate.encode import CLASSIFIER_SUFFIX

_TOKENIZER_FILES = ("tokenizer.json", "vocab*", "*.model")


def load_fp32(path: str) -> nn.Module:
    """Load a folder or hub id in float32: as a sequence classifier if its config says it is one, else as an encoder.

    Raises:
        QBertError: transformers cannot load it; the message repeats why.
    """
    from transformers import AutoConfig, AutoModel, AutoModelForSequenceClassification

    with quiet_transformers(), _one_line_errors("model", path):
        architectures = AutoConfig.from_pretrained(path).architectures or []
        classifier = any(name.endswith(CLASSIFIER_SUFFIX) for name in architectures)
        auto: Any = AutoModelForSequenceClassification if classifier else AutoModel
        return auto.from_pretrained(path, dtype=torch.float32).eval()


def load_tokenizer(path: str) -> Any:
    """The tokenizer beside a model. Raises QBertError if there is none."""
    from transformers import AutoTokenizer

    with _one_line_errors("tokenizer", path):
        return AutoTokenizer.from_pretrained(path)


def has_tokenizer(path: str) -> bool:
    """Whether a folder has the files of one: of a folder without them transformers makes a tokenizer that knows no word.

    Of a hub id nothing is known before it is asked for: True.
    """
    if not Path(path).is_dir():
        return bool(path)
    return any(any(Path(path).glob(pattern)) for pattern in _TOKENIZER_FILES)


def own_tokenizer(path: str) -> Any:
    """The tokenizer beside a model; None where a folder has none. Raises QBertError if it cannot be read."""
    return load_tokenizer(path) if has_tokenizer(path) else None


@contextmanager
def quiet_transformers() -> Iterator[None]:
    """No progress bars and no warnings about heads that are new or left out: both are meant here."""
    from transformers.utils import logging

    before, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(before)
        if bars:
            logging.enable_progress_bar()


@contextmanager
def _one_line_errors(what: str, path: str) -> Iterator[None]:
    try:
        yield
    except QBertError:
        raise
    except (OSError, ValueError, KeyError) as error:  # what transformers raises for a folder it cannot read
        first_line = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise QBertError(f"cannot load the {what} of {path!r}: {first_line}") from error
