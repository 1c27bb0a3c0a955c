"""What is read or worked on is let go."""

from __future__ import annotations

from pathlib import Path

import torch
from tiny_models import tiny_model

from quantspec.checkpoint.sliced import weight_files
from quantspec.freed_memory import FreedMemory
from quantspec.passes.pieces import Piece


def test_a_file_is_let_go_when_a_piece_of_it_was_read(tmp_path):
    """Its pages would count as the process's memory."""
    tiny_model("llama").save_pretrained(tmp_path)
    files = weight_files(tmp_path)
    name = "model.embed_tokens.weight"
    pieces = [files.get(name), files.get(name, Piece(-1, ((8, 40),), 64))]
    assert [tuple(piece.shape) for piece in pieces] == [(96, 64), (96, 32)]
    assert torch.equal(pieces[1], pieces[0][:, 8:40])
    assert str(tmp_path) not in Path("/proc/self/maps").read_text()


def test_memory_is_given_back_now_and_then(monkeypatch):
    calls: list[int] = []
    monkeypatch.setattr("quantspec.freed_memory._give_back", lambda: calls.append)
    freed = FreedMemory()
    weight = torch.empty(2**20, dtype=torch.uint8)
    for _ in range(9):
        freed.after(weight)
    assert len(calls) == 2
    freed.after(torch.empty(2**30, device="meta"))
    assert len(calls) == 2
