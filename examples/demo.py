"""``make demo``: SmolLM2-135M answers a question about a long document, speculating on itself.

An argument is the most tokens to write.
"""

from __future__ import annotations

import logging
import os
import sys
import time
from pathlib import Path

# Libraries announce on import what this machine lacks, and draw bars on reading the GGUF file.
logging.disable(logging.WARNING)
os.environ["TQDM_DISABLE"] = "1"

import torch  # noqa: E402
from transformers import TextStreamer  # noqa: E402

import quantspec  # noqa: E402
from quantspec.evals import load_smollm2  # noqa: E402
from quantspec.passes import cpu_lacks_half_matmul  # noqa: E402

DOCUMENT = Path(__file__).parent / "document.txt"
QUESTION = "How many signatures did the petition collect?"


def main(max_new_tokens: int = 128) -> None:
    """Load, convert, answer with streaming, and compare with plain Hugging Face generation."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    # The dtype in which plain generation is fastest on this machine, so that the comparison is fair.
    dtype = torch.float32 if device == "cpu" and cpu_lacks_half_matmul() else torch.bfloat16

    print("loading SmolLM2-135M-Instruct ...", flush=True)
    model, tokenizer = load_smollm2(dtype, device)
    print("converting (capture, passes, INT4 weights, self-check) ...", flush=True)
    start = time.perf_counter()
    qs = quantspec.convert(model, weight_group_size=64)
    print(f"{qs}\nconverted in {time.perf_counter() - start:.1f} s\n", flush=True)

    messages = [{"role": "user", "content": f"{DOCUMENT.read_text()}\n\n{QUESTION}"}]
    inputs = tokenizer.apply_chat_template(
        messages, add_generation_prompt=True, return_tensors="pt", return_dict=True
    ).to(device)
    prompt = inputs.input_ids.shape[1]
    print(f"The file {DOCUMENT.name}, {prompt} tokens. {QUESTION}\n", flush=True)

    options = {**inputs, "max_new_tokens": max_new_tokens, "do_sample": False}
    # On a CPU a draft's own steps do not pay, and what the text itself says does.
    drafts = {"draft": "lookup"} if device == "cpu" else {}
    streamer = TextStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True)
    start = time.perf_counter()
    answer = qs.generate(**options, **drafts, streamer=streamer)
    ours = time.perf_counter() - start
    print(f"\n{qs.last_stats}\n\nplain Hugging Face generation of the same answer ...", flush=True)

    start = time.perf_counter()
    expected = model.generate(**options)
    plain = time.perf_counter() - start
    same = (answer[:, : expected.shape[1]] == expected[:, : answer.shape[1]])[0, prompt:]
    agreeing = int(same.long().cumprod(0).sum())
    print(
        f"prompt and answer: quantspec {ours:.1f} s, Hugging Face {plain:.1f} s, {plain / ours:.2f}x "
        f"({device}, {dtype}); "
        f"the answers agree for {agreeing} of {expected.shape[1] - prompt} tokens"
    )
    if device == "cpu":
        print("a CPU is for trying: speculation pays on a GPU, see Figures in the README")


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
