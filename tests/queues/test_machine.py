"""A few of all the orders in which things may happen to a queue; ``make chaos`` tries many more."""

from __future__ import annotations

import pytest
from hypothesis import HealthCheck, settings
from hypothesis.stateful import RuleBasedStateMachine, run_state_machine_as_test
from machine import KillMachine, MemoryMachine, PowerCutMachine

FEW = settings(
    max_examples=25, stateful_step_count=40, deadline=None, database=None, suppress_health_check=list(HealthCheck)
)


@pytest.mark.parametrize("machine", [MemoryMachine, KillMachine, PowerCutMachine])
def test_whatever_happens_a_job_that_was_taken_ends_once(machine: type[RuleBasedStateMachine]) -> None:
    run_state_machine_as_test(machine, settings=FEW)
