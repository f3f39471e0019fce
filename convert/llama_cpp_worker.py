"""llama.cpp's tokens and log-probabilities of a GGUF file, in a process of its own: it writes to the terminal, and a damaged
file may end its process. A script that reads a JSON request on stdin and imports nothing of jaxsloth."""

from __future__ import annotations

import json
import os
import sys
import urllib.request
from typing import Any

import numpy as np


def main() -> None:
    """Request: file, lora (path or null), texts, prompts (each a text or token ids), limit (tokens of a prompt), top (how many
    next tokens are told), vocabulary (their number), out (a .npz file's path).

    Written: "tokens" (JSON: ids of each text, ids of each prompt) and "log_probs.N", float32 ``[tokens, vocabulary]`` of prompt
    N, -inf for tokens that were not told.
    """
    request = json.load(sys.stdin)
    server = _server(request["file"], request["lora"], request["limit"])
    texts = [_tokenize(server, text) for text in request["texts"]]
    prompts = [prompt if isinstance(prompt, list) else _tokenize(server, prompt) for prompt in request["prompts"]]
    prompts = [prompt[: request["limit"]] for prompt in prompts]
    rows: dict[str, Any] = {f"log_probs.{index}": _log_probs(server, ids, request) for index, ids in enumerate(prompts)}
    np.savez(request["out"], tokens=np.array(json.dumps([texts, prompts])), **rows)


def _server(file: str, lora: str | None, limit: int) -> Any:
    import xllamacpp

    settings = xllamacpp.CommonParams()
    settings.model.path, settings.n_ctx, settings.warmup = file, limit + 64, False
    settings.n_parallel, settings.n_gpu_layers = 1, 0
    settings.swa_full = True  # tokens behind a window stay, for the next prompt that begins alike
    settings.cpuparams.n_threads = max(1, (os.cpu_count() or 2) // 2)  # those that wait spin
    settings.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED  # its sums are in 16 bits
    settings.cache_type_k = settings.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
    if lora is not None:
        adapter = xllamacpp.CommonAdapterLoraInfo()
        adapter.path, adapter.scale = lora, 1.0
        settings.lora_adapters = [adapter]
    return xllamacpp.Server(settings)


def _tokenize(server: Any, text: str) -> list[int]:
    body = json.dumps({"content": text, "add_special": True, "parse_special": True}).encode()
    request = urllib.request.Request(f"{server.listening_address}/tokenize", body, {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=60) as answer:
        return list(json.load(answer)["tokens"])


def _log_probs(server: Any, ids: list[int], request: dict[str, Any]) -> np.ndarray:
    """float32 ``[tokens, vocabulary]``: the server tells those of one next token at a time; it keeps the tokens before it."""
    # None come with a token that is no whole character or that ends the answer, so another is forced; they are those before it.
    letter = _tokenize(server, "a")[-1]
    rows = np.full((len(ids), request["vocabulary"]), -np.inf, np.float32)
    for end in range(1, len(ids) + 1):
        asked = {"prompt": ids[:end], "n_predict": 1, "temperature": 0.0, "n_probs": request["top"], "cache_prompt": True}
        answer = server.handle_completions(asked | {"ignore_eos": True, "logit_bias": [[letter, 1e4]]})
        if not (answer.get("choices") and answer["choices"][0].get("logprobs")):
            sys.exit(f"llama.cpp answered: {json.dumps(answer)[:300]}")
        for entry in answer["choices"][0]["logprobs"]["content"][0]["top_logprobs"]:
            rows[end - 1, entry["id"]] = entry["logprob"]
    return rows


if __name__ == "__main__":
    main()
