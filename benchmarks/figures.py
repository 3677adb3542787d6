"""Print the README's figures from benchmarks/results; a test compares the two."""

import json
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results"


def main() -> None:
    free, memory, real = (_read(f"pipeline-{name}.json") for name in ("free", "memory", "real"))
    print("| measured on 2 CPU cores (`benchmarks/pipeline.py`, `benchmarks/results`) | |")
    print("|---|---|")
    for size in (600, 2000):
        rate = _range(free[f"ray_pairs_per_s_units_of_{size}"])
        print(f"| pairs/s through Ray with a free scorer, 1 KB texts, units of {size:,} | {rate} |")
    peaks = [memory[key]["median"] for key in sorted(memory, key=len) if key.startswith("driver_peak")]
    print(f"| the driver's peak memory at 100 and at 1,000 units | {peaks[0]:.0f} and {peaks[1]:.0f} MiB |")
    for threads in (1, 2):
        run = real[f"{threads}_threads"]
        ray, local = run["ray_pairs_per_s"]["median"], run["local_pairs_per_s"]["median"]
        share = f"{ray:.0f} and {local:.0f}: {run['ray_over_local']:.0%}"
        print(
            f"| MiniLM, one actor of {threads} thread{'s'[: threads - 1]}: pairs/s through Ray and without | {share} |"
        )


def _read(name: str) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((RESULTS / name).read_text())
    return content


def _range(value: dict[str, float]) -> str:
    return f"{value['median']:,.0f} ({value['min']:,.0f} to {value['max']:,.0f})"


if __name__ == "__main__":
    main()
