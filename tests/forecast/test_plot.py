"""Pictures: they are written whole, show what they say, and refuse what cannot be drawn."""

import numpy as np
import pytest

from downriver.core.errors import InputError
from downriver.forecast import Chain, RunTable
from downriver.forecast import plot as room
from downriver.forecast.plot import plot_law, plot_residuals, plot_truth

N = np.repeat([1e7, 8e7, 4e8], 3)
D = N * np.tile([20.0, 80.0, 320.0], 3)
LOSS = (1.8 + 170 * N**-0.27 + 290 * D**-0.27) * (1 + 0.003 * np.random.default_rng(0).standard_normal(9))
RUNS = RunTable(N, D, {"loss": LOSS}, {"error": np.where(np.arange(9) == 4, np.nan, 0.85 - 2.2 * np.exp(-0.7 * LOSS))})


@pytest.fixture
def axes(monkeypatch):
    """The axes that a picture was drawn on."""
    seen = []
    original = room._picture

    from contextlib import contextmanager

    @contextmanager
    def spy(path, *args, **kwargs):
        with original(path, *args, **kwargs) as drawn:
            seen.append(drawn)
            yield drawn

    monkeypatch.setattr(room, "_picture", spy)
    return seen


@pytest.mark.parametrize("metric", ["loss", "error"])
def test_law_shows_every_measured_run_and_every_target(tmp_path, axes, metric):
    chain = Chain(metric=metric).fit(RUNS)
    plot_law(chain, RUNS, tmp_path / "a" / "law.png", [(6.9e9, 138e9)])
    assert (tmp_path / "a" / "law.png").read_bytes()[1:4] == b"PNG"
    (drawn,) = axes
    runs = next(c for c in drawn.collections if c.get_label() == "runs")
    assert len(runs.get_offsets()) == (9 if metric == "loss" else 8)
    words = [text.get_text() for text in drawn.get_legend().get_texts()]
    assert "law, 20 tokens a parameter" in words and "law, 320 tokens a parameter" in words
    assert "forecast, 90% interval" in words and drawn.get_ylabel() == metric


def test_residuals_are_the_laws(tmp_path, axes):
    chain = Chain().fit(RUNS)
    plot_residuals(chain, RUNS, tmp_path / "residuals.png")
    offsets = axes[0].collections[0].get_offsets()
    np.testing.assert_allclose(offsets[:, 1], 100 * (chain.law.fit_.predict(N, D) / LOSS - 1), rtol=1e-9)


def test_truth_against_forecast(tmp_path, axes):
    plot_truth([0.2, 0.4], [0.25, 0.35], tmp_path / "t.png", [0.1, 0.3], [0.3, 0.5], ["a", "b"], "error")
    assert axes[0].get_xlabel() == "error reached" and axes[0].get_ylabel() == "error forecast"
    assert [t.get_text() for t in axes[0].get_legend().get_texts()] == ["a", "b"]
    with pytest.raises(InputError, match="two columns of one length"):
        plot_truth([0.2], [0.2, 0.3], tmp_path / "bad.png")
    assert not (tmp_path / "bad.png").exists()
