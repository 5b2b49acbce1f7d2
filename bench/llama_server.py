"""llama.cpp's own HTTP server, llama-server, out of the package xllamacpp, which holds it as a
library: `python -m bench.llama_server --model FILE --port N`.
"""

from __future__ import annotations

import argparse
import time

import xllamacpp


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.llama_server", description=__doc__)
    parser.add_argument("--model", required=True)
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--n-ctx", type=int, default=4096, help="for all slots together")
    parser.add_argument("--slots", type=int, default=1)
    parser.add_argument("--cache-ram", type=int, default=8192, help="prompt cache in MiB")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--slot-save-path", default="", help="a directory, with / at its end")
    serve(parser.parse_args())


def serve(options: argparse.Namespace) -> None:
    """Until it is killed."""
    params = xllamacpp.CommonParams()
    params.model.path = options.model
    params.hostnames, params.port = [options.host], options.port
    params.n_ctx, params.n_parallel = options.n_ctx, options.slots
    params.cache_ram_mib = options.cache_ram
    params.cpuparams.n_threads = options.threads
    params.slot_save_path = options.slot_save_path
    params.endpoint_slots = True
    server = xllamacpp.Server(params)
    while server.listening_address:
        time.sleep(3600)


if __name__ == "__main__":
    main()
