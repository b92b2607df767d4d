"""`flap estimate`: what a run would take, from headers alone, of a model on the hub too."""

import json
from types import SimpleNamespace

import huggingface_hub
import pytest
import torch

from flapcli.checkpoints import open_checkpoint
from flapcli.estimation import machine
from flapcli.execution.device import Runtime
from flapcli.execution.memory import Demand, in_memory_bytes
from flapcli.storage.safetensors_file import read_header


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(machine, "MEASURED", 0.0)
    monkeypatch.setattr(machine, "WRITTEN", 4096)


def stages(flap, *args):
    found = json.loads(flap("estimate", *args, "--json").stdout)
    return found, {need["stage"]: need for need in found["stages"]}


def test_the_way_that_the_stages_would_go(tiny, flap, text_file, tmp_path):
    model, run = tiny("llama-gqa"), tmp_path / "none" / "run"
    args = (model, "-d", run, "--dataset", text_file, "--nsamples", 8, "--seqlen", 16, "--dtype", "float32")
    paper = (*args, "--preset", "paper")
    found, whole = stages(flap, *paper, "--ratio", 0.5)
    checkpoint = open_checkpoint(str(model))
    assert (found["parameters"], found["bytes"]) == (checkpoint.shape.parameters, checkpoint.nbytes)
    assert {need["way"] for need in whole.values()} == {"in memory", "no model", "tensor by tensor"}
    runtime = Runtime(torch.device("cpu"), torch.float32)
    assert whole["calibrate"]["memory"] > in_memory_bytes(checkpoint, runtime, Demand(16))
    _, layers = stages(flap, *paper, "--stream", "--target-params", "75%")
    assert layers["calibrate"]["way"] == layers["eval"]["way"] == "layer by layer"
    assert layers["apply"]["disk"] == int(0.75 * found["parameters"]) * 4
    _, best = stages(flap, *args)
    assert best["apply"]["reads"] > whole["apply"]["reads"]  # Gram matrices
    assert all(need["seconds"] > 0 for need in best.values())
    assert not run.parent.exists()
    shown = flap("estimate", *paper).stdout
    assert "computed, not measured" in shown and "tensor by tensor" in shown


def test_of_the_hub_only_headers_are_read(tiny, flap, monkeypatch):
    """What the hub says of a repository's files stands for them."""
    model = tiny("llama-gqa")
    header = read_header(model / "model.safetensors")
    infos, end = {}, 0
    for name, spec in header.tensors.items():
        infos[name] = SimpleNamespace(dtype=spec.dtype, shape=list(spec.shape), data_offsets=(end, end + spec.nbytes))
        end += spec.nbytes

    def snapshot(_repo, local_dir=None, local_files_only=False, **_):
        if local_files_only:
            raise FileNotFoundError
        (local_dir / "config.json").write_text((model / "config.json").read_text())

    metadata = {"model.safetensors": SimpleNamespace(tensors=infos, metadata={"format": "pt"})}
    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot)
    monkeypatch.setattr(huggingface_hub, "get_safetensors_metadata",
                        lambda _repo, revision: SimpleNamespace(files_metadata=metadata))  # fmt: skip
    found, _ = stages(flap, "some/model")
    assert found["model"] == "some/model"
    assert found["bytes"] == open_checkpoint(str(model)).nbytes
