"""The bundles in memory: those that were asked for last, up to a number of them."""

import weakref
from collections import OrderedDict
from collections.abc import Callable, Iterator

from service.engine.bundles.index import Key
from service.engine.engine import Loaded


class Residents:
    """Bundles by version, the one that nobody has asked for longest first.

    A bundle is in use while anybody else refers to it: a request that has found it, from then until its reply is
    computed. So that is tried out: one that is still there after it was let go is in use, and is taken back.

    Args:
        most: How many are kept, if so many are not in use.
        is_needed: Whether a bundle has to stay though nobody asks for it.
        let_go: Called when one has been let go to make room.
    """

    def __init__(self, most: int, is_needed: Callable[[Key], bool], let_go: Callable[[Key], None]) -> None:
        self._most = most
        self._is_needed = is_needed
        self._let_go = let_go
        self._bundles: OrderedDict[Key, Loaded] = OrderedDict()

    def __contains__(self, key: object) -> bool:
        return key in self._bundles

    def __iter__(self) -> Iterator[Key]:
        return iter(list(self._bundles))

    @property
    def room(self) -> int:
        """How many more there is room for."""
        return self._most - len(self._bundles)

    def get(self, key: Key) -> Loaded | None:
        """The bundle, which somebody asks for."""
        if key in self._bundles:
            self._bundles.move_to_end(key)
        return self._bundles.get(key)

    def items(self) -> list[tuple[Key, Loaded]]:
        """All of them."""
        return list(self._bundles.items())

    def peek(self, key: Key) -> Loaded | None:
        """The bundle, which nobody has asked for."""
        return self._bundles.get(key)

    def put(self, key: Key, bundle: Loaded) -> None:
        """Keep a bundle in place of another of the same version, or beside all others."""
        self._bundles[key] = bundle

    def drop(self, key: Key) -> None:
        """Let this one go; requests that have found it go on with it."""
        del self._bundles[key]

    def make_room(self, wanted: int = 1) -> bool:
        """Let go of bundles that are not in use until there is room for so many more; False where there is not."""
        for key in self:
            if self.room >= wanted:
                break
            if not self._is_needed(key) and self._has_gone(key):
                self._let_go(key)
        return self.room >= wanted

    def _has_gone(self, key: Key) -> bool:
        still_there = weakref.ref(self._bundles.pop(key))
        bundle = still_there()
        if bundle is not None:
            self._bundles[key] = bundle
        return bundle is None
