"""What a job has spent on accelerators, over all its runs, and when it has to stop."""

import time

from batch_rerank.config import JobConfig
from batch_rerank.errors import BudgetError
from batch_rerank.job.estimate import limits_of
from batch_rerank.store.receipts import Totals


class Spend:
    """Counts GPU seconds into `totals.gpu_seconds`, which a status keeps for the next run: actors that are asked for,
    from then on until scoring ends, whether they score or not. A run that is killed has counted up to the last status
    after a unit."""

    def __init__(self, config: JobConfig, totals: Totals) -> None:
        self._config, self._totals, self._before = config, totals, totals.gpu_seconds
        self._others = totals.gpu_seconds
        gpus = config.cluster.gpus_per_actor
        self._gpus_of_one = 0.0 if gpus == "auto" else gpus
        self._since: float | None = None
        self._gpus = 0.0

    def begin(self, actors: int) -> None:
        """So many actors are asked for now, in the place of those before."""
        self.end()
        self._since, self._gpus = time.monotonic(), actors * self._gpus_of_one

    @property
    def usd_per_gpu_hour(self) -> float | None:
        """The price; None where there is none, or no GPU."""
        return self._config.cost.usd_per_gpu_hour if self._config.cost and self._gpus_of_one else None

    @property
    def of_this_run(self) -> float:
        """GPU seconds."""
        return self._totals.gpu_seconds - self._others

    def count(self) -> None:
        """Up to now."""
        if self._since is not None:
            self._totals.gpu_seconds = self._before + (time.monotonic() - self._since) * self._gpus

    def end(self) -> None:
        """The actors are gone."""
        self.count()
        self._before, self._since = self._totals.gpu_seconds, None

    def check(self, left: int) -> None:
        """Raise BudgetError where the budget is spent and units are left."""
        self.count()
        cost = self._config.cost
        most = None if cost is None else cost.most_gpu_hours
        hours = self._totals.gpu_seconds / 3600
        if cost is None or most is None or not left or hours < most or not self._gpus_of_one:
            return
        price = cost.usd_per_gpu_hour
        money = "" if price is None else f", {hours * price:,.2f} USD"
        raise BudgetError(
            f"{self._config.output.path}: {hours:,.3g} GPU hours{money} are spent, and {left:,} units are left; "
            f"expected at most {limits_of(cost)}; finished units are kept: raise the limit and run the same command to "
            "go on"
        )
