"""batch_rerank: score every candidate of a first-stage run with a reranker and write the run back re-sorted.

`Reranker` scores in this process; `run(load_config("job.yaml"))` is the whole job. Importing this module imports
neither torch nor ray: the names below load what they need when they are first asked for.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from batch_rerank.config import load_config as load_config
    from batch_rerank.job.run import run as run
    from batch_rerank.reranker import Reranker as Reranker

__version__ = "0.1.0"
__all__ = ["Reranker", "__version__", "load_config", "run"]

_HOMES = {
    "Reranker": "batch_rerank.reranker",
    "load_config": "batch_rerank.config",
    "run": "batch_rerank.job.run",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)
