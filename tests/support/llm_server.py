"""A real LLM on 127.0.0.1: `python llm_server.py MODEL.gguf` prints its URL and serves until it is
ended."""

import signal
import sys

from xllamacpp import CommonParams, Server  # type: ignore[attr-defined]


def serve(file: str) -> None:
    parameters = CommonParams()
    parameters.model.path = file
    parameters.hostnames = ["127.0.0.1"]
    parameters.port = 0
    parameters.n_ctx = 4096
    # Two rows in one batch are not computed to the same last digit as each alone.
    parameters.n_parallel = 1
    # Threads that wait for each other lose most of their time where other programs compute too.
    parameters.cpuparams.n_threads = parameters.cpuparams_batch.n_threads = 1
    # An answer must not depend on what was asked before it.
    parameters.cache_prompt = False
    parameters.verbosity = 0
    server = Server(parameters)
    print(server.listening_address, flush=True)
    signal.pause()


if __name__ == "__main__":
    serve(sys.argv[1])
