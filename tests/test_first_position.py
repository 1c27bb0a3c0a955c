"""Where a model begins to count positions is found without its weights too, as a rank captures it."""

from __future__ import annotations

import torch
from tiny_models import tiny_model

from quantspec.capture import capture
from quantspec.pair.split import hollow


def test_positions_begin_where_they_do_with_weights():
    model = tiny_model("roberta", is_decoder=True)
    whole = capture(model).graph_module.code
    assert "add" in whole
    hollow(model, torch.device("cpu"))
    assert capture(model).graph_module.code == whole
