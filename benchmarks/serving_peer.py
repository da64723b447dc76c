"""llama.cpp's own server, by xllamacpp: `python -m benchmarks.serving_peer GGUF THREADS SLOTS`
prints its URL and serves until it is ended."""

import signal
import sys

from xllamacpp import CommonParams, Server, llama_flash_attn_type  # type: ignore[attr-defined]

CONTEXT = 1024
"""Tokens of a slot, of which no request of the benchmark takes more."""


def serve(file: str, threads: int, slots: int) -> None:
    parameters = CommonParams()
    parameters.model.path = file
    parameters.hostnames = ["127.0.0.1"]
    parameters.port = 0
    parameters.n_parallel = slots
    parameters.n_ctx = CONTEXT * slots
    parameters.cont_batching = parameters.cache_prompt = True
    parameters.flash_attn_type = llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_ENABLED
    parameters.cpuparams.n_threads = parameters.cpuparams_batch.n_threads = threads
    parameters.verbosity = 0
    server = Server(parameters)
    print(server.listening_address, flush=True)
    signal.pause()


if __name__ == "__main__":
    serve(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]))
