"""The training state as named stretches of float32 tensors, whatever ZeRO made of it.

DeepSpeed keeps the float32 parameters and the optimizer's moments of a rank in flat tensors, a layout that depends on
the number of ranks and on the ZeRO stage. Named stretches depend on neither: what W ranks wrote under one stage, any
other number reads under any other, bit for bit. A stretch is saved as `kind/name/start`, where the kind is `parameter`,
one of the optimizer's moments (such as `exp_avg`), or `importance` for what the model names in `tables`.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from deepspeed import DeepSpeedEngine
from safetensors import safe_open
from torch import Tensor

from sctd.errors import UserError
from sctd.train.engine.distributed import World

PARAMETER, TABLE = "parameter", "importance"  # the kinds beside the optimizer's own


@dataclass(frozen=True)
class Stretch:
    """A part of one parameter that this rank optimises.

    Args:
        start, length: its place in the flattened parameter.
        flat: the tensor that the optimizer knows, of which it is a part. offset: where it begins there.
        everywhere: whether every rank holds it.
    """

    name: str
    start: int
    length: int
    flat: Tensor
    offset: int
    everywhere: bool = False

    def of(self, tensor: Tensor) -> Tensor:
        """The stretch's view of `flat`, or of another tensor laid out like it."""
        return tensor.detach().view(-1).narrow(0, self.offset, self.length)


def stretches(engine: DeepSpeedEngine) -> Iterator[Stretch]:
    """What this rank holds in float32, in the order of the model's parameters."""
    for name, parameter in engine.module.named_parameters():
        if hasattr(parameter, "ds_id"):  # ZeRO-3: the parameter is cut into equal parts, the last one padded
            zero = engine.optimizer
            group, offset, part = zero.grad_position[zero.get_param_id(parameter)]
            start = part * dist.get_rank()
            length = min(part, parameter.ds_numel - start)
            if length > 0:
                yield Stretch(name, start, length, zero.fp32_partitioned_groups_flat[group], offset)
        elif hasattr(parameter, "_hp_mapping"):  # ZeRO-1 and 2: a part of each flat group, which cuts where it may
            place = parameter._hp_mapping
            if place is not None:
                flat = _partitions(engine.optimizer)[place.param_group_index]
                part, whole = place.hp_fragment_address, place.lp_fragment_address
                yield Stretch(name, whole.start, whole.numel, flat, part.start)
        else:
            yield Stretch(name, 0, parameter.numel(), parameter, 0, everywhere=True)


def tables(engine: DeepSpeedEngine) -> dict[str, Tensor]:
    """What training moves beside the parameters, whole on every rank."""
    return getattr(engine.module, "tables", {})


def snapshot(engine: DeepSpeedEngine, world: World) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """This rank's share of the training state, copied to the host, and the facts that are the same on all ranks.

    The ranks share out what each of them holds.
    """
    optimizer, tensors = _base(engine), {}
    states: dict[tuple[str, ...], dict[str, Any]] = {}  # scalars, by the moments of the same state
    for number, stretch in enumerate(stretches(engine)):
        state = optimizer.state.get(stretch.flat, {})
        moments = {kind: value for kind, value in state.items() if _is_moment(value, stretch.flat)}
        if moments:
            states[tuple(sorted(moments))] = {k: _scalar(value) for k, value in state.items() if k not in moments}
        if stretch.everywhere and number % world.size != world.rank:
            continue
        for kind, tensor in {PARAMETER: stretch.flat, **moments}.items():
            tensors[f"{kind}/{stretch.name}/{stretch.start}"] = stretch.of(tensor).to("cpu", copy=True)
    for number, (name, table) in enumerate(tables(engine).items()):
        if number % world.size == world.rank:
            tensors[f"{TABLE}/{name}/0"] = table.flatten().to("cpu", copy=True)
    facts = {
        "shapes": {name: list(_shape(parameter)) for name, parameter in engine.module.named_parameters()},
        "states": [{"moments": list(moments), "scalars": scalars} for moments, scalars in states.items()],
        "group_steps": [_scalar(group["step"]) for group in optimizer.param_groups if "step" in group],
        "skipped_steps": engine.skipped_steps,
        "loss_scaler": _numbers(getattr(engine.optimizer, "loss_scaler", None)),
        "autocast_scaler": scaler.state_dict() if (scaler := _autocast_scaler(engine)) else None,
        "scheduler": engine.lr_scheduler.state_dict() if engine.lr_scheduler else None,
    }
    return tensors, facts


def gather_weights(engine: DeepSpeedEngine, world: World, group: dist.ProcessGroup | None) -> dict[str, Tensor]:
    """The float32 parameters by name, whole and on the host, on rank 0; the others send what they hold, and get none.

    Args:
        group: of all ranks, over gloo; None for a single one.
    """
    mine = [stretch for stretch in stretches(engine) if world.is_main or not stretch.everywhere]
    parts = [stretch.of(stretch.flat).to("cpu", torch.float32) for stretch in mine]
    flat = torch.cat(parts) if parts else torch.empty(0)
    places: list[Any] = [[(stretch.name, stretch.start, stretch.length) for stretch in mine]]
    if group is not None:
        places, (own,) = [None] * world.size, places
        dist.all_gather_object(places, own, group=group)
    if not world.is_main:
        if len(flat):
            dist.send(flat, 0, group=group)
        return {}
    whole = {name: torch.empty(_shape(parameter)) for name, parameter in engine.module.named_parameters()}
    for rank, found in enumerate(places):
        lengths = [length for _, _, length in found]
        if rank > 0 and lengths:
            flat = torch.empty(sum(lengths))
            dist.recv(flat, rank, group=group)
        for (name, start, length), part in zip(found, flat.split(lengths), strict=True):
            whole[name].view(-1)[start : start + length] = part
    return whole


@torch.no_grad()
def restore(engine: DeepSpeedEngine, files: "StateFiles", facts: dict[str, Any], step: int) -> None:
    """Put a saved state into an engine of any number of ranks and any ZeRO stage.

    Raises:
        UserError: files that lack a part of it.
    """
    optimizer, states = _base(engine), facts["states"]
    for stretch in stretches(engine):
        stop = stretch.start + stretch.length
        stretch.of(stretch.flat).copy_(files.read(PARAMETER, stretch.name, stretch.start, stop))
        if states:
            # An optimizer may keep one state for some parameters, and another for the rest.
            saved = next((each for each in states if files.length(each["moments"][0], stretch.name)), states[0])
            state = optimizer.state[stretch.flat]
            for kind in saved["moments"]:
                if kind not in state:
                    state[kind] = torch.zeros_like(stretch.flat, requires_grad=False)
                stretch.of(state[kind]).copy_(files.read(kind, stretch.name, stretch.start, stop))
            group = _group_of(engine, optimizer, stretch)
            state.update({key: _unscalar(value, stretch.flat, group) for key, value in saved["scalars"].items()})
    for group, step_of_group in zip(optimizer.param_groups, facts["group_steps"], strict=False):
        group["step"] = _unscalar(step_of_group, next(engine.module.parameters()), group)
    for name, table in tables(engine).items():
        if not files.length(TABLE, name):
            continue  # of a branch from a run that had no use for it
        table.copy_(files.read(TABLE, name, 0, table.numel()).view(table.shape))
    _refresh(engine, files)
    scaler, saved = getattr(engine.optimizer, "loss_scaler", None), facts["loss_scaler"]
    if saved and scaler and saved.keys() == (_numbers(scaler) or {}).keys():  # a branch may have another precision
        vars(scaler).update(saved)
    if facts["autocast_scaler"] is not None and (scaler := _autocast_scaler(engine)):
        scaler.load_state_dict(facts["autocast_scaler"])
    if facts["scheduler"] is not None and engine.lr_scheduler:
        engine.lr_scheduler.load_state_dict(facts["scheduler"])
    engine.global_steps, engine.skipped_steps = step, facts["skipped_steps"]
    engine.global_samples = step * engine.train_batch_size()
    engine.micro_steps = step * engine.gradient_accumulation_steps()


class StateFiles:
    """Random access to the stretches in the files of all ranks that saved."""

    def __init__(self, folder: Path, pattern: str) -> None:
        self._folder = folder
        self._found: dict[tuple[str, str], list[tuple[int, int, Any, str]]] = {}
        for file in sorted(folder.glob(pattern)):
            handle = safe_open(file, "pt")
            for key in handle.keys():  # noqa: SIM118 - no mapping
                kind, name, start = key.split("/")
                length = handle.get_slice(key).get_shape()[0]
                place = (int(start), int(start) + length, handle, key)
                self._found.setdefault((kind, name), []).append(place)

    def length(self, kind: str, name: str) -> int:
        """Elements that are there; 0 for what was not saved."""
        return sum(last - first for first, last, _, _ in self._found.get((kind, name), []))

    def read(self, kind: str, name: str, start: int, stop: int) -> Tensor:
        """Elements from `start` up to `stop` of a flattened tensor, in however many files they are.

        Raises:
            UserError: they are not all there.
        """
        parts = []
        for first, last, handle, key in sorted(self._found.get((kind, name), []), key=lambda place: place[0]):
            low, high = max(start, first), min(stop, last)
            if low < high:
                parts.append(handle.get_slice(key)[low - first : high - first])
        found = torch.cat(parts) if parts else torch.empty(0)
        if len(found) != stop - start:
            raise UserError(
                f"checkpoint {self._folder} holds {len(found)} of {stop - start} numbers of {kind} {name}: "
                "continue it with the recipe and the version of sctd that wrote it"
            )
        return found


def _refresh(engine: DeepSpeedEngine, files: StateFiles) -> None:
    """Make the parameters that the model computes with from the float32 ones."""
    zero = engine.optimizer
    if any(hasattr(parameter, "ds_id") for parameter in engine.module.parameters()):
        zero.checkpoint_event_prologue()
        for group in range(len(zero.fp16_groups)):
            zero._reassign_or_swap_out_partitioned_parameters(group)
        zero.checkpoint_event_epilogue()
        return
    for name, parameter in engine.module.named_parameters():
        if hasattr(parameter, "_hp_mapping"):
            whole = files.read(PARAMETER, name, 0, parameter.numel())
            parameter.data.copy_(whole.view(parameter.shape))


def _base(engine: DeepSpeedEngine) -> Any:
    """The optimizer that computes: DeepSpeed's wrappers hold it."""
    return getattr(engine.optimizer, "optimizer", engine.optimizer)


def _partitions(zero: Any) -> list[Tensor]:
    """This rank's flat float32 tensors, one for each parameter group."""
    return zero.single_partition_of_fp32_groups if hasattr(zero, "partition_size") else zero.fp32_groups_flat_partition


def _autocast_scaler(engine: DeepSpeedEngine) -> Any:
    return engine.torch_autocast_z0_gradscaler or getattr(engine.optimizer, "torch_autocast_gradscaler", None)


def _group_of(engine: DeepSpeedEngine, optimizer: Any, stretch: Stretch) -> dict[str, Any]:
    """The options of the stretch's parameter group; ZeRO-3 lists no parameters in its groups, which are all alike."""
    groups = optimizer.param_groups
    return next((group for group in groups if any(stretch.flat is other for other in group["params"])), groups[0])


def _is_moment(value: Any, flat: Tensor) -> bool:
    return isinstance(value, Tensor) and value.dim() > 0 and value.shape == flat.shape


def _scalar(value: Any) -> list[Any]:
    """A number, and whether the optimizer keeps it as a tensor, as JSON."""
    return [value.item(), True] if isinstance(value, Tensor) else [value, False]


def _unscalar(saved: list[Any], like: Tensor, group: dict[str, Any]) -> Any:
    value, is_tensor = saved
    if not is_tensor:
        return value
    on_device = group.get("fused") or group.get("capturable")
    return torch.tensor(value, dtype=torch.float32, device=like.device if on_device else "cpu")


def _numbers(thing: Any) -> dict[str, Any] | None:
    return thing and {key: value for key, value in vars(thing).items() if isinstance(value, int | float)}


def _shape(parameter: Tensor) -> torch.Size:
    return getattr(parameter, "ds_shape", parameter.shape)
