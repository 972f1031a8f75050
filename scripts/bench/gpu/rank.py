"""One rank of `run`: loads the model as the handler does, measures one part, notes its results after each case.

Runs under torchrun: a JSON file that says what to measure, and a folder for the ranks' results.
"""

from __future__ import annotations

import gc
import json
import os
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from dsserve.config.handler import HandlerConfig
from dsserve.engine.build import build_engine
from dsserve.loading.load_clock import LoadClock
from dsserve.loading.sharded_model import ShardedModel
from dsserve.worker.base_handler import BaseDeepSpeedHandler
from dsserve.worker.exit import finish_rank
from dsserve.worker.load import load_sharded
from scripts.bench.gpu.device import StepBytes, held_bytes, read_bandwidth
from scripts.bench.gpu.engine import IDLE_STEPS, Group, Watch, summarise, summarise_admission
from scripts.bench.gpu.generate import continuous_batching, generate
from scripts.common.context import make_context
from scripts.model.random import draw_prompts

SHORT_PROMPT = 128  # of the stream beside which a long prompt is read


@dataclass(frozen=True)
class Spec:
    """What one part measures: `engine`, `kernels`, `autotp`, `generate` or `batching`, at one prompt length."""

    part: str
    model: str
    device: str
    dtype: str
    prompt: int
    batches: list[int]
    new_tokens: int
    repeats: int
    prefill_tokens: int | None = None
    chunk_tokens: int | None = None


class BenchRank(BaseDeepSpeedHandler):
    """A handler that measures instead of serving.

    Args:
        results: the file that holds this rank's results.
    """

    def __init__(self, spec: Spec, results: Path) -> None:
        super().__init__()
        self._spec = spec
        self._results = results
        self._found: dict[str, Any] = {"cases": {}, "skipped": {}}

    def run(self) -> None:
        """Measures all cases of the part."""
        spec = self._spec
        deepspeed: dict[str, Any] = {"dtype": spec.dtype}
        if spec.part == "kernels":
            deepspeed |= {"replace_with_kernel_inject": True, "max_out_tokens": spec.prompt + spec.new_tokens}
        yaml_config = {"deviceType": spec.device, "deepspeed": deepspeed}
        self.initialize(make_context("bench", spec.model, yaml_config))
        self._clock = LoadClock(self.rank.rank, self.device)
        self._note(bandwidth=read_bandwidth(self.device))
        measures = {"engine": self._engine_part, "kernels": self._engine_part, "autotp": self._autotp}
        measures.get(spec.part, self._one_device)()

    def _note(self, **more: Any) -> None:
        """Adds to the results, which are there whenever the part is ended."""
        self._found |= {**more, "memory": held_bytes(self.device), "load_s": self._clock.seconds}
        text = json.dumps(self._found)
        scratch = self._results.with_suffix(".part")
        scratch.write_text(text)
        scratch.rename(self._results)

    def _case(self, name: str, numbers: dict[str, Any]) -> None:
        self._found["cases"][name] = numbers
        self._note()

    def _skip(self, name: str, why: str) -> None:
        self._found["skipped"][name] = why
        self._note()

    def _prompts(self, batch: int, seed: int = 0) -> list[tuple[int, ...]]:
        return draw_prompts(self._vocabulary, self._spec.prompt, batch, seed)

    def _load(self) -> tuple[Any, ShardedModel]:
        config = HandlerConfig(model_path=self._spec.model)
        most = max(self._spec.batches)
        loaded, sharded = load_sharded(self.context, config, self.model_dir, self.rank, self.device, self._clock, most)
        self._vocabulary = sharded.module.config.vocab_size
        self._note(bytes=asdict(StepBytes.of(sharded.module, self.rank.world_size)))
        return loaded, sharded

    def _engine_part(self) -> None:
        loaded, sharded = self._load()
        spec, watch = self._spec, Watch()
        engine, rows = self._build(loaded, sharded, watch)
        group = Group(engine, self.rank, watch)
        if not self.rank.is_leader:
            group.follow()
            return
        group.together(self._prompts(1, seed=99), 8)
        for batch in (batch for batch in spec.batches if batch <= rows):
            rounds = [group.together(self._prompts(batch, seed), spec.new_tokens) for seed in range(spec.repeats)]
            self._case(str(batch), summarise(rounds))
        if sharded.workspace is None and rows > 1 and spec.new_tokens > IDLE_STEPS + 2:
            short = draw_prompts(self._vocabulary, min(SHORT_PROMPT, spec.prompt), spec.repeats + 1, seed=7)
            long, room = self._prompts(spec.repeats + 1, seed=8), spec.prompt + spec.new_tokens - len(short[0])
            rounds = [group.admit_beside(*pair, room) for pair in zip(short, long, strict=True)]
            self._case("admission", summarise_admission(rounds[1:]))
        group.end()

    def _build(self, loaded: Any, sharded: ShardedModel, watch: Watch) -> tuple[Any, int]:
        """The engine for the largest batch, and how many texts of the whole length its pages hold: larger batches are
        skipped, since texts that wait, or are computed again, are no measure of a step."""
        spec = self._spec
        config = self._config(max(spec.batches))
        engine, limits, _ = build_engine(sharded, loaded, config, self.rank, self.device, self._clock, watch)
        if sharded.workspace is not None:
            return engine, limits.max_running
        kv = engine._scheduler.kv
        rows = kv.tokens // (kv.pages_for(limits.max_model_len) * kv.page_tokens)
        for batch in (batch for batch in spec.batches if batch > rows):
            self._skip(
                str(batch), f"the KV cache holds {kv.tokens} tokens: {rows} texts of {limits.max_model_len} at a time"
            )
        return engine, min(rows, limits.max_running)

    def _config(self, rows: int) -> HandlerConfig:
        spec = self._spec
        return HandlerConfig(
            model_path=spec.model, max_running=max(rows, 2), max_model_len=spec.prompt + spec.new_tokens,
            max_new_tokens=spec.new_tokens, enable_prefix_caching=False,
            max_num_batched_tokens=spec.prefill_tokens or "auto", chunked_prefill_size=spec.chunk_tokens or "auto",
        )  # fmt: skip

    def _autotp(self) -> None:
        _, sharded = self._load()
        self._batches(lambda prompts: generate(sharded.module, prompts, self._spec.new_tokens, self._spec.repeats))

    def _one_device(self) -> None:
        from transformers import AutoModelForCausalLM

        spec = self._spec
        with self._clock.phase("from_pretrained"):
            model = AutoModelForCausalLM.from_pretrained(spec.model, dtype="auto").eval().to(self.device)
        model.generation_config.eos_token_id = None
        self._vocabulary = model.config.vocab_size
        self._note(bytes=asdict(StepBytes.of(model, 1)))
        way = generate if spec.part == "generate" else continuous_batching
        self._batches(lambda prompts: way(model, prompts, spec.new_tokens, spec.repeats))

    def _batches(self, measure: Any) -> None:
        for batch in self._spec.batches:
            try:
                self._case(str(batch), measure(self._prompts(batch)))
            except torch.OutOfMemoryError:
                self._skip(str(batch), "out of memory")
                gc.collect()
                torch.cuda.empty_cache()


def main() -> None:
    spec, folder = sys.argv[1:]
    results = Path(folder, f"{os.environ['RANK']}.json")
    BenchRank(Spec(**json.loads(Path(spec).read_text())), results).run()
    if torch.distributed.is_initialized():
        torch.distributed.barrier()
    finish_rank()


if __name__ == "__main__":
    main()
