"""`batch_rerank.Reranker`: the engine's, which finds models in stores too."""

from batch_rerank.engine import reranker
from batch_rerank.engine.checkpoint_files import Stored


class Reranker(reranker.Reranker):
    """The engine's Reranker; `name` may also be a place in a store, such as s3://bucket/models/mine, and then
    StorageError is raised too. Credentials come from the environment.
    """

    def _stored(self, name: str, allow_pickle: bool) -> Stored | None:
        if "://" not in name:
            return None
        from batch_rerank.score.weights import fetched_model  # not at the top: an engine alone has no fsspec

        return fetched_model(name, allow_pickle)
