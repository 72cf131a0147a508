"""How fast the engine computes rows, measured from its recent batches."""

MEMORY = 0.9  # the weight of a batch in the rate, for each batch that has run since
NEAR_FULL = 0.25  # of the largest batch. Smaller ones say little about the rate, because a batch has a cost of its own


class Throughput:
    """The measured rate of one engine instance, times the number of instances.

    Attributes:
        is_reliable: Whether it comes from nearly full batches.
    """

    def __init__(self, instances: int) -> None:
        self.is_reliable = False
        self._instances = instances
        # Summed apart, so that a large batch counts for what it is worth among smaller ones.
        self._rows = self._seconds = 0.0

    def note(self, rows: int, seconds: float, room: int) -> None:
        """A batch with room for so many rows has run; small ones count only until a nearly full one has."""
        is_near_full = rows >= NEAR_FULL * room
        if is_near_full and not self.is_reliable:
            self._rows = self._seconds = 0.0
            self.is_reliable = True
        if is_near_full or not self.is_reliable:
            self._rows = MEMORY * self._rows + rows
            self._seconds = MEMORY * self._seconds + seconds

    def seconds_for(self, rows: int) -> float:
        """How long so many rows take with every instance at work; 0 before anything was measured."""
        return rows * self._seconds / self._rows / self._instances if self._rows else 0.0
