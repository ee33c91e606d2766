"""The example server, asked by OpenAI's client over loopback: answers at once are those one by one, bit for bit."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from qbert import QBertError
from qbert.embed import embedder_of
from qbert.evaluate import get_task
from qbert.zoo import resolve_model

openai = pytest.importorskip("openai", reason="needs openai; requirements.txt has it")
pytest.importorskip("litserve", reason="needs litserve; requirements.txt has it")
EXAMPLES = Path(__file__).resolve().parents[2] / "examples/server"
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def client() -> Iterator[Any]:
    try:
        resolve_model("minilm")
    except QBertError as error:
        pytest.skip(str(error))
    sys.path.insert(0, str(EXAMPLES))
    try:
        from bench import serving

        with serving("minilm", "--scheme", "w8a8") as address:
            yield openai.OpenAI(base_url=address, api_key="none", max_retries=0)
    finally:
        sys.path.remove(str(EXAMPLES))


@pytest.fixture(scope="module")
def texts() -> list[str]:
    return list(get_task("trec").load().train.sample(256).texts)


def test_32_clients_at_once_get_the_serial_bits(client: Any, texts: list[str]) -> None:
    expected = embedder_of("minilm", scheme="w8a8").embed(texts).vectors
    with ThreadPoolExecutor(32) as pool:
        answers = list(pool.map(lambda text: client.embeddings.create(model="minilm", input=text), texts))
    at_once = np.array([answer.data[0].embedding for answer in answers], dtype=np.float32)
    serial = np.array(
        [client.embeddings.create(model="minilm", input=text).data[0].embedding for text in texts[:32]],
        dtype=np.float32,
    )
    assert np.array_equal(at_once, expected)
    assert np.array_equal(serial, expected[:32])


def test_requests_of_many_texts_share_batches_too(client: Any, texts: list[str]) -> None:
    whole = client.embeddings.create(model="minilm", input=texts[:50], encoding_format="float")
    assert [row.index for row in whole.data] == list(range(50))
    assert whole.usage.prompt_tokens == embedder_of("minilm").embed(texts[:50]).tokens
    with ThreadPoolExecutor(10) as pool:
        parts = pool.map(
            lambda at: client.embeddings.create(model="minilm", input=texts[at : at + 5]).data, range(0, 50, 5)
        )
        rows = [row.embedding for part in parts for row in part]
    assert np.array_equal(np.float32(rows), np.float32([row.embedding for row in whole.data]))


@pytest.mark.parametrize(
    "arguments",
    [{"input": []}, {"input": [1, 2, 3]}, {"input": "a", "dimensions": 7}, {"input": "a", "encoding_format": "int8"}],
)
def test_what_it_does_not_take_is_refused(client: Any, arguments: dict[str, Any]) -> None:
    with pytest.raises(openai.UnprocessableEntityError):
        client.embeddings.create(model="minilm", **arguments)
    assert len(client.embeddings.create(model="minilm", input="still there").data) == 1
