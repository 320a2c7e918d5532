"""One room a loss: its mathematics in torch, forward and closed-form backward.

`room.py` says what a room must offer, `selection.py` finds the largest scores for several of them; `topk.ops` registers
every room listed in `ROOMS` with torch.
"""

from topk.losses.noised import NOISED
from topk.losses.room import Room

ROOMS: dict[str, Room] = {room.name: room for room in (NOISED,)}

__all__ = ["ROOMS", "Room"]
