"""Do the parts of a run fit each other? Each check names what does not, and the way out."""

from collections.abc import Sequence
from importlib import import_module
from pathlib import Path

from transformers import AutoConfig

from millrace.actors.datasets.loading import columns, require
from millrace.cluster.config import RunConfig
from millrace.core.errors import ConfigError, ModelError, RecipeError, boundary, nearest
from millrace.core.recipe import Updates
from millrace.core.references import is_reference
from millrace.core.replay import limiter
from millrace.core.types import Prompt
from millrace.learner.config import LearnerConfig, SupervisedConfig
from millrace.learner.objective import Objective
from millrace.rewards.judge import verifier
from millrace.rewards.shaping import Shaping
from millrace.rewards.trial import tried

# Methods that leave nothing of a group of one.
COMPARES = frozenset(
    {
        "advantages.grpo",
        "advantages.mean_baseline",
        "advantages.rloo",
        "normalisers.batch_std",
        "selections.best_and_worst",
    }
)


def check_fit(
    config: RunConfig, prompts: Sequence[Prompt], held_out: Sequence[Prompt], *, supervised: bool
) -> list[str]:
    """The data, the verifier and the sizes fit each other. Returns what the user should know."""
    if supervised:
        require(prompts, ("answer",), whose=f"recipe {config.recipe.origin}", source=config.data.train)
        return ["a supervised run evaluates nothing: data.held_out is not used"] if held_out else []
    _check_gpus(config)
    return [*_check_verifier(config, prompts, held_out), *_idle_slots(config)]


def check_recipe(config: RunConfig, objective: Objective, reference: str | None) -> bool:
    """The recipe and the run fit each other. Returns whether anything compares with the reference model."""
    shaping = Shaping.of(config.judging)
    origin, loop, updates = config.recipe.origin, config.loop, config.recipe.updates
    if config.verifier is None and objective.learns_from_rewards:
        raise RecipeError(
            f"recipe {origin} learns from rewards, but names no verifier: "
            'set rewards.verifier to a name, or to your own "file.py:function"'
        )
    if not objective.learns_from_rewards:
        _check_supervised(config, objective)
    compares = [m.name for m in (objective.advantage, objective.normaliser, objective.selection) if m is not None]
    if loop.group_size == 1 and (one := next((name for name in compares if name in COMPARES), None)):
        raise RecipeError(
            f"recipe {origin}: {one} compares the rollouts of a group, but "
            "loop.group_size = 1: nothing would be learnt; set it to 2 or more"
        )
    if updates.minibatches > loop.groups_per_step:
        raise RecipeError(
            f"recipe {origin}: updates.minibatches = {updates.minibatches}, but a batch has loop.groups_per_step ="
            f" {loop.groups_per_step} groups, which stay whole: lower the first or raise the second"
        )
    if "reference_logprob_N" in shaping.words and reference is None:
        raise RecipeError(
            f"recipe {origin}: its shapers ask for reference_logprob_N: give the run a reference model,"
            ' reference = "path"'
        )
    compared = "reference_logprob_N" in objective.asks | objective.asks_of_groups | shaping.words
    if objective.moves_reference and not compared:
        raise RecipeError(
            f"recipe {origin}: {objective.reference.name} moves a reference model that nothing compares with: add a"
            ' divergence, as penalties = ["k3"], or leave it out'
        )
    return compared


def _check_supervised(config: RunConfig, objective: Objective) -> None:
    """Nothing is asked of a supervised run that it would leave undone."""
    recipe = config.recipe
    if "reference_logprob_N" in objective.asks:
        raise RecipeError(
            f"recipe {recipe.origin} learns from given answers, where there is no reference model: leave out what asks"
            " for reference_logprob_N, or learn from rewards"
        )
    if recipe.updates != Updates() or config.judging.shapers or config.judging.filters:
        raise RecipeError(
            f"recipe {recipe.origin} learns from given answers, which have no updates, shapers and filters: leave them"
            " out; how often the answers are seen is supervised.epochs and supervised.batch_rows"
        )


def check_lora(config: RunConfig, section: LearnerConfig | SupervisedConfig) -> None:
    """The model has the layers that are to be adapted."""
    if section.lora is not None:
        # Found where it is asked for: what it imports takes seconds.
        import_module("millrace.learner.lora").check_targets(config.model, section.lora)


def _check_gpus(config: RunConfig) -> None:
    """Ray hides the GPUs from a component that asked for none; it would go on, slowly, on the CPU."""
    if not config.generation.gpus:
        return
    sections = {"learner": config.learner.gpus, "evaluation": config.evaluation.gpus if config.data.held_out else 1}
    for name, gpus in sections.items():
        if not gpus:
            raise ConfigError(
                f"generation.gpus = {config.generation.gpus:g}, but {name}.gpus = 0, so that the {name} would run on "
                f"the CPU: give it a GPU, or a share of one, as {name}.gpus = 0.5"
            )


def check_found(name: str, what: str) -> None:
    """A directory that is not there is said at once; a hub id is asked for once, not file after file."""
    path = Path(name)
    if path.is_dir():
        return
    if path.is_absolute():
        raise ModelError(f"{what} {name}: no such directory; give one with config.json, or a hub id like owner/name")
    near = nearest(path.name, [found.parent.name for found in path.absolute().parent.glob("*/config.json")])
    with boundary(
        f"{what} {name} is no directory beside the configuration{near or '.'} Asking for it as a hub id", ModelError
    ):
        AutoConfig.from_pretrained(name)


def _check_verifier(config: RunConfig, prompts: Sequence[Prompt], held_out: Sequence[Prompt]) -> list[str]:
    assert config.verifier is not None
    method = verifier(config.verifier, columns=tuple(sorted(columns(prompts))))
    whose = f"verifier {method.name}"
    require(prompts, method.needs, whose=whose, source=config.data.train)
    if config.data.held_out is not None:
        require(held_out, method.needs, whose=whose, source=config.data.held_out)
    failed = tried(method, prompts, config.rewards) if is_reference(method.name) else ""
    return [failed] if failed else []


def _idle_slots(config: RunConfig) -> list[str]:
    """Engine slots that admission can never fill. Whole workers of them are a mistake, fewer are a note."""
    loop, generation = config.loop, config.generation
    slots = generation.slots * generation.workers
    sizes = {"groups_per_step": loop.groups_per_step, "group_size": loop.group_size, "max_lag": loop.max_lag}
    idle = limiter.idle_slots(slots, **sizes)
    if idle >= generation.slots:
        raise ConfigError(
            f"generation.workers = {generation.workers} with {generation.slots} slots each: "
            f"{idle // generation.slots} of them would never work. {limiter.explain_idle(slots, **sizes)}"
        )
    return [limiter.explain_idle(slots, **sizes)] if idle else []
