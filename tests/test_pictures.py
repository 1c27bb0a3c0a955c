"""Pictures show the numbers they are drawn from; timing a cycle for them changes nothing."""

from __future__ import annotations

import dataclasses
import sys

import pytest
import torch
from conftest import GROUP
from step_by_step import random_prompt
from tiny_models import tiny_model

import quantspec
from quantspec import GenerationStats, pictures
from quantspec.capture import CapturedLayer
from quantspec.cycle_times import CycleTimes, cycle_times
from quantspec.engine.plan import Plan
from quantspec.memory import expected_memory, full_precision_bytes

PROMPT = torch.tensor([random_prompt(2 * GROUP + 8)])
LAYERS = [CapturedLayer("", 32, 8, 128, 128, 0, 0.0, False)] * 32


@pytest.fixture
def generated(qs):
    """The shared llama after a call of 24 tokens."""
    qs.generate(PROMPT, max_new_tokens=24, num_speculative_tokens=3, eos_token_id=None, do_sample=False)
    return qs


def stats_of(*cycles: tuple[int, list[int]], num_speculative_tokens: int = 4) -> GenerationStats:
    """Statistics of these cycles: drafted tokens and accepted ones per sequence."""
    stats = GenerationStats(num_speculative_tokens)
    for drafted, accepted in cycles:
        stats.record_cycle(Plan(drafted), accepted, 0.1)
    return stats


# --- timing a cycle --------------------------------------------------------------------------------------------------


def test_times_of_a_cycle(generated):
    times = cycle_times(generated)
    assert (times.num_drafts, times.context) == (3, int(generated.session.cache.length[0]))
    assert times.draft > 0
    assert times.verify > 0
    assert times.rest >= 0
    assert times.total == times.draft + times.verify + times.rest
    assert cycle_times(generated, 0).draft == 0


def test_timing_leaves_the_text_as_it_is(qs, generated):
    """Lengths, planes and verified tokens stay, and the conversation goes on as it would have."""
    cache = generated.session.cache
    lengths = (cache.length.clone(), cache.quantized_len.clone())
    verified = int(cache.length[0] - cache.quantized_len[0])
    held = [part[:, :, :verified].clone() for layer in cache.layers for part in (layer.k_recent, layer.v_recent)]
    planes = [part.clone() for layer in cache.layers for part in layer.parts()[2:]]
    stats = generated.last_stats.as_dict()
    cycle_times(generated)
    assert torch.equal(cache.length, lengths[0])
    assert torch.equal(cache.quantized_len, lengths[1])
    kept = [part[:, :, :verified] for layer in cache.layers for part in (layer.k_recent, layer.v_recent)]
    assert all(torch.equal(before, after) for before, after in zip(held, kept, strict=True))
    now = [part for layer in cache.layers for part in layer.parts()[2:]]
    # Behind a text there may be what another left, NaN included.
    torch.testing.assert_close(now, planes, rtol=0, atol=0, equal_nan=True)
    assert generated.last_stats.as_dict() == stats


@pytest.mark.skipif(not torch.cuda.is_available(), reason="run on a machine with a CUDA GPU")
def test_times_of_graphed_cycles():
    """On a GPU, where cycles are CUDA graphs, with the text left as it is."""
    model = tiny_model("llama", torch.bfloat16).to("cuda")
    converted = quantspec.convert(model, kv_group_size=GROUP, self_check=False)
    converted.generate(PROMPT.cuda(), max_new_tokens=24, eos_token_id=None, do_sample=False)
    length = converted.session.cache.length.clone()
    times = cycle_times(converted)
    assert times.num_drafts == 4
    assert times.draft > 0
    assert times.verify > 0
    assert torch.equal(converted.session.cache.length, length)


def test_times_of_nothing(generated):
    with pytest.raises(ValueError, match="num_drafts must be between 0 and"):
        cycle_times(generated, 99)
    generated.reset()
    with pytest.raises(ValueError, match="call generate"):
        cycle_times(generated)


# --- single pictures -------------------------------------------------------------------------------------------------


def test_acceptance_by_position():
    """One bar for each draft token, as high as its rate; a place that was never drafted has none."""
    axes = pictures.plot_acceptance_by_position(stats_of((3, [3, 1]), (3, [0]), (3, [2])))
    assert [round(bar.get_height(), 3) for bar in axes.patches[:3]] == [0.75, 0.5, 0.25]
    assert [text.get_text() for text in axes.texts] == ["75%", "50%", "25%", ""]
    assert axes.get_title("right") == "2.50 tokens a cycle"


def test_acceptance_over_time():
    """The running mean ends where the text got harder; plain cycles of "auto" are left out of it."""
    stats = stats_of(*[(4, [4])] * 20, *[(0, [0])] * 5, *[(4, [1])] * 20)
    axes = pictures.plot_acceptance_over_time(stats)
    dots, mean = axes.lines
    assert len(dots.get_xdata()) == 40
    assert mean.get_ydata()[0] == 1
    assert mean.get_ydata()[-1] == 0.25
    assert list(mean.get_xdata()[18:22]) == [19, 20, 26, 27]


def test_acceptance_over_a_long_time():
    """Many thousand cycles are one line of few points."""
    axes = pictures.plot_acceptance_over_time(stats_of(*[(4, [3])] * 5000))
    (mean,) = axes.lines
    assert len(mean.get_xdata()) <= 400
    assert set(mean.get_ydata()) == {0.75}


def test_running_rate():
    """Rates of uneven cycles are of tokens, not of cycles."""
    assert pictures.running_rate([(4, 4), (0, 1), (0, 3)], 3) == [4 / 5, 4 / 8, 0]
    assert pictures.running_rate([(1, 2)], 8) == [0.5]


@pytest.mark.parametrize("draw", [pictures.plot_acceptance_by_position, pictures.plot_acceptance_over_time])
def test_nothing_drafted(draw):
    axes = draw(stats_of((0, [0]), num_speculative_tokens=0))
    assert [text.get_text() for text in axes.texts] == ["nothing was drafted"]


def test_cycle():
    """Widths of the parts are milliseconds, and they follow each other."""
    axes = pictures.plot_cycle(CycleTimes(num_drafts=2, context=1000, draft=0.004, verify=0.005, rest=0.001))
    parts = [(round(bar.get_x(), 6), round(bar.get_width(), 6)) for bar in axes.patches]
    assert parts == [(0, 2), (2, 2), (4, 5), (9, 1)]
    assert axes.get_title("right") == "10 ms after 1,000 tokens"


def test_memory_of_windows():
    """A layer with a window has no more than that in any of the caches."""
    windows = [dataclasses.replace(layer, window=1024) for layer in LAYERS]
    full, int8 = (line.get_ydata() for line in pictures.plot_memory(windows, max_context=131_072).lines)
    assert int8[-1] < full[-1] * 0.7
    assert max(int8) < 2 * int8[4]


def test_memory_needs_no_model():
    """Curves end at the planned bytes, in GiB, and the parts add up to the cache."""
    axes = pictures.plot_memory(LAYERS, max_context=131_072, num_speculative_tokens=4)
    full, int8 = (line.get_ydata()[-1] for line in axes.lines)
    assert axes.get_title("right") == "8.27 GiB instead of 16 GiB at 128k tokens"
    assert full == full_precision_bytes(LAYERS, 131_072) / 2**30 == 16
    planned = expected_memory(LAYERS, 131_072)
    top = max(collection.get_paths()[0].vertices[:, 1].max() for collection in axes.collections)
    assert top == pytest.approx(sum(planned.values()) / 2**30)
    assert int8 == pytest.approx(top, rel=0.02)
    labels = [text.get_text() for text in axes.texts]
    assert labels[-1] == "bfloat16 cache"
    assert "INT8, no draft" in labels
    assert len(labels) == 6


def test_memory_of_a_short_context():
    axes = pictures.plot_memory(LAYERS[:1], max_context=1, dtype=torch.float16)
    assert axes.get_ylabel() == "MiB"
    with pytest.raises(ValueError, match="max_context must be at least 1"):
        pictures.plot_memory(LAYERS, max_context=0)


def test_given_axes_are_used():
    axes = pictures.plot_memory(LAYERS)
    axes.clear()
    assert pictures.plot_cycle(CycleTimes(1, 1, 1.0, 1.0, 1.0), axes) is axes


# --- qs.plot ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "start"), [("a.png", b"\x89PNG"), ("a.svg", b"<?xml"), ("a.PDF", b"%PDF")])
def test_plot_writes_a_file(generated, tmp_path, name, start):
    figure = generated.plot(tmp_path / name)
    assert (tmp_path / name).read_bytes().startswith(start)
    titles = [axes.get_title("left") for axes in figure.axes]
    assert titles == ["Acceptance by position", "Acceptance over time", "One cycle", "Cache memory"]
    assert len(figure.axes[0].patches) == 3


def test_plot_returns_the_figure_alone(generated, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert len(generated.plot().axes) == 4
    assert not list(tmp_path.iterdir())


def test_plot_after_plain_decoding(qs):
    qs.generate(PROMPT, max_new_tokens=4, num_speculative_tokens=0, eos_token_id=None)
    assert qs.plot().axes[2].get_title("left") == "One cycle"


def test_bad_paths(generated, tmp_path, monkeypatch):
    """Refused before a cycle is timed."""
    monkeypatch.setattr(pictures, "time_cycle", lambda session: pytest.fail("a cycle was timed"))
    with pytest.raises(ValueError, match=r"a.xyz': its name must end in one of .*png"):
        generated.plot(tmp_path / "a.xyz")
    with pytest.raises(ValueError, match="there is no folder"):
        generated.plot(tmp_path / "absent" / "a.png")


def test_plot_before_generate(qs):
    qs.reset()
    with pytest.raises(ValueError, match="nothing to draw yet: call generate"):
        qs.plot()


def test_without_matplotlib(generated, monkeypatch):
    """Importing quantspec needs none; drawing names the extra."""
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ImportError, match=r"pip install .*\[plot\]'"):
        generated.plot()
