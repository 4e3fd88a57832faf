"""Muon through the engine: against plain torch, under every stage, precision and number of ranks, and through saves.

Run as a script, this file is one rank of a job that trains every variant.
"""

import json
import math
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import pytest
import torch
import torch.distributed as dist
from deepspeed.accelerator import get_accelerator
from safetensors.torch import save_file
from torch import Tensor, nn

from sctd.config import Config, load_config
from sctd.errors import UserError
from sctd.model.bert import Bert, BertShape
from sctd.train.engine import muon, state
from sctd.train.engine.distributed import World, init_world
from sctd.train.engine.engine import StepWatch, _parameter_groups, build_engine
from sctd.train.engine.launch import discover
from sctd.train.engine.resolve import resolve
from sctd.train.engine.state import StateFiles, Stretch
from support import ROOT, assert_same_run, environment, free_port, records, train

# A border between two ranks falls into the second layer's attention.out.
SHAPE = BertShape(
    vocab_size=64, layers=3, hidden_size=32, heads=2, intermediate_size=48, max_positions=16, dropout=0.0,
    attention_dropout=0.0,
)  # fmt: skip
MATRICES, MATRICES_FUSED = 3 * 6, 3 * 5  # key and value lie in one parameter
LR, MUON_LR, DECAY = 1e-3, 0.02, 0.1
ROWS = 8  # of a step
BAD = -1  # a row whose gradients are not finite
STEPS = [list(range(0, 8)), list(range(8, 16)), [*range(16, 23), BAD], list(range(24, 32))]
FACTORS = (1.0, 0.75, 0.5, 0.25)  # of the peak rates


class Variant(NamedTuple):
    precision: str
    stage: int
    accumulation: int = 1

    @property
    def name(self) -> str:
        return f"{self.precision}-zero{self.stage}-x{self.accumulation}"


VARIANTS = [
    *(Variant("fp32", stage, accumulation) for stage in (0, 1, 2) for accumulation in (1, 4)),
    *(Variant(precision, stage) for precision in ("bf16", "fp16") for stage in (1, 2)),
    Variant("bf16", 1, 4),
    *(Variant(precision, 0) for precision in ("bf16", "fp16")),  # last: an engine under autocast affects later ones
]
SAVED = Variant("fp32", 1)  # by two ranks, in the middle
RESUMED = [Variant("fp32", 0), Variant("fp32", 2), Variant("bf16", 1)]  # by one
ADAMW: list[tuple[int, dict[str, Any]]] = [
    (0, {}),
    (1, {"optimizer": {"type": "AdamW", "params": {"torch_adam": True}}}),  # which DeepSpeed builds
    (3, {}),
]


class Sloped(nn.Module):
    """A BERT under a loss that is linear in its parameters: the gradients are small whole numbers, which are exact in
    every precision and in every order of adding them up."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.bert = Bert(SHAPE)
        for parameter in self.parameters():
            parameter.data = (parameter.data * 1024).round() / 1024  # exact in bfloat16 and float16

    def forward(self, rows: list[int]) -> Tensor:
        terms = [
            (parameter.flatten() * slope(number, rows, parameter.numel()).to(parameter.dtype)).sum().float()
            for number, parameter in enumerate(self.parameters())
        ]
        return torch.stack(terms).sum()


def slope(number: int, rows: list[int], size: int) -> Tensor:
    """The gradient of a parameter: the mean over rows."""
    if BAD in rows:
        return torch.full((size,), math.inf)
    draws = [torch.Generator().manual_seed(1000 * number + row) for row in rows]
    return torch.stack([torch.randint(-8, 9, (size,), generator=draw) for draw in draws]).float().mean(0)


def config_of(variant: Variant, world: int, *overrides: str) -> Config:
    micro = ROWS // world // variant.accumulation
    words = (
        "optimizer.name=muon", f"optimizer.lr={LR}", f"optimizer.muon_lr={MUON_LR}", f"optimizer.weight_decay={DECAY}",
        "optimizer.clip=0", f"train.batch_size={ROWS}", f"train.micro_batch_size={micro}",
        f"train.precision={variant.precision}", f"train.zero_stage={variant.stage}",
    )  # fmt: skip
    return load_config("demo", [*words, *overrides])


# ---- one rank


def main(folder: Path) -> None:
    world = init_world(discover(os.environ), 60.0)
    get_accelerator().is_fp16_supported = lambda: True  # there are no products in this model
    if world.size == 1:
        (folder / "peaks.json").write_text(json.dumps([peaks(stage, user, world) for stage, user in ADAMW]))
    for variant in RESUMED if world.size == 1 else []:
        run = Trained(variant, world)
        run.restore(folder / "saved", step=2)
        run.save(folder / f"restored-{variant.name}")
        run.train(2, 4)
        run.save(folder / f"resumed-{variant.name}")
    for variant in VARIANTS:
        run = Trained(variant, world)
        run.train(0, 2)
        if (variant, world.size) == (SAVED, 2):
            run.save(folder / "saved")
        run.train(2, 4)
        run.save(folder / f"{variant.name}-{world.size}")


def peaks(stage: int, user: dict[str, Any], world: World) -> list[float]:
    """Of the groups of an engine that trains with AdamW."""
    config, merged = resolve(config_of(Variant("fp32", stage), 1, "optimizer.name=adamw"), user, 1)
    engine = build_engine(Sloped(), config, merged, lambda *_: None, world)  # type: ignore[arg-type]
    return [group["peak_lr"] for group in engine.optimizer.param_groups]


class Trained:
    """The model on an engine of its own, stepped as the loop does it."""

    def __init__(self, variant: Variant, world: World) -> None:
        config, merged = resolve(config_of(variant, world.size), {}, world.size)
        if variant.precision == "fp16" and variant.stage:
            merged["fp16"]["initial_scale_power"] = 4  # where the slopes times the scale are finite, and exact
        self.world, self.accumulation = world, variant.accumulation
        self.engine = build_engine(Sloped(), config, merged, lambda *_: None, world)  # type: ignore[arg-type]
        self.watch = StepWatch(self.engine)
        self.applied: list[bool] = []
        self.counts: list[int] = []  # matrices orthogonalised, by step

    def train(self, first: int, stop: int) -> None:
        product = muon.newton_schulz

        def counted(stack: Tensor) -> Tensor:
            self.counts[-1] += len(stack)
            return product(stack)

        muon.newton_schulz = counted
        for step in range(first, stop):
            self.counts.append(0)
            for group in self.engine.optimizer.param_groups:
                group["lr"] = FACTORS[step] * group["peak_lr"]
            pieces = torch.tensor(STEPS[step]).view(self.accumulation, self.world.size, -1)
            for rows in pieces[:, self.world.rank].tolist():
                self.engine.backward(self.engine(rows))
                self.engine.step()
            self.applied.append(self.watch.applied())
        muon.newton_schulz = product

    def save(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        tensors, facts = state.snapshot(self.engine, self.world)
        facts["test"] = {
            "applied": self.applied,
            "counts": self.counts,
            "peaks": [group["peak_lr"] for group in self.engine.optimizer.param_groups],
            "optimizer": type(self.engine.optimizer).__name__,
        }
        save_file(tensors, folder / f"rank-{self.world.rank}.safetensors")
        (folder / f"facts-{self.world.rank}.json").write_text(json.dumps(facts))

    def restore(self, folder: Path, step: int) -> None:
        facts = json.loads((folder / "facts-0.json").read_text())
        state.restore(self.engine, StateFiles(folder, "rank-*"), facts, step)


# ---- what they left


@pytest.fixture(scope="module")
def left(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder that jobs of two ranks and of one have written."""
    folder = tmp_path_factory.mktemp("muon")
    for world in (2, 1):
        common = environment() | {
            "WORLD_SIZE": str(world), "LOCAL_WORLD_SIZE": str(world), "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(free_port()),
        }  # fmt: skip
        common["PYTHONPATH"] += f":{ROOT / 'tests'}"
        command = [sys.executable, __file__, str(folder)]
        ranks = [
            subprocess.Popen(command, env=common | {"RANK": str(rank), "LOCAL_RANK": str(rank)}, cwd=ROOT)
            for rank in range(world)
        ]
        try:
            assert [rank.wait(timeout=240) for rank in ranks] == [0] * world
        finally:
            for rank in ranks:
                rank.kill()
    return folder


class Found(NamedTuple):
    """Parameters and moments by name, whole; what each rank said of its run."""

    parameters: dict[str, Tensor]
    moments: dict[str, Tensor]
    said: list[dict[str, Any]]


def read(folder: Path) -> Found:
    facts = [json.loads(path.read_text()) for path in sorted(folder.glob("facts-*.json"))]
    files = StateFiles(folder, "rank-*")
    shapes = {name: torch.Size(shape) for name, shape in facts[0]["shapes"].items()}
    moments = {
        f"{kind} {name}": files.read(kind, name, 0, shape.numel()).view(shape)
        for name, shape in shapes.items()
        for kind in ("momentum", "exp_avg", "exp_avg_sq")
        if files.length(kind, name)
    }
    parameters = {name: files.read("parameter", name, 0, shape.numel()).view(shape) for name, shape in shapes.items()}
    return Found(parameters, moments, [each["test"] for each in facts])


def runs(left: Path) -> Iterator[tuple[Variant, int, Found]]:
    for variant in VARIANTS:
        for world in (1, 2):
            yield variant, world, read(left / f"{variant.name}-{world}")


def is_moved(name: str) -> bool:
    return ".layers." in name and name.endswith("weight") and "norm" not in name


def parts_of(name: str) -> int:
    return 2 if "key_value" in name else 1


def reference() -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Parameters and Muon's momenta, by plain torch on whole matrices."""
    model = Sloped()
    named = dict(model.named_parameters())
    momenta = {name: torch.zeros_like(parameter) for name, parameter in named.items() if is_moved(name)}
    groups = [
        {"params": [p for n, p in named.items() if n not in momenta and p.dim() > 1], "weight_decay": DECAY},
        {"params": [p for p in named.values() if p.dim() == 1], "weight_decay": 0.0},
    ]
    betas = load_config("demo", []).optimizer.betas
    adamw = torch.optim.AdamW(groups, betas=betas, eps=load_config("demo", []).optimizer.eps)
    for rows, factor in zip(STEPS, FACTORS, strict=True):
        if BAD in rows:
            continue
        model.zero_grad()
        model(rows).backward()
        for group in adamw.param_groups:
            group["lr"] = LR * factor
        adamw.step()
        for name, momentum in momenta.items():
            gradient, weight, rate = named[name].grad, named[name].data, MUON_LR * factor
            momentum.mul_(0.95).add_(gradient, alpha=0.05)
            update = gradient * 0.05 + momentum * 0.95
            weight.mul_(1 - rate * DECAY)
            for matrix, part in zip(weight.chunk(parts_of(name)), update.chunk(parts_of(name)), strict=True):
                x = part / part.norm()
                for _ in range(5):
                    a = x @ x.T
                    x = 3.4445 * x + (-4.7750 * a + 2.0315 * a @ a) @ x
                matrix.sub_(x * rate * max(1, x.shape[0] / x.shape[1]) ** 0.5)
    return {name: parameter.detach() for name, parameter in named.items()}, momenta


def test_it_is_plain_muon_in_every_variant(left: Path) -> None:
    parameters, momenta = reference()
    start = dict(Sloped().named_parameters())
    assert all((parameters[name] - start[name]).abs().max() > MUON_LR / 10 for name in momenta)
    for variant, world, found in runs(left):
        for name, expected in parameters.items():
            off = (found.parameters[name] - expected).abs().max()
            assert off < 1e-6, (variant, world, name)
        for name, expected in momenta.items():
            assert (found.moments[f"momentum {name}"] - expected).abs().max() < 1e-6, (variant, world, name)


def test_variants_agree_bit_for_bit(left: Path) -> None:
    """Whatever the stage, the precision that the model computes in, the ranks and the micro-batches are."""
    (*_, first), *others = runs(left)
    assert len(first.moments) == MATRICES_FUSED + 2 * (len(first.parameters) - MATRICES_FUSED)
    for variant, world, found in others:
        assert_same(found, first, f"{variant}, {world} ranks")


def assert_same(a: Found, b: Found, said: str) -> None:
    for ours, theirs in ((a.parameters, b.parameters), (a.moments, b.moments)):
        assert ours.keys() == theirs.keys(), said
        assert [name for name in ours if not torch.equal(ours[name], theirs[name])] == [], said


def test_each_matrix_is_orthogonalised_once_a_step(left: Path) -> None:
    """Not once a micro-batch, and not at a step that is skipped; one that a border cuts, by both ranks."""
    for variant, world, found in runs(left):
        counts = [said["counts"] for said in found.said]
        once = [[MATRICES]] if world == 1 else [[MATRICES]] * 2 if variant.stage == 0 else [[10], [9]]
        assert [set(each) - {0} for each in counts] == [set(each) for each in once], (variant, world)
        assert all(each[2] == 0 and each.count(0) == 1 for each in counts)
        assert all(said["applied"] == [True, True, False, True] for said in found.said), (variant, world)


def test_groups_know_their_peak_rates_behind_every_wrapper(left: Path) -> None:
    found = list(runs(left))
    assert all(said["peaks"] == [LR, LR, MUON_LR] for _, _, run in found for said in run.said)
    wrappers = {said["optimizer"] for _, _, run in found for said in run.said}
    assert wrappers == {"Muon", "DeepSpeedZeroOptimizer", "BF16_Optimizer"}
    assert json.loads((left / "peaks.json").read_text()) == [[LR, LR]] * len(ADAMW)


@pytest.mark.parametrize("variant", RESUMED, ids=lambda variant: variant.name)
def test_one_rank_goes_on_from_what_two_have_saved(left: Path, variant: Variant) -> None:
    assert_same(read(left / f"restored-{variant.name}"), read(left / "saved"), "parameters and moments as they were")
    assert_same(read(left / f"resumed-{variant.name}"), read(left / f"{SAVED.name}-2"), "and after two more steps")


# ---- on one process, without DeepSpeed


@pytest.fixture
def alone() -> Iterator[None]:
    """A process group of one."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def plain(model: nn.Module) -> tuple[muon.Muon, Any]:
    """An optimizer that is not bound yet, and what stands for the engine that it is to be bound to."""
    groups = list(_parameter_groups(model, config_of(SAVED, 1).optimizer))
    optimizer = muon.Muon(groups, lr=LR, betas=(0.9, 0.98), eps=1e-6)
    return optimizer, SimpleNamespace(module=model, optimizer=optimizer, seq_data_parallel_group=None)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(5, 24, 40), (5, 40, 24), (5, 32, 32)])
def test_singular_values_come_near_one(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    sizes = torch.tensor([1e-6, 1e-3, 1, 1e3, 1e6]).view(-1, 1, 1)
    stack = (torch.randn(shape, generator=torch.Generator().manual_seed(1)) * sizes).to(dtype)
    made = muon.newton_schulz(stack)
    values = torch.linalg.svdvals(made.float())
    assert values[:, :20].min() > 0.6 and values.max() < 1.25
    for one, many in zip(stack, made, strict=True):
        assert torch.equal(muon.newton_schulz(one[None])[0], many)
    assert muon.newton_schulz(torch.zeros(1, 3, 4)).eq(0).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])  # of CPUs, and of GPUs
def test_fused_matrices_are_orthogonalised_apart(
    alone: None, monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype
) -> None:
    """However different their gradients are, key and value move alike; and in batches of any size."""
    monkeypatch.setattr(muon, "_product_dtype", lambda device: dtype)
    ends = []
    for at_once in (1, 1 << 25):
        monkeypatch.setattr(muon, "_AT_ONCE", at_once)
        model = Sloped()
        optimizer, engine = plain(model)
        optimizer.bind(engine)
        weight = model.bert.layers[1].attention.key_value.weight
        start = weight.detach().clone()
        model(STEPS[0]).backward()
        weight.grad[:32] *= 1000
        optimizer.step()
        ends.append(weight.detach())
    for part in ((start * (1 - MUON_LR * DECAY) - ends[0]) / MUON_LR).chunk(2):
        values = torch.linalg.svdvals(part)
        assert values[:24].min() > 0.6 and values.max() < 1.25
    assert torch.equal(*ends)


def test_before_it_is_bound_it_moves_nothing(alone: None) -> None:
    """DeepSpeed's wrappers may step with gradients of 0, to see the state allocated."""
    model = Sloped()
    optimizer, engine = plain(model)
    start = [parameter.detach().clone() for parameter in model.parameters()]
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    assert all(map(torch.equal, start, model.parameters())) and not optimizer.state
    parameter.grad[0] = 1
    with pytest.raises(RuntimeError, match="bind"):
        optimizer.step()


def test_pieces_of_a_cut_parameter_make_the_whole(alone: None) -> None:
    """Two stretches of a fused parameter, for any place of the border."""
    matrices = muon.Matrices(parts=2, rows=3, columns=2)
    for border in range(1, 12):
        flats = torch.arange(border), torch.arange(border, 12)
        stretches = Stretch("w", 0, border, flats[0], 0), Stretch("w", border, 12 - border, flats[1], 0)
        found: dict[tuple[str, int], list[int]] = {}
        for stretch in stretches:
            for piece in muon._pieces(stretch, matrices):
                elements = piece.held.of(piece.held.flat)
                assert elements.tolist()[0] == piece.key[1] * 6 + piece.held.start
                found.setdefault(piece.key, []).extend(elements.tolist())
        assert found == {("w", 0): list(range(6)), ("w", 1): list(range(6, 12))}


def test_what_each_half_holds() -> None:
    demo = BertShape(vocab_size=4096, layers=4, hidden_size=128, heads=2, intermediate_size=512, max_positions=128)
    model = Bert(demo)
    assert muon.describe(model) == "muon 24 matrices, 0.8M parameters; adamw 0.6M"
    found = muon.layer_matrices(nn.ModuleDict({"bert": model}))
    assert found.keys() == {name for name, _ in nn.ModuleDict({"bert": model}).named_parameters() if is_moved(name)}
    assert found["bert.layers.0.attention.key_value.weight"] == muon.Matrices(2, 128, 128)
    assert found["bert.layers.3.expand.weight"] == muon.Matrices(1, 512, 128)


def test_models_that_are_refused() -> None:
    with pytest.raises(UserError, match="no matrix inside a layer: use optimizer.name=adamw"):
        muon.layer_matrices(nn.ModuleDict({"embeddings": nn.Embedding(4, 4), "head": nn.Linear(4, 4)}))
    words = nn.Embedding(8, 4)
    tied = nn.Linear(4, 8)
    tied.weight = words.weight
    for inner, wrong in (
        ({"0": words}, "layers.0.weight"),
        ({"0": tied}, "layers.0.weight"),
        ({"head": nn.Linear(4, 8)}, "layers.head.weight"),
    ):
        model = nn.ModuleDict({"layers": nn.ModuleDict(inner), "words": words})
        with pytest.raises(UserError, match=f"{wrong} is no linear map of a layer: use optimizer.name=adamw"):
            muon.layer_matrices(model)


@pytest.mark.parametrize(
    ("user", "overrides", "words"),
    [
        ({}, ["train.zero_stage=3"], "stage 3 does not go with optimizer.name=muon.*use train.zero_stage=0, 1 or 2"),
        ({"zero_optimization": {"stage": 3}}, [], "stage 3 does not go with"),
        ({"zero_optimization": {"stage": 2, "offload_optimizer": {"device": "cpu"}}}, [], "offload_optimizer does not"),
        ({"zero_optimization": {"stage": 3, "offload_param": {"device": "cpu"}}}, [], "offload_param does not"),
        ({"optimizer": {"type": "AdamW"}}, [], "section 'optimizer' does not.*set optimizer.* in the recipe, or use"),
        ({"scheduler": {"type": "WarmupLR"}}, [], "section 'scheduler' does not.*set schedule.* in the recipe"),
        ({"optimizer": {"type": "Muon"}}, [], "type is 'Muon'.*use optimizer.name=muon"),
        ({"optimizer": {"type": "muon"}}, ["optimizer.name=adamw"], "type is 'muon'.*use optimizer.name=muon"),
        ({"bf16": {"enabled": True}, "zero_optimization": {"stage": 0}}, [], "use stage 1 or torch_autocast"),
    ],
)
def test_configurations_that_are_refused(user: dict[str, Any], overrides: list[str], words: str) -> None:
    with pytest.raises(UserError, match=words) as refused:
        resolve(load_config("demo", ["optimizer.name=muon", *overrides]), user, 1)
    assert "\n" not in str(refused.value)


def test_a_state_goes_into_a_fresh_optimizer_and_its_models_tables(tmp_path: Path) -> None:
    model: Any = nn.Linear(3, 2)
    model.tables = {"scores": torch.arange(4.0)}
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    engine: Any = SimpleNamespace(
        module=model, optimizer=optimizer, lr_scheduler=None, torch_autocast_z0_gradscaler=None, skipped_steps=0,
        train_batch_size=lambda: 1, gradient_accumulation_steps=lambda: 1,
    )  # fmt: skip
    model(torch.ones(3)).sum().backward()
    optimizer.step()
    tensors, facts = state.snapshot(engine, World(0, 1, torch.device("cpu")))
    (kind,) = facts["states"]
    assert kind == {"moments": ["exp_avg", "exp_avg_sq"], "scalars": {"step": [1.0, True]}}
    save_file(tensors, tmp_path / "rank-0.safetensors")
    engine.module = nn.Linear(3, 2)
    engine.module.tables = {"scores": torch.zeros(4)}
    engine.optimizer = torch.optim.AdamW(engine.module.parameters(), fused=True)
    state.restore(engine, StateFiles(tmp_path, "rank-*"), facts, 1)
    assert torch.equal(engine.module.weight, model.weight)
    assert torch.equal(engine.module.tables["scores"], torch.arange(4.0))
    assert engine.optimizer.state_dict()["state"].keys() == {0, 1}
    for old, new in zip(optimizer.state.values(), engine.optimizer.state.values(), strict=True):
        assert old.keys() == new.keys() and all(torch.equal(old[key], new[key]) for key in old)


# ---- whole runs


def test_a_run_resumes_bit_for_bit(recipe: Path, tmp_path: Path) -> None:
    """Two ranks under ZeRO-1 in bfloat16; then one rank without ZeRO continues the same checkpoint."""
    words = ("optimizer.name=muon", "train.steps=6", "train.valid_rows=2", "train.precision=bf16")
    whole, parts, single = (tmp_path / name for name in ("whole", "parts", "single"))
    train(recipe, whole, *words, "train.save_every=3", ranks=2)
    for run in (parts, single):
        shutil.copytree(whole, run)
        shutil.rmtree(run / "checkpoints" / "step-00000006")
    train(recipe, parts, *words, "--resume", ranks=2)
    assert_same_run(whole, parts)
    done = train(recipe, single, *words, "train.zero_stage=0", "--resume")
    assert "resuming" in done.stdout and "at step 3" in done.stdout
    found, expected = ([record["loss"] for record in records(run)] for run in (single, whole))
    assert found == pytest.approx(expected, abs=0.05)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
