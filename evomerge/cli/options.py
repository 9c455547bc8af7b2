"""Arguments that several commands share."""

from pathlib import Path
from typing import Annotated

import typer

from evomerge.errors import InputError

DEFAULT_STORE = "sqlite:///evomerge.db"
SERVER = "EVOMERGE_SERVER"
JobFile = Annotated[Path, typer.Argument(metavar="JOB.yaml", show_default=False)]
Search = Annotated[str, typer.Argument(metavar="SEARCH", help="The search's name.")]
StoreOption = Annotated[
    str | None,
    typer.Option(
        "--store",
        envvar="EVOMERGE_STORE",
        help="A SQLite file, or a database's URL; default: evomerge.db.",
    ),
]
ServerOption = Annotated[
    str | None,
    typer.Option(
        "--server",
        metavar="URL",
        envvar=SERVER,
        help="A server's address, http(s)://HOST:PORT, in place of a store.",
    ),
]
Detach = Annotated[
    bool, typer.Option("--detach", help="Of a server: do not follow the search to its end.")
]
Json = Annotated[bool, typer.Option("--json", help="One JSON document on stdout.")]


def server_of(context: typer.Context) -> str | None:
    """The server that a command is for, by its parameters; None where it is for a store. What is
    given goes before what the environment says, of which a server goes before a store. Raises
    InputError where both are given."""
    places = ("server", "store", "storage_path")
    given = [name for name in places if _is_given(context, name)]
    if len(given) > 1:
        one, other, *_ = (f"--{name.replace('_', '-')}" for name in given)
        raise InputError(f"{one} and {other}: a search is in one place: leave one out")
    if given and given[0] != "server":
        return None
    server: str | None = context.params["server"]
    return server or None


def _is_given(context: typer.Context, name: str) -> bool:
    source = context.get_parameter_source(name)
    return source is not None and source.name == "COMMANDLINE"


AllowCrimes = Annotated[
    bool,
    typer.Option(
        "--allow-crimes/--no-allow-crimes",
        help="Merge different architectures, as far as their tensors fit.",
    ),
]
AllowPickle = Annotated[
    bool, typer.Option("--allow-pickle", help="Read .bin weights, by torch's weights-only loader.")
]
UnsafeTruncateEmbeddings = Annotated[
    bool,
    typer.Option(
        "--unsafe-truncate-embeddings/--no-unsafe-truncate-embeddings",
        help="Cut embeddings to the fewest rows; token numbers have to agree.",
    ),
]

Executor = Annotated[
    str | None, typer.Option("--executor", help="executor.kind=KIND: inline or ray.")
]

# Flags of mergekit-evolve that mean a key of the job.
MaxFevals = Annotated[int | None, typer.Option("--max-fevals", min=1, help="budget.candidates=N.")]
Timeout = Annotated[float | None, typer.Option("--timeout", help="budget.hours, but in seconds.")]
RandomSeed = Annotated[int | None, typer.Option("--random-seed", min=0, help="seed=N.")]
BatchSize = Annotated[int | None, typer.Option("--batch-size", min=1, help="engine.batch_size=N.")]
PopulationSize = Annotated[
    int | None, typer.Option("--force-population-size", min=2, help="optimizer.population=N.")
]
StoragePath = Annotated[
    Path | None, typer.Option("--storage-path", help="Store the search in PATH/evomerge.db.")
]
TaskSearchPath = Annotated[
    list[Path] | None,
    typer.Option(
        "--task-search-path",
        help="Of a file of mergekit-evolve: a folder of lm-eval's task files; may be repeated.",
    ),
]

# The rest of them, and what holds instead.
NO_COUNTERPART = {
    "--sigma0": "write optimizer.sigma0=S, as a share of the space's bounds",
    "--save-final-model": "`evomerge export` saves it",
    "--no-save-final-model": "`evomerge export` saves it",
    "--i-understand-the-depths-of-the-evils-i-am-unleashing": "test splits stay sealed",
    "--load-in-8bit": "what is scored is what ships",
    "--load-in-4bit": "what is scored is what ships",
    "--trust-remote-code": "no code of models is run",
    "--allow-crimes": "models have to fit together",
    **dict.fromkeys(
        ("--wandb", "--no-wandb", "--wandb-project", "--wandb-entity"),
        "the store keeps the search: see `evomerge show`",
    ),
    **dict.fromkeys(
        ("--vllm", "--no-vllm"),
        "write engine.kind=vllm or engine.kind=transformers",
    ),
    **dict.fromkeys(
        ("--strategy", "-s", "--num-gpus"),
        "write executor.kind=ray, and executor.workers=N if it is not to take every GPU",
    ),
    **dict.fromkeys(
        ("--in-memory", "--no-in-memory", "--merge-cuda", "--no-merge-cuda"),
        "candidates are always merged in memory, where the engine runs: see engine.device",
    ),
    **dict.fromkeys(
        ("--reshard", "--no-reshard", "--no-trust-remote-code", "--no-allow-crimes"),
        "it is not needed",
    ),
}
