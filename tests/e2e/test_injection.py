"""Kernel injection through a real TorchServe and real ranks: on GPUs with DeepSpeed's kernels in fp16 (`-m gpu`), on
CPUs over the stand-in of the kernels in fp32.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
import torch
from transformers import AutoModel, AutoTokenizer, BertConfig, BertModel, LlamaConfig, LlamaForCausalLM

from scripts.pack import archive as packaging
from scripts.pack.archive import Choice
from scripts.serve import server
from tests.e2e.conftest import Served, package_with, serve
from tests.programs.injection.cases import TIE
from tests.programs.injection.cell import LIMITS

FOLDER = Path(__file__).parent / "kernel_handlers"
ROOT = FOLDER.parents[2]
RUNNING, WORKSPACE = 3, 96
GPUS = torch.cuda.device_count()
DTYPES = {"cpu": "fp32", "gpu": "fp16"}
TEXT = "the cat sat on a mat and looked at seven small birds in an old tree by the river until night came"
WORDS = TEXT.split()
PROMPTS = [
    " ".join(WORDS[start : start + count]) for start, count in [(0, 1), (2, 17), (5, 4), (1, 9), (8, 2), (3, 12)]
]
NEW_TOKENS = 12

needs_gpus = pytest.mark.skipif(GPUS < 2, reason=f"2 GPUs are needed, {GPUS} visible")
DEVICES = [pytest.param("cpu"), pytest.param("gpu", marks=[pytest.mark.gpu, needs_gpus])]


@dataclass(frozen=True)
class Injected:
    """A server, and the same weights in transformers."""

    served: Served
    folder: Path
    device: str

    def expected(self, prompt: str) -> str | None:
        """transformers' greedy text in fp32; None where two logits are a tie in the served dtype."""
        tokenizer = AutoTokenizer.from_pretrained(self.folder)
        device = "cuda" if self.device == "gpu" else "cpu"
        model = LlamaForCausalLM.from_pretrained(self.folder, dtype=torch.float32).to(device).eval()
        ids = tokenizer(prompt, return_tensors="pt").input_ids.to(device)
        output = model.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=NEW_TOKENS, do_sample=False, pad_token_id=0,
            eos_token_id=None, return_dict_in_generate=True, output_logits=True,
        )  # fmt: skip
        for logits in output.logits:
            best, second = logits[0].topk(2).values
            if best - second <= TIE * LIMITS[DTYPES[self.device]] * logits.square().mean().sqrt():
                return None
        return tokenizer.decode(output.sequences[0, ids.shape[1] :], skip_special_tokens=True)


def prepare(folder: Path, tokenizer: Path, dtype: str) -> Path:
    """A random Llama with grouped KV heads that reads SmolLM2's vocabulary."""
    torch.manual_seed(5)
    config = LlamaConfig(
        hidden_size=256, intermediate_size=512, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        vocab_size=49152, tie_word_embeddings=False, initializer_range=0.1, max_position_embeddings=256,
        bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    model = LlamaForCausalLM(config).to({"fp32": torch.float32, "fp16": torch.float16}[dtype])
    model.save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / name).symlink_to(tokenizer / name)
    return folder


@pytest.fixture(scope="module", params=DEVICES)
def injected(
    request: pytest.FixtureRequest, smollm2: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Injected]:
    device = request.param
    folder = tmp_path_factory.mktemp("injected")
    model = prepare(folder / "model", smollm2, DTYPES[device])
    with pytest.MonkeyPatch.context() as patch:
        # The stand-in of the kernels is a module of the tests.
        patch.setenv("PYTHONPATH", os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]))
        patch.setattr(packaging, "ENTRY", os.path.relpath(FOLDER / "injected_handler.py", ROOT / packaging.HANDLERS))
        choice = Choice(tp="2", device=device, dtype=DTYPES[device])
        deepspeed = {"replace_with_kernel_inject": True, "max_out_tokens": WORKSPACE}
        archive = package_with(folder, "injected", model, choice, deepspeed, max_running=RUNNING, max_waiting=16)
        served = serve(folder / "run", "injected", archive)
    yield Injected(served, model, device)
    assert server.stop(served.run) == 0, "processes had to be killed at the end"


def ask(prompt: str, **more: Any) -> dict[str, Any]:
    return {"prompt": prompt, "max_new_tokens": NEW_TOKENS, "ignore_eos": True, **more}


def test_requests_in_batches_get_the_texts_of_transformers(injected: Injected) -> None:
    """Twice as many at once as a batch takes, of unequal length."""
    with ThreadPoolExecutor(len(PROMPTS)) as pool:
        texts = list(pool.map(lambda prompt: injected.served.text(ask(prompt)), PROMPTS))
    expected = [injected.expected(prompt) for prompt in PROMPTS]
    compared = [(text, wanted) for text, wanted in zip(texts, expected, strict=True) if wanted is not None]
    assert len(compared) > len(PROMPTS) // 2
    assert all(text == wanted for text, wanted in compared)


def test_it_says_which_engine_serves(injected: Injected) -> None:
    client = openai.OpenAI(base_url=injected.served.base_url, api_key="none")
    engine = client.models.list().data[0].model_extra["engine"]  # type: ignore[index]
    assert engine["name"] == "kernel_injection" and engine["tensor_parallel_size"] == 2 and "fallback" not in engine


def test_a_stream_is_the_same_text_and_one_that_is_left_harms_nobody(injected: Injected) -> None:
    whole = injected.served.text(ask(PROMPTS[1]))
    with httpx.stream("POST", injected.served.url, json=ask(PROMPTS[3], stream=True), timeout=60) as response:
        next(response.iter_lines())  # then the client goes
    events = injected.served.events(ask(PROMPTS[1]))
    assert events[-1] == "[DONE]"
    assert "".join(json.loads(event)["text"] for event in events[:-1]) == whole


def test_what_the_workspace_does_not_hold_is_refused_with_the_numbers(injected: Injected) -> None:
    response = injected.served.ask(ask("word " * 120))
    assert response.status_code == 413 and str(WORKSPACE) in response.json()["error"]["message"]
    response = injected.served.ask({**ask(PROMPTS[1]), "max_new_tokens": WORKSPACE - 3})
    assert response.status_code == 413 and str(WORKSPACE) in response.json()["error"]["message"]
    assert injected.served.text(ask(PROMPTS[0]))


def test_sampling_repeats_with_its_seed(injected: Injected) -> None:
    body = ask(PROMPTS[2], temperature=1.5, top_p=0.9, seed=3)
    first = injected.served.text(body)
    assert injected.served.text(body) == first != injected.served.text({**body, "seed": 4})


@pytest.mark.parametrize("device", DEVICES)
def test_a_bert_handler_of_ones_own_is_right(device: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(1)
    config = BertConfig(
        hidden_size=128, num_hidden_layers=3, num_attention_heads=4, intermediate_size=512, vocab_size=997,
        hidden_act="gelu_new", max_position_embeddings=WORKSPACE,
    )  # fmt: skip
    dtype = {"cpu": torch.float32, "gpu": torch.float16}[device]
    BertModel(config).to(dtype).save_pretrained(tmp_path / "model")
    settings = (Path(__file__).parent / "own_handler" / "model-config.yaml").read_text()
    settings = settings.replace("WRITTEN_BY_THE_TEST", str(tmp_path / "model")).replace(
        "deviceType: cpu", f"deviceType: {device}"
    )
    settings = settings.replace(
        "replace_with_kernel_inject: false", f"replace_with_kernel_inject: true\n  max_out_tokens: {WORKSPACE}"
    )
    (tmp_path / "model-config.yaml").write_text(settings.replace("dtype: fp32", f"dtype: {DTYPES[device]}"))
    command = [sys.executable, "-m", "model_archiver.model_packaging", "--model-name", "encoder", "--version", "1.0"]
    command += ["--handler", str(FOLDER / "encoder_handler.py"), "--extra-files", str(ROOT / "handlers")]
    command += ["--config-file", str(tmp_path / "model-config.yaml"), "--export-path", str(tmp_path)]
    subprocess.run(command, check=True, capture_output=True)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]))
    served = serve(tmp_path / "run", "encoder", tmp_path / "encoder.mar")
    try:
        rows = [[5, 7, 11, 13, 17], [19], [23, 29, 31], list(range(40, 70))]

        def ask_for(ids: list[int]) -> torch.Tensor:
            return torch.tensor(httpx.post(served.url, json={"ids": ids}, timeout=60).json())

        with ThreadPoolExecutor(4) as pool:
            found = list(pool.map(ask_for, rows))
        reference = AutoModel.from_pretrained(tmp_path / "model", dtype=torch.float32).eval()
        for ids, mean in zip(rows, found, strict=True):
            with torch.inference_mode():
                wanted = reference(torch.tensor([ids])).last_hidden_state[0].mean(0)
            error = torch.linalg.vector_norm(mean - wanted) / torch.linalg.vector_norm(wanted)
            assert error < LIMITS[DTYPES[device]]
        assert "self-check: logits of the kernels differ by" in served.worker_log()
    finally:
        server.stop(served.run)
