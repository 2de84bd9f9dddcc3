"""The claim protocol against a model: owners, claimants, tickets; claims race, time runs out, owners fork, exit and are killed."""

import signal
import sys
import threading
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, initialize, invariant, multiple, rule

sys.path.insert(0, str(Path(__file__).parent))  # claimant.py, by name

import claimant

OWNERS = 2
BOUND = 12
EXAMPLES = 50


class Ticket:
    """What the model knows of a ticket. expired: its ttl was 0."""

    def __init__(self, owner, generation, raw, cookie, claims, expired):
        self.owner, self.generation, self.raw, self.cookie, self.claims, self.expired = owner, generation, raw, cookie, claims, expired


class Store(RuleBasedStateMachine):
    """Every ticket is given exactly as often as it may be, to whoever comes first, and never after its end."""

    tickets = Bundle("tickets")
    owners = st.integers(0, OWNERS - 1)
    #: Who claims: a bystander, or one of the owners.
    claimants = st.integers(-1, OWNERS - 1)
    #: A process takes longer to start, or to fork, than a hundred claims, and these rules are always open: they would be most of the time.
    seldom = st.integers(0, 5).map(lambda drawn: drawn == 3)
    steps = 0

    @initialize()
    def begin(self):
        self.processes = [claimant.Process() for _ in range(OWNERS)]
        self.bystander = claimant.Process()
        for process in self.processes:
            process("configure_all", BOUND, 0)
        self.generations = [0] * OWNERS
        self.made = [[] for _ in range(OWNERS)]

    def teardown(self):
        if hasattr(self, "processes"):
            for process in [*self.processes, self.bystander]:
                process.__exit__()

    def who(self, number):
        return self.bystander if number < 0 else self.processes[number]

    def alive(self, ticket):
        return ticket.generation == self.generations[ticket.owner]

    def waiting(self, owner):
        return [ticket for ticket in self.made[owner] if self.alive(ticket) and ticket.claims and not ticket.expired]

    def expected(self, ticket):
        """The words that tell the ticket's end, None where it is to be given."""
        if not self.alive(ticket):
            return "is gone"
        if ticket.expired:
            return "has expired"
        return None if ticket.claims else "claimed already"

    @rule(target=tickets, owner=owners, claims=st.integers(1, 3), expired=st.booleans())
    def make(self, owner, claims, expired):
        made = self.processes[owner]("make", claims, 0.0 if expired else None)
        if isinstance(made, str):
            assert "is full" in made
            assert len(self.waiting(owner)) == BOUND
            return multiple()
        assert len(self.waiting(owner)) < BOUND
        ticket = Ticket(owner, self.generations[owner], *made, claims, expired)
        self.made[owner].append(ticket)
        return ticket

    @rule(ticket=tickets, by=claimants)
    def claim(self, ticket, by):
        words = self.expected(ticket)
        outcome = self.who(by)("load", ticket.raw)
        if words is None:
            assert outcome == ("given", ticket.cookie)
            ticket.claims -= 1
        else:
            assert outcome[0] == "TicketError"
            assert words in outcome[1]

    @rule(ticket=tickets)
    def race(self, ticket):
        """All claim at once: as many get it as may."""
        outcomes = self.together([(process, "load", ticket.raw) for process in (self.bystander, *self.processes)])
        given = [outcome for outcome in outcomes if outcome[0] == "given"]
        words = self.expected(ticket)
        assert len(given) == (0 if words else min(ticket.claims, len(outcomes)))
        assert all(outcome[1] == ticket.cookie for outcome in given)
        assert all(outcome[0] == "TicketError" for outcome in outcomes if outcome not in given)
        ticket.claims -= len(given)

    @rule(ticket=tickets, by=claimants, seldom=seldom)
    def race_with_the_end(self, ticket, by, seldom):
        """A claim while the owner is being killed: it is given or it is not, and afterwards nobody has it."""
        if by == ticket.owner or not self.alive(ticket) or not seldom:
            return
        outcomes = self.together([(self.who(by), "load", ticket.raw)], meanwhile=lambda: self.replace(ticket.owner, signal.SIGKILL))
        assert outcomes[0][0] in ("given", "TicketError")
        if outcomes[0][0] == "given":
            assert outcomes[0][1] == ticket.cookie

    @rule(owner=owners, seldom=seldom)
    def fork(self, owner, seldom):
        if not seldom or len(self.waiting(owner)) == BOUND:
            return
        _, (inherited, stats, theirs, own, after, _), _, _ = self.processes[owner]("fork")
        assert not [link for link in inherited.values() if link.startswith("socket:") or "fdpass-store" in link]
        assert (stats["made"], stats["unclaimed"], after["made"], after["unclaimed"]) == (0, 0, 1, 0)
        assert (theirs, own) == ("given", "given")

    @rule(owner=owners, seldom=seldom)
    def exit(self, owner, seldom):
        if seldom:
            self.replace(owner, None)

    def replace(self, owner, end):
        status = self.processes[owner].end(end)
        assert status == (0 if end is None else -end)
        self.generations[owner] += 1
        self.made[owner] = []
        self.processes[owner] = claimant.Process()
        self.processes[owner]("configure_all", BOUND, 0)

    def together(self, calls, meanwhile=None):
        outcomes = [None] * len(calls)

        def ask(place, process, *order):
            outcomes[place] = process(*order)

        threads = [threading.Thread(target=ask, args=(place, *call)) for place, call in enumerate(calls)]
        for thread in threads:
            thread.start()
        if meanwhile is not None:
            meanwhile()
        for thread in threads:
            thread.join()
        return outcomes

    @invariant()
    def counts_agree(self):
        Store.steps += 1
        if hasattr(self, "processes"):
            for owner, process in enumerate(self.processes):
                assert process("stats")["unclaimed"] == len(self.waiting(owner))


@pytest.mark.long
@pytest.mark.timeout(600)
def test_the_store_does_what_the_model_says():
    Store.TestCase.settings = settings(
        max_examples=EXAMPLES, stateful_step_count=250, deadline=None, database=None, suppress_health_check=list(HealthCheck)
    )
    Store.steps = 0
    Store.TestCase("runTest").runTest()
    assert Store.steps >= 10_000
