import pandas as pd
import pytest

from benchmarks.bench import draw_cost

TABLE = pd.DataFrame([
    {"what": "memory", "variant": work, "hours": hours, "seconds": 40 * hours, "peak MB": 800 + slope * hours}
    for work, slope in (("scores of a manifest", 0.3), ("training's reader", 6)) for hours in (1, 3, 10)
] + [{"what": "width", "variant": "score of a clip of 5 s", "width": width, "ms each": 2.0 * width, "peak MB": 600 + width}
     for width in (8, 16, 64)])


def test_cost_figure(tmp_path):
    draw_cost(TABLE, tmp_path / "cost.png")
    assert (tmp_path / "cost.png").read_bytes().startswith(b"\x89PNG")
    with pytest.raises(ValueError, match="width did not run"):
        draw_cost(TABLE[TABLE.what == "memory"], tmp_path / "half.png")
    assert not (tmp_path / "half.png").exists()
