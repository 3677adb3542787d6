"""A job on a cluster of three nodes that loses one in the middle: `python lost_node.py JOB.YAML OUTPUT worker|head`.

A process of its own, because a cluster on one machine takes over this process's Ray. With `worker` the job runs here,
and one of the two nodes that work goes without notice. With `head` the job is a driver beside it, and the head goes.
Prints a JSON object: how many units were committed then, and how the job ended.
"""

import json
import logging
import os
import subprocess
import sys
import threading
import time
import warnings
from pathlib import Path

# a driver waits so long for a head that has gone: 60 where it is not set
os.environ.setdefault("RAY_gcs_rpc_server_reconnect_timeout_s", "5")

import ray
from ray.cluster_utils import Cluster

from batch_rerank.config import load_config
from batch_rerank.errors import UnfinishedError
from batch_rerank.job.run import run

UNITS_BEFORE = 10


def receipts(output: Path) -> int:
    return sum(1 for _ in (output / "_manifest/receipts").glob("[!.]*.json"))


def wait_for_units(output: Path) -> None:
    deadline = time.monotonic() + 90
    while receipts(output) < UNITS_BEFORE and time.monotonic() < deadline:
        time.sleep(0.02)


def lose_a_worker(cluster: Cluster, job: str, output: Path) -> None:
    ray.init(address=cluster.address, log_to_driver=False, logging_level=logging.ERROR)
    lost: list[int] = []

    def lose() -> None:
        wait_for_units(output)
        lost.append(receipts(output))
        cluster.remove_node(cluster.list_all_nodes()[-1], allow_graceful=False)

    thread = threading.Thread(target=lose)
    thread.start()
    try:
        run(load_config(job, [f"output.path={output}"]))
        ended = "done"
    except UnfinishedError as error:
        ended = str(error)
    thread.join()
    report = {"units": lost[0], "nodes_left": sum(node["Alive"] for node in ray.nodes()), "ended": ended}
    print(json.dumps(report), flush=True)


def lose_the_head(cluster: Cluster, job: str, output: Path) -> None:
    command = [sys.executable, "-m", "batch_rerank.cli", "run", job, "--set", f"output.path={output}"]
    driver = subprocess.Popen(command, env={**os.environ, "RAY_ADDRESS": cluster.address})
    wait_for_units(output)
    cluster.remove_node(cluster.head_node, allow_graceful=False)
    lost, since = receipts(output), time.monotonic()
    report = {"units": lost, "ended": driver.wait(120), "seconds": time.monotonic() - since}
    print(json.dumps(report), flush=True)


def main() -> None:
    job, output, which = sys.argv[1], Path(sys.argv[2]), sys.argv[3]
    warnings.simplefilter("ignore")
    # what runs on the head cannot be lost with another node; its tasks are the others'
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False})
    try:
        for _ in range(2):
            cluster.add_node(num_cpus=4)
        cluster.wait_for_nodes()
        (lose_a_worker if which == "worker" else lose_the_head)(cluster, job, output)
    finally:
        ray.shutdown()
        cluster.shutdown()


if __name__ == "__main__":
    main()
