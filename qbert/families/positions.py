"""How many tokens a model's table of positions allows."""

from __future__ import annotations

from typing import Any

# These families number positions from padding_idx + 1 on (fairseq's rule), so that many of their table's rows are never used.
AFTER_PADDING = frozenset({"roberta", "xlm-roberta", "xlm-roberta-xl", "camembert", "mpnet", "data2vec-text"})
_FAIRSEQ_PADDING = 1


def longest(config: Any) -> int | None:
    """Tokens of the longest sequence, special ones included; None where the configuration names no limit."""
    rows = getattr(config, "max_position_embeddings", None)
    if not rows or getattr(config, "model_type", "") not in AFTER_PADDING:
        return int(rows) if rows else None
    padding = getattr(config, "pad_token_id", None)
    return int(rows) - (_FAIRSEQ_PADDING if padding is None else int(padding)) - 1
