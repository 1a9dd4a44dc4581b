"""How much is evaluated, and when."""

from __future__ import annotations

import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from nnscaler.cli.config import EvaluationConfig
from nnscaler.cli.evaluation import Evaluation
from nnscaler.data.training import Share
from tests.data.test_training import LENGTH, Rows


def evaluation(rows: int, steps: int | None, batches: int = 10**9) -> Evaluation:
    """Of a model whose loss at each label is the label; `batches`: after so many it is not to go on."""

    def evaluate(micro_batches):
        total = torch.zeros((), dtype=torch.float64)
        for inputs in micro_batches:
            total += inputs["labels"][inputs["labels"] != -100].sum()
        return total

    data = Rows.numbered(rows)
    data.sequence_length = LENGTH
    module = SimpleNamespace(evaluate=evaluate, gives_loss=True)
    left = iter(range(batches))
    config = EvaluationConfig(data, 5, steps)
    share, go_on = Share(0, 1, 2, 3), lambda: next(left, None) is not None
    return Evaluation(config, data, module, share, -100, torch.device("cpu"), False, go_on)


@pytest.mark.parametrize(("steps", "rows"), [(None, 20), (1, 6), (2, 12), (9, 20)])
def test_the_first_samples_of_so_many_steps_are_evaluated(steps, rows):
    """Steps of six samples. Row r holds r + 1 at every place."""
    found = evaluation(20, steps).run()
    wanted = sum(range(1, rows + 1)) / rows
    assert found == {"eval_loss": pytest.approx(wanted), "eval_perplexity": pytest.approx(math.exp(wanted))}


def test_every_evaluation_is_of_the_same_samples():
    twice = evaluation(20, 1)
    assert [twice.run()["eval_loss"] for _ in range(3)] == pytest.approx([3.5] * 3)


def test_it_ends_where_the_run_is_told_to():
    assert evaluation(20, None, batches=2).run() == {}


def test_no_more_steps_are_evaluated_than_there_are_samples_for():
    """Four steps of six hold twenty samples: nobody is asked whether to go on with a fifth."""
    assert evaluation(20, 9, batches=4).run()["eval_loss"] == pytest.approx(10.5)


def test_it_is_due_every_interval_and_at_the_end():
    assert [step for step in range(1, 13) if evaluation(1, None).is_due(step, step == 12)] == [5, 10, 12]


def test_losses_that_are_no_numbers():
    data = evaluation(1, None)
    data._module.evaluate = lambda batches: torch.tensor(float("inf"), dtype=torch.float64) + 0 * len(list(batches))
    assert data.run() == {"eval_loss": None, "eval_perplexity": None}
    data._module.evaluate = lambda batches: torch.tensor(3000.0, dtype=torch.float64) + 0 * len(list(batches))
    assert data.run() == {"eval_loss": 1000.0, "eval_perplexity": None}


def test_without_a_label_there_is_no_loss():
    data = evaluation(2, None)
    data._batches._samples._dataset.rows = [
        {name: np.full(LENGTH, value) for name, value in (("input_ids", 5), ("labels", -100))} for _ in range(2)
    ]
    assert data.run() == {"eval_loss": None, "eval_perplexity": None}


def test_another_rank_of_a_pipeline_has_the_losses():
    """Whatever this one's module gives."""
    data = evaluation(2, None)
    data._module.gives_loss = False
    assert data.run() == {"eval_loss": None, "eval_perplexity": None}


def test_losses_of_many_steps_are_summed_in_fp64():
    data, losses = evaluation(12, None), iter([2**24, 1])
    data._module.evaluate = lambda batches: torch.full((), next(losses), dtype=torch.float64) + 0 * len(list(batches))
    assert data.run()["eval_loss"] == (2**24 + 1) / (12 * (LENGTH - 1))
