"""``make demo``: SmolLM2-135M answers a question about a long document, speculating on itself."""

from __future__ import annotations

import logging
import time

import torch

# torchao and torch announce on import what this machine lacks.
logging.disable(logging.WARNING)

import transformers  # noqa: E402
from transformers import TextStreamer  # noqa: E402

import quantspec  # noqa: E402
from quantspec.evals import load_smollm2, python_reference  # noqa: E402
from quantspec.passes import cpu_lacks_half_matmul  # noqa: E402

QUESTION = "Using the text above, explain in a few sentences what the 'finally' clause of a 'try' statement does."
MAX_NEW_TOKENS = 96


def main() -> None:
    """Load, convert, answer with streaming, and compare with plain Hugging Face generation."""
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    # The dtype in which plain generation is fastest on this machine, so that the comparison is fair.
    dtype = torch.float32 if device == "cpu" and cpu_lacks_half_matmul() else torch.bfloat16

    print("loading SmolLM2-135M-Instruct ...", flush=True)
    model, tokenizer = load_smollm2(dtype, device)
    print("converting (capture, passes, INT4 weights, self-check) ...", flush=True)
    start = time.perf_counter()
    qs = quantspec.convert(model, weight_group_size=64)
    print(f"{qs}\nconverted in {time.perf_counter() - start:.1f} s\n", flush=True)

    document = python_reference("try", "exceptions", "with")
    messages = [{"role": "user", "content": f"{document}\n\n{QUESTION}"}]
    inputs = tokenizer.apply_chat_template(
        messages, add_generation_prompt=True, return_tensors="pt", return_dict=True
    ).to(device)
    print(f"prompt: {inputs.input_ids.shape[1]} tokens. {QUESTION}\n", flush=True)

    options = {**inputs, "max_new_tokens": MAX_NEW_TOKENS, "do_sample": False}
    start = time.perf_counter()
    answer = qs.generate(**options, streamer=TextStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True))
    ours = time.perf_counter() - start
    print(f"\n{qs.last_stats}\n\nplain Hugging Face generation of the same answer ...", flush=True)

    start = time.perf_counter()
    expected = model.generate(**options)
    plain = time.perf_counter() - start
    new_tokens = expected.shape[1] - inputs.input_ids.shape[1]
    same = (answer[:, : expected.shape[1]] == expected[:, : answer.shape[1]])[0, inputs.input_ids.shape[1] :]
    agreeing = int(same.long().cumprod(0).sum())
    print(f"quantspec     {ours:6.1f} s for prompt and answer")
    print(f"Hugging Face  {plain:6.1f} s for prompt and answer ({dtype}, {plain / ours:.2f}x quantspec's time)")
    print(f"the two answers agree for {agreeing} of {new_tokens} tokens")
    if device == "cpu":
        print("a CPU is for trying: speculation pays on a GPU, see Figures in the README")


if __name__ == "__main__":
    main()
