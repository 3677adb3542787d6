"""A job's model tested on this machine, without the job's input."""

from batch_rerank.config import JobConfig
from batch_rerank.engine.encoding import make_encoder
from batch_rerank.engine.selftest import SelfTest, not_loaded, self_test
from batch_rerank.errors import ModelError
from batch_rerank.job.devices import settle, this_machine
from batch_rerank.job.plan import configured_model
from batch_rerank.job.steps import load_scorer


def run_self_test(config: JobConfig) -> SelfTest:
    """Load a job's model as one of its actors would, and test it. What is wrong with the model is in the result.

    Raises ConfigError.
    """
    config = settle(config, this_machine(), actors=1)
    try:
        model = configured_model(config)
        make_encoder(model)
        return self_test(*load_scorer(config, model))
    except ModelError as error:
        return not_loaded(error)
