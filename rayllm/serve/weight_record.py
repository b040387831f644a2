"""Which weights the replicas of one endpoint are to serve: a record that each of them works towards.

Plain data and the steps from one record to the next. Where it is kept is `weight_store`'s, who changes it `promoter`'s.
"""

import msgspec

from rayllm.engine.weights import Weights


class Candidate(msgspec.Struct, frozen=True):
    """Weights that some replicas try. `gate` names the text that each measures them on before it serves them."""

    weights: Weights
    replicas: tuple[str, ...]
    gate: str | None = None


class WeightRecord(msgspec.Struct, frozen=True):
    """`serial` grows by one with each change, and names it. Replicas that start have `current`; `previous` is what a
    rollback returns to."""

    serial: int
    current: Weights
    previous: Weights | None = None
    candidate: Candidate | None = None

    def wanted(self, replica: str) -> Weights:
        tried = self.candidate
        return tried.weights if tried is not None and replica in tried.replicas else self.current

    def trying(self, candidate: Candidate) -> "WeightRecord":
        return WeightRecord(self.serial + 1, self.current, self.previous, candidate)

    def taken(self) -> "WeightRecord":
        """The candidate becomes what all replicas serve."""
        assert self.candidate is not None
        return WeightRecord(self.serial + 1, self.candidate.weights, self.current)

    def withdrawn(self) -> "WeightRecord":
        """As if there had been no candidate."""
        return WeightRecord(self.serial + 1, self.current, self.previous)

    def rolled_back(self) -> "WeightRecord":
        """Withdrawn, where weights are being tried; else the previous ones, to which the current ones then are."""
        if self.candidate is not None:
            return self.withdrawn()
        assert self.previous is not None
        return WeightRecord(self.serial + 1, self.previous, self.current)


class ReplicaReport(msgspec.Struct, frozen=True):
    """How far a replica is: it has done, or given up, what the record with `serial` asks of it.

    `perplexities`: by the new weights and by those before, if they were gated.
    """

    serial: int
    weight_version: str
    problem: str | None = None
    perplexities: tuple[float, float] | None = None
