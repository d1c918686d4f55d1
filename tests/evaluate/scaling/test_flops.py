"""FLOPs of the paper's ladder against those recorded with the golden points."""

from __future__ import annotations

import csv
from pathlib import Path

import pytest

from bc2_jax.config import BAICHUAN2_7B, BAICHUAN2_13B
from bc2_jax.evaluate.scaling.flops import matmul_parameters, non_embedding_parameters, training_compute
from bc2_jax.evaluate.scaling.ladder import LENGTH, RUNGS, paper_rung

POINTS = Path(__file__).parents[2] / "golden" / "evals" / "scaling" / "points.csv"


def test_compute_of_the_ladder_and_its_targets():
    models = {f"paper_form:h{hidden}": paper_rung(hidden).model for hidden in RUNGS}
    models |= {"paper_form:7B": BAICHUAN2_7B, "paper_form:13B": BAICHUAN2_13B}
    rows = [row for row in csv.DictReader(POINTS.open()) if row["set"] in models]
    assert len(rows) == 9
    for row in rows:
        model, tokens = models[row["set"]], float(row["D"])
        compute = training_compute(model, tokens, LENGTH)
        assert compute.total == pytest.approx(float(row["C"]), rel=1e-3)
        norms = (2 * model.num_hidden_layers + 1) * model.hidden_size
        assert non_embedding_parameters(model) == int(row["N"]) - norms
        assert compute.layers == pytest.approx(6 * (int(row["N"]) - norms) * tokens, rel=1e-9)
        assert compute.layers + compute.head == pytest.approx(6 * matmul_parameters(model) * tokens, rel=1e-9)
    smallest = training_compute(models["paper_form:h384"], 1e12, LENGTH)
    assert smallest.head / smallest.total == pytest.approx(0.70, abs=0.005)
