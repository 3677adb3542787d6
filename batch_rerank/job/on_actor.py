"""One call on the cluster with what an actor has: its GPUs and its threads."""

import os
import pickle
from collections.abc import Callable
from typing import Any, TypeVar

import ray

from batch_rerank.config import JobConfig
from batch_rerank.errors import BatchRerankError, UnfinishedError, as_value, from_value
from batch_rerank.job.cluster import machines, on_cluster
from batch_rerank.job.devices import reservations, room, settle
from batch_rerank.score.tasks import environment

T = TypeVar("T")


def on_actor(config: JobConfig, call: Callable[[JobConfig], T]) -> tuple[T, JobConfig]:
    """What a call returns, and the job with what there is to compute on, which the call is given. Raises its expected
    errors, ConfigError where no Ray answers or no actor has room, and UnfinishedError where Ray gives up."""
    with on_cluster(config) as found:
        config = settle(config, found)
        room(config.cluster, found)
        cpus, _, _ = reservations(config.cluster.threads, config.cluster.gpus, 1, machines())
        task: Any = ray.remote(num_cpus=cpus, num_gpus=config.cluster.gpus, max_retries=0)(_call)
        try:
            value, error = pickle.loads(ray.get(task.remote(pickle.dumps((call, config, environment())))))
        except ray.exceptions.RayError as failure:
            lines = str(failure).strip().splitlines() or [type(failure).__name__]
            raise UnfinishedError(f"Ray ended the call: {lines[-1][:300]}") from failure
    if error is not None:
        raise from_value(error)
    return value, config


def _call(data: bytes) -> bytes:
    call, config, variables = pickle.loads(data)
    os.environ.update(variables)
    try:
        return pickle.dumps((call(config), None))
    except BatchRerankError as error:
        return pickle.dumps((None, as_value(error)))
