"""Every shape on 1 to 8 ranks is transformers' model to 1e-4 in fp32, or is refused with the sizes that work."""

from __future__ import annotations

from typing import Any

import pytest

from tests.programs.distributed.shapes import SHAPES, UNREAD
from tests.support.ranks import run_ranks

RANKS = (1, 2, 3, 4, 8)
EXACT = None  # else what the refusal says

# Shape (attention heads / KV heads) -> what 1, 2, 3, 4 and 8 ranks give.
TABLE: dict[str, tuple[str | None, ...]] = {
    "Llama 8/8": (EXACT, EXACT, EXACT, EXACT, EXACT),
    "Llama 8/4": (EXACT, EXACT, EXACT, EXACT, EXACT),
    "Llama 8/2": (EXACT, EXACT, EXACT, EXACT, EXACT),
    "Llama 9/3": (EXACT, EXACT, EXACT, EXACT, EXACT),
    "Llama 4/2": (EXACT, EXACT, EXACT, EXACT, "4 attention head(s)"),
    "Qwen2 8/4": (EXACT, EXACT, EXACT, EXACT, EXACT),
    "Qwen2 9/3": (EXACT, EXACT, EXACT, EXACT, EXACT),
    "Qwen3 8/2": (EXACT, EXACT, EXACT, EXACT, EXACT),
    "Mistral 8/2": (EXACT, EXACT, EXACT, EXACT, EXACT),
    "Gemma 8/1": (EXACT, EXACT, EXACT, EXACT, EXACT),
    "Gemma 2 8/4": (EXACT, EXACT, EXACT, EXACT, EXACT),
    "Gemma 3 4/1": (EXACT, EXACT, EXACT, EXACT, "4 attention head(s)"),
    "Phi-3 8/2": (EXACT, EXACT, "2 KV head(s)", "2 KV head(s)", "2 KV head(s)"),
    "Phi-3 8/4": (EXACT, EXACT, EXACT, EXACT, "4 KV head(s)"),
    "OPT 8": (EXACT, EXACT, EXACT, EXACT, EXACT),
    "OPT 9": (EXACT, EXACT, EXACT, EXACT, EXACT),
    "GPT-NeoX 8": (EXACT, EXACT, EXACT, EXACT, EXACT),
    "GPT-NeoX 9": (EXACT, EXACT, EXACT, EXACT, EXACT),
    "BLOOM 8": (EXACT, EXACT, EXACT, EXACT, EXACT),
    "BLOOM 9": (EXACT, EXACT, EXACT, EXACT, EXACT),
}
LIMIT = 1e-4
# Uneven heads (9 over 4 ranks: 3, 2, 2, 2) and a position bias of the rank's own.
STREAMS = {1: [], 2: [], 3: ["Qwen2 8/4", "BLOOM 8"], 4: ["Llama 9/3", "GPT-NeoX 9"], 8: []}
KV_HEADS = {
    ("Llama 8/4", 3): [2, 1, 1],
    ("Llama 8/2", 3): [2, 1, 1],  # two copies of each
    ("Llama 8/2", 4): [1, 1, 1, 1],
    ("Llama 9/3", 4): [3, 2, 2, 2],  # three copies of each
    ("Llama 8/4", 8): [1] * 8,
    ("BLOOM 9", 8): [2] + [1] * 7,
}

Outcomes = list[dict[str, dict[str, Any]]]


# Four and eight ranks on two cores take a minute and more: `make test-long`.
PARAMS = [pytest.param(ranks, id=f"TP={ranks}", marks=[pytest.mark.long] if ranks > 3 else []) for ranks in RANKS]


@pytest.fixture(scope="module", params=PARAMS)
def ranks(request: pytest.FixtureRequest) -> int:
    return request.param


@pytest.fixture(scope="module")
def outcomes(ranks: int, tmp_path_factory: pytest.TempPathFactory) -> Outcomes:
    """All shapes in one start of the ranks: rank -> shape -> outcome."""
    folder = str(tmp_path_factory.mktemp("shapes"))
    # Without g++ on PATH two ranks use gloo too: shared memory spins, five times longer beside other programs.
    return run_ranks(
        "tests.programs.distributed.shapes:outcomes", ranks, folder=folder, streams=STREAMS[ranks], env={"PATH": folder}
    )


def test_the_table_names_every_shape() -> None:
    assert list(TABLE) == list(SHAPES)


@pytest.mark.parametrize("shape", TABLE)
def test_logits_are_transformers_or_the_shape_is_refused(outcomes: Outcomes, ranks: int, shape: str) -> None:
    refusal = TABLE[shape][RANKS.index(ranks)]
    for found in (rank[shape] for rank in outcomes):
        if refusal is not None:
            assert refusal in found["refused"] and f"nproc-per-node to {refusal[0]} or less" in found["refused"]
            continue
        assert "refused" not in found and found["cached"]
        assert found["largest"] > 1 and found["packed_layers"] > 0
        assert max(found["logits"], found["engine"], found["packed"]) < LIMIT


def test_the_handler_refuses_before_it_reads_weights(outcomes: Outcomes, ranks: int) -> None:
    expected = f"LlamaForCausalLM on {ranks} ranks: it has 1 attention head(s)"
    for rank in outcomes:
        assert (expected if ranks > 1 else "not a whole safetensors file") in rank[UNREAD]["refused"]


def test_every_rank_has_kv_heads(outcomes: Outcomes, ranks: int) -> None:
    for (shape, size), heads in KV_HEADS.items():
        if size == ranks:
            assert [rank[shape]["kv_heads"] for rank in outcomes] == heads
    assert all(found.get("kv_heads", 1) >= 1 for rank in outcomes for found in rank.values())


def test_requests_that_join_and_leave_get_the_tokens_of_generate(outcomes: Outcomes, ranks: int) -> None:
    for shape in STREAMS[ranks]:
        found = outcomes[0][shape]
        assert found["streamed"] == found["generated"]
        assert len({tuple(tokens) for tokens in found["streamed"]}) == len(found["streamed"])
