"""Block influence, plans that drop whole layers, and the stock checkpoints of fewer layers that they make."""

import numpy as np
import torch
from models import load_dense, load_tokenizer

from flapcli.calibrate import measure
from flapcli.checkpoint import open_checkpoint
from flapcli.corpus import calibration_windows
from flapcli.progress import Silent


def test_block_influence_is_what_hidden_states_say(any_tiny, text_file):
    """Whatever the batch size, of layers by transformers' own hidden states, of modules by the residual additions."""
    windows = calibration_windows(str(text_file), load_tokenizer(any_tiny), 12, 24, 0)
    cpu, checkpoint = torch.device("cpu"), open_checkpoint(str(any_tiny))
    model = load_dense(any_tiny)
    attended: list[torch.Tensor] = []
    for layer in model.model.layers:
        layer.self_attn.register_forward_hook(lambda _, __, output: attended.append(output[0]))
    last: list[torch.Tensor] = []
    model.model.norm.register_forward_pre_hook(lambda _, inputs: last.append(inputs[0]))
    with torch.no_grad():
        states = model(torch.from_numpy(windows), output_hidden_states=True).hidden_states
    streams = [*states[:-1], last[0]]  # transformers norms the last one
    for batch_size in (None, 5):
        measured = measure(checkpoint, windows, cpu, torch.float32, batch_size, False, Silent())
        for i, found in enumerate(measured.influences):
            before, middle, after = streams[i], streams[i] + attended[i], streams[i + 1]
            wanted = [1 - cosine(*pair) for pair in ((before, after), (before, middle), (middle, after))]
            np.testing.assert_allclose(found, wanted, rtol=1e-4)


def cosine(one, two):
    return torch.nn.functional.cosine_similarity(one.double(), two.double(), dim=-1).mean().item()
