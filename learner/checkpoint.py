"""Checkpoints: directories that AutoModel and vLLM open as they are, and that resume the learner exactly.

    step_N.<epoch>/   model.safetensors, config.json, generation_config.json, the tokenizer's files
                      learner/optimiser.safetensors   moments, count of steps, random number generators
                      learner/state.json              step, version, epoch, memory of methods
                      files.json                      size and SHA-256 of all files; its own SHA-256 is THE digest

The learner's part has a folder of its own because vLLM reads every safetensors file beside the config.

A directory is written under another name, made durable and renamed: under its own name it is complete. Nothing
in it is a pickle.
"""

import hashlib
import json
import os
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from millrace.core.errors import TrainingError
from millrace.learner.optimiser import Optimiser

SCHEMA = 1
PARTIAL = ".partial"


@dataclass(frozen=True, slots=True, kw_only=True)
class LearnerState:
    """What of the learner is no tensor."""

    step: int  # optimiser steps made
    version: int  # of the weights, as published
    epoch: int  # of the learner that wrote it
    seed: int
    reward: float = 0.0  # mean of the step's batch; what `best` is measured by
    memory: Mapping[str, Any] = field(default_factory=dict)  # of methods that have one; plain JSON values


@dataclass(frozen=True, slots=True, kw_only=True)
class Saved:
    """A complete checkpoint."""

    directory: str
    digest: str


def save(
    root: str,
    state: LearnerState,
    *,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase | None,
    optimiser: Optimiser,
) -> Saved:
    """Write `root/step_N.<epoch>/` durably. A directory of that name is replaced: it was never committed."""
    final = Path(root) / f"step_{state.step}.{state.epoch}"
    partial = final.with_name(final.name + PARTIAL)
    for stale in (partial, final):
        if stale.exists():
            shutil.rmtree(stale)
    learner = partial / "learner"
    learner.mkdir(parents=True)
    save_model(partial, model, tokenizer)
    tensors = {f"optimiser.{name}": tensor.contiguous() for name, tensor in optimiser.state().items()}
    save_file({**tensors, **_generators()}, learner / "optimiser.safetensors")
    _write_json(learner / "state.json", {"schema": SCHEMA, **{f: getattr(state, f) for f in state.__slots__}})
    written = sorted(path for path in partial.rglob("*") if path.is_file())
    files = {str(path.relative_to(partial)): _fingerprint(path) for path in written}
    _write_json(partial / "files.json", files)
    digest = hashlib.sha256((partial / "files.json").read_bytes()).hexdigest()
    for path in (*written, partial / "files.json", learner, partial):
        _fsync(path)
    partial.rename(final)
    _fsync(final.parent)
    return Saved(directory=str(final), digest=digest)


def save_model(directory: Path, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None) -> None:
    """Model, generation config and tokenizer, as `from_pretrained` reads them."""
    model.save_pretrained(directory)
    if tokenizer is not None:
        tokenizer.save_pretrained(directory)


def verify(directory: str, digest: str | None) -> None:
    """Every file is there with its size and SHA-256, and their list has the recorded digest.

    Raises:
        TrainingError: naming the first file that differs.
    """
    folder = Path(directory)
    listing = folder / "files.json"
    way_out = "restore the directory from a copy, or resume from an earlier checkpoint"
    if not listing.is_file():
        raise TrainingError(f"checkpoint {directory}: there is no files.json, so it is not complete; {way_out}")
    found = hashlib.sha256(listing.read_bytes()).hexdigest()
    if digest is not None and found != digest:
        raise TrainingError(
            f"checkpoint {directory}: files.json has digest {found[:12]}, the ledger recorded {digest[:12]}; {way_out}"
        )
    for name, expected in json.loads(listing.read_text()).items():
        path = folder / name
        if not path.is_file():
            raise TrainingError(f"checkpoint {directory}: {name} is missing; {way_out}")
        if _fingerprint(path) != expected:
            raise TrainingError(f"checkpoint {directory}: {name} is not what was written; {way_out}")


def load(directory: str, digest: str | None, *, model: PreTrainedModel, optimiser: Optimiser) -> LearnerState:
    """Verify, then put weights, moments and random number generators back.

    Raises:
        TrainingError: the checkpoint is damaged, or of another model.
    """
    verify(directory, digest)
    folder = Path(directory)
    _load_weights(folder, model)
    tensors = load_file(folder / "learner" / "optimiser.safetensors")
    optimiser.load({n.removeprefix("optimiser."): t for n, t in tensors.items() if n.startswith("optimiser.")})
    torch.set_rng_state(tensors["generator.cpu"])
    if torch.cuda.is_available() and "generator.cuda" in tensors:
        torch.cuda.set_rng_state(tensors["generator.cuda"])
    data = json.loads(_state_of(folder).read_text())
    if data.pop("schema") != SCHEMA:
        raise TrainingError(f"checkpoint {directory} was written by another release; resume with that one")
    return LearnerState(**data)


def _load_weights(folder: Path, model: PreTrainedModel) -> None:
    """In place: the optimiser and the publisher hold these very parameters."""
    loaded, report = type(model).from_pretrained(folder, dtype=torch.float32, output_loading_info=True)
    held, saved = dict(model.named_parameters()), dict(loaded.named_parameters())
    odd = sorted({*report["missing_keys"], *(held.keys() ^ saved.keys())})
    odd += [name for name in held.keys() & saved.keys() if held[name].shape != saved[name].shape]
    if odd:
        raise TrainingError(
            f"checkpoint {folder} does not fit the model: {len(odd)} weights differ, such as {odd[0]};"
            " resume with the model that the run was started with"
        )
    with torch.no_grad():
        for name, parameter in held.items():
            parameter.copy_(saved[name])


Kept = tuple[str, float]  # directory, mean reward


def surviving(root: str, resumed: str) -> list[Kept]:
    """Checkpoints up to the one resumed from, in the order of their steps."""
    found = []
    last = _step_of(Path(resumed))
    for path in Path(root).glob("step_*.*"):
        if path.suffix != PARTIAL and _step_of(path) < last and _state_of(path).is_file():
            found.append((_step_of(path), str(path), _reward_of(path)))
    found.sort()
    return [*((path, reward) for _, path, reward in found), (resumed, _reward_of(Path(resumed)))]


def retain(root: str, committed: Sequence[Kept], *, keep: int) -> list[Kept]:
    """Delete all but the last `keep` committed checkpoints and the one of the best mean reward.

    Args:
        root: the directory of checkpoints; what else of them lies there is an orphan of an earlier incarnation.
        committed: in the order of their commits.
        keep: at least 1.
    Returns:
        those that stay, in their order.
    """
    best = max(committed, key=lambda kept: kept[1], default=None)
    stay = [kept for at, kept in enumerate(committed) if at >= len(committed) - max(keep, 1) or kept is best]
    names = {Path(directory).name for directory, _ in stay}
    for path in Path(root).glob("step_*.*"):
        if path.name not in names:
            shutil.rmtree(path)
    return stay


def _step_of(path: Path) -> int:
    return int(path.name.removeprefix("step_").partition(".")[0])


def _reward_of(path: Path) -> float:
    return float(json.loads(_state_of(path).read_text())["reward"])


def _state_of(path: Path) -> Path:
    return path / "learner" / "state.json"


def _generators() -> dict[str, torch.Tensor]:
    states = {"generator.cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        states["generator.cuda"] = torch.cuda.get_rng_state()
    return states


def _fingerprint(path: Path) -> dict[str, Any]:
    with path.open("rb") as file:
        return {"size": path.stat().st_size, "sha256": hashlib.file_digest(file, "sha256").hexdigest()}


def _write_json(path: Path, data: Any) -> None:
    try:
        path.write_text(json.dumps(data, indent=1, sort_keys=True) + "\n")
    except TypeError as caught:
        raise TrainingError(
            f"{path} cannot be saved: {caught}; a method's memory must be of plain numbers, strings, lists and tables"
        ) from None


def _fsync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
