"""What torch's CUDA caching allocator would reserve for a sequence of allocations: its rules, without a GPU.

Rules of c10/cuda/CUDACachingAllocator.cpp with its default settings: sizes are rounded up to 512 bytes; requests of at
most 1 MiB come out of segments of 2 MiB, others below 10 MiB out of segments of 20 MiB, larger ones get a segment of
their own size, rounded up to 2 MiB; the smallest free block that fits is taken and split where enough is left over;
free neighbours within a segment are joined; segments are never given back. One stream.
"""

from __future__ import annotations

from dataclasses import dataclass

MIB = 2**20
SMALL_BYTES = 1 * MIB
"""Requests up to this size belong to the pool of small blocks."""
_ROUNDING_BYTES = 512


@dataclass(eq=False)
class Block:
    """A piece of a segment, allocated or free, between its neighbours."""

    size: int
    small: bool
    free: bool = True
    before: Block | None = None
    after: Block | None = None


class CachingAllocator:
    """Allocates and frees by torch's rules, and counts what a GPU would have reserved."""

    def __init__(self) -> None:
        self.reserved_bytes = self.live_bytes = self.peak_reserved_bytes = self.peak_live_bytes = 0
        self.num_segments = 0
        self._free: dict[bool, list[Block]] = {True: [], False: []}

    def allocate(self, num_bytes: int) -> Block:
        """A block of at least `num_bytes`, out of what is reserved or out of a new segment."""
        size = max(-(-num_bytes // _ROUNDING_BYTES) * _ROUNDING_BYTES, _ROUNDING_BYTES)
        small = size <= SMALL_BYTES
        fitting = [block for block in self._free[small] if block.size >= size]
        if fitting:
            block = min(fitting, key=lambda b: b.size)
            self._free[small].remove(block)
        else:
            block = self._new_segment(size, small)
        rest = block.size - size
        if rest >= _ROUNDING_BYTES if small else rest > SMALL_BYTES:
            other = Block(rest, small, before=block, after=block.after)
            if block.after is not None:
                block.after.before = other
            block.after, block.size = other, size
            self._free[small].append(other)
        block.free = False
        self.live_bytes += block.size
        self.peak_live_bytes = max(self.peak_live_bytes, self.live_bytes)
        return block

    def free(self, block: Block) -> None:
        """Give a block back to the pool, joined with its free neighbours."""
        self.live_bytes -= block.size
        pool = self._free[block.small]
        for neighbour in (block.before, block.after):
            if neighbour is not None and neighbour.free:
                pool.remove(neighbour)
                first, second = (neighbour, block) if neighbour is block.before else (block, neighbour)
                first.size += second.size
                first.after = second.after
                if second.after is not None:
                    second.after.before = first
                block = first
        block.free = True
        pool.append(block)

    def _new_segment(self, size: int, small: bool) -> Block:
        segment = 2 * MIB if small else 20 * MIB if size < 10 * MIB else -(-size // (2 * MIB)) * 2 * MIB
        self.num_segments += 1
        self.reserved_bytes += segment
        self.peak_reserved_bytes = max(self.peak_reserved_bytes, self.reserved_bytes)
        return Block(segment, small)


def replay(events: list[tuple[int, int]], scale: float = 1.0) -> CachingAllocator:
    """Run (key, bytes) events, bytes 0 for a free, through an allocator; sizes are multiplied by `scale`."""
    allocator = CachingAllocator()
    held: dict[int, Block] = {}
    for key, num_bytes in events:
        if num_bytes:
            held[key] = allocator.allocate(int(num_bytes * scale))
        elif key in held:
            allocator.free(held.pop(key))
    return allocator
