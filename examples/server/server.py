"""An embedding server with OpenAI's /v1/embeddings: LitServe (on FastAPI) gathers requests that wait into one batch.

    pip install qbert[server]
    python examples/server/server.py minilm --scheme w8a8 --port 8000

A fused encoder gives a text the same bits in every batch, so an answer does not depend on who else asks.
"""

import base64
import sys
import warnings
from typing import Annotated, Any, Literal

import litserve
import typer
from fastapi import HTTPException
from pydantic import BaseModel, ConfigDict, Field

from qbert.embed import SAME_BITS, embedder_of
from qbert.errors import QBertError

MAX_TEXTS = 2048  # of a request, as OpenAI has it
MAX_REQUESTS = 64  # of a batch
PATH = "/v1/embeddings"
Texts = Annotated[list[str], Field(min_length=1, max_length=MAX_TEXTS)]


class EmbeddingsRequest(BaseModel):
    """What OpenAI's clients send. FastAPI answers 422 to anything else: to lists of token ids, which are of OpenAI's own
    vocabulary, and to `dimensions`, for a model has as many as it has."""

    model_config = ConfigDict(extra="forbid")

    input: str | Texts
    model: str = ""
    encoding_format: Literal["float", "base64"] = "float"
    user: str | None = None


class Embeddings(litserve.LitAPI):
    """Holds the model in LitServe's worker. A batch is the texts of all requests that waited.

    Args:
        model: local folder, hub id or alias.
        options: for `qbert.embed.embedder_of`.
        requests: of a batch, at most; 1 for no batching.
        wait_seconds: for more requests, after the first.
    """

    def __init__(self, model: str, options: dict[str, Any], requests: int, wait_seconds: float) -> None:
        super().__init__(max_batch_size=requests, batch_timeout=wait_seconds, api_path=PATH)
        self.name, self.options = model, options

    def setup(self, device: str) -> None:
        self.embedder = embedder_of(self.name, **self.options)
        self.embedder.embed(["what a first call prepares"])

    def decode_request(self, request: EmbeddingsRequest) -> EmbeddingsRequest:
        return request  # an error here would be the answer to every request of the batch

    def batch(self, inputs: list[EmbeddingsRequest]) -> list[EmbeddingsRequest]:
        return inputs

    def predict(self, x: Any) -> Any:
        """A list of requests to a list of answers; without batching, one to one."""
        return self._answers(x) if isinstance(x, list) else self._answers([x])[0]

    def unbatch(self, output: list[dict[str, Any]]) -> list[dict[str, Any]]:
        return output

    def encode_response(self, output: dict[str, Any]) -> dict[str, Any]:
        return output

    def _answers(self, requests: list[EmbeddingsRequest]) -> list[dict[str, Any]]:
        texts = [[each.input] if isinstance(each.input, str) else each.input for each in requests]
        try:
            embedded = self.embedder.embed([text for each in texts for text in each])
        except QBertError as error:
            raise HTTPException(500, str(error)) from None
        answers, start = [], 0
        for request, own in zip(requests, texts, strict=True):
            rows = slice(start, start + len(own))
            answers.append(self._answer(request, embedded.vectors[rows], int(embedded.lengths[rows].sum())))
            start += len(own)
        return answers

    def _answer(self, request: EmbeddingsRequest, rows: Any, tokens: int) -> dict[str, Any]:
        encode = as_base64 if request.encoding_format == "base64" else as_floats
        data = [{"object": "embedding", "index": index, "embedding": encode(row)} for index, row in enumerate(rows)]
        usage = {"prompt_tokens": tokens, "total_tokens": tokens}
        return {"object": "list", "data": data, "model": self.name, "usage": usage}


def as_base64(row: Any) -> str:
    """Little-endian float32."""
    return base64.b64encode(row.astype("<f4").tobytes()).decode("ascii")


def as_floats(row: Any) -> list[float]:
    """Which JSON writes with all digits that a float32 has."""
    return [float(value) for value in row]


def main(
    model: Annotated[str, typer.Argument(help="a checkpoint of qbert's, or a float encoder: folder, hub id, or alias")],
    scheme: Annotated[str | None, typer.Option(help="quantize a float model first, fused: w8a8")] = None,
    calibrate: Annotated[str | None, typer.Option(help="with --scheme: static scales, as in `qbert quantize`")] = None,
    pooling: Annotated[str | None, typer.Option(help="mean or cls; by default the model's own")] = None,
    host: Annotated[str, typer.Option()] = "127.0.0.1",
    port: Annotated[int, typer.Option()] = 8000,
    requests: Annotated[int, typer.Option(help="of a batch, at most; 1: no batching")] = MAX_REQUESTS,
    wait: Annotated[float, typer.Option(help="milliseconds, after the first request, for others")] = 2.0,
) -> None:
    """Serve embeddings until it is stopped; GET /health says when it is ready."""
    options = {"scheme": scheme, "calibrate_with": calibrate, "pooling": pooling}
    try:  # what is wrong with the model is said here, in one line, and not by a worker
        bits = embedder_of(model, **options).batch_bits
    except QBertError as error:
        sys.exit(f"error: {error}")
    if bits != SAME_BITS:
        print(f"an answer's {bits}", file=sys.stderr)
    warnings.filterwarnings("ignore", message=".*has both batch and unbatch methods.*")  # of no use for one request
    api = Embeddings(model, options, requests, wait / 1000)
    litserve.LitServer(api, accelerator="cpu", timeout=60).run(
        host=host, port=port, num_api_servers=1, generate_client_file=False, log_level="warning"
    )


if __name__ == "__main__":
    typer.run(main)
