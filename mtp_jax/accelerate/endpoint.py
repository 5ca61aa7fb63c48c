"""Gets answers from an OpenAI-compatible server that runs the same model: `mtp accelerate --endpoint URL`.

Such a server answers faster than the engine of this package. It must run exactly the model that is to be accelerated,
because the heads learn what that model writes.
"""

import http.client
import json
import pathlib
import time
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from mtp_jax.accelerate.answers import record_of
from mtp_jax.accelerate.batches import Record, Say, run_batches
from mtp_jax.errors import UserError
from mtp_jax.loading import LoadedModel

BATCH = 64
AT_ONCE = 8
"""Number of requests that run at the same time."""
TIMEOUT = 600
WAITS = (1, 4, 16)
"""Seconds to wait before each repetition of a request, if the server was too busy."""


def make_answers(
    url: str, lm: LoadedModel, prompts: list[Record], tokens: int, seed: int, folder: pathlib.Path, say: Say
) -> list[Record]:
    """Lets the server answer all prompts. Returns the same kind of records as `answers.make_answers`.

    Args:
      url: URL of the server, without `/chat/completions`.
      lm: the model; its tokenizer counts the tokens of answers.
      prompts: the prompts.
      tokens: most tokens of an answer.
      seed: seed of the sampled answers.
      folder: directory for the files of the batches.
      say: is called with a line of text about the progress.

    Raises:
      UserError: the server cannot be reached, or its answers have another format.
    """
    base = url.rstrip("/")
    batches = -(-len(prompts) // BATCH)
    model = _model(base)

    def make(number: int) -> list[Record]:
        chosen = range(number * BATCH, min((number + 1) * BATCH, len(prompts)))
        drawn = {"temperature": 0.8} if number % 2 else {"temperature": 0.0}

        def ask(i: int) -> Record | None:
            body = {"model": model, "max_tokens": tokens, "seed": seed * 1_000_003 + i, **drawn}
            text, finished = _answer(base, prompts[i], body)
            return record_of(prompts[i], text, len(lm.tokenizer.encode(text)), finished) if text.strip() else None

        with ThreadPoolExecutor(AT_ONCE) as pool:
            found = [record for record in pool.map(ask, chosen) if record is not None]
        if not found:
            raise UserError(
                f"--endpoint {base} gave empty answers to {len(chosen)} prompts; is the model loaded there?"
            )
        return found

    return run_batches(folder, batches, make, f"answers from {base}", say)


def _model(base: str) -> str:
    found = _call(f"{base}/models", None)
    try:
        return str(found["data"][0]["id"])
    except (KeyError, IndexError, TypeError) as error:
        raise UserError(
            f"--endpoint {base} lists no model at {base}/models; is it an OpenAI-compatible server?"
        ) from error


def _answer(base: str, prompt: Record, body: dict[str, Any]) -> tuple[str, bool]:
    """The text of the server's answer, and whether the answer was finished."""
    is_text = "text" in prompt
    url = f"{base}/completions" if is_text else f"{base}/chat/completions"
    given = {"prompt": prompt["text"]} if is_text else {"messages": prompt["messages"]}
    found = _call(url, body | given)
    try:
        choice = found["choices"][0]
        text = choice["text"] if is_text else choice["message"]["content"]
        return str(text or ""), choice["finish_reason"] == "stop"
    except (KeyError, IndexError, TypeError) as error:
        raise UserError(f"--endpoint {base}: the answer of {url} has no choices; is it OpenAI-compatible?") from error


def _call(url: str, body: dict[str, Any] | None, tried: int = 0) -> Any:
    data = None if body is None else json.dumps(body).encode()
    try:
        request = urllib.request.Request(url, data, {"Content-Type": "application/json"})
        with urllib.request.urlopen(request, timeout=TIMEOUT) as response:
            return json.load(response)
    except urllib.error.HTTPError as error:
        is_busy = error.code == 429 or error.code >= 500
        if not is_busy or tried == len(WAITS):
            said = error.read(200).decode(errors="replace")
            raise UserError(f"--endpoint: {url} answers with status {error.code}: {' '.join(said.split())}") from error
    except (OSError, ValueError, http.client.HTTPException) as error:
        raise UserError(
            f"--endpoint: the request to {url} failed: {error}; start the server, or leave --endpoint out"
        ) from error
    time.sleep(WAITS[tried])
    return _call(url, body, tried + 1)
