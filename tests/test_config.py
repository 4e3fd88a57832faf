"""Configuration: recipes load and merge, and every mistake is one line that names the key and what to do."""

import dataclasses
import math
import typing
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from sctd import config as module
from sctd.cli import main
from sctd.cli.config import explain
from sctd.config import (
    ARMS,
    FAMILIES,
    Config,
    apply_override,
    config_from_dict,
    load_config,
    merge_dicts,
    to_dict,
    to_yaml,
)
from sctd.errors import UserError
from support import ROOT

SHIPPED = sorted(path.stem for path in (Path(module.__file__).parent / "recipes").glob("*.yaml"))
SECTIONS = {f.name: f.default_factory for f in fields(Config) if f.name != "arm"}
KEYS = ["arm"] + [f"{section}.{f.name.rstrip('_')}" for section, cls in SECTIONS.items() for f in fields(cls)]


def refused(*overrides: str, recipe: str = "bert-base-sctd") -> str:
    """The message of the UserError that these overrides raise."""
    with pytest.raises(UserError) as caught:
        load_config(recipe, overrides)
    text = str(caught.value)
    assert text and "\n" not in text, f"not one line: {text!r}"
    return text


def test_round_trip_of_unusual_values() -> None:
    config = load_config(
        "demo",
        [
            "objective.kl_weight=1e-7",
            "model.first_dropped=0",
            "optimizer.betas=[0.1, 0.25]",
            "run.dir='2024: #x'",
            'run.examples=["a: [MASK] #é", "\\"[MASK]\\""]',
            "train.micro_batch_size=3",
            "model.layer_norm_eps=1e-12",
            "data.mask_stages=[[3, 2e-1], [5.0, 0.1]]",
        ],
    )
    assert config.data.mask_stages == ((3, 0.2), (5, 0.1))
    assert config.objective.kl_weight == 1e-7 and config.model.layer_norm_eps == 1e-12
    assert config.run.examples == ("a: [MASK] #é", '"[MASK]"') and config.run.dir == "2024: #x"
    assert config_from_dict(yaml.safe_load(to_yaml(config))) == config


# ---- overrides


def test_overrides_change_one_key_each_and_later_ones_win() -> None:
    config = load_config("bert-base-sctd", ["train.steps=30000", "train.steps=40000", "arm=token_drop", "run.dir=x"])
    assert (config.train.steps, config.arm, config.run.dir) == (40_000, "token_drop", "x")
    expected = dataclasses.replace(
        load_config("bert-base-sctd"),
        arm="token_drop",
        train=dataclasses.replace(load_config("bert-base-sctd").train, steps=40_000),
        run=dataclasses.replace(load_config("bert-base-sctd").run, dir="x"),
    )
    assert config == expected


def test_numbers_as_people_write_them() -> None:
    config = load_config(
        "demo", ["optimizer.lr=1e-4", "objective.kl_weight=1", "train.steps=1.0e+3", "train.stop_at=null"]
    )
    assert config.optimizer.lr == 1e-4 and config.objective.kl_weight == 1.0
    assert config.train.steps == 1000 and isinstance(config.train.steps, int) and config.train.stop_at is None
    assert isinstance(config.objective.kl_weight, float)


def test_names_may_look_like_numbers() -> None:
    assert load_config("demo", ["run.dir=2024", "data.corpus="]).run.dir == "2024"


def test_every_key_can_be_overridden_with_its_own_value() -> None:
    config = load_config("bert-base-sctd")
    tree = to_dict(config)
    for key in KEYS:
        value: Any = tree
        for part in key.split("."):
            value = value[part]
        assert load_config("bert-base-sctd", [f"{key}={yaml.safe_dump(value, default_flow_style=True)}"]) == config, key


# ---- extends


def write(folder: Path, **files: str) -> dict[str, str]:
    for name, text in files.items():
        (folder / f"{name}.yaml").write_text(text)
    return {name: str(folder / f"{name}.yaml") for name in files}


def test_extends_merges_key_by_key(tmp_path: Path) -> None:
    paths = write(tmp_path, mine="extends: bert-base-sctd\ntrain: {steps: 50000}\nrun: {seed: 9}\n")
    config, parent = load_config(paths["mine"]), load_config("bert-base-sctd")
    assert (config.train.steps, config.run.seed, config.run.dir) == (50_000, 9, "runs/mine")
    assert config.train == dataclasses.replace(parent.train, steps=50_000) and config.model == parent.model
    assert config.optimizer == parent.optimizer and config.arm == "sctd"


def test_extends_over_two_steps_and_overrides_last(tmp_path: Path) -> None:
    paths = write(tmp_path, a="extends: demo\ntrain: {steps: 5000, log_every: 7}\n")
    paths |= write(tmp_path, b=f"extends: {paths['a']}\ntrain: {{steps: 6000}}\n")
    config = load_config(paths["b"], ["train.steps=7000"])
    assert (config.train.steps, config.train.log_every) == (7000, 7)
    assert config.train.batch_size == load_config("demo").train.batch_size


def test_a_circle_of_recipes_is_refused(tmp_path: Path) -> None:
    paths = write(tmp_path, a=f"extends: {tmp_path / 'b.yaml'}\n", b=f"extends: {tmp_path / 'a.yaml'}\n")
    assert "extends itself" in refused(recipe=paths["a"])


def test_merge_leaves_its_arguments_alone() -> None:
    base, top = {"a": {"x": 1, "y": 2}, "b": 3}, {"a": {"y": 4}, "c": {"z": 5}}
    assert merge_dicts(base, top) == {"a": {"x": 1, "y": 4}, "b": 3, "c": {"z": 5}}
    assert base == {"a": {"x": 1, "y": 2}, "b": 3} and top == {"a": {"y": 4}, "c": {"z": 5}}
    assert merge_dicts({"a": 1}, {"a": {"x": 2}}) == {"a": {"x": 2}} and merge_dicts({"a": {"x": 2}}, {"a": 1}) == {
        "a": 1
    }


# ---- mistakes


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("train.stpes=3", ("train.stpes", "did you mean 'steps'")),
        ("objective.lambda=3", ("objective.lambda", "known:")),
        ("modle.layers=4", ("modle", "did you mean 'model'")),
        ("arms=sctd", ("arms", "did you mean 'arm'")),
        ("arm=token-drop", ("arm", "did you mean 'token_drop'")),
        ("arm=xyz", ("arm", "known:", *ARMS)),
        ("train.precision=bf61", ("train.precision", "did you mean 'bf16'")),
        ("train.precision=aut", ("train.precision", "did you mean 'auto'")),
        ("model.family=modernbrt", ("model.family", "'modernbrt'", "did you mean 'modernbert'")),
        ("model.family=gpt", ("model.family", "'gpt'", "known: bert, modernbert")),
        ("model.positions=sinusoid", ("model.positions", "'sinusoid'", "did you mean 'sinusoidal'")),
        ("optimizer.name=adamW", ("optimizer.name", "did you mean 'adamw'")),
        ("schedule.name=polynomal", ("schedule.name", "did you mean 'polynomial'")),
        ("objective.semantic_positions=mean", ("objective.semantic_positions", "cls", "all")),
        ("model.layers.x=3", ("model.layers.x",)),
        ("extends=demo", ("extends",)),
        ("train", ("train", "section.key=value")),
        ("=3", ("=3", "section.key=value")),
        ("train.steps=[", ("train.steps", "YAML")),
        ("train=5", ("train", "mapping")),
        ("train=", ("train", "mapping")),
    ],
)
def test_names_are_checked(override: str, said: tuple[str, ...]) -> None:
    text = refused(override)
    assert all(part in text for part in said), text


@pytest.mark.parametrize(
    ("override", "wanted"),
    [
        ("train.steps=many", "a whole number"),
        ("train.steps=1.5", "a whole number"),
        ("train.steps=true", "a whole number"),
        ("train.steps=null", "a whole number"),
        ("train.steps=[1]", "a whole number"),
        ("optimizer.lr=fast", "a number"),
        ("optimizer.lr=true", "a number"),
        ("optimizer.lr=null", "a number"),
        ("optimizer.betas=0.9", "a list"),
        ("optimizer.betas=[0.9]", "a list of 2"),
        ("optimizer.betas=[0.9, 0.9, 0.9]", "a list of 2"),
        ("optimizer.betas=[0.9, x]", "a number"),
        ("data.mask_stages=0.3", "a list"),
        ("data.mask_stages=[3, 0.3]", "a list"),
        ("data.mask_stages=[[3]]", "a list of 2"),
        ("data.mask_stages=[[3, 0.3, 0.1]]", "a list of 2"),
        ("data.mask_stages=[[0.3, 3]]", "a whole number"),
        ("data.mask_stages=[[3, x]]", "a number"),
        ("schedule.full_start=0.3", "a whole number"),
        ("model.family=[bert]", "text"),
        ("objective.kl_global=1", "true or false"),
        ("objective.kl_global='yes'", "true or false"),
        ("run.dir=true", "text"),
        ("run.dir=1.5", "text"),
        ("run.dir=[a]", "text"),
        ("run.examples=text [MASK]", "a list"),
        ("run.examples=[[a]]", "text"),
        ("model.first_dropped=x", "a whole number"),
        ("arm=[sctd]", "text"),
    ],
)
def test_types_are_checked(override: str, wanted: str) -> None:
    text = refused(override)
    assert override.split("=")[0] in text and wanted in text, text


@pytest.mark.parametrize(
    "override",
    [
        "model.keep_ratio=0",
        "model.keep_ratio=1.5",
        "model.keep_ratio=-0.5",
        "model.keep_ratio=.nan",
        "model.layers=5",
        "model.layers=0",
        "model.layers=-2",
        "model.hidden_size=0",
        "model.heads=0",
        "model.heads=7",
        "model.intermediate_size=0",
        "model.max_positions=0",
        "model.vocab_size=-1",
        "model.dropout=1",
        "model.dropout=-0.1",
        "model.attention_dropout=1.0",
        "model.layer_norm_eps=-1e-12",
        "model.layer_norm_eps=.nan",
        "model.initializer_range=-0.02",
        "model.initializer_range=.nan",
        "model.full_tail=0",
        "model.full_tail=12",
        "model.first_dropped=-1",
        "model.first_dropped=11",
        "data.mask_probability=0",
        "data.mask_probability=0.6",
        "data.mask_probability=.nan",
        "data.mask_stages=[[3, 0]]",
        "data.mask_stages=[[3, -0.1]]",
        "data.mask_stages=[[3, 0.51]]",
        "data.mask_stages=[[3, .nan]]",
        "data.mask_stages=[[3, 0.3], [5, 0.7]]",
        "data.mask_stages=[[0, 0.3]]",
        "data.mask_stages=[[1, 0.3]]",
        "data.mask_stages=[[-3, 0.3]]",
        "data.mask_stages=[[5, 0.3], [3, 0.2]]",
        "data.mask_stages=[[3, 0.3], [3, 0.2]]",
        "data.mask_stages=[[250001, 0.3]]",
        "data.span_length=-1",
        "data.span_length=0.5",
        "data.span_length=6",
        "data.replace=[0.8, 0.1, 0.2]",
        "data.replace=[1.1, -0.1, 0]",
        "objective.interval=0",
        "objective.interval=-10",
        "objective.kl_weight=-0.1",
        "objective.kl_weight=.nan",
        "objective.kl_weight=.inf",
        "objective.importance_beta=1",
        "objective.importance_beta=-0.1",
        "optimizer.lr=0",
        "optimizer.lr=-1",
        "optimizer.lr=.nan",
        "optimizer.lr=.inf",
        "optimizer.betas=[0.9, 1.0]",
        "optimizer.betas=[-0.1, 0.9]",
        "optimizer.eps=-1e-6",
        "optimizer.eps=.nan",
        "optimizer.weight_decay=-0.01",
        "optimizer.weight_decay=.nan",
        "optimizer.clip=-1",
        "optimizer.muon_lr=0",
        "optimizer.muon_lr=-0.02",
        "optimizer.muon_lr=.nan",
        "optimizer.muon_lr=.inf",
        "schedule.full_start=-1",
        "schedule.full_start=250001",
        "schedule.full_finish=-1",
        "schedule.full_finish=250001",
        "schedule.warmup_steps=-1",
        "schedule.warmup_steps=250001",
        "schedule.decay_steps=-1",
        "schedule.decay_steps=225001",
        "schedule.power=-1",
        "schedule.power=.nan",
        "schedule.final_lr=-1",
        "schedule.final_lr=.nan",
        "train.steps=0",
        "train.stop_at=0",
        "train.stop_at=250001",
        "train.batch_size=0",
        "train.micro_batch_size=0",
        "train.log_every=0",
        "train.valid_every=-1",
        "train.valid_rows=0",
        "train.save_every=-1",
        "train.keep_checkpoints=0",
        "train.zero_stage=4",
        "train.zero_stage=-1",
        "run.seed=-1",
        "run.examples=[no mask]",
    ],
)
def test_ranges_are_checked(override: str) -> None:
    text = refused(override)
    assert f"'{override.split('=')[0]}'" in text, text


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["schedule.full_start=150000", "schedule.full_finish=100001"], ("schedule.full_finish", "100001", "100000")),
        (["train.steps=30000", "schedule.full_start=30001"], ("schedule.full_start", "30001", "train.steps=30000")),
        (["train.steps=30000", "data.mask_stages=[[30001, 0.2]]"], ("data.mask_stages", "[[30001, 0.2]]", "30000")),
        (["data.mask_stages=[[3, 0.3], [5, 0.7]]"], ("data.mask_stages", "0.7", "at most 0.5")),
        (["model.family=modernbert", "model.heads=256"], ("model.heads", "256", "it has 3")),
        (["model.family=modernbert", "model.hidden_size=45", "model.heads=1"], ("model.heads", "it has 45")),
        (["model.family=modernbert", "model.heads=7"], ("model.heads", "7", "model.hidden_size=768")),
        (["model.family=modernbert", "model.positions=sinusoidal"], ("model.positions", "'sinusoidal'", "modernbert")),
        (["model.family=modernbert", "model.layer_norm=apex"], ("model.layer_norm", "'apex'", "modernbert")),
    ],
)
def test_combinations_are_checked(overrides: list[str], said: tuple[str, ...]) -> None:
    text = refused(*overrides)
    assert all(part in text for part in said), text


@pytest.mark.parametrize(
    "overrides",
    [
        ["model.heads=256"],  # 3 columns a head: nothing turns in a bert
        ["model.layer_norm=apex", "model.positions=sinusoidal"],
        ["model.family=modernbert", "model.heads=384"],
        ["schedule.full_start=150000", "schedule.full_finish=99999"],
        ["schedule.full_start=249999"],
        ["schedule.full_finish=249999"],
        ["data.mask_stages=[[2, 0.5], [3, 0.001], [250000, 0.2]]"],
        ["arm=baseline", "schedule.full_start=10"],
        ["train.precision=auto"],
    ],
)
def test_combinations_that_go_together(overrides: list[str]) -> None:
    load_config("bert-base-sctd", overrides)


@pytest.mark.parametrize(
    "override",
    [
        "model.keep_ratio=1",
        "model.keep_ratio=0.01",
        "model.layers=2",
        "model.first_dropped=0",
        "model.first_dropped=10",
        "model.full_tail=11",
        "model.dropout=0",
        "objective.interval=1",
        "objective.kl_weight=0",
        "objective.importance_beta=0",
        "optimizer.clip=0",
        "optimizer.weight_decay=0",
        "schedule.warmup_steps=0",
        "schedule.warmup_steps=250000",
        "train.stop_at=250000",
        "train.zero_stage=0",
        "train.valid_every=0",
        "data.mask_probability=0.5",
        "run.seed=0",
    ],
)
def test_limits_are_allowed(override: str) -> None:
    load_config("bert-base-sctd", [override])


@pytest.mark.parametrize(
    "override",
    [
        "run.dir=2024-13-45",
        "train.steps=0b_",
        "train.steps=!!int x",
        "run.dir=!!timestamp x",
        "optimizer.lr=!!float y",
        "optimizer.lr=" + "1" * 400,
        "train.steps=" + "1" * 5000,
        "train.steps=" + "[" * 2000,
        'arm="a\\nb"',
        "ar\nm=sctd",
        "arm\n",
    ],
    ids=lambda text: text[:24],
)
def test_values_that_yaml_itself_stumbles_over(override: str) -> None:
    refused(override)


@pytest.mark.parametrize("known", [("demoo", "demo"), ("bert-base-scdt", "bert-base-sctd"), ("zzz", "known:")])
def test_unknown_recipes(known: tuple[str, str]) -> None:
    text = refused(recipe=known[0])
    assert known[0] in text and known[1] in text


@pytest.mark.parametrize(
    "text",
    [
        b"a: [",
        b"- a\n- b\n",
        b"just text",
        b"\xff\xfe\x00",
        b"train: 2024-99-99\n",
        b"a: \t\x01",
        b"train: {steps: 0b_}",
    ],
)
def test_files_that_are_no_recipes(tmp_path: Path, text: bytes) -> None:
    (tmp_path / "mine.yaml").write_bytes(text)
    assert "mine.yaml" in refused(recipe=str(tmp_path / "mine.yaml"))


def test_a_missing_file_and_a_folder(tmp_path: Path) -> None:
    (tmp_path / "folder.yaml").mkdir()
    for name in ("none.yaml", "folder.yaml"):
        assert name in refused(recipe=str(tmp_path / name))


@pytest.mark.parametrize("stored", [None, [], {"arm": "none"}, {"train": {"steps": 0}}, {"x": 1}, {1: 2}])
def test_stored_configurations_are_checked_too(stored: Any) -> None:
    with pytest.raises(UserError):
        config_from_dict(stored)


# ---- fuzz

VALUES = st.one_of(
    st.integers(-3, 300_000),
    st.floats(-2, 2),
    st.sampled_from(
        ["nan", ".nan", ".inf", "-.inf", "1e400", "1" * 400, "1" * 5000, "0b_", "0x", "1:99", "2024-13-45"]
    ),
    st.sampled_from(["null", "~", "true", "off", "{}", "[]", "[[[", "{a: 1}", "[1, 2]", "[0.1, 0.2]", "!!int x", "*a"]),
    st.sampled_from(["!!timestamp x", "!!float y", "&a [*a]", "{[1]: 2}", "=", "<<", "? a", '"a\\nb"', "'", "@x", "%"]),
    st.sampled_from([*ARMS, "cls", "all", "bf16", "fp32", "adamw", "wsd", "linear", "['[MASK]']"]),
    st.sampled_from([*FAMILIES, "auto", "muon", "sinusoidal", "apex", "[[3, 0.2], [9, 0.1]]", "[[2, 0.9]]", "[[1]]"]),
    st.text(max_size=12),
)
NAMES = st.one_of(
    st.sampled_from(KEYS),
    st.sampled_from([*SECTIONS, "extends", "run.", ".run", "a.b.c.d", "train..steps", "train.steps.x", ""]),
    st.text(max_size=8),
)


@settings(deadline=None, max_examples=400)
@given(
    recipe=st.sampled_from(["demo", "demo-bert", "bert-base-sctd", "bert-mini-baseline", "modernbert-mini-sctd"]),
    pairs=st.lists(st.tuples(NAMES, VALUES), min_size=1, max_size=3),
)
def test_any_override_gives_a_valid_config_or_one_line(recipe: str, pairs: list[tuple[str, Any]]) -> None:
    try:
        config = load_config(recipe, [f"{name}={value}" for name, value in pairs])
    except UserError as error:
        assert len(str(error).splitlines()) == 1, str(error)
        return
    assert config_from_dict(yaml.safe_load(to_yaml(config))) == config
    assert_types(config)
    assert 0 < config.model.keep_ratio <= 1 and config.model.layers % 2 == 0 and config.objective.interval >= 1
    assert config.arm in ARMS and config.train.steps >= 1 and config.optimizer.lr > 0
    assert config.schedule.full_start + config.schedule.full_finish <= config.train.steps
    assert all(0 < share <= 0.5 and start <= config.train.steps for start, share in config.data.mask_stages)
    model = config.model
    assert model.family == "bert" or (model.hidden_size // model.heads % 2 == 0 and model.layer_norm == "native")


def assert_types(config: Any) -> None:
    """Each field has the type that it declares, exactly: no bool for an int, no int for a float, no nan."""
    for name, hint in typing.get_type_hints(type(config)).items():
        value = getattr(config, name)
        if dataclasses.is_dataclass(value):
            assert_types(value)
        elif hint in (int, float, str, bool):
            assert type(value) is hint, (name, value)
            assert hint is not float or not math.isnan(value), name
        elif value is not None:
            assert type(value) in (*typing.get_args(hint), tuple), (name, value)


def test_an_objective_without_a_term_is_refused() -> None:
    terms = [f"objective.{name}=false" for name in ("mlm_drop", "mlm_full", "kl_global", "kl_local")]
    assert "mlm_drop" in refused(*terms)
    for left_on in range(4):
        load_config("bert-base-sctd", terms[:left_on] + terms[left_on + 1 :])


def test_extends_by_path_counts_from_the_recipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "base.yaml").write_text("extends: bert-mini-sctd\ntrain: {steps: 1234}\n")
    (tmp_path / "a" / "mine.yaml").write_text("extends: base.yaml\narm: baseline\n")
    monkeypatch.chdir(tmp_path)
    config = load_config("a/mine.yaml")
    assert config.train.steps == 1234 and config.arm == "baseline" and config.run.dir == "runs/mine"


# ---- sctd config


def test_every_key_is_explained_beside_its_field_and_nowhere_else() -> None:
    """One line for each, and its default is the dataclass's; no document repeats the explanation."""
    found = module.keys()
    assert list(found) == KEYS
    documents = [ROOT / "README.md", *(ROOT / "docs").glob("*.md")]
    prose = " ".join(" ".join(path.read_text(encoding="utf-8") for path in documents).split())
    whole = [line.split() for line in explain().splitlines()]
    for key, field in found.items():
        text = field.metadata["text"]
        assert 10 < len(text) < 90 and "\n" not in text, key
        assert len(text) < 40 or text not in prose, f"{key}: a document repeats its explanation"
        lines = [line.strip() for line in explain(key).splitlines()]
        shown = next(line.removeprefix("default ").strip() for line in lines if line.startswith("default "))
        tree: dict[str, Any] = {}
        apply_override(tree, f"{key}={shown}")
        assert lines[:2] == [key, text] and config_from_dict(tree) == Config(), key
        assert any(words[:2] == [key.rpartition(".")[2], shown.split()[0]] for words in whole), key


def test_config_lists_all_sections_one_section_and_one_key(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["config"]) == 0
    whole = capsys.readouterr().out
    assert max(map(len, whole.splitlines())) <= 100
    assert all(f"\n{section}: " in whole for section in SECTIONS) and whole.startswith("  arm ")
    assert main(["config", "optimizer"]) == 0
    section = capsys.readouterr().out
    assert section.startswith("optimizer: ") and section in whole and "adamw | muon" in section
    assert "steps" not in section
    for name in ("train.precision", "precision"):
        assert main(["config", name]) == 0
        assert "auto | bf16 | fp16 | fp32" in capsys.readouterr().out
    assert "above 0 and at most 1" in explain("model.keep_ratio")
    assert "a whole number or null" in explain("train.stop_at")
    assert "train.steps\n" in explain("steps") and "evaluation.steps\n" in explain("steps")
    assert "random_ltd" in explain("arm")


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("optimzer", "did you mean 'optimizer'?"),
        ("train.stpes", "did you mean 'train.steps'?"),
        ("keep_ration", "did you mean 'keep_ratio'?"),
        ("zzz", "`sctd config` lists them"),
    ],
)
def test_config_names_the_nearest_key(name: str, words: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["config", name]) == 2
    said = capsys.readouterr().err
    assert said.startswith("sctd: error: ") and said.count("\n") == 1 and repr(name) in said and words in said
