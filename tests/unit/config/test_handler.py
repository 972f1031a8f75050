"""The `handler:` section and the one truth for the TP size."""

from __future__ import annotations

import pytest

from dsserve.config.handler import HandlerConfig, check_tp_size, read_handler_config
from dsserve.config.torchserve import check_server_settings
from dsserve.core.errors import LoadError


def read(**section: object) -> HandlerConfig:
    return read_handler_config({"handler": section})


def test_defaults() -> None:
    config = read(model_path="m")
    assert (config.max_new_tokens, config.num_scheduler_steps, config.pack_weights) == (256, 128, "auto")
    assert config.trust_remote_code is False


@pytest.mark.parametrize(
    ("section", "words"),
    [
        ({}, ["handler.model_path", "missing"]),
        ({"model_path": ""}, ["handler.model_path"]),
        ({"model_path": "m", "max_new_tokens": 0}, ["handler.max_new_tokens", "1"]),
        ({"model_path": "m", "max_new_tokens": "9"}, ["handler.max_new_tokens"]),
        ({"model_path": "m", "max_new_tokens": 9, "max_new_tokens_limit": 8}, ["9", "8"]),
        ({"model_path": "m", "temperture": 1}, ["handler.temperture", "unknown", "max_model_len"]),
        ({"model_path": "m", "model_name": "x"}, ["handler.model_name", "handler.model_path"]),
        ({"model_path": "m", "max_length": 50}, ["handler.max_length", "max_new_tokens"]),
        ({"model_path": "m", "manual_seed": 40}, ["handler.manual_seed", "seed"]),
    ],
)
def test_a_bad_section_names_the_key_and_the_mend(section: dict[str, object], words: list[str]) -> None:
    with pytest.raises(LoadError) as raised:
        read(**section)
    message = str(raised.value)
    assert "\n" not in message
    for word in ["model-config.yaml", *words]:
        assert word in message


def test_a_missing_section_says_what_to_write() -> None:
    with pytest.raises(LoadError, match="model_path"):
        read_handler_config({})


def test_tp_size_is_the_world_size_when_nothing_disagrees() -> None:
    assert check_tp_size({}, None, 2) == 2
    assert check_tp_size({"torchrun": {"nproc-per-node": 2}, "deviceIds": [0, 1]}, 2, 2) == 2


@pytest.mark.parametrize(
    ("yaml_config", "tp_size", "world_size"),
    [
        ({"torchrun": {"nproc-per-node": 2}}, 4, 2),
        ({"torchrun": {"nproc-per-node": 4}}, None, 2),
        ({"torchrun": {"nproc-per-node": 2}, "deviceIds": [0]}, None, 2),
        ({}, 2, 1),
    ],
)
def test_disagreeing_tp_sizes_name_all_three(yaml_config: dict, tp_size: int | None, world_size: int) -> None:
    with pytest.raises(LoadError) as raised:
        check_tp_size(yaml_config, tp_size, world_size)
    for name in ("tp_size", "torchrun.nproc-per-node", "deviceIds", str(world_size)):
        assert name in str(raised.value)


GOOD = {"continuousBatching": True, "parallelType": "tp", "minWorkers": 1, "maxWorkers": 1}


def test_good_server_settings_give_the_number_of_slots() -> None:
    check_server_settings(GOOD, 17, sequences=16)


@pytest.mark.parametrize("key", sorted(GOOD))
def test_server_settings_that_lose_requests_are_refused(key: str) -> None:
    with pytest.raises(LoadError, match=key):
        check_server_settings({**GOOD, key: 2}, 17, 16)
    with pytest.raises(LoadError, match=key):
        check_server_settings({name: value for name, value in GOOD.items() if name != key}, 17, 16)


@pytest.mark.parametrize("size", [0, -1, True, "4096", 1.5, None])
def test_what_is_no_size_of_a_queue_is_refused(size: object) -> None:
    with pytest.raises(LoadError, match="jobQueueSize"):
        check_server_settings({**GOOD, "jobQueueSize": size}, 17, 16)


@pytest.mark.parametrize(
    ("queue", "rank", "warned"), [({}, "0", True), ({}, "1", False), ({"jobQueueSize": 4096}, "0", False)]
)
def test_a_queue_that_a_burst_would_fill_is_told_once(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, queue: dict[str, int], rank: str, warned: bool
) -> None:
    monkeypatch.setenv("RANK", rank)
    check_server_settings(GOOD | queue, 17, 16)
    assert ("jobQueueSize 100: in a burst" in caplog.text) is warned


def test_async_communication_is_refused() -> None:
    with pytest.raises(LoadError, match="asyncCommunication"):
        check_server_settings({**GOOD, "asyncCommunication": True}, 17, 16)
