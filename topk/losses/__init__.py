"""One room a loss: its mathematics in torch, forward and closed-form backward.

`room.py` says what a room must offer; `topk.ops` registers every room listed in `ROOMS` with torch.
"""

from topk.losses.room import Room
from topk.losses.smooth import SMOOTH

ROOMS: dict[str, Room] = {room.name: room for room in (SMOOTH,)}

__all__ = ["ROOMS", "Room"]
