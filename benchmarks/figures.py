"""Print the README's figures from benchmarks/results; a test compares the two."""

import json
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results"

AGAINST = {
    "causal": ("Qwen3 shape, CoSQA (65 tokens), 100 candidates a query", "CrossEncoder", "cross_encoder"),
    "passages": ("Qwen3 shape, passages of 233 tokens", "CrossEncoder", "cross_encoder"),
    "encoder": ("XLM-R shape, CoSQA", "CrossEncoder", "cross_encoder"),
    "bi_encoder": ("BERT shape, documents that repeat", "SentenceTransformer", "sentence_transformer"),
}


def main() -> None:
    engine = _read("engine-cpu.json")
    print("| pairs/s, 8 layers × 512, same weights, same process | sentence-transformers | batch_rerank | times |")
    print("|---|---|---|---|")
    for name, (what, peer, key) in AGAINST.items():
        row = engine[name]
        theirs, ours = row[f"{key}_pairs_per_s"], row["pairs_per_s"]
        low, high = row["spread"]
        print(f"| {what} | {theirs:.1f} ({peer}) | {ours:.1f} | {row['times_as_fast']:.2f} ({low:.2f} to {high:.2f}) |")
    print()
    free, memory, real = (_read(f"pipeline-{name}.json") for name in ("free", "memory", "real"))
    print("| the rest of the job | |")
    print("|---|---|")
    shares = ", ".join(f"{engine[name]['share_of_matmul_rate']:.0%}" for name in ("causal", "passages", "encoder"))
    print(f"| of the CPU's rate of matrix products, used by weights: the first three rows above | {shares} |")
    print(f"| bfloat16 against float32, CoSQA | {engine['bf16']['times_as_fast']:.2f} times |")
    peaks = [engine["memory"][f"peak_mib_at_{n}_candidates"] for n in (100, 10_000)]
    print(f"| peak memory for one query with 100 and with 10,000 candidates | {peaks[0]} and {peaks[1]} MiB |")
    for size in (600, 2000):
        rate = _range(free[f"ray_pairs_per_s_units_of_{size}"])
        print(f"| pairs/s through Ray with a free scorer, 1 KB texts, units of {size:,} | {rate} |")
    peaks = [memory[key]["median"] for key in sorted(memory, key=len) if key.startswith("driver_peak")]
    print(f"| the driver's peak memory at 100 and at 1,000 units | {peaks[0]:.0f} and {peaks[1]:.0f} MiB |")
    units = _read("bookkeeping.json")
    sizes = (1000, 5000, 20_000)
    peaks = [units[f"{size}_units"]["killed"]["driver_peak_mib"] for size in sizes]
    named = ", ".join(f"{size:,}" for size in sizes)
    print(f"| the same with 64 actors, at {named} units | {', '.join(map(str, peaks))} MiB |")
    whole, many = _read("publish.json"), _read("many-units.json")
    run = whole["run"]
    rate, files = f"{run['pairs_per_s_with_publishing']:,} pairs/s", whole["files"]["all"]
    print(
        f"| {whole['pairs'] // 10**6} million pairs of {whole['text_bytes']} bytes, free scorer, from start to the "
        f"published output | {rate}, {files} files, driver {run['peak_mib']} MiB |"
    )
    slow, proof = _read("publish-again.json"), whole["verify"]["seconds"]  # since parts are tried first
    times, again = slow["run"]["seconds"] / whole["run"]["seconds"], slow["publish_again"]
    print(
        f"| the same published again with `top_k: 10`: tried, then made, on a machine {times:.1f} times slower; and "
        f"verified | {again['try_out']:.0f} and {again['publish']:.0f} s; {proof:.0f} s |"
    )
    plans, seen = _read("plan-scale.json"), _read("plan-coverage.json")["covered_of_100"]
    taken = ", ".join(f"{plans[str(pairs)]['seconds']:.0f}" for pairs in (10**6, 10**7, 10**8))
    peak = max(plans[str(pairs)]["peak_mib"] for pairs in (10**6, 10**7, 10**8))
    what = "a plan of 1, 10 and 100 million pairs with Qwen3's tokenizer, other work beside it"
    print(f"| {what} | {taken} s, {peak:,} MiB |")
    covered = f"{seen['tokens']} and {seen['truncated']}"
    print(f"| its interval has the truth, tokens and cut pairs, of 100 samples | {covered} |")
    runs = [run for run in _read("plan-error.json").values() if isinstance(run, dict)]
    wall, busy = ([run[name] for run in runs] for name in ("off", "actor_seconds_off"))
    what = "time of five runs of different shape against their plans, after a bench (CPU, one core)"
    off = [f"{100 * min(one):+.1f} to {100 * max(one):+.1f} %" for one in (wall, busy)]
    print(f"| {what} | {off[0]}, actor-seconds {off[1]} |")
    read = [f"{many[case]['objects_read']:,} in {many[case]['seconds']:.0f} s" for case in ("alone", "rolled")]
    print(
        f"| a resume of {many['units']:,} units: objects read with a receipt each, and rolled up | {', '.join(read)} |"
    )
    scale = _read("stage-scale.json")
    runs = [scale[f"stage_{size}_candidates"] for size in (1_000_000, 3_000_000, 10_000_000)]
    seconds = ", ".join(f"{run['seconds']:.0f}" for run in runs)
    most = max(run["peak_mib_above_idle"] for run in runs)
    print(f"| staging 1, 3 and 10 million candidates over 2 million documents | {seconds} s, {most:,} MiB |")
    large = _read("scale.json")["1,000,000,000 pairs"]
    verify = large["verify"]["scan_s"] + large["verify"]["tasks_s"]
    steps = [large["resume"]["all_s"], large["publish"]["all_s"], verify]
    most = max(large[step]["peak_mib"] for step in ("resume", "publish", "verify"))
    what = "the driver of 10^9 pairs in 500,000 units, simulated: to the tasks of a resume, of publishing, of verify"
    print(f"| {what} | {', '.join(f'{one:.0f}' for one in steps)} s, {most:,} MiB |")
    labels = _read("export.json")
    rates = ", ".join(f"{labels[f'{how}_flagembedding_pairs_per_second']:,}" for how in ("local", "ray"))
    peaks = " and ".join(f"{labels[f'{how}_flagembedding_peak_mib']:,}" for how in ("local", "ray"))
    what = f"labels of {labels['pairs'] // 10**6} million pairs of 1 KB texts: in one process, on Ray"
    print(f"| {what} | {rates} pairs/s, {peaks} MiB |")
    student = _read("distill.json")
    quality = ", ".join(f"{one:.2f}" for one in student["nDCG@10"].values())
    what = "`make distill`, nDCG@10 of BM25, the student before and after, its teacher"
    print(f"| {what} | {quality}, in {student['seconds']} s |")
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
