"""What a map's adapter is to NeMo Automodel: a drop-in for the state-dict adapters that its models have.

`mapdsl compile X.map --target automodel` writes a class on `AutomodelAdapter` and on Automodel's own base classes; this
module does not import Automodel.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor

from mapdsl.checkpoint.checkpoint import open_checkpoint
from mapdsl.checkpoint.tensors import LazyState
from mapdsl.frameworks.hub import folder_of
from mapdsl.frameworks.incoming import Import
from mapdsl.frameworks.layouts import Layout, expert_layout
from mapdsl.frameworks.live import (
    EXTRA_STATE,
    Load,
    MissingTensorsError,
    apart,
    check_readable,
    refuse_lacking,
    telling_what_is_missing,
)
from mapdsl.frameworks.naming import (
    LAYOUT,
    LEGACY_LAYOUT,
    OUTER_PREFIX,
    Naming,
    check_pairs,
    outer_prefix,
    telling_of_layouts,
)
from mapdsl.frameworks.outgoing import Export
from mapdsl.frameworks.parts import Part, check_complete, parts_of
from mapdsl.runtime.adapter import Adapter
from mapdsl.runtime.codecs.values import Cast
from mapdsl.runtime.dtensors import is_dtensor
from mapdsl.runtime.errors import some_of
from mapdsl.runtime.made_names import left_names_of
from mapdsl.runtime.names import captures
from mapdsl.runtime.tracing import Target, trace

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh


class AutomodelAdapter:
    """Converts the state of an Automodel model, as it lies on the ranks of a job, to and from stored tensors.

    A class on it names the compiled adapter and the tensors whose first dimension is the routed expert, as patterns of
    the model's names (`#` is a number). `config` is the model's, as transformers or Automodel has it; of `backend` it
    matters whether grouped experts are the model's own memory. `dtype` is that of decoded tensors.

    Some params of a map, where it has them, follow what Automodel asks: `packed` (experts are stored in a format that
    is another layout) what it says of quantisation, `te` that the backend attends with Transformer Engine,
    `lora_targets` are the parameters of experts that PEFT's `target_parameters` name.
    """

    ADAPTER: ClassVar[type[Adapter]]
    EXPERTS: ClassVar[tuple[str, ...]] = ()
    LOAD_PART: ClassVar[Callable[..., Any] | None] = None
    """Automodel's own class of a part of a load: its loader takes no other."""

    # Automodel sets it while an adapter is loaded whose metadata tell its layout.
    _paramwrapper_layout_hint: str | None = None

    def __init__(
        self,
        config: Any,
        moe_config: Any = None,
        backend: Any = None,
        dtype: torch.dtype = torch.bfloat16,
        **params: Any,
    ) -> None:
        self.config = config
        self.moe_config = moe_config
        self.backend = backend
        self.dtype = dtype
        self.adapter = self.ADAPTER(config, **params)
        if getattr(backend, "attn", None) == "te" and hasattr(self.adapter, "te"):
            self.adapter.config.given.setdefault("te", True)
        self._load = Load()
        self._view_loaded: set[str] = set()
        self._dtypes: dict[str, torch.dtype] = {}
        self._named: tuple[dict[str, bool], Naming] | None = None

    # --- out of the model ---

    def to_hf(
        self,
        state_dict: Mapping[str, Any],
        exclude_key_regex: str | None = None,
        quantization: bool = False,
        *,
        for_checkpoint_load: bool = False,
        v4_compatible: bool = False,
        legacy_paramwrapper_layout: bool = False,
        **options: Any,
    ) -> dict[str, Any]:
        """The stored tensors of the model's state, or of a part of it such as a pipeline stage; see docs/automodel.md.

        A process gets those stored tensors of which it holds a part. `for_checkpoint_load` gives what is to be
        overwritten: views of the model's memory where tensors are just moved, and new memory of the stored shapes and
        dtypes where they are decoded. Without it, moved tensors have memory of their own. With `quantization` tensors
        are in the format that reading found, else in the map's first; what is to be loaded is in that of the folder
        that `config` was read from, if it is one. Stored names that `exclude_key_regex` matches from their beginning
        are left out.

        LoRA of experts is stored for the map's `lora_targets`, with `legacy_paramwrapper_layout` as PEFT to
        0.19.0 has it; with `v4_compatible`, or without such parameters, for each projection of each expert. Raises
        ConversionError where the state does not fit the map.
        """
        del options
        if quantization and for_checkpoint_load:
            self._expect_formats_of_config()
        tensors, others = apart(state_dict)
        prefix, tensors = outer_prefix(tensors)
        plain, low_rank = self._naming.split(tensors)
        load = self._load if for_checkpoint_load else None
        is_fused = bool(self._v5_peft_target_parameters) and not v4_compatible
        with self._stored_anew(packed=quantization, is_fused=is_fused, is_legacy=legacy_paramwrapper_layout):
            made: dict[str, Any]
            if load is None and not any(map(is_dtensor, plain.values())):
                made = self._write(plain, quantization=quantization)
            else:
                export = Export(
                    self.adapter,
                    plain,
                    quantization=quantization,
                    load=load,
                    in_place=self._is_in_place,
                    dtype=self.dtype,
                    dtypes=self._dtypes,
                )
                refuse_lacking(export.trace.lacking)
                made = export.run()
                if load is not None:
                    load.found |= self.adapter.complement.found
        # Models that have fused experts in transformers have all modules there as Automodel calls them.
        made |= {name if is_fused else self._naming.left(name): tensor for name, tensor in low_rank.items()}
        made = {prefix + name: tensor for name, tensor in made.items()} | others
        if exclude_key_regex is None:
            return made
        excluded = re.compile(exclude_key_regex)
        return {name: value for name, value in made.items() if not excluded.match(name)}

    def convert_single_tensor_to_hf(self, fqn: str, tensor: Any, **options: Any) -> list[tuple[str, Any]]:
        """The stored tensors of one tensor of the model, none where it is not stored; options as of `to_hf`.

        Raises MissingTensorsError where the stored tensor needs others with it.
        """
        return list(self.to_hf({fqn: tensor}, **options).items())

    def get_hf_state_dict_keys(self, state_dict: Mapping[str, Any]) -> list[str]:
        """The names of what `to_hf` gives, without any conversion; `_extra_state` is none of them."""
        if any(map(is_dtensor, state_dict.values())):
            blank = {
                name: torch.empty_like(value, device="meta") if isinstance(value, Tensor) else value
                for name, value in state_dict.items()
            }
            return list(self.to_hf(blank, exclude_key_regex=rf".*{EXTRA_STATE}.*"))
        tensors, others = apart(state_dict)
        prefix, tensors = outer_prefix(tensors)
        plain, low_rank = self._naming.split(tensors)
        with self._stored_anew(packed=False, is_fused=bool(self._v5_peft_target_parameters)):
            names = list(left_names_of(self.adapter, plain))
        names += low_rank if self._v5_peft_target_parameters else map(self._naming.left, low_rank)
        return [*(prefix + name for name in names), *(name for name in others if EXTRA_STATE not in name)]

    def _write(self, state: dict[str, Tensor], *, quantization: bool) -> dict[str, Tensor]:
        """The stored tensors of a state that this process has all of."""
        with telling_what_is_missing():
            return self.adapter.write(state, quantization=quantization, dtype=self.dtype, partial=True)

    # --- into the model ---

    def from_hf(
        self,
        hf_state_dict: Mapping[str, Any],
        device_mesh: DeviceMesh | None = None,
        *,
        partial: bool = False,
        reset_view_loaded_keys: bool = True,
        **options: Any,
    ) -> dict[str, Any]:
        """The model's tensors out of stored ones: all of them, or those that a `to_hf` for loading had given out.

        Tensors are held as the model holds them, where `to_hf` has seen it for this load. Else grouped experts are cut
        over the dimensions `ep` and `ep_shard` of the device mesh, as DTensors cut, and others are as they are given.
        What was read through views into the model is left out, and listed by `view_loaded_native_keys`, which begins
        anew unless `reset_view_loaded_keys` is false. With `partial` groups that are absent whole are left out, such as
        those of another namespace, which has a call of its own. Raises MissingTensorsError, a RuntimeError, for tensors
        that this process needs and that are not there.
        """
        del options
        if reset_view_loaded_keys:
            self._view_loaded = set()
        load, self._load = self._load, Load()
        tensors, others = apart(hf_state_dict)
        check_pairs(tensors)
        prefix, tensors = outer_prefix(tensors)
        plain, low_rank = self._naming.split_left(tensors)
        is_part = partial or bool(load.layouts) or bool(prefix) or bool(low_rank)
        hint = {} if self._paramwrapper_layout_hint is None else {"lora_layout": self._paramwrapper_layout_hint}
        out: dict[str, Any]
        known = self.adapter.complement.adding() if is_part else nullcontext()
        with self._given(**{**load.found, **hint}), telling_what_is_missing(), telling_of_layouts(self.adapter), known:
            if device_mesh is None and not load.layouts and not any(map(is_dtensor, plain.values())):
                out = self._read(plain, partial=is_part)
                out |= {self._naming.right(name): tensor for name, tensor in low_rank.items()}
                return {prefix + name: tensor for name, tensor in out.items()} | others
            made = Import(
                self.adapter,
                plain,
                dtype=self.dtype,
                partial=is_part,
                layout=lambda target, layouts: self._layout(target, layouts, load, device_mesh),
            )
        nothing = load.empty() - made.expected
        if plain and not partial:
            self._check_experts(load, made.expected | nothing)
        out, filled = made.run(lambda name: load.is_filled(name, plain))
        filled |= nothing
        for name in made.beside(load.layouts) if load.layouts else ():
            out.pop(name, None)
        self._view_loaded |= {prefix + name for name in filled}
        load.forget(made.expected | nothing)
        self._load = load
        out |= {self._naming.right(name): tensor for name, tensor in low_rank.items()}
        return {prefix + name: tensor for name, tensor in out.items()} | others

    def _read(self, state: dict[str, Tensor], *, partial: bool) -> dict[str, Tensor]:
        """The model's tensors of a state that this process has all of.

        What decoding loses is not kept beside the model: it is there to be trained.
        """
        check_readable(self.adapter, state, partial=partial)
        return self.adapter.read(state, dtype=self.dtype, partial=partial, keep=False)

    def expect_formats(self, stored: Mapping[str, Tensor]) -> None:
        """Note in which formats a checkpoint has its tensors, so that `to_hf` asks for these.

        Of the tensors names, dtypes and shapes are looked at, meta tensors will do; there may be more than the model's.
        """
        trace(self.adapter, self.adapter.LEFT, stored, dtype=self.dtype, others=True)
        self._dtypes = {name: tensor.dtype for name, tensor in stored.items()}

    def _expect_formats_of_config(self) -> None:
        """The same, unless it was done, of the checkpoint that the config was read from, if it is on this machine."""
        folder = None if self._dtypes else folder_of(self.config)
        if folder is not None and any(folder.glob("*.safetensors")):
            self.expect_formats(LazyState(open_checkpoint(folder)).meta())

    @property
    def view_loaded_native_keys(self) -> set[str]:
        """The model's tensors that the last load read through views: they are in the model, not in its result."""
        return set(self._view_loaded)

    def iter_checkpoint_load_parts(
        self, model_state_dict: Mapping[str, Any], device_mesh: DeviceMesh | None = None
    ) -> Iterator[Any] | None:
        """The load of a quantised checkpoint in parts, each read and decoded into the model before the next.

        None where several processes load: each asks for what it holds of all tensors, at once. Raises
        MissingTensorsError, before anything is read, where the folder that `config` was read from lacks tensors.
        """
        del device_mesh
        is_job = torch.distributed.is_available() and torch.distributed.is_initialized()
        if self.LOAD_PART is None or (is_job and torch.distributed.get_world_size() > 1):
            return None
        tensors, others = apart(model_state_dict)
        self._expect_formats_of_config()
        with self._stored_anew(packed=True):
            found = trace(self.adapter, self.adapter.RIGHT, tensors, partial=True)
        refuse_lacking(found.lacking)
        if self._dtypes:
            check_complete(found, self._dtypes)
        self._view_loaded = set()
        parts = parts_of(found, tensors)
        return (
            self._load_part({name: tensors[name] for name in names}, {} if number else others)
            for number, names in enumerate(parts)
        )

    def _load_part(self, held: dict[str, Tensor], others: Iterable[str]) -> Any:
        part = Part(held, self.to_hf(held, quantization=True, for_checkpoint_load=True))

        def finish() -> None:
            part.install(self.from_hf(part.stored, reset_view_loaded_keys=False))

        assert self.LOAD_PART is not None
        return self.LOAD_PART(
            checkpoint_tensors=part.stored,
            model_keys=frozenset([*held, *others]),
            temporary_checkpoint_keys=part.temporary(),
            finish=finish,
        )

    def _layout(self, target: Target, sources: Iterable[Layout], load: Load, device_mesh: DeviceMesh | None) -> Layout:
        """How a tensor of the model is to be held."""
        if target.name in load.layouts:
            return load.layouts[target.name]
        # Automodel reads the LoRA of all experts on every rank, and cuts it itself.
        if device_mesh is not None and self._is_expert(target.name) and ".lora_" not in target.name:
            return expert_layout(target.shape, device_mesh)
        (first, *more) = [*sources, Layout(target.shape)]
        links = list(target.links())
        is_renamed = len(more) == 1 and len(links) == 1 and links[0].is_rename and first.shape == target.shape
        return first if is_renamed else Layout(target.shape)

    def _check_experts(self, load: Load, made: set[str]) -> None:
        """Refuse a load that asked for experts of a layer and got none of them."""
        missing = sorted(name for name in load.layouts if self._is_expert(name) and name not in made)
        if missing:
            raise MissingTensorsError("R605", f"no expert is there of {some_of(missing)}")

    # --- what it is ---

    @property
    def supports_write_through_checkpoint_load(self) -> bool:
        """Whether everything that `to_hf` gives to be loaded is the model's own memory."""
        return self._grouped_is_model_memory and self._naming.share_of_views == 1

    @property
    def supports_low_memory_dcp_load(self) -> bool:
        """Whether what `to_hf` gives to be loaded needs little memory beside the model's: an eighth of it at most."""
        return self._grouped_is_model_memory and self._naming.share_of_views >= 7 / 8

    def forced_hf_dtype_mapping(self, hf_state_dict: Mapping[str, Any]) -> dict[str, str]:
        """Stored names whose dtype the map states: that in which `to_hf` gave them, in the spelling of safetensors."""
        out: dict[str, str] = {}
        for name, tensor in hf_state_dict.items():
            alternatives = self._naming.stored.get(name, ())
            casts = {one.dtype: one.storage.dtypes[0] for one in alternatives if isinstance(one, Cast)}
            if len(casts) == len(alternatives) and isinstance(tensor, Tensor) and tensor.dtype in casts:
                out[name] = casts[tensor.dtype]
        return out

    @property
    def _v5_peft_target_parameters(self) -> tuple[str, ...]:
        """What Automodel writes to `target_parameters` of the config of an adapter."""
        return tuple(getattr(self.adapter, "lora_targets", ()))

    def map_peft_target_module_to_hf(self, name: str, *, v4_compatible: bool = False, **options: Any) -> str:
        """What the LoRA of a module, or of a grouped expert's, is called by `to_hf`; the name itself if by no other."""
        del options
        if self._v5_peft_target_parameters and not v4_compatible:
            return name
        prefix = OUTER_PREFIX if name.startswith(OUTER_PREFIX) else ""
        return prefix + self._naming.module(name.removeprefix(prefix))

    def _stored_anew(
        self, *, packed: bool, is_fused: bool = False, is_legacy: bool = False
    ) -> AbstractContextManager[None]:
        """Layouts are as asked, not as they were read: what Automodel writes beside LoRA speaks of gates and ups."""
        layout = LEGACY_LAYOUT if is_legacy else LAYOUT
        return self._given(packed=packed, lora_fused=is_fused, lora_layout=layout, lora_gate=True, lora_up=True)

    @contextmanager
    def _given(self, **params: Any) -> Iterator[None]:
        """Give the map some of its params for a while, those that it has and that nobody gave it."""
        given = self.adapter.config.given
        now = {name: value for name, value in params.items() if hasattr(self.adapter, name) and name not in given}
        given |= now
        try:
            yield
        finally:
            for name in now:
                del given[name]

    @property
    def _naming(self) -> Naming:
        """The names of the map's sides, anew where reading found another variant of it."""
        variant = dict(self.adapter.complement.found)
        if self._named is None or self._named[0] != variant:
            self._named = variant, Naming(self.adapter)
        return self._named[1]

    def _is_expert(self, name: str) -> bool:
        return any(captures(pattern, name) is not None for pattern in self.EXPERTS)

    def _is_in_place(self, name: str) -> bool:
        """Whether a tensor of the model's state is its own memory, not a copy that the backend makes of it."""
        return not self._is_expert(name) or self._grouped_is_model_memory

    @property
    def _grouped_is_model_memory(self) -> bool:
        experts, dispatcher = (getattr(self.backend, field, None) for field in ("experts", "dispatcher"))
        return experts != "te" and dispatcher != "mok"


__all__ = ["AutomodelAdapter"]
