"""A user's own handler, written as docs/own-handler.md shows it, packed and served by TorchServe with two ranks."""

from __future__ import annotations

import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx

from scripts.serve import server
from tests.e2e.conftest import serve

FOLDER = Path(__file__).parent / "own_handler"
ROOT = FOLDER.parents[2]


def test_a_handler_of_ones_own_is_sharded_and_right(smollm2: Path, tmp_path: Path) -> None:
    config = (FOLDER / "model-config.yaml").read_text().replace("WRITTEN_BY_THE_TEST", str(smollm2))
    (tmp_path / "model-config.yaml").write_text(config)
    command = [sys.executable, "-m", "model_archiver.model_packaging", "--model-name", "nextword", "--version", "1.0"]
    command += ["--handler", str(FOLDER / "next_word_handler.py"), "--extra-files", str(ROOT / "handlers")]
    command += ["--config-file", str(tmp_path / "model-config.yaml"), "--export-path", str(tmp_path)]
    subprocess.run(command, check=True, capture_output=True)
    served = serve(tmp_path / "run", "nextword", tmp_path / "nextword.mar")
    try:

        def ask(prompt: str) -> str:
            return httpx.post(served.url, content=prompt, headers={"content-type": "text/plain"}, timeout=60).text

        prompts = ["The capital of France is", "One, two, three,", "The opposite of hot is", "Monday, Tuesday,"]
        with ThreadPoolExecutor(4) as pool:
            assert list(pool.map(ask, prompts)) == ["Paris", "four", "cold", "Wednesday"]
        log = served.worker_log()
        assert "rank 0: model.layers.0.self_attn.q_proj [384, 576]" in log
        assert "rank 1: model.layers.0.self_attn.q_proj [192, 576]" in log
    finally:
        server.stop(served.run)


def test_the_page_shows_this_very_handler() -> None:
    code = (FOLDER / "next_word_handler.py").read_text().split('"""\n', 1)[1].strip()
    assert code in (ROOT / "docs" / "own-handler.md").read_text()
