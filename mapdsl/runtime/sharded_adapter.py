"""The base of compiled adapters of maps with meshes: the same conversions, of whole states and of one rank's share."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor

from mapdsl.runtime.adapter import Adapter, ignore, naming_the_rule, refuse
from mapdsl.runtime.assembling import assembled
from mapdsl.runtime.complement import Alternatives
from mapdsl.runtime.dtensors import Otherwise, is_dtensor, rank_of, unwrapped, wrapped
from mapdsl.runtime.errors import ConversionError
from mapdsl.runtime.partial import partial_form
from mapdsl.runtime.place import Meshes, Place
from mapdsl.runtime.put import Put, Sink
from mapdsl.runtime.resharding import Resharding
from mapdsl.runtime.share_list import ShareList
from mapdsl.runtime.shares import Ranks

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh


class ShardedAdapter(Adapter):
    """An adapter whose axes are cut over the ranks of meshes.

    As it is made it converts whole states; `at` gives that of one rank. `shard`, `merge` and `reshard` move one side
    from some ranks to others. Ranks are given by mesh: `{"tp": 4, "ep": 2}`, one of them as `{"tp": 3, "ep": 0}`, and
    states of all ranks in a list, the mesh that the map declares last counting fastest. A torch `DeviceMesh` says both
    at once: its dimensions are meshes of the map by name, others (`dp`) cut nothing; one rank of it is a global rank
    number, or this process where none is given.
    """

    MESHES: ClassVar[Meshes] = {}
    place = Place({})

    # --- one rank ---

    def at(self, ranks: Ranks | DeviceMesh, rank: Ranks | int | None = None, *, counts_from_all: bool = False) -> Any:
        """The adapter, of the same class, of one rank's share: `ranks` says how many there are, `rank` which this is.

        It converts what one rank holds of either side; a mesh that is not named is one rank. With `counts_from_all`
        `{local e}` in a name counts as in a whole state. Raises ConversionError: N113 for a mesh that the map has not
        and a rank that there is not, P453 where an axis does not divide, as soon as it is asked for.
        """
        other = copy.copy(self)
        other.complement = type(self.complement)()
        other.place = Place(self.MESHES, *rank_of(self.MESHES, ranks, rank), counts_from_all=counts_from_all)
        other.set_params(other.config)
        return other

    def counting_from_all(self) -> ShardedAdapter:
        """The adapter of this rank under the names of a whole state."""
        other: ShardedAdapter = self.at(self.place.ranks, self.place.rank, counts_from_all=True)
        return other

    def list_shares(self, side: str, tensors: Mapping[str, Tensor]) -> ShareList:
        """What this rank holds of a side; of `tensors`, its state, names are looked at that the map does not say."""
        if side not in (self.LEFT, self.RIGHT):
            raise ConversionError("N111", f"the sides of the map are `{self.LEFT}` and `{self.RIGHT}`, not `{side}`")
        self.set_params(self.config)
        shares = ShareList(tensors)
        with naming_the_rule():
            if side == self.LEFT:
                self.accept(shares)
            direction = self._to_right if side == self.LEFT else self._to_left
            direction(shares, Put(ignore, refuse, device=torch.device("meta")))
        return shares

    # --- from ranks to ranks ---

    def shard(
        self,
        state_dict: Mapping[str, Tensor],
        ranks: Ranks | DeviceMesh,
        rank: Ranks | int | None = None,
        *,
        side: str = "",
    ) -> dict[str, Tensor]:
        """What one rank holds of a whole state; `side` is the right one if not said. Tensors own their memory.

        Raises ConversionError where the state does not fit the map, and P453 or P454 where it cannot be cut so.
        """
        return self.reshard([state_dict], {}, ranks, rank, side=side)

    def merge(
        self, states: Sequence[Mapping[str, Tensor]], ranks: Ranks, *, side: str = "", compare: bool = True
    ) -> dict[str, Tensor]:
        """The whole state of those of all ranks; R602 where what several of them hold differs.

        Without `compare` the first rank's is taken.
        """
        return self.reshard(states, ranks, {}, {}, side=side, compare=compare)

    def reshard(
        self,
        states: Sequence[Mapping[str, Tensor]],
        ranks: Ranks,
        to: Ranks | DeviceMesh,
        rank: Ranks | int | None = None,
        *,
        side: str = "",
        compare: bool = True,
    ) -> dict[str, Tensor]:
        """What one rank of others, `to`, holds, out of the states of all `ranks`; nothing larger is made."""
        plan = Resharding(self, side or self.RIGHT, states, ranks)
        made = plan.target(*rank_of(self.MESHES, to, rank))
        return {name: assembled(name, one, states, compare=compare) for name, one in made.items()}

    # --- DTensors ---

    def to_dtensors(
        self,
        state_dict: Mapping[str, Tensor],
        device_mesh: DeviceMesh,
        *,
        side: str = "",
        otherwise: Otherwise = "error",
    ) -> dict[str, Tensor]:
        """What this process holds of a side, as DTensors that say what all ranks hold together; nothing is copied.

        A tensor that no other rank has part in stays a plain one. Raises ConversionError, P456, where no placements
        say how a tensor is cut; with `otherwise="local"` it stays a plain one, too. No communication.
        """
        return wrapped(self.at(device_mesh), side or self.RIGHT, state_dict, device_mesh, otherwise)

    def from_dtensors(
        self,
        state_dict: Mapping[str, Tensor],
        device_mesh: DeviceMesh,
        *,
        side: str = "",
        redistribute: bool = True,
    ) -> dict[str, Tensor]:
        """What this process holds of a side, of DTensors on dimensions of a device mesh; plain tensors are local ones.

        A DTensor that is placed as the map says gives its own memory. Others are redistributed, by all ranks together,
        or are an error, P456, without `redistribute`.
        """
        return unwrapped(self.at(device_mesh), side or self.RIGHT, state_dict, redistribute=redistribute)

    def read_into(self, state_dict: Mapping[str, Tensor], sink: Sink, read_back: Any, **options: Any) -> None:
        """See `Adapter.read_into`; DTensors are taken as `from_dtensors` takes them."""
        super().read_into(self._local(state_dict, self.LEFT), sink, read_back, **options)

    def write_into(self, state_dict: Mapping[str, Tensor], sink: Sink, read_back: Any, **options: Any) -> None:
        """See `Adapter.write_into`; DTensors are taken as `from_dtensors` takes them."""
        super().write_into(self._local(state_dict, self.RIGHT), sink, read_back, **options)

    def _local(self, state_dict: Mapping[str, Tensor], side: str) -> Mapping[str, Tensor]:
        # The values of other mappings may be lazy, and are asked for once.
        if isinstance(state_dict, dict) and any(map(is_dtensor, state_dict.values())):
            return unwrapped(self, side, state_dict, redistribute=True)
        return state_dict

    # --- what compiled adapters ask ---

    def mesh_size(self, mesh: str) -> int:
        """Over how many ranks a mesh cuts its axes."""
        return self.place.size(mesh)

    def mesh_rank(self, mesh: str) -> int:
        """The place of this rank in a mesh."""
        return self.place.coordinate(mesh)

    def partial(self, mesh: str) -> Alternatives:
        """How a tensor is stored whose value the ranks of a mesh share."""
        return partial_form(self.mesh_size(mesh))

    def held(self, axis: str, positions: range) -> range:
        """Those positions of an axis that this rank holds; P453 where they do not divide."""
        return self.place.held(axis, positions)

    def held_padded(self, axis: str, positions: range, multiple: int) -> range:
        """Those positions that this rank holds of an axis rounded up to a multiple."""
        return self.place.held_padded(axis, positions, multiple)

    def unpadded(self, axis: str, held: range) -> range:
        """Those positions of an axis that lie in what is held of it with its padding."""
        return self.place.unpadded(axis, held)

    def counted_from(self, held: range, positions: range) -> int:
        """What the numbers in the names of a rank count from."""
        return self.place.counted_from(held, positions)


__all__ = ["ShardedAdapter"]
