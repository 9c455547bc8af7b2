"""The sections of a job file but its space, one pydantic model each."""

from typing import Annotated, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

# Names that tables and stored searches give to what is no parent.
RESERVED = {
    "base": "the base model",
    "mean": "the mean of the optimizer's distribution",
    "ties": "a baseline",
}

# What is maximised over the tasks of a search.
Objective = Literal["mean", "worst", "relative", "pareto"]


class Section(BaseModel):
    """What every section is: frozen, and without keys that nobody reads."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class Parent(Section):
    """A source model; exactly one of `model`, `search` and `series` is given."""

    model: str | None = Field(
        None,
        description="A folder with config.json and safetensors files, or a hub id ORG/NAME[@REV]; "
        "either may end in +ADAPTER, a folder or hub id too.",
    )
    search: str | None = Field(
        None, description="A finished search of the same store: its winner is the parent."
    )
    series: str | None = Field(
        None,
        description="A pattern of folders, such as runs/checkpoint-*: each is a parent, in the "
        "order of their numbers.",
    )

    @model_validator(mode="after")
    def _names_one(self) -> Self:
        if sum(given is not None for given in (self.model, self.search, self.series)) != 1:
            raise ValueError("give one of 'model', 'search' and 'series', and only one")
        return self


class TaskEntry(Section):
    """A task that drives the search, and its share of the objective."""

    task: str = Field(
        description="A folder with a task.yaml or suite.yaml, the file itself, the name of a "
        "ready-made one, or lm-eval:NAME."
    )
    weight: float = Field(
        1.0,
        ge=0,
        allow_inf_nan=False,
        description="0: measured for an objective or a constraint, no part of the score.",
    )
    chat: bool | None = Field(
        None, description="Whether it is asked as a conversation; default: as its file says."
    )
    metric: str | None = Field(
        None,
        description="Of a task of lm-eval: METRIC or METRIC,FILTER, such as acc_norm; default: the "
        "first that is a mean over examples.",
    )


class Constraint(Section):
    """What a candidate must keep: its score on a task is not below a model's by more than that."""

    task: str = Field(description="A task of this job, by the name in its file.")
    of: str = Field("base", description="A parent, or base: the model that is compared with.")
    drop: float = Field(0.0, ge=0, lt=1, description="How much may be lost, as a fraction.")


class Optimizer(Section):
    """Who proposes."""

    name: Literal[
        "auto", "cma-es", "lra-cma-es", "cma-es-margin", "tpe", "nsga2", "qmc", "random"
    ] = Field("auto", description="auto: by dimensions, kinds of coordinates, noise, objectives.")
    population: int | Literal["auto"] = Field(
        "auto", description="Candidates in a generation; auto: 4 + floor(3 ln d)."
    )
    sigma0: float | None = Field(
        None, gt=0, le=1 / 3, description="First step size, in units of the box; default: its own."
    )
    restarts: int = Field(
        0,
        ge=0,
        description="cma-es: how often it begins anew with twice the population after converging.",
    )

    @model_validator(mode="after")
    def _large_enough(self) -> Self:
        if self.population != "auto" and self.population < 2:
            raise ValueError(f"population: {self.population}: give at least 2, or auto")
        return self


class Budget(Section):
    """When to stop: whichever is reached first, at the end of a generation."""

    candidates: int | None = Field(None, ge=1)
    example_evaluations: int | None = Field(None, ge=1)
    hours: float | None = Field(None, gt=0, allow_inf_nan=False)
    gpu_hours: float | None = Field(
        None, gt=0, allow_inf_nan=False, description="Of devices at work, summed over them."
    )

    @model_validator(mode="after")
    def _some_limit(self) -> Self:
        if all(limit is None for _, limit in self):
            raise ValueError("no limit: give candidates, example_evaluations, hours or gpu_hours")
        return self


class Stop(Section):
    """When to stop before the budget is spent; None: not for this reason."""

    target: float | None = Field(
        None, gt=0, le=1, description="The shrunk score of the incumbent that is good enough."
    )
    stagnation: int | None = Field(
        None, ge=1, description="Generations without a better shrunk score of the incumbent."
    )
    overfitting: int | None = Field(
        None,
        ge=1,
        description="How often in a row a new incumbent's monitor score is below that of the last "
        "one while its train score is above, and the gap grew by more than its standard error.",
    )


class Staging(Section):
    """Score a generation in stages and let only the best go on.

    Stage i scores every candidate still in the race on the first stages[i] of the generation's
    examples; the keep[i] best go on to stage i + 1.
    """

    stages: tuple[int, ...] = Field(min_length=1)
    keep: tuple[int, ...]

    @model_validator(mode="after")
    def _narrowing(self) -> Self:
        if len(self.keep) != len(self.stages) - 1:
            raise ValueError(f"keep: {len(self.stages) - 1} numbers go between the stages")
        if list(self.stages) != sorted(set(self.stages)) or self.stages[0] < 1:
            raise ValueError(f"stages: {list(self.stages)} do not grow")
        if list(self.keep) != sorted(self.keep, reverse=True) or min(self.keep, default=1) < 1:
            raise ValueError(f"keep: {list(self.keep)} does not shrink towards 1")
        return self


class Guard(Section):
    """What protects the claim."""

    validation_looks: int = Field(
        5, ge=2, description="Uses of validation: one for the best parent, the rest for finalists."
    )
    alpha: float = Field(0.05, gt=0, lt=1, description="Chance of promoting without a real gain.")
    monitor: float = Field(
        0.2, ge=0, lt=1, description="Share of train that the optimizer is never told about."
    )
    train_on_public_test_sets: bool = Field(
        False,
        description="Search on what public benchmarks are scored by, such as parts of MGSM or "
        "IFEval; the model card then says so.",
    )


class Engine(Section):
    """What runs the merged model."""

    kind: Literal["transformers", "vllm"] = "transformers"
    device: str = Field("auto", description="auto, cpu, cuda, cuda:0 ...")
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = Field(
        "auto", description="What the model computes in; auto: as the merged model is stored."
    )
    threads: Annotated[int, Field(ge=1)] | Literal["auto"] = Field(
        "auto", description="CPU threads; results may depend on it, so it is kept for resuming."
    )
    batch_size: Annotated[int, Field(ge=1)] | Literal["auto"] = Field(
        "auto", description="Examples in one forward at most; auto: as many as memory allows."
    )
    context: int | None = Field(
        None, ge=2, description="Tokens of prompt and reply at most; default: the model's own."
    )
    merge_ahead: bool | Literal["auto"] = Field(
        "auto",
        description="transformers: merge the next candidate while this one is scored, where memory "
        "has room for a second model; auto: on a GPU. No result depends on it.",
    )
    tensor_parallel: int = Field(1, ge=1, description="vllm: devices that share one model.")
    gpu_memory: float = Field(
        0.5,
        gt=0,
        lt=1,
        description="vllm: share of a GPU's memory for the live model and its cache; the parents "
        "are held in the rest.",
    )
    cache_gb: float | None = Field(
        None,
        gt=0,
        allow_inf_nan=False,
        description="vllm: size of the KV cache of each device; default: what gpu_memory leaves, "
        "on a CPU 1.",
    )
    eager: bool = Field(
        True,
        description="vllm: false compiles the model: faster, but a recipe with another number of "
        "layers starts the engine again.",
    )

    @model_validator(mode="after")
    def _known_to_its_kind(self) -> Self:
        if self.kind != "vllm":
            for name in ("tensor_parallel", "gpu_memory", "cache_gb", "eager"):
                # A stored job names every key.
                if getattr(self, name) != type(self).model_fields[name].default:
                    raise ValueError(f"{name}: only engine.kind: vllm has it: leave it out")
        elif self.merge_ahead is True:
            raise ValueError("merge_ahead: only engine.kind: transformers does: leave it out")
        return self


class Executor(Section):
    """Where candidates are scored: in this process, or by workers on a Ray cluster."""

    kind: Literal["inline", "ray"] = "inline"
    address: str | None = Field(
        None,
        description="ray: of the cluster, HOST:PORT or ray://HOST:PORT, or auto: one that runs on "
        "this machine; default: RAY_ADDRESS, else one is started here.",
    )
    workers: Annotated[int, Field(ge=1)] | Literal["auto"] = Field(
        "auto", description="ray: how many at most; auto: as many as there is room for at any time."
    )
    priority: int = Field(
        0,
        description="ray: searches of a higher one on the same cluster have room first; equal ones "
        "share it.",
    )
    cpus: Annotated[float, Field(ge=0, allow_inf_nan=False)] | Literal["auto"] = Field(
        "auto",
        description="ray: cores of each worker; auto: engine.threads on a CPU, 1 beside a GPU.",
    )
    gpus: Annotated[float, Field(ge=0, allow_inf_nan=False)] | Literal["auto"] = Field(
        "auto",
        description="ray: GPUs of each worker, a fraction to share one; auto: as many as its "
        "engine uses, where the cluster has any and engine.device allows it.",
    )
    resources: dict[str, Annotated[float, Field(gt=0, allow_inf_nan=False)]] = Field(
        {}, description="ray: what else each worker asks for, by the names that nodes give it."
    )
    time_limit: float = Field(
        3600.0,
        gt=0,
        allow_inf_nan=False,
        description="ray: seconds that a worker may take to open the models, or for one "
        "evaluation, before it is replaced.",
    )
    start_limit: float = Field(
        300.0,
        gt=0,
        allow_inf_nan=False,
        description="ray: seconds to wait for the cluster to have room for any worker.",
    )

    @model_validator(mode="after")
    def _known_to_its_kind(self) -> Self:
        if self.kind != "ray":
            for name, field in type(self).model_fields.items():
                if name != "kind" and getattr(self, name) != field.default:
                    raise ValueError(f"{name}: only executor.kind: ray has it: leave it out")
        if self.gpus != "auto" and self.gpus > 1 and self.gpus % 1:
            raise ValueError(f"gpus: {self.gpus:g}: give a whole number, or a fraction below 1")
        return self
