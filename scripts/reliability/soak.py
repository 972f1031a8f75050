"""Hours of mixed load with a fault a minute: is every reply right or a clean error, and does the server stay as it is?

Starts a server of its own in fp32, so that every text can be compared with transformers'. Fails (exit code 1) on a
wrong reply, on a server that does not come back, and on memory, files or segments that grow. The last line is one JSON
document. Does not measure speed (`bench`).
"""

from __future__ import annotations

import tempfile
import threading
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import typer

from scripts.bench.client import BenchError
from scripts.bench.http import describe_machine, free_ports
from scripts.bench.prompts import OPENINGS
from scripts.common.console import exit_on_sigterm, fail, print_report, say
from scripts.common.machine import MachineError
from scripts.common.paths import DEMO_MODEL, ROOT
from scripts.model.prepare import ModelError, prepare
from scripts.pack.archive import Choice, PackageError, package
from scripts.reliability.soak_faults import Sample, faults, take_sample
from scripts.reliability.soak_load import Client, Reference, Tally
from scripts.serve import server
from scripts.serve.health import State, check
from scripts.serve.run_dir import HOST, Ports, Record, RunDir

NAME = "soak"
CLIENTS = 8
COLLECTIVE_TIMEOUT_S = 15.0
RECOVERY_S = 240.0
# What a run may add: the JVM's heap (1 GiB at most) fills before it is collected, and the KV cache grows to its 4 GiB,
# since pages keep what they hold until others need them. Rank 0 has two of three KV heads.
GROWTH_MIB = {"TorchServe": 600.0, "torchrun": 50.0, "rank 0": 2800.0, "rank 1": 1450.0}
GROWTH_FILES = 20


def make_references(model_path: str) -> list[Reference]:
    """transformers' greedy texts in fp32, of 4 to 48 tokens."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model_path)
    model = AutoModelForCausalLM.from_pretrained(model_path, dtype=torch.float32).eval()
    references = []
    for index, prompt in enumerate(OPENINGS):
        inputs, tokens = tokenizer(prompt, return_tensors="pt"), 4 + 3 * index
        with torch.inference_mode():
            output = model.generate(**inputs, do_sample=False, max_new_tokens=tokens)
        new = output[0, inputs["input_ids"].shape[1] :]
        references.append(Reference(prompt, tokens, tokenizer.decode(new, skip_special_tokens=True)))
    return references


def wait_until_served(ports: Ports) -> None:
    """Returns when a token comes again. Raises BenchError."""
    started = time.monotonic()
    while check(ports, NAME, timeout_s=RECOVERY_S).state is not State.READY:
        if time.monotonic() - started > RECOVERY_S:
            raise BenchError(f"not served again within {RECOVERY_S:.0f} s: see {ROOT / 'run'}")
        time.sleep(0.5)


def soak(run: RunDir, record: Record, references: list[Reference], minutes: float, period_s: float) -> dict[str, Any]:
    """Load and faults for so long, or until the server does not come back; returns the report."""
    ports, tally, over = Ports(record.port), Tally(), threading.Event()
    url = f"http://{HOST}:{record.port}/predictions/{NAME}"
    clients = [Client(url, references, tally, over, seed) for seed in range(CLIENTS)]
    for client in clients:
        client.start()
    events: list[dict[str, Any]] = []
    samples: list[Sample] = []
    sequence, started = faults(run, record), time.monotonic()
    failed: list[str] = []
    try:
        while True:
            time.sleep(period_s)
            samples.append(take_sample(run, record))
            if time.monotonic() - started + period_s > minutes * 60:
                break
            name, inject = sequence[len(events) % len(sequence)]
            began = time.monotonic()
            inject()
            # A stalled rank is noticed at the end of its time limit, a dead one at once.
            time.sleep(COLLECTIVE_TIMEOUT_S + 6 if name.startswith("stop") else 1)
            wait_until_served(ports)
            events.append({"fault": name, "served_again_after_s": round(time.monotonic() - began, 1)})
            say(f"{(time.monotonic() - started) / 60:5.1f} min  {name}: served again; {dict(tally.outcomes)}")
    except Exception as error:  # the report says what was seen until then
        failed.append(f"{type(error).__name__}: {error}")
    finally:
        over.set()
        for client in clients:
            client.join(60)
    samples = samples or [take_sample(run, record)]
    outcomes = dict(sorted(tally.outcomes.items()))
    return {
        "minutes": round((time.monotonic() - started) / 60, 1),
        "requests": sum(outcomes.values()),
        "outcomes": outcomes,
        "wrong": tally.wrong[:5],
        "faults": events,
        "start": asdict(samples[0]),
        "end": asdict(samples[-1]),
        "growth": grown(samples[0], samples[-1]),
        "failed": failed,
    }


def grown(first: Sample, last: Sample) -> list[str]:
    """What grew beyond its allowance, in words."""
    found = []
    for role, mib in last.memory_mib.items():
        if mib > first.memory_mib.get(role, 0) + GROWTH_MIB.get(role, 0):
            found.append(f"{role}: {first.memory_mib.get(role)} -> {mib} MiB")
        if last.files[role] > first.files.get(role, 0) + GROWTH_FILES:
            found.append(f"{role}: {first.files.get(role)} -> {last.files[role]} open files")
    if set(first.memory_mib) != set(last.memory_mib):
        found.append(f"processes: {sorted(first.memory_mib)} -> {sorted(last.memory_mib)}")
    if last.shared_memory:
        found.append(f"{last.shared_memory} segments in /dev/shm")
    if last.sockets > first.sockets:
        found.append(f"{first.sockets} -> {last.sockets} sockets")
    return found


def table(report: dict[str, Any]) -> str:
    """The report for people."""
    lines = [f"{report['minutes']} minutes, {report['requests']} requests, {len(report['faults'])} faults"]
    lines += [f"  {outcome:<12} {count:>7}" for outcome, count in report["outcomes"].items()]
    lines += ["", f"  {'MiB, open files':<16}{'start':>16}{'end':>16}"]
    start, end = report["start"], report["end"]
    for role in sorted({*start["memory_mib"], *end["memory_mib"]}):
        columns = [f"{side['memory_mib'].get(role, 0):.0f}, {side['files'].get(role, 0)}" for side in (start, end)]
        lines.append(f"  {role:<16}{columns[0]:>16}{columns[1]:>16}")
    for what in ("shared_memory", "sockets", "torchrun_folders"):
        lines.append(f"  {what:<16}{start[what]:>16}{end[what]:>16}")
    lines += [
        "",
        *(f"  {item['fault']:<20} served again after {item['served_again_after_s']} s" for item in report["faults"]),
    ]
    verdict = "FAILED: " + "; ".join([*report["failed"], *report["wrong"], *report["growth"]])
    return "\n".join([*lines, "", "passed" if is_passed(report) else verdict])


def is_passed(report: dict[str, Any]) -> bool:
    return (
        not report["failed"] and not report["wrong"] and not report["growth"] and report["outcomes"].get("right", 0) > 0
    )


def main(
    minutes: float = typer.Option(30.0, help="how long"),
    period_s: float = typer.Option(45.0, help="quiet seconds before each fault: with its recovery about a minute"),
) -> None:
    """Run the soak, print a table, then one JSON line."""
    exit_on_sigterm()
    try:
        model = prepare(DEMO_MODEL)
        say("transformers' texts ...")
        references, ports = make_references(model), free_ports()
        run = RunDir(ROOT / "run" / f"{NAME}-{ports.inference}")
        with tempfile.TemporaryDirectory(prefix="dsserve-soak-") as folder:
            choice, limits = (
                Choice(tp="2", device="cpu", dtype="fp32"),
                {"collective_timeout": COLLECTIVE_TIMEOUT_S, "max_model_len": 1024},
            )
            archive = package(NAME, model, choice, model_store=Path(folder), handler=limits)
            try:
                record = server.start(run, NAME, archive, ports)
                server.wait_until_ready(run, record, say)
                report = soak(run, record, references, minutes, period_s)
            finally:
                killed = server.stop(run)
    except (BenchError, PackageError, MachineError, ModelError, server.ServerError) as error:
        fail(str(error))
    report["killed_at_the_end"] = killed
    print_report(table, {"machine": describe_machine(), **report})
    raise typer.Exit(code=0 if is_passed(report) else 1)


if __name__ == "__main__":
    typer.run(main)
