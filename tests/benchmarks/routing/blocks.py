"""The KV memory of one engine: blocks that requests hold, and those that earlier requests left behind."""

from collections.abc import Iterable, Sequence


class Blocks:
    """Blocks of KV; those that are full carry the hash of all that leads up to their end, and can be shared.

    What nobody holds stays until its place is needed: what was let go first goes first, of one request its tail.
    """

    def __init__(self, total: int) -> None:
        self.total = total
        self.held = 0
        self._holders: dict[int, int] = {}
        self._idle: dict[int, None] = {}

    @property
    def free(self) -> int:
        """How many could be taken now."""
        return self.total - self.held

    @property
    def usage(self) -> float:
        """The share that requests hold."""
        return self.held / self.total

    def known(self, chain: Sequence[int]) -> int:
        """How many blocks of a chain are here, from its beginning."""
        for count, block in enumerate(chain):
            if block not in self._holders and block not in self._idle:
                return count
        return len(chain)

    def price(self, chain: Sequence[int], blank: int) -> int:
        """How many free blocks it takes to hold a known chain and so many blank ones."""
        return blank + sum(block in self._idle for block in chain)

    def hold(self, chain: Iterable[int]) -> None:
        """Share blocks that are known."""
        for block in chain:
            holders = self._holders.get(block, 0)
            if not holders:
                del self._idle[block]
                self.held += 1
            self._holders[block] = holders + 1

    def take(self, count: int) -> bool:
        """Take so many blank blocks; False, and nothing changes, if there aren't as many."""
        if count > self.total - self.held:
            return False
        self.held += count
        while self.held + len(self._idle) > self.total:
            del self._idle[next(iter(self._idle))]
        return True

    def name(self, block: int) -> bool:
        """A block that was taken is full now; False if requests hold one of the same name, and it stays nameless."""
        if block in self._holders:
            return False
        self._idle.pop(block, None)
        self._holders[block] = 1
        return True

    def let_go(self, named: Sequence[int], blank: int) -> None:
        """Give back what one request held."""
        self.held -= blank
        for block in reversed(named):
            holders = self._holders[block] - 1
            if holders:
                self._holders[block] = holders
            else:
                del self._holders[block]
                self._idle[block] = None
                self.held -= 1
