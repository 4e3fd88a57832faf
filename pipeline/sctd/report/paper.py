"""The numbers of the paper (Zhong et al., ACL 2023) that a report has beside its own, and the layout of its tables."""

from dataclasses import dataclass

# What the paper pretrained with.
STEPS, ROWS, LENGTH, SEEDS = 250_000, 1024, 512, 5
SHAPES = {"base": (12, 768), "large": (24, 1024)}  # layers, hidden size
TITLES = {"baseline": "baseline", "token_drop": "token drop", "sctd": "SCTD", "random_drop": "random drop",
          "random_ltd": "random-LTD"}  # fmt: skip


@dataclass(frozen=True)
class Column:
    """A column of scores.

    Args:
        task: as `evaluate.results.best_scores` names it. suite: whose average it counts in; empty: the whole table's.
    """

    task: str
    metric: str
    title: str
    suite: str = ""


@dataclass(frozen=True)
class Row:
    """A row of a table of scores, in percent in the order of the columns.

    Args:
        hours: of pretraining; saving: of them, as printed, relative to the baseline.
        average: as printed; None: the table has none.
    """

    size: str
    arm: str
    steps: int
    scores: tuple[float, ...]
    hours: float | None = None
    saving: float | None = None
    average: float | None = None


@dataclass(frozen=True)
class Layout:
    """A table of scores."""

    name: str
    title: str
    columns: tuple[Column, ...]
    rows: tuple[Row, ...]

    def digits(self, column: Column) -> int:
        """Behind the point, as the paper prints this column."""
        place = self.columns.index(column)
        return max(len(str(row.scores[place]).partition(".")[2]) for row in self.rows)

    def score(self, size: str, arm: str, column: Column) -> float | None:
        """The paper's, at its last step."""
        place = self.columns.index(column)
        return next((r.scores[place] for r in self.rows if (r.size, r.arm, r.steps) == (size, arm, STEPS)), None)


GLUE = Layout(
    "glue",
    "GLUE, in the layout of the paper's Table 2",
    (
        Column("cola", "matthews", "CoLA\nMcc.", "GLUE"),
        Column("mrpc", "accuracy", "MRPC\nacc.", "GLUE"),
        Column("mrpc", "f1", "MRPC\nF1", "GLUE"),
        Column("stsb", "pearson", "STS-B\nPear.", "GLUE"),
        Column("stsb", "spearman", "STS-B\nSpea.", "GLUE"),
        Column("rte", "accuracy", "RTE\nacc.", "GLUE"),
        Column("mnli", "accuracy", "MNLI\nm.", "GLUE"),
        Column("mnli", "accuracy_mm", "MNLI\nmm.", "GLUE"),
        Column("sst2", "accuracy", "SST-2\nacc.", "GLUE"),
    ),
    (
        Row("large", "baseline", STEPS, (61.3, 90.0, 92.7, 90.2, 89.9, 83.8, 86.3, 86.1, 93.5), 34.35, None, 84.37),
        Row("large", "token_drop", STEPS, (64.3, 88.0, 91.4, 89.7, 89.5, 80.1, 86.8, 86.3, 94.0), 27.33, 0.20, 84.04),
        Row("large", "sctd", 100_000, (62.3, 89.2, 92.2, 89.9, 89.7, 80.9, 85.1, 84.8, 93.0), 11.83, 0.66, 83.61),
        Row("large", "sctd", 160_000, (65.8, 88.7, 91.8, 89.9, 89.7, 81.2, 86.4, 86.1, 94.0), 17.75, 0.48, 84.55),
        Row("large", "sctd", STEPS, (65.6, 91.4, 93.8, 90.2, 89.9, 84.5, 87.1, 86.5, 94.2), 29.54, 0.14, 85.63),
        Row("base", "baseline", STEPS, (56.0, 86.8, 90.1, 89.0, 88.8, 77.6, 83.3, 83.5, 92.3), 15.17, None, 81.11),
        Row("base", "token_drop", STEPS, (54.1, 85.5, 89.6, 87.8, 87.8, 77.6, 83.4, 83.3, 91.7), 12.92, 0.15, 80.35),
        Row("base", "sctd", 100_000, (55.4, 87.3, 91.1, 88.4, 88.3, 76.9, 82.2, 82.4, 91.4), 5.51, 0.64, 80.59),
        Row("base", "sctd", 160_000, (58.1, 87.0, 90.7, 88.1, 88.0, 78.7, 83.4, 83.3, 90.6), 8.79, 0.42, 81.28),
        Row("base", "sctd", STEPS, (58.8, 86.8, 90.5, 88.2, 88.1, 79.4, 83.8, 83.6, 91.6), 13.78, 0.092, 81.72),
    ),
)  # fmt: skip
QUESTIONS = Layout(
    "superglue-squad",
    "SuperGLUE and SQuAD, in the layout of the paper's Table 3",
    (
        Column("boolq", "accuracy", "BoolQ\nacc.", "SuperGLUE"),
        Column("cb", "accuracy", "CB\nacc.", "SuperGLUE"),
        Column("multirc", "f1", "MultiRC\nF1", "SuperGLUE"),
        Column("copa", "accuracy", "COPA\nacc.", "SuperGLUE"),
        Column("squad1", "exact_match", "SQuAD v1\nEM", "SQuAD"),
        Column("squad2", "exact_match", "SQuAD v2\nEM", "SQuAD"),
    ),
    (
        Row("large", "baseline", STEPS, (78.1, 91.1, 70.3, 72.0, 85.53, 79.16)),
        Row("large", "token_drop", STEPS, (79.9, 91.1, 72.8, 68.0, 86.35, 81.50)),
        Row("large", "sctd", STEPS, (79.7, 92.9, 72.8, 72.0, 86.54, 81.67)),
        Row("base", "baseline", STEPS, (74.4, 83.9, 68.1, 63.0, 81.97, 72.18)),
        Row("base", "token_drop", STEPS, (73.0, 83.9, 67.7, 64.0, 81.67, 72.68)),
        Row("base", "sctd", STEPS, (73.8, 87.5, 68.9, 68.0, 82.47, 72.79)),
    ),
)
SEMANTIC = Layout(
    "semantic",
    "Semantic-intense tasks, in the layout of the paper's Tables 1 and 6",
    (
        Column("ontonotes-32shot", "f1", "OntoNotes\nF1, 32-shot"),
        Column("conll03-32shot", "f1", "CoNLL03\nF1, 32-shot"),
        Column("mrpc", "accuracy", "MRPC\nacc."),
        Column("sickr", "spearman", "SICK-R\nSpea."),
    ),
    (
        Row("base", "baseline", STEPS, (30.16, 54.48, 86.80, 69.08), average=60.13),
        Row("base", "token_drop", STEPS, (27.49, 53.73, 85.50, 66.16), average=58.22),
        Row("base", "sctd", STEPS, (29.53, 56.32, 86.80, 68.54), average=60.30),
    ),
)
LAYOUTS = (GLUE, QUESTIONS, SEMANTIC)

# Figures 3, 4, 6 and 8 are pictures without numbers; what the text says of them:
PROBING = (
    "In the paper's Figures 4 and 8 (BERT-base) token dropping falls behind the baseline in the dropped layers, by up "
    "to 25.2 points at the last of them, and SCTD keeps more than token dropping in most layers."
)
DRIFT = (
    "In the paper's Figure 3 (BERT-base) the similarity of token dropping lies below the baseline's, its validation "
    "result is worse, and both gaps tend to grow with training."
)
OVER_TRAINING = (
    "In the paper's Figure 6 (BERT-base, GLUE) SCTD lies above the other two all the way, and is comparable with the "
    "baseline's last average at 150K of 250K steps."
)

# Ablations: BERT-large, 35K steps; percent.
# The check marks of Table 4's pairs are taken in the order of its columns.
OBJECTIVES = {
    "baseline": (77.73, 69.11, 74.15),
    "token_drop": (76.58, 68.01, 72.28),
    "mlm_full": (78.30, 68.73, 75.56),
    "kl_local": (78.06, 69.49, 75.66),
    "kl_global": (79.27, 68.64, 75.80),
    "mlm_full+kl_local": (78.51, 69.64, 75.51),
    "mlm_full+kl_global": (79.26, 69.32, 75.59),
    "kl_local+kl_global": (79.36, 69.89, 75.91),
    "mlm_full+kl_local+kl_global": (79.58, 70.29, 76.01),
}  # GLUE, SuperGLUE, SQuAD
INTERVALS = {
    "baseline": (4.93, None, 77.73, 74.15),
    "token_drop": (3.87, 0.215, 76.58, 72.28),
    5: (4.69, 0.049, 78.96, 75.49),
    10: (4.25, 0.138, 79.58, 75.80),
    20: (4.04, 0.181, 78.45, 75.74),
    50: (3.92, 0.205, 79.01, 75.04),
}  # hours, saving, GLUE, SQuAD
ABLATIONS = {
    "objectives": "In the paper (Table 4; BERT-large, 35K steps) each term helps token dropping, KL_global most by "
    "itself on GLUE, and all three together are best.",
    "interval": "In the paper (Table 5; BERT-large, 35K steps) F = 10 is the best trade between time and score.",
    "lambda": "In the paper (Figure 7; BERT-large, 35K steps) every lambda improves on the baseline, 0.05 most; the "
    "figure has no numbers to put beside ours.",
    "selection": "The paper has no such table.",
}
# Table 7: training rows of its tasks; of MultiRC it counts the 5.1K questions, here their answers are rows.
TRAIN_ROWS = {
    "cola": 8_500, "mrpc": 3_700, "stsb": 5_700, "rte": 2_500, "mnli": 392_000, "sst2": 63_300, "boolq": 9_400,
    "cb": 250, "multirc": 27_243, "copa": 400, "squad1": 87_600, "squad2": 130_000,
}  # fmt: skip
