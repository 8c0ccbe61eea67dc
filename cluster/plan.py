"""Everything that can be checked before anything expensive starts, and what would then run.

`make_plan` reads the data, opens the tokenizer and the model's config, composes the recipe and resolves the
verifier. `millrace train` begins with it; `--dry-run` ends with it.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any, TypeVar

from transformers import AutoConfig, GenerationConfig, PreTrainedTokenizerBase

from millrace.actors.config import EvaluationConfig
from millrace.actors.datasets.loading import load
from millrace.actors.engines import ENGINES
from millrace.cluster import trackers
from millrace.cluster.checks import check_fit, check_found, check_lora, check_recipe
from millrace.cluster.config import RunConfig
from millrace.core.catalogue import Spec, split
from millrace.core.config import Config
from millrace.core.errors import ConfigError, ModelError, boundary, nearest
from millrace.core.protocols import Sampling
from millrace.core.replay.config import QueueConfig
from millrace.core.types import Prompt
from millrace.learner.config import LearnerConfig, SupervisedConfig
from millrace.learner.objective import Objective
from millrace.learner.tokenizer import load_tokenizer


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """A run that can start."""

    config: RunConfig
    objective: str  # the composed loss, in words
    loop: QueueConfig  # as the run's, with what it leaves to the recipe
    reference: str | None  # the model that a divergence is measured to, as it begins
    prompts: Sequence[Prompt]
    held_out: Sequence[Prompt]
    sampling: Sampling
    evaluation: EvaluationConfig  # as the run's, with what it leaves to sampling
    learner: LearnerConfig  # as the run's, with what it leaves to the run
    supervision: SupervisedConfig | None  # of a recipe that learns from the data's answers
    engine: dict[str, Any]  # name and options, as engines are built from
    verifier: Spec | None  # None where nothing is judged
    notes: tuple[str, ...]  # what the user should know, but need not change

    @property
    def supervised(self) -> bool:
        """The recipe learns from the data's answers: no engine, no judge, no queue."""
        return self.supervision is not None

    def __str__(self) -> str:
        return "\n".join(_described(self))


def make_plan(config: RunConfig) -> Plan:
    """Check everything.

    Raises:
        ConfigError, DataError, ModelError, RecipeError, RewardError: what cannot work, and the way out.
    """
    trackers.check(config.tracking)
    reference = _reference(config)
    objective = Objective.of(config.recipe.objective, models=frozenset({"reference"} if reference else ()))
    supervised = not objective.learns_from_rewards
    compared = check_recipe(config, objective, reference)
    check_found(config.model, "model")
    if reference is not None and reference != config.model:
        check_found(reference, "reference")
    tokenizer = load_tokenizer(config.model)
    check_lora(config, config.supervised if supervised else config.learner)
    context = _context(config.model)
    new = 0 if supervised else config.sampling.max_tokens
    stop_tokens = _stop_tokens(config.model, int(tokenizer.eos_token_id))
    evaluation = _filled(
        config.evaluation,
        max_tokens=config.sampling.max_tokens,
        temperature=config.sampling.temperature,
        stop_token_ids=stop_tokens,
    )
    room = config.generation.context or context
    prompts, held_out = _data(
        config,
        tokenizer,
        context_tokens=room,
        new_tokens=new,
        held_out_tokens=0 if supervised else evaluation.max_tokens,
    )
    notes = check_fit(config, prompts, held_out, supervised=supervised)
    if config.reference and not compared:
        notes.append(
            f"nothing in recipe {config.recipe.origin} compares with reference = {config.reference}: it is left out"
        )
    longest = max(len(prompt.tokens_P) for prompt in (*prompts, *held_out))
    longest += max(config.sampling.max_tokens, evaluation.max_tokens if held_out else 0)
    engine, engine_notes = _engine(config, min(config.generation.context or longest, context))
    return Plan(
        config=config,
        objective=str(objective),
        loop=_loop(config),
        reference=reference if compared else None,
        prompts=prompts,
        held_out=held_out,
        sampling=Sampling(
            max_tokens=config.sampling.max_tokens,
            temperature=config.sampling.temperature,
            stop_token_ids=stop_tokens,
        ),
        evaluation=evaluation,
        learner=_learner(config),
        supervision=_supervision(config, len(prompts)) if supervised else None,
        engine=engine,
        verifier=config.verifier,
        notes=(*notes, *engine_notes),
    )


def _learner(config: RunConfig) -> LearnerConfig:
    return _filled(
        config.learner,
        seed=config.seed,
        publish_dtype=config.generation.dtype,
        decay_steps=config.loop.steps * config.recipe.updates.per_batch,
    )


def _supervision(config: RunConfig, rows: int) -> SupervisedConfig:
    section = config.supervised
    return _filled(section, seed=config.seed, decay_steps=section.epochs * -(-rows // section.batch_rows))


def _reference(config: RunConfig) -> str | None:
    """The run's; a reference that follows the policy begins as the policy does."""
    moves = split(config.recipe.objective.reference, slot="reference")[0] != "frozen"
    return config.reference or (config.model if moves else None)


def _loop(config: RunConfig) -> QueueConfig:
    """The run's sizes, with the recipe's reuse."""
    if "reuse" in config.loop.model_fields_set:
        return config.loop
    said = config.loop.model_dump(exclude_unset=True) | {"reuse": config.recipe.updates.reuse}
    return QueueConfig.parse(said, source=f"recipe {config.recipe.origin} in loop")


def _data(
    config: RunConfig,
    tokenizer: PreTrainedTokenizerBase,
    *,
    context_tokens: int,
    new_tokens: int,
    held_out_tokens: int,
) -> tuple[Sequence[Prompt], Sequence[Prompt]]:
    """Training and held-out prompts."""
    data = config.data
    prompts = load(
        data.train, tokenizer, data, context_tokens=context_tokens, max_new_tokens=new_tokens, limit=data.limit
    )
    if data.held_out is None:
        return prompts, ()
    return prompts, load(
        data.held_out,
        tokenizer,
        data,
        context_tokens=context_tokens,
        max_new_tokens=held_out_tokens,
        limit=data.held_out_limit,
    )


def _context(model: str) -> int:
    """Tokens that the model can hold."""
    with boundary(f"loading the config of model {model}", ModelError):
        text = AutoConfig.from_pretrained(model).get_text_config()
    for name in ("max_position_embeddings", "n_positions", "positions"):
        if value := getattr(text, name, None):
            return int(value)
    raise ModelError(f"model {model}: its config does not say how many tokens it can hold: set max_position_embeddings")


def _stop_tokens(model: str, eos: int) -> tuple[int, ...]:
    """The tokenizer's end of sequence, and those of the model's generation config."""
    more: Any = None
    if (Path(model) / "generation_config.json").is_file() or not Path(model).is_dir():
        try:
            more = GenerationConfig.from_pretrained(model).eos_token_id
        except OSError:
            more = None  # a hub model without one
    listed = more if isinstance(more, list) else [] if more is None else [more]
    return tuple(dict.fromkeys([eos, *map(int, listed)]))


def _engine(config: RunConfig, max_model_len: int) -> tuple[dict[str, Any], list[str]]:
    """The engine's name and options; transformers where vLLM is not installed, which is said."""
    name, options = split(config.generation.engine, slot="generation.engine", error=ConfigError)
    if name not in ENGINES:
        raise ConfigError(
            f"generation.engine: unknown engine '{name}'{nearest(name, ENGINES)} There are {', '.join(ENGINES)}."
        )
    notes = []
    if name.startswith("vllm") and find_spec("vllm") is None:
        notes.append("vLLM is not installed here: the transformers engine generates instead, more slowly")
        name, options = "transformers", {}
    return {
        "name": name,
        "model": config.model,
        "slots": config.generation.slots,
        "max_model_len": max_model_len,
        "dtype": config.generation.dtype,
        "seed": config.seed,
        **options,
    }, notes


Section = TypeVar("Section", bound=Config)


def _filled(section: Section, **defaults: Any) -> Section:
    """The section, with `defaults` where the user said nothing."""
    said = section.model_fields_set
    return section.model_copy(update={key: value for key, value in defaults.items() if key not in said})


def _spelled(spec: Spec | None) -> str:
    """A spec as one reads it: `name(setting=value)`."""
    if spec is None or isinstance(spec, str):
        return str(spec)
    name, settings = split(spec, slot="verifier")
    return f"{name}({', '.join(f'{key}={value!r}' for key, value in settings.items())})"


def _described(plan: Plan) -> Iterator[str]:
    """What would run, a line each."""
    config = plan.config
    loop, generation = config.loop, config.generation
    yield f"run        {config.name} -> {config.directory}"
    yield f"model      {config.model}" + (f", reference {plan.reference}" if plan.reference else "")
    yield f"recipe     {config.recipe.origin}: {plan.objective}"
    yield f"data       {len(plan.prompts)} prompts of {config.data.train}"
    if plan.held_out:
        yield (
            f"held out   {len(plan.held_out)} prompts of {config.data.held_out}, {config.evaluation.samples} responses "
            f"each, every {config.evaluation.every} steps"
        )
    if plan.supervised:
        yield "learner    supervised, from the data's answers"
    else:
        yield f"verifier   {_spelled(plan.verifier)}, {config.rewards.workers} x"
        yield (
            f"loop       {loop.steps} steps of {loop.groups_per_step} groups x {loop.group_size} rollouts, "
            f"at most {loop.max_lag} versions old (stale: {loop.stale})"
        )
        yield (
            f"generation {generation.workers} x {plan.engine['name']}, {generation.slots} slots of "
            f"{plan.engine['max_model_len']} tokens, temperature {plan.sampling.temperature:g}"
        )
    yield from (f"note       {note}" for note in plan.notes)
