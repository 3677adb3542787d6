"""`batch-rerank publish` as a process that is killed, or stopped while another publishes. `campaign.py` does it at each
step."""

from collections.abc import Callable

import pytest

from chaos.harness import Chaos, Step
from chaos.publishing import kill_a_publisher, publishing_steps, stop_a_publisher


@pytest.fixture(scope="module")
def chaos(tmp_path_factory: pytest.TempPathFactory) -> Chaos:
    return Chaos.make(tmp_path_factory.mktemp("chaos"), 12)[0]


@pytest.mark.parametrize("strike", [kill_a_publisher, stop_a_publisher])
def test_struck_between_the_removals_of_a_publication(
    strike: Callable[[Chaos, str, Step, int], str], chaos: Chaos
) -> None:
    strike(chaos, strike.__name__, ("remove", "before", r"^part\-\d+\.parquet$"), 3)


@pytest.mark.chaos
@pytest.mark.parametrize("strike", [kill_a_publisher, stop_a_publisher])
def test_struck_at_each_step(strike: Callable[[Chaos, str, Step, int], str], chaos: Chaos) -> None:
    steps = publishing_steps(chaos)
    assert len(steps) > 30
    for number, (step, count) in enumerate(steps.items()):
        strike(chaos, f"{strike.__name__}-{number}", step, (count + 1) // 2)
