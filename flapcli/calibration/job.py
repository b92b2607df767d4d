"""The part of stage 1 that computes: where, in which of the two ways, and from which checkpoint on."""

from collections import deque
from contextlib import nullcontext
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from flapcli.artifacts.few_tokens import FEW
from flapcli.artifacts.plan import format_ranges
from flapcli.artifacts.self_text import path_beside
from flapcli.artifacts.stats import Calibration, GramDtype, StatsHeader, file_bytes, gram_bytes, tokens_of_experts
from flapcli.artifacts.stats_writer import StatsWriter, save_stats
from flapcli.artifacts.versions import versions
from flapcli.calibration.brain_surgeon import eliminator
from flapcli.calibration.fisher import Sample
from flapcli.calibration.in_memory import measure
from flapcli.calibration.recorder import NotFiniteError
from flapcli.calibration.request import CalibrationRequest
from flapcli.calibration.streaming import stream
from flapcli.calibration.workload import Workload
from flapcli.execution.device import Runtime, own_gpu
from flapcli.execution.loading import quiet_transformers
from flapcli.execution.memory import Demand, refuse_map, should_stream
from flapcli.execution.ranks import Ranks
from flapcli.progress import Progress, Silent
from flapcli.storage.atomic import explain, move_file, require_space, require_writable
from flapcli.storage.dtypes import dtype_name
from flapcli.storage.resume import Resume, discard_all, key_of
from flapcli.storage.sizes import parse_size
from flapcli.texts.calibration_text import CalibrationText, refuse_unlike_ranks
from flapcli.texts.opening import first_predicted, opening_text
from flapcli.texts.windows import windows_sha256


def write_stats(request: CalibrationRequest, force: bool, progress: Progress, ranks: Ranks) -> StatsHeader:
    """Measure and write what is asked for, going on where a killed run of the same stopped; `force` begins anew."""
    quiet_transformers()
    checkpoint, options, execution = request.checkpoint, request.options, request.execution
    checkpoint.shape  # noqa: B018  an unknown family or a corrupt checkpoint is refused before any text is asked for
    checkpoint.refuse_length(options.seqlen)
    if ranks.rank == 0:
        require_writable(request.out)
    progress = Silent() if ranks.rank else progress
    runtime = Runtime.of(execution, options.dtype)
    runtime = replace(runtime, device=own_gpu(runtime.device))
    demand = Demand(options.seqlen, options.gram, options.fisher)
    if execution.device_map:
        refuse_map(checkpoint, runtime, demand)
    streamed = not execution.device_map and any(
        ranks.agree(should_stream(checkpoint, runtime, demand, execution.stream, progress))
    )
    place = path_beside(request.out)
    text = CalibrationText(place, checkpoint, options, runtime, execution.device_map, streamed)
    progress.doing(f"reading {options.dataset}")
    windows = text.windows(force, progress, ranks)
    refuse_unlike_ranks(ranks, checkpoint, windows, runtime.dtype)
    header = _header(request, windows, opening_text(text.tokenizer), runtime, streamed)
    facts = {"header": header.model_dump(mode="json"), "device": runtime.device.type, "rank": [ranks.rank, ranks.size]}
    resume = Resume(request.out, key_of(facts, windows.tobytes()), ranks.rank, ranks.size)
    if force:
        resume.discard()
    share, first = ranks.share(len(windows)), first_predicted(text.tokenizer)
    sample = Sample.of(windows.shape, share, options.seed, first) if options.fisher else None
    work = Workload(
        checkpoint, windows[share], runtime, options.gram, sample, progress, ranks, resume, execution.device_map,
        text.model,
    )  # fmt: skip
    try:
        _run(request, header, work, resume)
    except NotFiniteError:
        resume.discard()
        raise
    except OSError as error:
        raise explain(error, resume.folder) from error
    if ranks.rank == 0:
        _say_of_experts(request, progress)
    ranks.agree(None)  # until rank 0 has written all, each may have to go on
    discard_all(request.out)
    return header


def _header(
    request: CalibrationRequest, windows: NDArray[np.int64], begins_with: str | None, runtime: Runtime, streamed: bool
) -> StatsHeader:
    options = request.options
    calibration = Calibration(
        dataset=str(options.dataset),
        nsamples=options.nsamples,
        seqlen=options.seqlen,
        seed=options.seed,
        text_column=options.text_column,
        tokens=int(windows.size),
        dtype=dtype_name(runtime.dtype),
        source_sha256=request.text_sha256,
        windows_sha256=windows_sha256(windows),
        tokenizer_sha256=request.tokenizer_sha256,
        begins_with=begins_with,
        mode="streamed" if streamed else "in-memory",
    )
    shape = request.checkpoint.shape
    return StatsHeader(model=shape, calibration=calibration, settings=request.settings, versions=versions())


def _run(request: CalibrationRequest, header: StatsHeader, work: Workload, resume: Resume) -> None:
    stored: GramDtype = "BF16" if request.options.gram_dtype == "bfloat16" else "F32"
    gram = stored if work.gram else None
    streamed = header.calibration.mode == "streamed"
    _check_space(request, work, gram, streamed, resume.nbytes)
    if streamed:
        growing = resume.ready() / "stats.safetensors"
        writer = StatsWriter(growing, header, gram, resume=True) if work.ranks.rank == 0 else None
        stream(work, resume, writer, parse_size(request.execution.activation_memory, "--activation-memory"))
        if writer:
            with writer:  # checks that all is there
                pass
            move_file(growing, request.out)
        return
    found = measure(work)
    if work.ranks.rank:
        deque(found, maxlen=0)
        return
    work.progress.doing("writing statistics")
    layers = header.model.num_layers if gram and work.fisher else 0
    with work.progress.task("eliminate", layers, "layers") if layers else nullcontext(lambda _: None) as advance:
        save_stats(request.out, header, found, gram, eliminator(work.checkpoint, work.runtime.device, advance))


def _say_of_experts(request: CalibrationRequest, progress: Progress) -> None:
    """Experts that saw too few tokens: what is known of them leans towards their layer's mean."""
    layers = [i for i, layer in enumerate(request.checkpoint.shape.layers) if layer.num_experts]
    found = {i: few for i in layers if len(few := np.flatnonzero(tokens_of_experts(request.out, i) < FEW))}
    if found:
        layer, few = next(iter(found.items()))
        progress.note(
            f"{sum(map(len, found.values()))} experts in {len(found)} layers saw fewer than {FEW} tokens (layer {layer}"
            f": {format_ranges(few)}), and lean towards their layer's mean; more --nsamples would help"
        )


def _check_space(
    request: CalibrationRequest, work: Workload, gram: GramDtype | None, streamed: bool, there_already: int
) -> None:
    """Say how large Gram matrices are. Raises FlapError where the disk is too full for what will be written."""
    shape = work.checkpoint.shape
    needed = file_bytes(shape, gram) if work.ranks.rank == 0 else 0
    if gram:
        layers = [gram_bytes(shape, layer, gram) for layer in range(shape.num_layers)]
        work.progress.note(
            f"Gram matrices take {sum(layers) / 1e9:.2f} GB on disk ({max(layers) / 1e9:.3f} GB a layer, "
            f"{request.options.gram_dtype})"
        )
    token = shape.hidden_size * work.runtime.dtype.itemsize
    if streamed:  # a layer's input and output
        needed += 2 * work.windows.size * token
    if streamed and work.fisher:  # and a layer's gradients
        kept = (shape.num_layers + 3) * work.fisher.numbers.numel() * token
        work.progress.note(
            "Fisher information layer by layer keeps its windows' hidden states between all layers on disk until it is "
            f"done: {kept / 1e9:.2f} GB"
        )
        needed += kept
    elif gram:  # the sums so far
        needed += file_bytes(shape, "F32")
    require_space(request.out.parent, max(needed - there_already, 0))
