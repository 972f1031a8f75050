"""The `handler:` section of model-config.yaml, typed and checked, and the one truth for the TP size.

Does not read the `deepspeed:` section (`deepspeed`) and does not look at weights (`hf_model`).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from dsserve.core.errors import LoadError

YAML_FILE = "model-config.yaml"
# Texts that run at the same time where the settings leave it open, by the kind of device. A CPU computes more at a time
# no faster; the kernels of kernel injection hold a whole context for each.
AUTO_RUNNING = {"cuda": 256, "cpu": 64}
AUTO_BATCH = 16
# Texts that wait where the settings leave it open and nobody says how many requests TorchServe hands over.
AUTO_WAITING = 768
# Tokens of a step, and of one in which running texts wait for prompts, where the settings leave them open: on a GPU of
# so many GiB, on a smaller one, and on a CPU. About 20 ms of an 8 billion parameter model on one H200 are 1024 tokens.
LARGE_GPU_GIB = 70
AUTO_TOKENS = {"large": 8192, "cuda": 2048, "cpu": 256}
AUTO_CHUNK = {"large": 1024, "cuda": 512, "cpu": 256}

# Keys of upstream's DeepSpeed example, and what took their place.
_UPSTREAM_KEYS = {
    "model_name": "`handler.model_path` (a folder or a hub id)",
    "max_length": "`handler.max_new_tokens` (output only) and `handler.max_model_len` (prompt + output)",
    "manual_seed": "the request parameter `seed`",
    "low_cpu_mem_usage": "nothing: leave it out",
    "dtype": "`deepspeed.dtype`",
    "torch_dtype": "`deepspeed.dtype`",
    "tp_size": "`torchrun.nproc-per-node`",
    "checkpoint": "`deepspeed.checkpoint`",
    "micro_batch_size": "`batchSize`",
    "batch_size": "`batchSize`",
    "prefix_cache_rows": "`handler.enable_prefix_caching` (true or false)",
    "max_batch_prefill_tokens": "`handler.max_num_batched_tokens` (a step) and `handler.chunked_prefill_size` (one in "
    "which running texts wait)",
}


class HandlerConfig(BaseModel):
    """What `DeepSpeedHandler` reads from `handler:`. Lengths are in tokens; `None` means "derived at load"."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, protected_namespaces=())

    model_path: str = Field(
        min_length=1, description="folder (absolute, or relative to the model folder) or hub id of the model"
    )
    revision: str | None = Field(None, description="revision of a hub id; default: the newest")
    shard_cache: str | None = Field(
        None, description="folder that `make shard` wrote; default: `shards` in the model's folder, if it is there"
    )
    trust_remote_code: bool = Field(False, description="run model code that comes with the weights")
    max_model_len: int | None = Field(
        None, ge=2, description="longest prompt + output, in tokens; default: the model's own context"
    )
    max_new_tokens: int = Field(256, ge=1, description="output tokens of a request that names no number")
    max_new_tokens_limit: int | None = Field(
        None, ge=1, description="ceiling of a request's output tokens; default: `max_model_len`"
    )
    max_running: Literal["auto"] | Annotated[int, Field(ge=1, le=1024)] = Field(
        "auto",
        description="texts that generate at the same time, at most; what they hold is a matter of memory alone. "
        "`auto`: 256 on a GPU, 64 on a CPU, 16 with kernel injection",
    )
    max_waiting: Literal["auto"] | Annotated[int, Field(ge=0)] = Field(
        "auto",
        description="texts that wait for a row or for pages; more are answered with 429. `auto`: as many as "
        "TorchServe's `batchSize` has room for beside those that run",
    )
    max_n: int = Field(128, ge=1, le=128, description="texts for one prompt (`n`)")
    max_stops: int = Field(4, ge=0, le=64, description="stop strings of one request")
    enable_prefix_caching: bool = Field(
        True,
        description="prompts that begin like another text use its pages of the KV cache, while it runs and after its "
        "end, and compute the rest",
    )
    kv_memory_fraction: float = Field(
        0.9,
        gt=0,
        le=1,
        description="largest share of the free memory that the KV cache takes (AutoTP). Free is what weights and "
        "passes leave: a GPU measures a pass of prompts at load. The rest is for graphs and libraries. Lower it where "
        "another program uses the GPU. On a CPU it takes 4 GiB at most, or what one text needs",
    )
    max_num_batched_tokens: Literal["auto"] | Annotated[int, Field(ge=16)] = Field(
        "auto",
        description="most tokens of a step, of prompts and one of each running text (AutoTP). `auto`: 8192 on a GPU of "
        "70 GiB and more, 2048 on a smaller one, 256 on a CPU. Fewer leave more memory for the KV cache",
    )
    chunked_prefill_size: Literal["auto"] | Annotated[int, Field(ge=16)] = Field(
        "auto",
        description="most tokens of a step in which running texts wait for prompts; prompts get at least half. A "
        "longer prompt is read in parts (chunked prefill). More reads prompts sooner; fewer keep streams even. "
        "`auto`: 1024 on a GPU of 70 GiB and more, 512 on a smaller one, 256 on a CPU",
    )
    waiting_served_ratio: float = Field(
        0.3,
        gt=0,
        description="a step may have `max_num_batched_tokens` if at least two requests join free rows, and at least "
        "this many times as many as run. The running texts then wait once for the whole burst. A single prompt "
        "stops nobody. TGI has the same name and value",
    )
    num_scheduler_steps: int = Field(
        128, ge=1, le=1024, description="most steps in one call of the handler; 1: each token leaves alone"
    )
    max_stream_delay_ms: float = Field(
        150.0,
        ge=0,
        description="longest call of the handler while a client streams. Tokens leave at the end of a call: a larger "
        "value is faster, a smaller one streams more finely",
    )
    pack_weights: Literal["auto"] | bool = Field(
        "auto",
        description="one matmul for q, k and v, and one for gate and up. On a CPU the weights are also laid out for "
        "oneDNN",
    )
    compiled_ops: Literal["auto"] | bool = Field(
        "auto",
        description="fused operations for RMS norm, rotary embedding and KV writes: C++ on a CPU (needs g++), Triton "
        "on a GPU. A GPU also fuses the gated MLP, matmuls of up to 32 rows (64 with 8-bit weights), decode attention, "
        "and, in layers of Llama's form, each sum over the ranks with the addition and norm behind it",
    )
    cuda_graphs: bool = Field(
        True,
        description="GPU only: CUDA graphs for decode steps (by their number of texts), for steps that read prompts "
        "(by their tokens, up to 4096), and for sampling",
    )
    launch_ahead: bool = Field(
        True,
        description="GPU with AutoTP only: a step starts before the tokens of the step before are read, unless a text "
        "depends on them. false: each step waits",
    )
    num_threads: int | None = Field(
        None, ge=1, description="CPU threads of a rank; default: cores // ranks, 1 with a GPU"
    )
    warmup: bool = Field(True, description="run every prefill and decode shape once at load")
    collective_timeout: float = Field(
        60.0,
        gt=0,
        description="s; longest call of the engine: a longer one ends the worker. This value + 5 s must be below "
        "`responseTimeout`",
    )
    request_timeout: float = Field(
        600.0, gt=0, description="s; longest time of a request, and the default of its parameter `timeout`"
    )
    log_format: Literal["text", "json"] = Field(
        "text", description="the worker's log lines; json: one object a line, with `request_id` where one is concerned"
    )
    log_level: Literal["debug", "info", "warning", "error"] = Field(
        "info", description="level of rank 0 while it serves; the other ranks write warnings once they are loaded"
    )

    @property
    def most_running(self) -> int:
        """`max_running`, or what `auto` gives at most on any device."""
        return max(AUTO_RUNNING.values()) if self.max_running == "auto" else self.max_running

    def rows(self, device_type: str) -> int:
        """`max_running`, or what `auto` gives at most on a device of this kind."""
        return AUTO_RUNNING[device_type] if self.max_running == "auto" else self.max_running

    @property
    def batch_rows(self) -> int:
        """The same with kernel injection."""
        return AUTO_BATCH if self.max_running == "auto" else self.max_running

    @property
    def stated_texts(self) -> int:
        """Texts that run or wait at most, as far as the settings say so."""
        return sum(number for number in (self.max_running, self.max_waiting) if number != "auto")

    def step_tokens(self, device_type: str, gib: float) -> tuple[int, int]:
        """`max_num_batched_tokens` and `chunked_prefill_size` on a device of this kind with so much memory."""
        kind = "large" if device_type == "cuda" and gib >= LARGE_GPU_GIB else device_type
        step = AUTO_TOKENS[kind] if self.max_num_batched_tokens == "auto" else self.max_num_batched_tokens
        chunk = AUTO_CHUNK[kind] if self.chunked_prefill_size == "auto" else self.chunked_prefill_size
        return step, min(chunk, step)

    @model_validator(mode="after")
    def _default_within_limit(self) -> HandlerConfig:
        if self.max_new_tokens_limit is not None and self.max_new_tokens > self.max_new_tokens_limit:
            raise ValueError(
                f"max_new_tokens {self.max_new_tokens} is above max_new_tokens_limit {self.max_new_tokens_limit}"
            )
        return self


def read_handler_config(yaml_config: Mapping[str, Any]) -> HandlerConfig:
    """Reads and checks the `handler:` section.

    Raises:
        LoadError: the section is missing, a key is unknown (upstream's keys are answered with the new name),
            or a value has the wrong type or range.
    """
    section = yaml_config.get("handler")
    if not isinstance(section, Mapping):
        raise LoadError(
            f"{YAML_FILE}: section `handler:` is missing; write `handler: {{model_path: <folder or hub id>}}`"
        )
    for old, new in _UPSTREAM_KEYS.items():
        if old in section:
            raise LoadError(f"{YAML_FILE}: handler.{old} is not a key of this handler; use {new} instead")
    try:
        return HandlerConfig.model_validate(dict(section))
    except ValidationError as error:
        raise LoadError(f"{YAML_FILE}: {describe(error, 'handler', list(HandlerConfig.model_fields))}") from None


def describe(error: ValidationError, section: str, allowed: list[str]) -> str:
    """One line for pydantic's first complaint: the key, what is wrong, and for an unknown key the allowed ones."""
    first = error.errors()[0]
    key = ".".join([section, *(str(part) for part in first["loc"] if not str(part).startswith("literal["))])
    if first["type"] == "extra_forbidden":
        return f"{key} is unknown; allowed: {', '.join(sorted(allowed))}"
    if first["type"] == "missing":
        return f"{key} is missing; add it"
    return f"{key}: {first['msg']} (found {first['input']!r:.80})"


def check_tp_size(yaml_config: Mapping[str, Any], tp_size: int | None, world_size: int) -> int:
    """Returns the size of the TP group: `torchrun: nproc-per-node` states it, everything else must agree.

    Args:
        yaml_config: model-config.yaml.
        tp_size: `tensor_parallel.tp_size` of the `deepspeed` section, None where it is left out.
        world_size: torchrun's WORLD_SIZE, 1 without torchrun.

    Raises:
        LoadError: the sizes differ; the message names all of them.
    """
    torchrun = yaml_config.get("torchrun") or {}
    nproc = torchrun.get("nproc-per-node", torchrun.get("nproc_per_node"))
    device_ids = yaml_config.get("deviceIds")
    stated = {
        "deepspeed.tensor_parallel.tp_size": tp_size,
        "torchrun.nproc-per-node": nproc,
        "len(deviceIds)": len(device_ids) if isinstance(device_ids, list) else None,
    }
    if any(size is not None and size != world_size for size in stated.values()):
        found = ", ".join(f"{name} = {'not set' if size is None else size}" for name, size in stated.items())
        raise LoadError(
            f"{YAML_FILE}: the sizes of the TP group disagree: {found}; {world_size} rank(s) were started. "
            "Set torchrun.nproc-per-node, leave tp_size out, and give as many deviceIds (or none)"
        )
    return world_size
