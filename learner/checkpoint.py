"""Checkpoints: directories that AutoModel and vLLM open as they are, and that resume the learner exactly.

    step_N.<epoch>/   model.safetensors, config.json, generation_config.json, the tokenizer's files
                      adapter/                        where adapters are trained: in peft's format; the model above
                                                      then has them merged, for others; a learner resumes from these
                      learner/optimiser.safetensors   moments, count of steps, random number generators
                      learner/reference.safetensors   of a reference that follows the policy
                      learner/state.json              step, version, epoch, memory of methods
                      files.json                      size and SHA-256 of all files; its own SHA-256 is THE digest

These parts have folders of their own because vLLM reads every safetensors file beside the config.

A directory is written under another name, made durable and renamed: under its own name it is complete. Nothing
in it is a pickle.
"""

import hashlib
import json
import os
import shutil
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from millrace.core.errors import TrainingError
from millrace.core.one_at_a_time import MODEL_LOADING
from millrace.learner.model import Policy
from millrace.learner.optimiser import Optimiser

SCHEMA = 1
ADAPTER, REFERENCE = "adapter", "learner/reference.safetensors"
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
    base: str | None = None  # identity of the weights that adapters belong to; None: all weights are trained


@dataclass(frozen=True, slots=True, kw_only=True)
class Saved:
    """A complete checkpoint."""

    directory: str
    digest: str


def save(
    root: str,
    state: LearnerState,
    *,
    policy: Policy,
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
    save_model(partial, policy, tokenizer)
    if policy.moving_reference is not None:
        named = policy.moving_reference.named_parameters()
        save_file({name: parameter.detach().contiguous() for name, parameter in named}, partial / REFERENCE)
    state = replace(state, base=None if policy.adapters is None else policy.adapters.base)
    tensors = {f"optimiser.{name}": tensor.contiguous() for name, tensor in optimiser.state().items()}
    save_file({**tensors, **_generators()}, learner / "optimiser.safetensors")
    _write_json(learner / "state.json", {"schema": SCHEMA, **{f: getattr(state, f) for f in state.__slots__}})
    written = sorted(path for path in partial.rglob("*") if path.is_file())
    files = {str(path.relative_to(partial)): _fingerprint(path) for path in written}
    _write_json(partial / "files.json", files)
    digest = hashlib.sha256((partial / "files.json").read_bytes()).hexdigest()
    folders = {path.parent for path in written}
    for path in (*written, partial / "files.json", *(folders - {partial}), partial):
        _fsync(path)
    partial.rename(final)
    _fsync(final.parent)
    return Saved(directory=str(final), digest=digest)


def save_model(directory: Path, policy: Policy, tokenizer: PreTrainedTokenizerBase | None) -> None:
    """Model, generation config and tokenizer, as `from_pretrained` reads them; adapters merged, and by themselves."""
    # Not on the GPU: there is no room for the merged weights beside the model that trains.
    whole = None if policy.adapters is None else dict(policy.adapters.whole(device=torch.device("cpu")))
    policy.model.save_pretrained(directory, state_dict=whole)
    if policy.adapters is not None:
        policy.adapters.save(directory / ADAPTER)
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


def load(directory: str, digest: str | None, *, policy: Policy, optimiser: Optimiser) -> LearnerState:
    """Verify, then put weights, moments and random number generators back.

    Args:
        policy: opened as it was when the run was started; where adapters are trained, its model is their base.
    Raises:
        TrainingError: the checkpoint is damaged, of another model, or of other settings of lora.
    """
    verify(directory, digest)
    folder = Path(directory)
    data = json.loads(_state_of(folder).read_text())
    if data.pop("schema") != SCHEMA:
        raise TrainingError(f"checkpoint {directory} was written by another release; resume with that one")
    state = LearnerState(**data)
    _load_trained(folder, state, policy)
    if policy.moving_reference is not None:
        if not (folder / REFERENCE).is_file():
            raise TrainingError(
                f"checkpoint {directory} holds no reference model, which the run's recipe moves; resume with the recipe"
                " that the run was started with"
            )
        _copy(load_file(folder / REFERENCE), policy.moving_reference, folder)
    tensors = load_file(folder / "learner" / "optimiser.safetensors")
    optimiser.load({n.removeprefix("optimiser."): t for n, t in tensors.items() if n.startswith("optimiser.")})
    torch.set_rng_state(tensors["generator.cpu"])
    if torch.cuda.is_available() and "generator.cuda" in tensors:
        torch.cuda.set_rng_state(tensors["generator.cuda"])
    return state


def _load_trained(folder: Path, state: LearnerState, policy: Policy) -> None:
    """What is trained: adapters, or all weights. In place: the optimiser and the publisher hold these very tensors."""
    model, adapters = policy.model, policy.adapters
    if adapters is None:
        if state.base is not None:
            raise TrainingError(
                f"checkpoint {folder} was written with lora; resume with the settings that the run was started with"
            )
        with MODEL_LOADING:
            loaded, report = type(model).from_pretrained(folder, dtype=torch.float32, output_loading_info=True)
        return _copy(dict(loaded.named_parameters()), model, folder, missing=report["missing_keys"])
    if state.base not in (None, adapters.base):
        raise TrainingError(
            f"checkpoint {folder} has adapters of a base model with weights {state.base[:12]}, the run's model has"
            f" {adapters.base[:12]}: its files have changed; resume with those that the run was started with"
        )
    adapters.load(folder / ADAPTER)


def _copy(
    saved: Mapping[str, torch.Tensor], model: PreTrainedModel, folder: Path, *, missing: Iterable[str] = ()
) -> None:
    held = dict(model.named_parameters())
    odd = sorted({*missing, *(held.keys() ^ saved.keys())})
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
        path.write_text(json.dumps(data, indent=1) + "\n")  # in their order, which may be a memory's: who came last
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
