"""`sctd report` on real runs: what is on the page and in the tables, what it refuses, what it leaves out."""

import csv
import itertools
import json
import re
import shutil
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from matplotlib.figure import Figure
from scipy import stats

from evaluations import COLA, MRPC, RTE, at_step, write_cells, write_json, write_mark, write_probe
from pages import Reader, assert_stands_for_itself
from sctd.cli import main
from sctd.corpus.manifest import read_manifest
from sctd.evaluate.ablate.ablations import ABLATIONS, describe
from sctd.present.pictures import Picture
from sctd.report.gather import gather
from sctd.report.groups import group, partners
from sctd.report.report import sections_of
from sctd.report.summary import tiles
from sctd.report.training import loss_section
from sctd.train.flops import flops_until
from sctd.train.keep.export import read_run, record_at
from support import records

Runs = Callable[..., Path]


def report(out: Path, *folders: Path) -> str:
    """The page."""
    assert main(["report", *map(str, folders), "--out", str(out)]) == 0
    return out.read_text(encoding="utf-8")


def undrawn(out: Path, *folders: Path) -> str:
    """What the page says; the tables' files are written, the pictures are not drawn, which is what takes the time."""
    files = out.with_name(f"{out.stem}-tables")
    shutil.rmtree(files, ignore_errors=True)
    files.mkdir()
    sections = sections_of(gather(folders))
    for section in sections:
        section.write_tables(files)
    return " ".join(re.sub(r"\\(.)", r"\1", section.markdown()) for section in sections)


def refused(capsys: pytest.CaptureFixture[str], *words: Any) -> str:
    """The one line that is said."""
    capsys.readouterr()
    assert main(["report", *map(str, words)]) == 2
    said = capsys.readouterr()
    assert said.err.count("\n") == 1 and not said.out
    return said.err


def table(out: Path, name: str) -> dict[str, dict[str, str]]:
    """A table's rows by their first cell."""
    text = (out.with_name(f"{out.stem}-tables") / f"{name}.csv").read_text(encoding="utf-8")
    return {next(iter(row.values())): row for row in csv.DictReader(text.splitlines())}


def prose(page: str) -> str:
    return " ".join(" ".join(Reader(page).said).replace("\xa0", " ").split())


def test_the_page_stands_for_itself_and_has_everything(whole_report: Path) -> None:
    reader = assert_stands_for_itself(whole_report.read_text(encoding="utf-8"))
    said = prose(whole_report.read_text(encoding="utf-8"))
    for expected in (
        "Arms & <more>", "2 pretraining runs (baseline and SCTD; seed 1)", "4 layers of 32", "Losses", "Semantic drift",
        "10 optimizer steps of 8 rows", "Cost", "Scores over training", "What each layer knows", "ablations",
        "Exactly what was run", "bert-base-uncased", "paper, base: SCTD", "There is one pretraining run per arm",
    ):  # fmt: skip
        assert expected in said, expected
    files = whole_report.with_name("report-tables")
    assert reader.tags.count("svg") == len(list(files.glob("*.png"))) == 10
    assert reader.tags.count("table") == len(list(files.glob("*.csv"))) == len(list(files.glob("*.md"))) - 1
    index = (files / "README.md").read_text(encoding="utf-8")
    assert all(f"({path.name})" in index for path in files.glob("*.png"))
    assert all(path.stat().st_size > 5000 for path in files.glob("*.png"))


def test_costs_are_those_on_record_and_flops_those_of_the_steps(runs: Runs, tmp_path: Path) -> None:
    out, places = tmp_path / "r.html", {name: runs(name) for name in ("baseline", "sctd")}
    undrawn(out, *places.values())
    rows, hours, flops = table(out, "cost"), {}, {}
    for name, label in (("baseline", "baseline"), ("sctd", "SCTD")):
        last, config = records(places[name])[-1], read_run(places[name])
        hours[name] = last["seconds"] / 3600
        flops[name] = flops_until(config, read_manifest(places[name] / "corpus"), [10])[0]
        assert float(rows[label]["hours"]) == pytest.approx(hours[name], rel=1e-6)
        assert float(rows[label]["FLOPs"]) == pytest.approx(flops[name], rel=1e-6)
        assert float(rows[label]["tokens/s"]) == pytest.approx(last["tokens"] / last["seconds"], rel=1e-6)
        assert (rows[label]["tokens"], rows[label]["steps"]) == (str(last["tokens"]), "10")
    clock, work = (of["sctd"] / of["baseline"] - 1 for of in (hours, flops))
    assert float(rows["SCTD"]["hours vs. baseline"]) == pytest.approx(clock, rel=1e-5)
    assert float(rows["SCTD"]["FLOPs vs. baseline"]) == pytest.approx(work, rel=1e-5)
    compared = table(out, "comparisons")["SCTD against baseline"]
    assert float(compared["time"]) == pytest.approx(clock, rel=1e-5)
    assert float(compared["FLOPs"]) == pytest.approx(work, rel=1e-5) and work < 0
    theirs = [float(rows[f"paper, {size}: SCTD"]["hours vs. baseline"]) for size in ("large", "base")]
    assert theirs == [-0.14, -0.092]
    assert float(rows["paper, base: token drop"]["hours vs. baseline"]) == -0.15
    loss = table(out, "held-out-loss")
    last = {name: records(place)[-1]["valid_loss"] for name, place in places.items()}
    assert float(loss["SCTD"]["held-out loss"]) == pytest.approx(last["sctd"])
    assert float(loss["SCTD"]["minus baseline"]) == pytest.approx(last["sctd"] - last["baseline"], abs=1e-9)


def test_mfu_is_the_records_weighted_by_their_time(runs: Runs, tmp_path: Path) -> None:
    run, out = runs("baseline"), tmp_path / "r.html"
    lines = [
        {"step": 1, "loss": 6.0, "tokens": 512, "seconds": 1.0, "mfu": 0.1},
        {"step": 5, "loss": None, "tokens": 2560, "seconds": 4.0, "mfu": 0.3, "valid_loss": float("nan")},
        {"step": 10, "loss": 5.0, "tokens": 5120, "seconds": 5.0, "mfu": None, "valid_loss": 5.5},
    ]
    torn = "".join(json.dumps(line) + "\n" for line in lines) + '{"step": 11, "lo'
    (run / "metrics.jsonl").write_text(torn, encoding="utf-8")
    page = report(out, run)
    assert "nan" not in page.lower().replace("nance", "")
    row = table(out, "cost")["baseline"]
    assert float(row["MFU"]) == pytest.approx((0.1 * 1 + 0.3 * 3) / 4)
    assert float(row["tokens/s"]) == 1024 and row["steps"] == "10"


def test_scores_are_means_over_seeds_beside_the_papers(evaluated: tuple[Path, Path], tmp_path: Path) -> None:
    out = tmp_path / "r.html"
    undrawn(out, *evaluated)
    rows = table(out, "scores-glue")
    for arm, label in (("baseline", "baseline"), ("sctd", "SCTD")):
        row = rows[label]
        assert float(row["RTE acc."]) == pytest.approx(100 * statistics.fmean(RTE[arm]))
        assert float(row["RTE acc.: deviation"]) == pytest.approx(100 * statistics.stdev(RTE[arm]))
        assert float(row["CoLA Mcc."]) == pytest.approx(100 * statistics.fmean(COLA[arm]))
        # A task counts the mean of its metrics; the spread is that of each seed's average.
        seeds = zip(RTE[arm], COLA[arm], *MRPC[arm], strict=True)
        averages = [100 * statistics.fmean([rte, cola, (acc + f1) / 2]) for rte, cola, acc, f1 in seeds]
        assert float(row["mean of these"]) == pytest.approx(statistics.fmean(averages))
        assert float(row["mean of these: deviation"]) == pytest.approx(statistics.stdev(averages))
        last = table(out, "scores-glue-last-epoch")[label]
        assert float(last["RTE acc."]) == pytest.approx(100 * statistics.fmean(RTE[arm]) - 2)
    paper = rows["paper, base: baseline"]
    assert (paper["RTE acc."], paper["hours"], paper["seeds"]) == ("77.6", "15.17", "5")
    assert float(paper["mean of these"]) == pytest.approx((56.0 + (86.8 + 90.1) / 2 + 77.6) / 3)
    assert "STS-B Pear." not in paper, "what nobody was measured on is left out"


def test_differences_are_tested(evaluated: tuple[Path, Path], tmp_path: Path) -> None:
    out = tmp_path / "r.html"
    said = undrawn(out, *evaluated)
    rows = table(out, "difference-1")
    ps = {}
    for task, values in (("RTE acc.", RTE), ("CoLA Mcc.", COLA), ("MRPC acc.", {a: v[0] for a, v in MRPC.items()})):
        expected = stats.ttest_ind(values["sctd"], values["baseline"], equal_var=False)
        low, high = expected.confidence_interval(0.95)
        ps[task] = expected.pvalue
        assert float(rows[task]["p over seeds"]) == pytest.approx(expected.pvalue, rel=1e-6)
        assert float(rows[task]["95 % interval"]) == pytest.approx(100 * low, rel=1e-6)
        assert float(rows[task]["95 % interval: high"]) == pytest.approx(100 * high, rel=1e-6)
    assert float(rows["RTE acc."]["p, Holm"]) == pytest.approx(3 * min(ps.values()), rel=1e-6)
    assert (rows["RTE acc."]["paper, base"], rows["RTE acc."]["sign"]) == ("1.8", "same")
    assert (rows["CoLA Mcc."]["paper, base"], rows["CoLA Mcc."]["sign"]) == ("2.8", "other")
    assert (rows["MRPC acc."]["paper, base"], rows["MRPC acc."]["sign"]) == ("0", "–")
    compared = table(out, "comparisons")["SCTD against baseline"]
    assert [compared[key] for key in ("tasks", "higher", "lower", "significant")] == ["3", "1", "2", "0"]
    assert f"{float(compared['points']):+.2f}" == "+0.67" and float(compared["points: p"]) > 0.05
    assert f"{float(compared['paper, base']):+.2f}" == "+1.53"
    assert "| 1 of 2 |" in said, "signs that agree, of tasks where both differences are not 0"
    assert (
        "SCTD against baseline: the mean difference agrees in sign with the paper's BERT-base; 0 of 3 tasks "
        "significant at 5 %; too few tasks to test their mean." in said
    )


def test_several_seeds_of_an_arm_count_once_each(runs: Runs, tmp_path: Path) -> None:
    values = {"baseline": [[0.50, 0.60], [0.58, 0.60]], "sctd": [[0.61, 0.63], [0.66, 0.64]]}
    places = []
    for arm, of_arm in values.items():
        for seed, scores in enumerate(of_arm, 1):
            places.append(runs(arm, f"{arm}-{seed}", seed=seed))
            write_cells(at_step(places[-1]), "rte", {"accuracy": scores})
    out = tmp_path / "r.html"
    said = undrawn(out, *places)
    means = {arm: [statistics.fmean(scores) for scores in of_arm] for arm, of_arm in values.items()}
    row = table(out, "scores-glue")["SCTD"]
    assert row["seeds"] == "2 × 2"
    assert float(row["RTE acc."]) == pytest.approx(100 * statistics.fmean(means["sctd"]))
    assert float(row["RTE acc.: deviation"]) == pytest.approx(100 * statistics.stdev(means["sctd"]))
    expected = stats.ttest_ind(means["sctd"], means["baseline"], equal_var=False).pvalue
    assert float(table(out, "difference-1")["RTE acc."]["p over runs"]) == pytest.approx(expected, rel=1e-6)
    assert table(out, "cost")["SCTD"]["runs"] == "2"
    assert "Welch's t-test over pretraining seeds (2 and 2)" in said and "seeds 1 and 2" in said
    # Against an arm with one run the fine-tunings are compared, on both sides.
    undrawn(out, *places[:1], *places[2:])
    pooled = [value for scores in values["sctd"] for value in scores]
    expected = stats.ttest_ind(pooled, values["baseline"][0], equal_var=False).pvalue
    assert float(table(out, "difference-1")["RTE acc."]["p over seeds"]) == pytest.approx(expected, rel=1e-6)


def test_layers_and_drift(evaluated: tuple[Path, Path], tmp_path: Path) -> None:
    out = tmp_path / "r.html"
    undrawn(out, *evaluated)
    layers = table(out, "probing-tense")
    assert [float(layers["4"][label]) for label in ("baseline", "SCTD")] == pytest.approx([90.0, 84.0])
    apart = table(out, "probing-differences")
    dropped, last = (apart[f"Tense, SCTD against baseline, layer {end}"] for end in ("3 (last dropped)", "4 (last)"))
    assert (float(dropped["difference"]), float(dropped["difference: p"])) == (0, 1)
    assert float(last["difference"]) == pytest.approx(-6) and 0 < float(last["difference: p"]) < 0.1
    drift = table(out, "drift")
    assert (float(drift["10"]["SCTD: cosine"]), float(drift["2"]["baseline: cosine"])) == (0.4, 0.3)
    apart = table(out, "drift-differences")
    first, last = (apart[f"SCTD against baseline, step {step}"] for step in (2, 10))
    assert float(first["cosine"]) == 0 and float(last["cosine"]) == pytest.approx(-0.1)
    assert float(last["cosine: p"]) < 0.001
    along = table(out, "scores-over-training")
    assert float(along["SCTD"]["RTE acc."]) == pytest.approx(60.0)


def test_an_ablation_stands_beside_the_papers(runs: Runs, tmp_path: Path) -> None:
    folder = tmp_path / "ablate-interval"
    folder.mkdir()
    (folder / "ablation.json").write_text(describe(ABLATIONS["interval"], "recipes/my.yaml", {}), encoding="utf-8")
    for row in ABLATIONS["interval"].rows[:4]:
        changes: dict[str, Any] = {"objective": {"interval": row.value}} if isinstance(row.value, int) else {}
        run = runs("baseline" if row.value == "baseline" else "sctd", f"{folder.name}/{row.run}", **changes)
        write_cells(at_step(run), "rte", {"accuracy": [0.5, 0.54]})
    shutil.rmtree(tmp_path / folder.name / "f10" / "export")
    out = tmp_path / "r.html"
    said = undrawn(out, folder)
    rows = table(out, "ablation-interval")
    assert list(rows) == ["baseline", "token drop", "F = 5"]
    five = rows["F = 5"] | table(out, "ablation-interval-tasks")["F = 5"]
    assert (five["paper: hours"], five["paper: change"], five["paper: GLUE"]) == ("4.69", "-0.049", "78.96")
    assert float(five["RTE acc."]) == pytest.approx(52) and float(five["held-out loss"]) > 0
    assert "3 runs of recipe my.yaml, one seed each" in said
    assert "Not finished, and left out: F = 10, F = 20 and F = 50." in said
    for named in ([], [folder / "f5"]):  # a run that is named too counts once
        material = gather([folder, *named])
        figures = {what: value for value, what in tiles(material, group(material))}
        assert (figures["pretraining runs"], figures["fine-tunings"]) == ("3", "8")


def test_labels_of_ticks_do_not_run_into_each_other(runs: Runs) -> None:
    place = runs("baseline")
    path = place / "metrics.jsonl"
    longer = [{**record, "tokens": 4_000 * record["tokens"]} for record in records(place)]  # 20 million
    path.write_text("".join(json.dumps(record) + "\n" for record in longer), encoding="utf-8")
    groups = group(gather([place]))
    pictures = [part for part in loss_section(groups).parts if isinstance(part, Picture)]
    assert [picture.name for picture in pictures] == ["held-out-loss", "training-loss"]
    for picture in pictures:
        figure = Figure(figsize=(9, picture.height), layout="constrained")
        picture.fill(figure)
        figure.draw_without_rendering()
        for axes in figure.axes:
            shown = [label for label in axes.get_xticklabels() if axes.viewLim.intervalx[0] <= label.get_position()[0]]
            boxes = [label.get_window_extent() for label in shown]
            assert len(boxes) > 2 and all(a.x1 < b.x0 for a, b in itertools.pairwise(boxes)), axes.get_xlabel()


def rewrite(run: Path, change: Callable[[dict[str, Any]], dict[str, Any]]) -> None:
    lines = [json.dumps(change(record)) + "\n" for record in records(run)]
    (run / "metrics.jsonl").write_text("".join(lines), encoding="utf-8")


def broken_through(record: dict[str, Any]) -> dict[str, Any]:
    """As if at step 4."""
    return record | ({"breakthrough_step": 4} if "valid_loss" in record and record["step"] >= 4 else {})


def test_breakthroughs_are_told_run_by_run_and_counted_by_arm(runs: Runs, tmp_path: Path) -> None:
    first, second, old, out = runs("sctd"), runs("sctd", "late", seed=2), runs("baseline"), tmp_path / "r.html"
    rewrite(first, broken_through)
    keys = ("valid_gap", "context_use", "breakthrough_step")  # which earlier versions did not write
    rewrite(old, lambda record: {key: value for key, value in record.items() if key not in keys})
    said = undrawn(out, first, second, old)
    rows, last = table(out, "learning"), records(first)[-1]
    assert {name: row["breakthrough at step"] for name, row in rows.items()} == {
        "sctd": "4", "late": "not reached", "baseline": "",
    }  # fmt: skip
    assert float(rows["sctd"]["gap"]) == pytest.approx(last["valid_gap"], rel=1e-6)
    assert float(rows["sctd"]["context use"]) == pytest.approx(last["context_use"], rel=1e-6)
    assert {label: row["broke through"] for label, row in table(out, "held-out-loss").items()} == {
        "SCTD": "1", "baseline": "",
    }  # fmt: skip
    assert "Without a breakthrough, so that their losses say little about the arms: late (see Losses)." in said
    undrawn(out, old)
    assert not (tmp_path / "r-tables" / "learning.csv").exists()


def test_the_curve_has_the_unigram_entropy_the_breakthrough_and_the_phases(runs: Runs) -> None:
    run = runs("sctd", schedule={"full_start": 3, "full_finish": 2})
    rewrite(run, broken_through)
    pictures = {part.name: part for part in loss_section(group(gather([run]))).parts if isinstance(part, Picture)}
    figure = Figure()
    pictures["held-out-loss"].fill(figure)
    upper, *lower = figure.axes
    lines = {(line.get_linestyle(), line.get_marker()): line for line in upper.lines}
    assert lines["--", "None"].get_ydata()[0] == read_manifest(run / "corpus").unigram_entropy
    star = lines["None", "*"]
    assert (star.get_xdata()[0], star.get_ydata()[0]) == (4, records(run)[3]["valid_loss"])
    borders = [line.get_xdata()[0] for line in upper.lines if line.get_linestyle() == ":"]
    assert borders == [3.5, 8.5]
    assert [len(axes.lines) for axes in lower] == [1, 1, 1]
    figure = Figure()
    pictures["alignment"].fill(figure)
    for axes, key in zip(figure.axes, ("kl_global", "kl_local", "kl_gradient"), strict=True):
        known = {record["step"]: record[key] for record in records(run) if record.get(key) is not None}
        assert dict(zip(*axes.lines[0].get_data(), strict=True)) == known and list(known) == [4, 8]


# ---- what is missing, and what differs -----------------------------------------------------------------------------


def test_one_run_alone(runs: Runs, tmp_path: Path) -> None:
    said = undrawn(tmp_path / "r.html", runs("sctd"))
    assert "1 pretraining run (SCTD; seed 1)" in said
    assert "Not in these folders, and left out: scores, scores over training, probing, drift and ablations." in said
    assert "There is no baseline on the same model, data and steps for SCTD" in said
    for missing in ("Runs of baseline and token drop.", "Semantic drift over training", "Figures 4 and 8", "Table 4"):
        assert missing in said


def test_a_run_without_a_step(runs: Runs, tmp_path: Path) -> None:
    empty, other = runs("sctd", "begun"), runs("baseline")
    (empty / "metrics.jsonl").unlink()
    assert "Without a recorded step so far: begun." in prose(report(tmp_path / "r.html", other, empty))
    report(tmp_path / "alone.html", empty)


def test_runs_that_go_on_are_compared_as_far_as_both_have_come(runs: Runs, tmp_path: Path) -> None:
    baseline, short, out = runs("baseline"), runs("sctd"), tmp_path / "r.html"
    lines = (short / "metrics.jsonl").read_text(encoding="utf-8").splitlines(keepends=True)
    (short / "metrics.jsonl").write_text("".join(lines[:5]), encoding="utf-8")
    said = undrawn(out, baseline, short)
    assert "Not at its end yet: sctd (step 5 of 10)." in said
    assert table(out, "comparisons")["SCTD against baseline"]["step"] == "5"
    row = table(out, "cost")["SCTD"]
    expected = records(short)[-1]["seconds"] / records(baseline)[4]["seconds"] - 1
    losses = table(out, "held-out-loss")
    assert {label: of["validated at step"] for label, of in losses.items()} == {"baseline": "10", "SCTD": "4"}
    assert all(float(of["held-out loss"]) > 0 for of in losses.values())
    assert row["steps"] == "5" and float(row["hours vs. baseline"]) == pytest.approx(expected, rel=1e-6)


def test_what_differs_in_more_than_the_method_is_not_compared(runs: Runs, tmp_path: Path) -> None:
    places = runs("baseline"), runs("sctd", optimizer={"lr": 5e-4})
    for place in places:
        write_cells(at_step(place), "rte", {"accuracy": [0.5, 0.6]})
    out = tmp_path / "r.html"
    said = undrawn(out, *places)
    assert "These runs differ in optimizer.lr, not only in the method" in said
    assert not (tmp_path / "r-tables" / "difference-1.csv").exists()
    assert table(out, "cost")["SCTD"]["hours vs. baseline"] == ""
    assert {row["baseline"] for row in table(out, "recipes").values()} == {"0.001"}


@pytest.mark.parametrize(
    "change",
    [
        {"model": {"family": "modernbert"}},
        {"train": {"precision": "bf16"}},
        {"data": {"mask_stages": [[5, 0.3]]}},
        {"optimizer": {"name": "muon"}},
    ],
)
def test_other_settings_are_another_class(runs: Runs, change: dict[str, Any]) -> None:
    groups = group(gather([runs("baseline"), runs("sctd", **change)]))
    assert len({each.kind for each in groups}) == 2 and partners(groups) == []
    families = ["baseline (BERT)", "SCTD (ModernBERT)"] if "model" in change else ["baseline", "SCTD"]
    assert [each.label for each in groups] == families


def test_phases_belong_to_the_method_and_two_dropping_arms_need_the_same(runs: Runs, tmp_path: Path) -> None:
    phases = {"full_start": 3, "full_finish": 2}
    places = runs("baseline"), runs("sctd", schedule=phases), runs("sctd", "drop", arm="token_drop")
    said = undrawn(tmp_path / "r.html", *places)
    assert "SCTD and token drop drop differently (other layers, shares or steps)" in said
    pairs = [(first.label, second.label) for first, second in partners(group(gather(places)))]
    assert sorted(pairs) == [("SCTD", "baseline"), ("token drop", "baseline")]
    places = *places[:2], runs("sctd", "alike", arm="token_drop", schedule=phases)
    pairs = [(first.label, second.label) for first, second in partners(group(gather(places)))]
    assert ("SCTD", "token drop") in pairs and "drop differently" not in undrawn(tmp_path / "r.html", *places)


def test_a_label_names_what_tells_most(runs: Runs) -> None:
    """Of many settings that differ those first that tell a group from most others."""
    changed = {"optimizer": {"lr": 5e-4, "clip": 0.5}, "model": {"family": "modernbert"}}
    places = runs("sctd"), runs("sctd", "b", objective={"interval": 9}), runs("sctd", "c", **changed)
    assert [each.label for each in group(gather(places))] == [
        "SCTD (BERT, interval 4, 2 more)", "SCTD (BERT, interval 9, 2 more)", "SCTD (ModernBERT, 3 more)",
    ]  # fmt: skip


def test_a_modernbert_is_called_so(runs: Runs, tmp_path: Path) -> None:
    said = undrawn(tmp_path / "r.html", runs("sctd", model={"family": "modernbert", "layers": 12, "hidden_size": 768}))
    assert "of a ModernBERT with 12 layers of 768" in said
    assert "BERT-base and BERT-large: these models are ModernBERTs with 12 layers of 768." in said


def test_other_rows_and_other_steps_are_marked(runs: Runs, tmp_path: Path) -> None:
    baseline, other = runs("baseline"), runs("sctd")
    write_cells(at_step(baseline), "rte", {"accuracy": [0.5, 0.6]})
    write_cells(at_step(other), "rte", {"accuracy": [0.7, 0.8]}, data="others")
    out = tmp_path / "r.html"
    said = undrawn(out, baseline, other)
    assert "SCTD against baseline: no task on the same rows" in said
    assert table(out, "difference-1")["RTE acc. †"]["p over seeds"] == ""
    for change in ({"steps": 7}, {"max_length": 128}, {"lr": 3e-5}):
        shutil.rmtree(at_step(other))
        write_cells(at_step(other), "rte", {"accuracy": [0.7, 0.8]}, **change)
        assert "no task on the same rows with the same settings" in undrawn(out, baseline, other), change
    shutil.move(at_step(other), at_step(other, 8))
    assert "Scored at different steps, and so not compared: SCTD and baseline." in undrawn(out, baseline, other)


def test_a_run_that_diverged_has_no_loss(runs: Runs, tmp_path: Path) -> None:
    run, out = runs("sctd"), tmp_path / "r.html"
    lines = [
        {"step": 5, "loss": 3.0, "valid_loss": 3.5, "mlm_drop": 3.0},
        {"step": 10, "loss": None, "valid_loss": None},
    ]
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    assert "Without a finite held-out loss at the end: SCTD." in undrawn(out, run)
    assert table(out, "held-out-loss")["SCTD"]["held-out loss"] == ""
    assert record_at(run, 10) == {"step": 10, "loss": None, "valid_loss": None, "mlm_drop": 3.0}


def test_tasks_that_not_all_runs_of_an_arm_have(runs: Runs, tmp_path: Path) -> None:
    """An array that is half finished: means are over whole runs, and no number joins two of them."""
    first, second, out = runs("sctd"), runs("sctd", "sctd-2", seed=2), tmp_path / "r.html"
    for step in (4, 10):
        write_cells(at_step(first, step), "rte", {"accuracy": [0.5, 0.6]})
        write_cells(at_step(second, step), "cola", {"matthews": [0.1, 0.2]})
    undrawn(out, first, second)
    row = table(out, "scores-glue")["SCTD"]
    assert (float(row["RTE acc."]), row["RTE acc.: deviation"], row["mean of these"]) == (pytest.approx(55), "", "")
    write_cells(at_step(second), "rte", {"accuracy": [0.7, 0.8]})
    undrawn(out, first, second)
    row = table(out, "scores-glue")["SCTD"]
    assert float(row["RTE acc."]) == pytest.approx(65) and row["RTE acc.: deviation"]
    assert float(row["mean of these"]) == pytest.approx((75 + 15) / 2) and not row["mean of these: deviation"]


def test_a_repeated_seed_is_no_further_one(runs: Runs, tmp_path: Path) -> None:
    out = tmp_path / "r.html"
    undrawn(out, runs("sctd"), runs("sctd", "again"), runs("sctd", "other", seed=2))
    rows = {label: row["runs"] for label, row in table(out, "cost").items() if not label.startswith("paper")}
    assert rows == {"SCTD": "2", "SCTD no. 2": "1"}


def test_probes_of_other_steps_and_poolings_are_not_compared(runs: Runs, tmp_path: Path) -> None:
    baseline, other, out = runs("baseline"), runs("sctd"), tmp_path / "r.html"
    write_probe(at_step(baseline), "tense", [0.6, 0.7, 0.8, 0.8, 0.9])
    write_probe(at_step(other, 4), "tense", [0.6, 0.7, 0.8, 0.8, 0.8], [1, 3])
    assert "Tense, SCTD against baseline: probed at another step, so not compared" in undrawn(out, baseline, other)
    assert [row["difference"] for row in table(out, "probing-differences").values()] == [""]
    shutil.move(at_step(other, 4), at_step(other))
    assert "Tense, SCTD against baseline, layer 4 (last)" in undrawn(out, baseline, other)
    path = at_step(other) / "probe" / "tense.json"
    write_json(path, json.loads(path.read_text(encoding="utf-8")) | {"pooling": "cls"})
    said = undrawn(out, baseline, other)
    assert "Tense, SCTD against baseline" not in said
    assert set(table(out, "probing-tense")["4"]) == {"layer", "baseline"}
    assert set(table(out, "probing-tense-cls")["4"]) == {"layer", "SCTD"}


def test_no_sign_where_the_papers_difference_is_none(runs: Runs, tmp_path: Path) -> None:
    """MRPC's accuracy: 86.8 of the paper's BERT-base by both arms."""
    baseline, other = runs("baseline"), runs("sctd")
    write_cells(at_step(baseline), "mrpc", {"accuracy": [0.7, 0.71], "f1": [0.8, 0.81]})
    write_cells(at_step(other), "mrpc", {"accuracy": [0.72, 0.74], "f1": [0.8, 0.81]})
    said = undrawn(tmp_path / "r.html", baseline, other)
    assert "the mean difference has no sign to compare with the paper's" in said and "agree" not in said


def test_chance_has_no_spread_and_no_test(runs: Runs, tmp_path: Path) -> None:
    baseline, other = runs("baseline"), runs("sctd")
    for place in (baseline, other):
        write_cells(at_step(place), "rte", {"accuracy": [0.527, 0.527, 0.527]})
    said = undrawn(tmp_path / "r.html", baseline, other)
    assert "too few seeds: a test of a task takes two values or more on both sides, and some spread in them" in said


def test_hours_between_two_records(runs: Runs, tmp_path: Path) -> None:
    run = runs("sctd")
    lines = [{"step": step, "loss": 5.0, "tokens": 64 * step, "seconds": 3600.0 * step} for step in (2, 10)]
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    assert gather([run]).runs[0].at(6)["hours"] == pytest.approx(6.0)


def test_a_run_that_was_not_scored_at_the_step_of_its_arm_is_named(runs: Runs, tmp_path: Path) -> None:
    first, second = runs("sctd"), runs("sctd", "late", seed=2)
    write_cells(at_step(first), "rte", {"accuracy": [0.5, 0.6]})
    write_cells(at_step(second, 8), "rte", {"accuracy": [0.7, 0.8]})
    said = undrawn(tmp_path / "r.html", first, second)
    assert "Not scored at the last scored step of its arm, and so in no mean: late (of SCTD)." in said
    assert table(tmp_path / "r.html", "scores-glue")["SCTD"]["RTE acc."] == "55"


def test_groups_of_one_arm_are_told_apart(runs: Runs, tmp_path: Path) -> None:
    out = tmp_path / "r.html"
    undrawn(out, runs("sctd"), runs("sctd", "rare", objective={"interval": 9}), runs("sctd", "again", seed=2))
    assert {label: row["runs"] for label, row in table(out, "cost").items() if not label.startswith("paper")} == {
        "SCTD (interval 4)": "2",
        "SCTD (interval 9)": "1",
    }


def test_results_kept_elsewhere_go_to_their_run(runs: Runs, tmp_path: Path) -> None:
    run, kept = runs("sctd"), tmp_path / "kept"
    write_mark(kept, "sctd", run="sctd", arm="sctd", seed=1, step=10)
    write_cells(kept, "rte", {"accuracy": [0.5, 0.6]})
    out = tmp_path / "r.html"
    undrawn(out, run, kept)
    assert [label for label in table(out, "scores-glue") if not label.startswith("paper")] == ["SCTD"]
    other = tmp_path / "elsewhere" / "sctd"  # another run of the same name, arm and seed
    shutil.copytree(run, other)
    undrawn(out, run, other, kept)
    assert [label for label in table(out, "scores-glue") if not label.startswith("paper")] == ["sctd"]


def test_tasks_of_users_and_few_shots(runs: Runs, tmp_path: Path) -> None:
    run, out = runs("sctd"), tmp_path / "r.html"
    write_cells(at_step(run), "rte", {"accuracy": [0.5, 0.6]}, shots=32)
    write_cells(at_step(run), "conll03", {"f1": [0.4, 0.5], "precision": [0.5, 0.5], "recall": [0.4, 0.4]}, shots=32)
    write_cells(at_step(run), "cb", {"accuracy": [0.5]}, title="Mine | <b>", suite="own", shots=4)
    assert "Mine | <b>" in undrawn(out, run)
    row = table(out, "scores-further")["SCTD"]
    assert float(row["RTE, 32-shot acc."]) == pytest.approx(55)
    assert float(row["Mine | <b>, 4-shot acc."]) == pytest.approx(50)
    assert float(table(out, "scores-semantic")["SCTD"]["CoNLL03 F1, 32-shot"]) == pytest.approx(45)
    lines = (tmp_path / "r-tables" / "scores-further.md").read_text(encoding="utf-8").splitlines()
    assert len({line.replace("\\|", "").count("|") for line in lines if line.startswith("|")}) == 1


# ---- bad input -----------------------------------------------------------------------------------------------------


def test_a_folder_of_nothing(trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    said = refused(capsys, tmp_path, "--out", tmp_path / "r.html")
    assert "a run has config.yaml, an ablation ablation.json, an evaluation encoder.json" in said
    assert "did you mean those in it (baseline, sctd)?" in refused(capsys, trained, "--out", tmp_path / "r.html")
    assert "no such folder" in refused(capsys, tmp_path / "none", "--out", tmp_path / "r.html")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("file", "text"),
    [
        ("finetune/rte/cell/result.json", "{"),
        ("finetune/rte/cell/result.json", '{"task": "rte"}'),
        ("probe/tense.json", '{"task": "tense", "title": "Tense", "dropped": null, "layers": []}'),
        ("encoder.json", "[1]"),
    ],
)
def test_a_file_that_cannot_be_read_is_named(
    runs: Runs, tmp_path: Path, capsys: pytest.CaptureFixture[str], file: str, text: str
) -> None:
    path = at_step(runs("sctd")) / file
    path.parent.mkdir(parents=True)
    path.write_text(text, encoding="utf-8")
    assert str(path) in refused(capsys, tmp_path / "sctd", "--out", tmp_path / "r.html")
    assert [place.name for place in tmp_path.iterdir()] == ["sctd"]


def test_a_score_that_is_no_number_is_named(runs: Runs, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = runs("sctd")
    write_json(
        run / "evaluation" / "drift.json", {"encoder": "x", "arm": "sctd", "sentences": 3, "points": [{"step": 1}]}
    )
    assert "drift.json is not as evaluations write it" in refused(capsys, run, "--out", tmp_path / "r.html")


def test_only_a_report_is_replaced(runs: Runs, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run, out = runs("sctd"), tmp_path / "r.html"
    assert "there is no folder" in refused(capsys, run, "--out", tmp_path / "no" / "r.html")
    assert "ends in .html" in refused(capsys, run, "--out", tmp_path / "r.pdf")
    out.write_text("<html>mine</html>", encoding="utf-8")
    assert "exists and is not a report of sctd" in refused(capsys, run, "--out", out)
    assert out.read_text(encoding="utf-8") == "<html>mine</html>"
    out.unlink()
    files = tmp_path / "r-tables"
    files.mkdir()
    assert "r-tables exists and is not a report of sctd" in refused(capsys, run, "--out", out)
    files.rmdir()
    first = report(out, run)
    (files / "stale.csv").touch()
    assert report(out, run) == first, "equal input, equal page"
    assert not (files / "stale.csv").exists()
    (files / "notes.txt").write_text("mine", encoding="utf-8")
    assert "holds notes.txt" in refused(capsys, run, "--out", out)
    assert (files / "notes.txt").read_text(encoding="utf-8") == "mine"
