"""Checkpoints: directories that AutoModel and vLLM open as they are, and that resume the learner exactly.

    step_N.<epoch>/   model.safetensors, config.json, generation_config.json, the tokenizer's files
                      adapter/                        where adapters are trained: in peft's format; the model above
                                                      then has them merged, for others; a learner resumes from these
                      learner/optimiser.safetensors   moments, count of steps, random number generators
                      learner/reference.safetensors   of a reference that follows the policy
                      learner/state.json              step, version, epoch, memory of methods, reports of the steps
                      files.json                      size and SHA-256 of all files; its own SHA-256 is THE digest

These parts have folders of their own because vLLM reads every safetensors file beside the config.

A directory is written under another name, made durable and renamed: under its own name it is complete. Nothing
in it is a pickle.
"""

import copy
import errno
import hashlib
import json
import os
import shutil
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from millrace.core.errors import CheckpointError, DiskFullError, TrainingError, boundary
from millrace.core.failpoint import reach
from millrace.core.one_at_a_time import MODEL_LOADING
from millrace.learner.model import Policy
from millrace.learner.optimiser import Optimiser

SCHEMA = 1
ADAPTER, REFERENCE = "adapter", "learner/reference.safetensors"
STATE = "learner/state.json"
PARTIAL = ".partial"
FULL = frozenset({errno.ENOSPC, errno.EDQUOT})
BESIDE = 2**20  # bytes of a checkpoint that are no tensors, at least


@dataclass(frozen=True, slots=True, kw_only=True)
class LearnerState:
    """What of the learner is no tensor."""

    step: int  # optimiser steps made
    version: int  # of the weights, as published
    epoch: int  # of the learner that wrote it
    seed: int
    reward: float = 0.0  # mean of the step's batch; what `best` is measured by
    memory: Mapping[str, Any] = field(default_factory=dict)  # of methods that have one; plain JSON values
    reports: Sequence[Mapping[str, Any]] = field(
        default_factory=list
    )  # of the steps since the commit before, as learner/report.py has them
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
    """Write `root/step_N.<epoch>/` durably. A directory of that name is replaced: it was never committed.

    Raises:
        DiskFullError: there is no room for it; nothing of it stays.
        CheckpointError: it cannot be written for another reason; nothing of it stays.
        TrainingError: a method's memory is not plain.
    """
    final = Path(root) / f"step_{state.step}.{state.epoch}"
    partial = final.with_name(final.name + PARTIAL)
    needed = _bytes_of(policy, optimiser)
    try:
        for stale in (partial, final):
            if stale.exists():
                shutil.rmtree(stale)
        final.parent.mkdir(parents=True, exist_ok=True)
        if shutil.disk_usage(final.parent).free < needed:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        digest = _write(partial, state, policy, tokenizer, optimiser)
        partial.rename(final)
        _fsync(final.parent)
    except (OSError, SafetensorError) as caught:
        shutil.rmtree(partial, ignore_errors=True)
        raise _unwritten(final, caught, needed) from caught
    return Saved(directory=str(final), digest=digest)


def _write(
    partial: Path,
    state: LearnerState,
    policy: Policy,
    tokenizer: PreTrainedTokenizerBase | None,
    optimiser: Optimiser,
) -> str:
    """All files, durable. Returns the digest."""
    learner = partial / "learner"
    learner.mkdir(parents=True)
    save_model(partial, policy, tokenizer)
    if policy.moving_reference is not None:
        named = policy.moving_reference.named_parameters()
        save_file({name: parameter.detach().contiguous() for name, parameter in named}, partial / REFERENCE)
    reach("learner.checkpoint.write")
    state = replace(state, base=None if policy.adapters is None else policy.adapters.base)
    tensors = {f"optimiser.{name}": tensor.contiguous() for name, tensor in optimiser.state().items()}
    save_file({**tensors, **_generators()}, learner / "optimiser.safetensors")
    _write_json(partial / STATE, {"schema": SCHEMA, **{f: getattr(state, f) for f in state.__slots__}})
    written = sorted(path for path in partial.rglob("*") if path.is_file())
    files = {str(path.relative_to(partial)): _fingerprint(path) for path in written}
    _write_json(partial / "files.json", files)
    digest = hashlib.sha256((partial / "files.json").read_bytes()).hexdigest()
    folders = {path.parent for path in written}
    for path in (*written, partial / "files.json", *(folders - {partial}), partial):
        _fsync(path)
    return digest


def _bytes_of(policy: Policy, optimiser: Optimiser) -> int:
    """At least so many: weights, a reference that moves, and two moments of whatever is trained."""
    models = (policy.model, policy.moving_reference)
    held = [p for model in models if model is not None for p in model.parameters()] + 2 * list(optimiser.parameters)
    return BESIDE + sum(int(parameter.nbytes) for parameter in held)


def _unwritten(final: Path, caught: OSError | SafetensorError, needed: int) -> CheckpointError:
    # safetensors wraps the system's error in its own, and keeps only the text.
    code = caught.errno if isinstance(caught, OSError) else None
    if code not in FULL and not any(f"os error {number}" in str(caught) for number in FULL):
        return CheckpointError(
            f"checkpoint {final} cannot be written: {caught}; make its directory writable, then resume the run"
        )
    free = shutil.disk_usage(final.parent).free
    return DiskFullError(
        f"checkpoint {final} cannot be written: it needs {needed:,} bytes, and {free:,} are free there. Nothing of it"
        " was kept, and earlier checkpoints are untouched; free some space, or lower learner.checkpoint_keep, then"
        " resume the run"
    )


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
        CheckpointError: naming the first file that differs, or cannot be read.
    """
    way_out = "restore the directory from a copy, or resume from an earlier checkpoint"
    try:
        _verify(Path(directory), digest, way_out)
    except (OSError, ValueError) as caught:
        raise CheckpointError(f"checkpoint {directory} cannot be read: {caught}; {way_out}") from caught


def _verify(directory: Path, digest: str | None, way_out: str) -> None:
    listing = directory / "files.json"
    if not listing.is_file():
        raise CheckpointError(f"checkpoint {directory}: there is no files.json, so it is not complete; {way_out}")
    found = hashlib.sha256(listing.read_bytes()).hexdigest()
    if digest is not None and found != digest:
        raise CheckpointError(
            f"checkpoint {directory}: files.json has digest {found[:12]}, the ledger recorded {digest[:12]}; {way_out}"
        )
    for name, expected in json.loads(listing.read_text()).items():
        path = directory / name
        if not path.is_file():
            raise CheckpointError(f"checkpoint {directory}: {name} is missing; {way_out}")
        if _fingerprint(path) != expected:
            raise CheckpointError(f"checkpoint {directory}: {name} is not what was written; {way_out}")


def load(directory: str, digest: str | None, *, policy: Policy, optimiser: Optimiser) -> LearnerState:
    """Verify, then `restore`."""
    verify(directory, digest)
    return restore(directory, policy=policy, optimiser=optimiser)


def restore(directory: str, *, policy: Policy, optimiser: Optimiser) -> LearnerState:
    """Put weights, moments and random number generators of a verified checkpoint back.

    Args:
        policy: opened as it was when the run was started; where adapters are trained, its model is their base.
    Raises:
        TrainingError: the checkpoint is of another model, another release, or of other settings of lora.
    """
    folder = Path(directory)
    data = json.loads((folder / STATE).read_text())
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
        # By the run's own config: another model's would make one of whatever size its defaults are.
        own = {"config": copy.deepcopy(model.config), "ignore_mismatched_sizes": True}  # they are named below
        with boundary(f"loading the weights of checkpoint {folder}", TrainingError), MODEL_LOADING:
            loaded, report = type(model).from_pretrained(folder, dtype=torch.float32, output_loading_info=True, **own)
        odd = {*report["missing_keys"], *(name for name, *_ in report["mismatched_keys"])}
        return _copy(dict(loaded.named_parameters()), model, folder, odd=odd)
    if state.base not in (None, adapters.base):
        raise TrainingError(
            f"checkpoint {folder} has adapters of a base model with weights {state.base[:12]}, the run's model has"
            f" {adapters.base[:12]}: its files have changed; resume with those that the run was started with"
        )
    adapters.load(folder / ADAPTER)


def _copy(saved: Mapping[str, torch.Tensor], model: PreTrainedModel, folder: Path, *, odd: Iterable[str] = ()) -> None:
    held = dict(model.named_parameters())
    both = held.keys() & saved.keys()
    odd = {*odd, *(held.keys() ^ saved.keys()), *(name for name in both if held[name].shape != saved[name].shape)}
    if odd:
        raise TrainingError(
            f"checkpoint {folder} does not fit the model: {len(odd)} weights differ, such as {min(odd)};"
            " resume with the model that the run was started with"
        )
    with torch.no_grad():
        for name, parameter in held.items():
            parameter.copy_(saved[name])


def _generators() -> dict[str, torch.Tensor]:
    states = {"generator.cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        states["generator.cuda"] = torch.cuda.get_rng_state()
    return states


def _fingerprint(path: Path) -> dict[str, Any]:
    with path.open("rb") as file:
        return {"size": path.stat().st_size, "sha256": hashlib.file_digest(file, "sha256").hexdigest()}


def plain(memory: Mapping[str, Any]) -> dict[str, Any]:
    """The memory of methods as a checkpoint gives it back, in its order, which may be part of it: who came last.

    Raises:
        TrainingError: JSON cannot hold it as it is.

    >>> plain({"advantage": {"average": 0.25, "seen": ("a", "b")}})
    {'advantage': {'average': 0.25, 'seen': ['a', 'b']}}
    """
    try:
        if odd := _odd_key(memory):
            raise TypeError(f"the key {odd} is no string")
        found: dict[str, Any] = json.loads(json.dumps(memory))
    except TypeError as caught:
        raise TrainingError(
            f"the memory of {', '.join(memory)} cannot be saved: {caught}; it must be of plain numbers, strings, lists"
            " and tables whose keys are strings"
        ) from None
    return found


def _odd_key(value: Any) -> str:
    """A key within it that JSON would turn into a string; "" for none."""
    if isinstance(value, Mapping):
        found = next((repr(key) for key in value if not isinstance(key, str)), "")
        return found or next(filter(None, map(_odd_key, value.values())), "")
    if isinstance(value, list | tuple):
        return next(filter(None, map(_odd_key, value)), "")
    return ""


def _write_json(path: Path, data: Any) -> None:
    path.write_text(json.dumps(data, indent=1) + "\n")


def _fsync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
