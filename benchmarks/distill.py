"""What `make distill` gives and takes, from an empty folder on.

    python benchmarks/distill.py [--queries 2000] [--write]

Prints its table, and ends with one JSON line; --write puts it into benchmarks/results/distill.json.
"""

import argparse
import json
import os
import tempfile
import time
from pathlib import Path

from batch_rerank import distill


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--queries", type=int, default=distill.QUERIES)
    parser.add_argument("--write", action="store_true")
    given = parser.parse_args()
    card = {"benchmark": "distill", "cores": os.cpu_count(), "load_before": os.getloadavg()[0]}
    started = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        rows = distill.distill(folder, given.queries)
    card |= {"queries": given.queries, "layers": distill.LAYERS, "max_length": distill.MAX_LENGTH}
    card |= {"epochs": distill.EPOCHS, "seconds": round(time.monotonic() - started)}
    card[distill.MEASURE] = {row.name: round(row.quality, 3) for row in rows}
    card["pairs_per_s"] = {row.name: round(row.rate) for row in rows if row.rate is not None}
    if given.write:
        (Path(__file__).parent / "results" / "distill.json").write_text(json.dumps(card) + "\n")
    print(json.dumps(card))


if __name__ == "__main__":
    main()
