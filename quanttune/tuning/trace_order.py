"""The order in which a forward meets its observed tensors, for torch.compile.

While it traces, nothing tells tensors apart. A forward before that has left a plan: which sites
come in which order, and how many instances of eq. 2 each new tensor stands for.
"""

from ..origins import Source
from .observation import Observation

_OTHER_ORDER = (
    ", which the first forward after attach() had otherwise: a model that skips or repeats layers "
    "at random cannot be tuned under torch.compile"
)


class Plan:
    """Made of what the first observed forward visits; a traced forward follows it."""

    def __init__(self) -> None:
        self.always_new: set[str] = set()  # sites at which no tensor came by that was known
        self.reached: set[str] = set()  # sites at which any did
        self._entries: list[tuple[str, int, Source | None]] | None = None
        self._visits: list[tuple[str, Observation | None]] = []
        self._position: int | None = None

    @property
    def is_made(self) -> bool:
        return self._entries is not None

    @property
    def is_followed(self) -> bool:
        return self._position is not None

    def begin(self, follow: bool) -> None:
        """Begin a forward, or end one."""
        self._visits, self._position = [], 0 if follow else None

    def visit(self, site: str, observation: Observation | None) -> None:
        """Note what is new at a site: None for a tensor that another site has met."""
        if self._entries is None:
            self._visits.append((site, observation))

    def make(self) -> None:
        """Keep the first forward's visits; its logits, with no instances, are not visited again."""
        if self._entries is None:
            self._entries = [
                (site, observation.multiplicity, observation.source)
                if observation
                else (site, 0, None)
                for site, observation in self._visits
                if observation is None or observation.multiplicity
            ]
            self.reached = {site for site, _ in self._visits}
            seen_again = {site for site, observation in self._visits if observation is None}
            self.always_new = self.reached - seen_again

    def follow(self, site: str) -> tuple[int, Source | None]:
        """Return how many instances the tensor at the next site, which must be this, stands for.

        And the source of the mask that is for it.
        """
        entries, position = self._entries or [], self._position
        if position is None or position >= len(entries) or entries[position][0] != site:
            raise RuntimeError(f"{site} is observed{_OTHER_ORDER}")
        self._position = position + 1
        return entries[position][1:]

    def check_end(self) -> None:
        """Refuse a traced forward that is shorter than the plan."""
        if self._position != len(self._entries or ()):
            raise RuntimeError(f"only {self._position} tensors were observed{_OTHER_ORDER}")
