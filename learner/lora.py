"""LoRA: trained low-rank factors beside frozen weights, W = W_base + (alpha / rank) * B A.

Source: LoRA (Hu et al. 2021), arXiv:2106.09685. The layers are those of the library peft, put into the model in place,
so that it stays the Hugging Face model it was: attention over packed rows, checkpointing and autocast go on as before.
"""

import copy
import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import peft
import torch
from peft.tuners.lora import LoraLayer
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from millrace.core.errors import ConfigError, ModelError, TrainingError, boundary, nearest
from millrace.core.one_at_a_time import MODEL_LOADING
from millrace.core.weights import LORA_A, LORA_B, identity_of
from millrace.learner.config import LoraConfig

ADAPTER = "default"  # as peft calls it
PEFT_PREFIX = "base_model.model."  # of names in peft's files
CONFIG_FILE, TENSORS_FILE = "adapter_config.json", "adapter_model.safetensors"


def check_targets(name: str, config: LoraConfig) -> None:
    """Refuse targets that the model of this name does not have, before its weights are read.

    Raises:
        ConfigError: naming the target and the nearest right one.
        ModelError: the model's config does not open.
    """
    with boundary(f"loading the config of model {name}", ModelError), MODEL_LOADING, torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(name))
    target_modules(model, config)


def target_modules(model: PreTrainedModel, config: LoraConfig) -> list[str]:
    """Full names of the linear layers that get adapters.

    Raises:
        ConfigError: a target is no linear layer of the model's blocks, or there is none at all.
    """
    head = model.get_output_embeddings()
    layers: dict[str, list[str]] = {}
    for name, module in model.named_modules():
        *path, last = name.split(".")
        # Blocks are numbered: model.layers.0.self_attn.q_proj.
        if isinstance(module, torch.nn.Linear | Conv1D) and module is not head and any(map(str.isdecimal, path)):
            layers.setdefault(last, []).append(name)
    kind = model.config.model_type
    if not layers:
        raise ConfigError(f"lora: model type '{kind}' has no linear layers in numbered blocks; train it without lora")
    for target in config.targets or ():
        if target not in layers:
            raise ConfigError(
                f"lora.targets: model type '{kind}' has no linear layer '{target}' in its blocks"
                f"{nearest(target, layers)} It has {', '.join(layers)}."
            )
    return [name for last in config.targets or layers for name in layers[last]]


@dataclass(frozen=True, slots=True)
class AdaptersOff:
    """A model with adapters, seen without them: the base model, at no memory of its own."""

    adapters: "Adapters"


class Adapters:
    """The adapters of a model, put into it here; its other weights are frozen.

    Args:
        model: from `load_model`; changed in place.
        config: rank, alpha and targets.
        name: of the base model, for the adapter's own config file.
        seed: of the first factors A; the factors B start as zeros, so that the model computes what it did.
    Raises:
        ConfigError: a target is no linear layer of the model's blocks.
    """

    def __init__(self, model: PreTrainedModel, config: LoraConfig, *, name: str, seed: int) -> None:
        targets = target_modules(model, config)
        self.model = model
        self.scale = config.alpha / config.rank
        self.base = identity_of((n, p.detach().float().cpu().numpy()) for n, p in model.named_parameters())
        modules = dict(model.named_modules())
        self._config = peft.LoraConfig(
            r=config.rank,
            lora_alpha=config.alpha,  # type: ignore[arg-type]  # peft divides it by the rank, nothing else
            target_modules=targets,
            fan_in_fan_out=any(isinstance(modules[target], Conv1D) for target in targets),
            task_type=peft.TaskType.CAUSAL_LM,
            base_model_name_or_path=name,
        )
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            peft.inject_adapter_in_model(self._config, model, adapter_name=ADAPTER)
        self._layers: dict[str, LoraLayer] = {n: m for n, m in model.named_modules() if isinstance(m, LoraLayer)}

    @contextmanager
    def off(self) -> Iterator[None]:
        """The model computes as its base does."""
        for layer in self._layers.values():
            layer.enable_adapters(False)
        try:
            yield
        finally:
            for layer in self._layers.values():
                layer.enable_adapters(True)

    def factors(self) -> Iterator[tuple[str, torch.Tensor]]:
        """What is published: `lora_B` and `lora_A` of each weight, whose product has the weight's own shape."""
        for name, layer in self._layers.items():
            b, a = self._factors(layer)
            yield f"{name}.weight{LORA_B}", b
            yield f"{name}.weight{LORA_A}", a

    @torch.no_grad()
    def whole(self, *, device: torch.device | None = None) -> Iterator[tuple[str, torch.Tensor]]:
        """The entries of the base model's state dict, with the adapters merged into their weights.

        Args:
            device: of the merged ones; None: the model's.
        """
        for name, tensor in self.model.state_dict().items():
            path, _, last = name.rpartition(".base_layer.")
            if not path:
                if ".lora_" not in name:
                    yield name, tensor
                continue
            if last == "weight":
                b, a = self._factors(self._layers[path])
                tensor = torch.addmm(tensor, b, a, alpha=self.scale).to(device)
            yield f"{path}.{last}", tensor

    def save(self, folder: Path) -> None:
        """In peft's own format: `peft.PeftModel.from_pretrained(base, folder)` opens it."""
        config = copy.copy(self._config)
        config.inference_mode = True
        config.save_pretrained(str(folder))
        tensors = {name: parameter.detach().contiguous() for name, parameter in self._named()}
        save_file(tensors, folder / TENSORS_FILE, metadata={"format": "pt"})

    def load(self, folder: Path) -> None:
        """Put the factors of `save` back, to the bit.

        Raises:
            TrainingError: there are none, or they are of other layers, another rank or another alpha.
        """
        way_out = "resume with the lora settings that the run was started with"
        if not (folder / TENSORS_FILE).is_file():
            raise TrainingError(f"checkpoint {folder.parent} was written without lora; {way_out}")
        saved, held = load_file(folder / TENSORS_FILE), dict(self._named())
        odd = sorted(saved.keys() ^ held.keys())
        odd += [name for name in saved.keys() & held.keys() if saved[name].shape != held[name].shape]
        if odd:
            raise TrainingError(f"checkpoint {folder} has other adapters, such as {odd[0]}; {way_out}")
        config = json.loads((folder / CONFIG_FILE).read_text())
        if config["lora_alpha"] != self._config.lora_alpha:
            raise TrainingError(
                f"checkpoint {folder} has lora.alpha = {config['lora_alpha']:g}, the run {self._config.lora_alpha:g};"
                f" {way_out}"
            )
        with torch.no_grad():
            for name, parameter in held.items():
                parameter.copy_(saved[name])

    def _named(self) -> Iterator[tuple[str, torch.nn.Parameter]]:
        for name, layer in self._layers.items():
            yield f"{PEFT_PREFIX}{name}.lora_A.weight", _weight(layer.lora_A)
            yield f"{PEFT_PREFIX}{name}.lora_B.weight", _weight(layer.lora_B)

    def _factors(self, layer: LoraLayer) -> tuple[torch.Tensor, torch.Tensor]:
        a, b = _weight(layer.lora_A), _weight(layer.lora_B)
        # GPT-2 keeps its weights as [in, out]: the transpose of B A is the product of the transposes, swapped.
        return (a.T, b.T) if isinstance(layer.get_base_layer(), Conv1D) else (b, a)


def _weight(factor: torch.nn.ModuleDict) -> torch.nn.Parameter:
    weight = factor[ADAPTER].weight
    assert isinstance(weight, torch.nn.Parameter)
    return weight
