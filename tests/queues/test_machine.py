"""All that may happen to a queue, in any order: a few orders, always the same, and with ``make chaos`` many others."""

from __future__ import annotations

import counting
import pytest
from hypothesis import HealthCheck, settings
from hypothesis.stateful import RuleBasedStateMachine, run_state_machine_as_test
from machine import KillMachine, MemoryMachine, PowerCutMachine

PLAIN = settings(stateful_step_count=40, deadline=None, database=None, suppress_health_check=list(HealthCheck))


@pytest.mark.parametrize("machine", [MemoryMachine, KillMachine, PowerCutMachine])
def test_whatever_happens_a_job_that_was_taken_ends_once(machine: type[RuleBasedStateMachine]) -> None:
    run_state_machine_as_test(machine, settings=settings(PLAIN, max_examples=25, derandomize=True))


@pytest.mark.chaos
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("machine", [MemoryMachine, KillMachine, PowerCutMachine])
def test_whatever_else_happens_it_does_so_too(machine: type[RuleBasedStateMachine]) -> None:
    examples = 3000
    run_state_machine_as_test(machine, settings=settings(PLAIN, max_examples=examples, stateful_step_count=60))
    counting.keep(f"orders of events, {machine.__name__}", tried=examples, broke_the_promise=0)
