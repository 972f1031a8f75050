"""The `deepspeed:` section: inline keys, ds-config.json, and what must not reach DeepSpeed."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch

os.environ.setdefault("DS_ACCELERATOR", "cpu")

from dsserve.config.deepspeed import DeepSpeedSettings, read_deepspeed_settings
from dsserve.core.errors import LoadError


def read(section: Any, folder: Path, file: Any = None, world_size: int = 1, **yaml_config: Any) -> DeepSpeedSettings:
    if file is not None:
        text = file if isinstance(file, str) else json.dumps(file)
        (folder / "ds-config.json").write_text(text)
    config = {"deepspeed": section, **yaml_config}
    return read_deepspeed_settings(config, folder, world_size, torch.float32)


def test_inline_keys_and_a_file_give_the_same(tmp_path: Path) -> None:
    keys = {"dtype": "bf16", "replace_with_kernel_inject": False, "max_out_tokens": 2048}
    inline = read(keys, tmp_path)
    from_file = read({"config": "ds-config.json"}, tmp_path, keys)
    assert inline == from_file
    assert inline.dtype is torch.bfloat16
    assert inline.init == {"replace_with_kernel_inject": False, "max_out_tokens": 2048}


def test_aliases_are_deepspeeds_current_names(tmp_path: Path) -> None:
    settings = read({"kernel_inject": True, "tp": {"tp_size": 1}, "max_tokens": 10}, tmp_path)
    assert settings.kernel_inject and settings.tp_size == 1 and settings.init["max_out_tokens"] == 10


def test_the_same_value_twice_is_fine_and_two_values_are_not(tmp_path: Path) -> None:
    section = {"config": "ds-config.json", "tp": {"tp_size": 1}}
    assert read(section, tmp_path, {"tensor_parallel": {"tp_size": 1}}).tp_size == 1
    with pytest.raises(LoadError, match="two values"):
        read({"config": "ds-config.json", "kernel_inject": False}, tmp_path, {"replace_with_kernel_inject": True})


def test_auto_is_as_if_left_out_and_our_keys_never_reach_deepspeed(tmp_path: Path) -> None:
    settings = read({"dtype": "auto", "self_check": False, "tp": {"tp_size": "auto"}}, tmp_path)
    assert settings.init == {} and settings.dtype is torch.float32 and settings.self_check is False


def test_auto_injection_tries_the_kernels_and_may_fall_back(tmp_path: Path) -> None:
    for key in ("replace_with_kernel_inject", "kernel_inject"):
        settings = read({key: "auto"}, tmp_path)
        assert settings.kernel_inject and settings.may_fall_back
        assert settings.init == {"replace_with_kernel_inject": True}
    assert not read({"kernel_inject": True}, tmp_path).may_fall_back
    with pytest.raises(LoadError, match="two values"):
        read({"config": "ds-config.json", "kernel_inject": "auto"}, tmp_path, {"replace_with_kernel_inject": False})


def test_the_tp_size_left_out_is_the_world_size(tmp_path: Path) -> None:
    assert read({}, tmp_path, world_size=2).tp_size == 2


@pytest.mark.parametrize(
    ("section", "file", "words"),
    [
        ({"config": "none.json"}, None, ["none.json", "no such file", "--extra-files"]),
        ({"config": "ds-config.json"}, "{", ["ds-config.json", "not valid JSON"]),
        ({"config": "ds-config.json"}, "[1]", ["ds-config.json", "object"]),
        ({"config": "ds-config.json"}, {"dtype": "auto"}, ["ds-config.json", "auto", "model-config.yaml"]),
        ({"config": "ds-config.json"}, {"self_check": True}, ["self_check", "model-config.yaml"]),
        ({"config": "ds-config.json"}, {"dtyp": "fp16"}, ["ds-config.json", "dtyp", "allowed", "dtype"]),
        ({"dtyp": "fp16"}, None, ["dtyp", "allowed"]),
        ({"dtype": "fp8"}, None, ["dtype", "fp8", "bf16"]),
        ({"dtype": "int8"}, None, ["int8", "deepspeed.quantization"]),
        ({"quant": {"weight": {"num_bits": 4}}}, None, ["deepspeed.quant:", "deepspeed.quantization: int8"]),
        ({"quantization": {"bits": 8}}, None, ["quantization", "int8, fp8, int4"]),
        ({"quantization": "int5"}, None, ["int5", "int8, fp8, int4"]),
        ({"quantization": 8}, None, ["quantization", "int8"]),
        ({"quantization": "int8", "kernel_inject": True}, None, ["AutoTP", "replace_with_kernel_inject: false"]),
        ({"config": "ds-config.json"}, {"quantization": "int8"}, ["quantization", "model-config.yaml"]),
        ({"self_check": "yes"}, None, ["self_check"]),
        ({"max_out_tokens": 0}, None, ["max_out_tokens"]),
        ({"tensor_parallel": {"tp_sice": 2}}, None, ["tp_sice"]),
        ({"tensor_parallel": {"tp_size": 2}}, None, ["tp_size", "nproc-per-node", "deviceIds"]),
        ("x", None, ["deepspeed"]),
    ],
)
def test_bad_settings_name_the_key_and_the_mend(tmp_path: Path, section: Any, file: Any, words: list[str]) -> None:
    with pytest.raises(LoadError) as raised:
        read(section, tmp_path, file)
    assert "\n" not in str(raised.value)
    for word in words:
        assert word in str(raised.value)


def test_a_dtype_that_the_device_lacks_names_those_it_has(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from deepspeed.accelerator import get_accelerator

    monkeypatch.setattr(type(get_accelerator()), "supported_dtypes", lambda self: [torch.float32])
    with pytest.raises(LoadError, match="lacks float16; it has float32"):
        read({"dtype": "fp16"}, tmp_path)
