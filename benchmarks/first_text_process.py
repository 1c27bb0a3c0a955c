"""One process of :mod:`benchmarks.first_text`: prints a row as its last line. Uses what users of quantspec use."""

from __future__ import annotations

import json
import resource
import sys
import time
from typing import Any

STARTED = time.perf_counter()


class Stopwatch:
    """Seconds on the clock, and of processors in this process and those that it waited for, by stage."""

    def __init__(self) -> None:
        self.row: dict[str, float] = {}
        self._last = (STARTED, 0.0)

    def stage(self, name: str) -> None:
        """End a stage."""
        used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
        now = (time.perf_counter(), sum(one.ru_utime + one.ru_stime for one in used))
        for kind, before, after in zip(("seconds", "cpu_seconds"), self._last, now, strict=True):
            self.row[f"{name}_{kind}"] = round(after - before, 2)
        self._last = now


class FirstToken:
    """A streamer that ends a stage when the first token arrives behind the prompt."""

    def __init__(self, watch: Stopwatch, stage: str) -> None:
        self._watch, self._stage, self._arrived = watch, stage, 0

    def put(self, value: Any) -> None:
        """The prompt, or a token."""
        self._arrived += 1
        if self._arrived == 2:
            self._watch.stage(self._stage)

    def end(self) -> None:
        """Nothing to do."""


def main() -> None:
    """Take ``{"shape", "device", "dtype", "compile", "folder", "loads", "saves"}`` as JSON."""
    settings = json.loads(sys.argv[1])
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    import quantspec

    quantspec.convert  # noqa: B018 - imports what it needs
    watch = Stopwatch()
    watch.stage("import")
    device, folder, options = settings["device"], settings["folder"], {"compile": settings["compile"]}
    if settings["loads"]:
        qs = quantspec.from_pretrained(folder, device=device, **options)
        watch.stage("load")
    else:
        torch.manual_seed(0)
        torch.set_default_dtype(getattr(torch, settings["dtype"]))
        with torch.device(device):
            model = LlamaForCausalLM(LlamaConfig(**settings["shape"])).eval()
        torch.set_default_dtype(torch.float32)
        watch.stage("model")
        qs = quantspec.convert(model, weight_group_size=64, **options)
        watch.stage("convert")
    prompt = (torch.arange(300, device=device) * 7919 % qs.vocab_size)[None]
    for call in ("first", "second"):
        streamer = FirstToken(watch, f"{call}_token")
        qs.generate(prompt, max_new_tokens=16, do_sample=False, eos_token_id=None, streamer=streamer)
        watch.stage(f"{call}_rest")
    if settings["saves"]:
        qs.save_pretrained(folder)
        watch.stage("save")
    print(json.dumps(watch.row))


if __name__ == "__main__":
    main()
