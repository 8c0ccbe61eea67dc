"""What a run is: one TOML file, typed, with every unknown key refused.

    model = "path/or/hub-id"
    recipe = "grpo"
    data = { train = "train.jsonl", held_out = "held_out.jsonl" }
    rewards.verifier = "my_rewards.py:score"
    loop = { steps = 200, groups_per_step = 16, group_size = 8, max_lag = 4 }
    sampling.max_tokens = 256

Relative paths start at the file, those of a RunConfig made in Python at the working directory. A recipe holds a
method; model, sizes and machines are the run's.
"""

import tomllib
from collections.abc import Mapping, Sequence
from os.path import normpath
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Self

import tomli_w
from pydantic import Field, ValidationError, field_validator, model_validator

from millrace.actors.config import EvaluationConfig, GenerationConfig
from millrace.actors.datasets.config import DataConfig
from millrace.cluster.supervise.config import SuperviseConfig
from millrace.core.config import Config, in_words
from millrace.core.errors import ConfigError, nearest
from millrace.core.recipe import Recipe, Rewards, Spec, Specs
from millrace.core.recipe import load as load_recipe
from millrace.core.references import absolute
from millrace.core.replay.config import QueueConfig
from millrace.core.replay.journal import JournalConfig
from millrace.learner.config import LearnerConfig, SupervisedConfig
from millrace.rewards.config import RewardConfig

Dtype = Literal["float32", "bfloat16", "float16"]


class SamplingConfig(Config):
    """How training rollouts are sampled. What the learner cannot reproduce is not offered."""

    max_tokens: int = Field(default=256, ge=1)
    """Longest response."""

    temperature: float = Field(default=1.0, gt=0)
    """Log-probabilities are those of the distribution at this temperature, in engine and learner alike."""


class GenerationSection(GenerationConfig):
    """The generation workers: one engine each."""

    workers: int = Field(default=1, ge=1)
    """Engines."""

    engine: Spec = "vllm"
    """"vllm", "vllm_async" (an engine that spans GPUs), "transformers" or "table", with its own settings."""

    dtype: Dtype = "float32"
    """The engines compute in it, and weights are published in it."""

    gpus: float = Field(default=0, ge=0)
    """GPUs of one engine."""

    context: int | None = Field(default=None, ge=1)
    """Longest prompt and response together, tokens; by default what the data and `sampling` need."""


class RewardSection(RewardConfig):
    """The reward workers, and what they judge by."""

    verifier: Spec | None = None
    """Instead of the recipe's: a name, "file.py:function" or "package.module:function"."""

    shapers: Specs | None = None
    """Instead of the recipe's: what is made of a group's scores, in order."""

    filters: Specs | None = None
    """Instead of the recipe's: which judged groups are learnt from."""


class EvaluationSection(EvaluationConfig):
    """Held-out evaluation; it runs when the data name a held-out file. `max_tokens` and `temperature`
    are sampling's if not given."""

    gpus: float = Field(default=0, ge=0)
    """GPUs of the evaluator's engine."""


class LearnerSection(LearnerConfig):
    """The learner."""

    gpus: float = Field(default=0, ge=0)
    """GPUs of the learner."""


class RunConfig(Config):
    """A run. Made of keywords, `RunConfig(model=..., recipe="grpo", data={"train": ...}, loop={...})`, or of a file.

    Raises:
        ConfigError: every mistake on a line of its own, with the key and the nearest right one.
    """

    name: str = ""
    """Of the directory it leaves; by default the file's stem."""

    model: str
    """A directory that `AutoModelForCausalLM` opens, or a hub id."""

    reference: str | None = None
    """The model that a recipe's divergence is measured to; frozen."""

    recipe: Recipe
    """A name in recipes/, a path to a .toml of one's own, or a table."""

    data: DataConfig
    """Training and held-out rows."""

    loop: QueueConfig
    """Sizes and bounds of the loop: steps, groups_per_step, group_size, max_lag, stale."""

    sampling: SamplingConfig = SamplingConfig()
    generation: GenerationSection = GenerationSection()
    rewards: RewardSection = RewardSection()
    learner: LearnerSection = LearnerSection()
    supervised: SupervisedConfig = SupervisedConfig()
    """Used by recipes that learn from the data's answers instead of rollouts."""

    evaluation: EvaluationSection = EvaluationSection()
    journal: JournalConfig = JournalConfig()
    """What the queue keeps on the disk, so that it survives a kill."""

    supervise: SuperviseConfig = SuperviseConfig()
    """When a component counts as lost, and how often it is started again."""

    seed: int = Field(default=0, ge=0)
    """Of data order, sampling and whatever else is drawn."""

    runs: str = "runs"
    """The directory that run directories are made in."""

    stall_s: float = Field(default=600.0, gt=0)
    """A run in which no step ends for so long is stopped with a message that says who waits for whom."""

    stall_report_s: float = Field(default=60.0, gt=0)
    """When no step ends for so long, one message says which draw everything waits for, where it is, and what to do."""

    tracking: Specs = ()
    """Outside systems that are told of it: "wandb", "mlflow", "prometheus", each with its own settings."""

    if not TYPE_CHECKING:  # to type checkers the fields are the signature

        def __init__(self, **table: Any) -> None:
            try:
                super().__init__(**_with_recipe(table, Path.cwd()))
            except ValidationError as caught:
                raise in_words(caught, source="RunConfig") from None

        __init__.__pydantic_base_init__ = True  # validation needs no detour through it

    @classmethod
    def load(cls, path: str | Path, **settings: Any) -> "RunConfig":
        """A run out of a TOML file; `settings` replace what it says, a dot in a key written as two underscores:
        `RunConfig.load("run.toml", loop__steps=20)`.

        Raises:
            ConfigError: the file is missing or no TOML, or a key or value in it is wrong.
        """
        return load(path, settings=[(key.split("__"), value) for key, value in settings.items()])

    @field_validator("model", "reference")
    @classmethod
    def _named(cls, value: str | None) -> str | None:
        if value is not None and not value.strip():
            raise ValueError("is empty: give a model directory or a hub id like owner/name")
        return value

    @model_validator(mode="after")
    def _names_are_file_names(self) -> Self:
        if "/" in self.name or self.name in (".", ".."):
            raise ValueError(f"name '{self.name}' is not a directory's name: leave out the slashes")
        return self

    @model_validator(mode="after")
    def _weights_are_published_as_engines_compute(self) -> Self:
        published, computed = self.learner.publish_dtype, self.generation.dtype
        if "publish_dtype" in self.learner.model_fields_set and published != computed:
            raise ValueError(
                f"learner.publish_dtype = '{published}', but generation.dtype = '{computed}': what is published could "
                "not be proved in the engines; leave publish_dtype out, it follows generation.dtype"
            )
        return self

    @model_validator(mode="after")
    def _a_poison_prompt_is_told_from_its_neighbours(self) -> Self:
        if self.loop.crashes < 3:
            raise ValueError(
                f"loop.crashes = {self.loop.crashes}: a prompt that crashes its engine is told from those beside it "
                "from the second crash on, so that with less than 3 all of them would be given up; 3 is the least"
            )
        return self

    @model_validator(mode="after")
    def _a_verdict_comes_before_its_lease_ends(self) -> Self:
        if self.rewards.deadline_s >= self.loop.judge_lease_s:
            raise ValueError(
                f"rewards.deadline_s = {self.rewards.deadline_s:g} is not below loop.judge_lease_s = "
                f"{self.loop.judge_lease_s:g}: slow verdicts would come after the lease of their group has ended, and "
                "be thrown away; raise loop.judge_lease_s to at least twice the deadline"
            )
        return self

    @property
    def verifier(self) -> Spec | None:
        """What judges: the run's own choice, else the recipe's."""
        return self.judging.verifier

    @property
    def judging(self) -> Rewards:
        """How rollouts are judged: the recipe's way, with the run's own choices."""
        own = {slot: spec for slot in Rewards.model_fields if (spec := getattr(self.rewards, slot)) is not None}
        return self.recipe.rewards.model_copy(update=own)

    @property
    def directory(self) -> Path:
        return Path(self.runs) / self.name


def of(table: Mapping[str, Any], *, root: Path, source: str, name: str = "run") -> RunConfig:
    """A run out of a table, its paths made absolute from `root`.

    Raises:
        ConfigError: every mistake on a line of its own, with the file, the key and the nearest right one.
    """
    return anchored(RunConfig.parse({"name": name, **_with_recipe(table, root)}, source=source), root)


def _with_recipe(table: Mapping[str, Any], root: Path) -> dict[str, Any]:
    """The table with its recipe composed, so that a mistake there is a RecipeError."""
    recipe = table.get("recipe", "grpo")
    return {**table, "recipe": load_recipe(recipe, root=root) if isinstance(recipe, str | Mapping) else recipe}


def anchored(config: RunConfig, root: Path) -> RunConfig:
    """The same run with its paths absolute; relative ones start at `root`."""
    data = config.data.model_copy(
        update={key: _below(root, getattr(config.data, key)) for key in ("train", "held_out")}
    )
    own = {slot: _anchored(spec, root) for slot in Rewards.model_fields if (spec := getattr(config.rewards, slot))}
    rewards = config.rewards.model_copy(update=own)
    return config.model_copy(
        update={
            "name": config.name or "run",
            "recipe": config.recipe.anchored(root),
            "data": data,
            "rewards": rewards,
            "model": _model(config.model, root),
            "reference": config.reference and _model(config.reference, root),
            "runs": _below(root, config.runs),
        }
    )


def load(path: str | Path, *, settings: Sequence[tuple[Sequence[str], Any]] = ()) -> RunConfig:
    """A run out of a TOML file.

    Args:
        settings: (dotted key, value) pairs that replace what the file says.
    Raises:
        ConfigError: the file is missing or no TOML, or a key or value in it is wrong.
    """
    path = Path(path).expanduser()
    if not path.is_file():
        beside = [p.name for p in path.parent.glob("*.toml")] if path.parent.is_dir() else []
        what = "is a folder; give a .toml file" if path.is_dir() else "there is no such file"
        raise ConfigError(f"{path}: {what}{nearest(path.name, beside)}")
    try:
        table = tomllib.loads(path.read_text(encoding="utf-8"))
    except tomllib.TOMLDecodeError as caught:
        raise ConfigError(f"{path}: is not TOML: {caught}") from None
    for keys, value in settings:
        _set(table, keys, value)
    return of(table, root=path.resolve().parent, source=str(path), name=path.stem)


def of_directory(directory: str | Path) -> RunConfig:
    """The configuration that a run directory was started with.

    Raises:
        ConfigError: it is no run directory.
    """
    path = Path(directory).expanduser().resolve() / "config.toml"
    if not path.is_file():
        raise ConfigError(f"{directory}: is no run directory, it has no config.toml; give the one that holds the run")
    return load(path)


def save(config: RunConfig, path: Path) -> None:
    """Write what was said, resolved, so that `load` gives an equal configuration."""
    path.write_text(tomli_w.dumps(_without_none(config.model_dump(mode="json", exclude_unset=True))), encoding="utf-8")


def _without_none(value: Any) -> Any:
    """TOML has no null: what is None is left out, and is None by default."""
    if isinstance(value, dict):
        return {key: _without_none(inner) for key, inner in value.items() if inner is not None}
    return [_without_none(inner) for inner in value] if isinstance(value, list | tuple) else value


def _set(table: dict[str, Any], keys: Sequence[str], value: Any) -> None:
    for key in keys[:-1]:
        inner = table.setdefault(key, {})
        if not isinstance(inner, dict):
            inner = table[key] = {"name": inner}  # recipe = "grpo" and recipe.objective... = ...
        table = inner
    table[keys[-1]] = value


def _below(root: Path, value: str | None) -> str | None:
    return None if value is None else normpath(root / Path(value).expanduser())


def _anchored(spec: Any, root: Path) -> Any:
    """A spec, or several, with its references made absolute, those in its settings too."""
    if isinstance(spec, str):
        return absolute(spec, root)
    if isinstance(spec, Mapping):
        return {key: _anchored(value, root) for key, value in spec.items()}
    return type(spec)(_anchored(each, root) for each in spec) if isinstance(spec, list | tuple) else spec


def _model(value: str, root: Path) -> str:
    """A directory if there is one below `root`, or the value looks like a path; else a hub id as it stands."""
    path = root / Path(value).expanduser()
    looks_local = value.startswith((".", "/", "~")) or value.count("/") > 1
    return normpath(path) if looks_local or path.exists() else value
