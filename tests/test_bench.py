import numpy as np
import pandas as pd
import pytest
import torch

from benchmarks.bench import draw_cost, interleaved, product

TABLE = pd.DataFrame([{"what": "growth", "variant": work, "hours": hours, "seconds": 40 * hours, "peak MB": 800 + slope}
                      for work, slope in (("pyramid", 0.3), ("both", 6)) for hours in (1, 3, 10)])


def test_cost_figure(tmp_path):
    draw_cost(TABLE, tmp_path / "cost.png")
    assert (tmp_path / "cost.png").read_bytes().startswith(b"\x89PNG")
    with pytest.raises(ValueError, match="did not run"):
        draw_cost(TABLE.assign(what="command"), tmp_path / "half.png")
    assert not (tmp_path / "half.png").exists()


def test_the_peak_is_a_matrix_product_of_the_precision():
    amount, work = product(torch.float32)
    result = work()
    assert result.dtype == torch.float32 and amount > 0.1
    times = interleaved({"once": work, "nothing": lambda: None}, rounds=3)
    assert len(times["once"]) == 3 and np.median(times["once"]) > np.median(times["nothing"])
