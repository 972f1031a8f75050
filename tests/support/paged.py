"""Engines over a real small model with as many pages as a test wants, on one rank or on several."""

from __future__ import annotations

import math
from typing import Any

import torch

from dsserve.core.request import GenerationRequest
from dsserve.engine.engine import Engine
from dsserve.engine.scheduler import Scheduler
from dsserve.engine.token_budget import TokenBudget
from dsserve.kv.manager import KVManager
from dsserve.parallel.rank import RankInfo
from dsserve.runner.autotp import KVSize, ModelRunner
from dsserve.runner.base import Runner

ALONE = RankInfo(0, 0, 1, 1)


def make_scheduler(
    size: KVSize, step: int = 4096, chunk: int | None = None, ratio: float = math.inf, reuse: bool = True
) -> Scheduler:
    """A book of texts over all pages of a cache.

    Args:
        step, chunk, ratio: see `TokenBudget`.
    """
    kv = KVManager(size.pages, size.page_tokens, reuse)
    return Scheduler(size.rows, kv, TokenBudget(step, chunk or step, ratio))


def make_runner(module: Any, size: KVSize, rank: RankInfo = ALONE, device: str = "cpu") -> ModelRunner:
    return ModelRunner(module, size, rank, torch.device(device))


def make_engine(
    runner: Runner, scheduler: Scheduler, make_text: Any, rank: RankInfo = ALONE, eos: int | None = None, **more: Any
) -> Engine:
    return Engine(runner, rank, make_text, frozenset() if eos is None else frozenset({eos}), scheduler, **more)


def greedy(name: str, prompt: tuple[int, ...], new: int, **more: Any) -> GenerationRequest:
    return GenerationRequest(name, prompt, new, **more)
