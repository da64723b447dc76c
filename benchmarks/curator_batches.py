"""Whether another client of the Batch API works against the stand-in of our tests:
`PYTHONPATH=tests/support python -m benchmarks.curator_batches`.

bespokelabs-curator, in the environment that benchmarks.labels makes for it, asks ROWS rows in
batches of BATCH. What the service would refuse or leave out, the stand-in must too: that both
clients get along with it is a sign that it speaks the protocol, and not only ours. The last line is
JSON: the rows that curator has answers for, the batches, how often each row was answered, and the
seconds.
"""

import json
import os
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

from batch_endpoint import BatchEndpoint, Plan

from benchmarks.labels import CURATOR_ENVIRONMENT, CURATOR_VENV, install_curator

ROWS, BATCH = 20, 8

SCRIPT = """
import json, sys
from bespokelabs import curator

_, url, rows, batch = sys.argv
labeller = curator.LLM(
    model_name="gpt-4o-mini",
    backend="openai",
    batch=True,
    backend_params={
        "base_url": url,
        "api_key": "none",
        "batch_check_interval": 1,
        "batch_size": int(batch),
    },
)
questions = [f"What comes after {number}?" for number in range(int(rows))]
answers = labeller(questions).dataset["response"]
print(json.dumps(answers))
"""


def main() -> None:
    if not install_curator():
        sys.exit(1)
    with tempfile.TemporaryDirectory() as folder, BatchEndpoint(lambda _: Plan(looks=2)) as service:
        script = Path(folder) / "script.py"
        script.write_text(SCRIPT)
        environment = os.environ | CURATOR_ENVIRONMENT
        # It keeps the answers of earlier runs in the home folder.
        environment |= {"HOME": folder, "CURATOR_CACHE_DIR": f"{folder}/cache"}
        environment.pop("PYTHONPATH", None)
        python = str(CURATOR_VENV / "bin" / "python")
        started = time.perf_counter()
        done = subprocess.run(
            [python, str(script), service.url, str(ROWS), str(BATCH)],
            cwd=folder,
            env=environment,
            stdout=subprocess.PIPE,
            text=True,
        )
        seconds = time.perf_counter() - started
        if done.returncode:
            sys.exit(f"bespokelabs-curator ended with {done.returncode}")
        requests = Counter(service.requests)
        print(", ".join(f"{count} x {name}" for name, count in requests.items()))
        figures = {
            "rows": len(json.loads(done.stdout.strip().splitlines()[-1])),
            "batches": len(service.batches),
            "rows_by_answers": Counter(service.answered.values()),
            "seconds": round(seconds, 1),
        }
    print(json.dumps(figures))


if __name__ == "__main__":
    main()
