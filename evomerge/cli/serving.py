"""The commands of whoever runs a server: start one, and say by tokens who may use it."""

from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from evomerge.cli.options import DEFAULT_STORE, Json, StoreOption
from evomerge.cli.places import tell
from evomerge.errors import InputError

if TYPE_CHECKING:
    from evomerge.store import Token

token = typer.Typer(help="Say who may use a server, by tokens of its store.", no_args_is_help=True)

TokenName = Annotated[
    str, typer.Argument(metavar="NAME", help="Whose it is; the audit log says so.")
]

_HERE = "command line"  # of the audit log, where others have an address


def serve(
    store: StoreOption = None,
    host: Annotated[str, typer.Option(help="Address to listen on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="0 takes any free one.")] = 8765,
    data: Annotated[Path, typer.Option(metavar="DIR", help="Folder for logs and exports.")] = Path(
        "evomerge-server"
    ),
    root: Annotated[
        list[Path] | None,
        typer.Option(
            metavar="DIR",
            help="Folder in which models and tasks of submitted jobs may lie; may be repeated; "
            "default: this one.",
        ),
    ] = None,
    searches: Annotated[int, typer.Option(min=1, help="Searches at work at once.")] = 1,
    devices: Annotated[
        int | None, typer.Option(min=1, help="Devices that they may have together.")
    ] = None,
    public_url: Annotated[
        str | None, typer.Option(metavar="URL", help="Where clients find it, if not there.")
    ] = None,
    tls_cert: Annotated[Path | None, typer.Option(metavar="FILE", help="For https.")] = None,
    tls_key: Annotated[Path | None, typer.Option(metavar="FILE", help="Its key.")] = None,
    proxy: Annotated[
        list[str] | None,
        typer.Option(
            metavar="ADDRESS", help="A reverse proxy that may say for whom it asks; repeatable."
        ),
    ] = None,
    allow_host: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME", help="A name that clients know it by; may be repeated."),
    ] = None,
    webhook_host: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME", help="A host of its own network that webhooks may be at; repeatable."
        ),
    ] = None,
) -> None:
    """Serve the API and the pages; conduct what is submitted.

    Ctrl-C lets what is under way land; searches go on with the next server of the same store.
    """
    try:
        from evomerge.service.server import serve as serving
    except ModuleNotFoundError as error:
        raise InputError(f"a server needs {error.name}: pip install 'evomerge[serve]'") from None
    from evomerge.service.settings import Settings

    settings = Settings(
        store or DEFAULT_STORE,
        host=host,
        port=port,
        data=data,
        roots=tuple(path.resolve() for path in root or [Path.cwd()]),
        searches=searches,
        devices=devices,
        public_url=public_url,
        tls_cert=tls_cert,
        tls_key=tls_key,
        hosts=tuple(allow_host or ()),
        proxies=tuple(proxy or ()),
        webhook_hosts=tuple(webhook_host or ()),
    )
    serving(settings, tell)


@token.command()
def create(
    name: TokenName,
    scopes: Annotated[
        str,
        typer.Option(
            metavar="SCOPE,...",
            help="read; run: submit and steer; admin: both, tokens and more; unseal: open test.",
        ),
    ] = "read,run",
    days: Annotated[
        int | None, typer.Option(min=1, max=36500, help="After which it expires; default: never.")
    ] = None,
    store: StoreOption = None,
    as_json: Json = False,
) -> None:
    """Make a token and print its secret, this once.

    A store that is not there yet is made.
    """
    from evomerge.cli import view
    from evomerge.store import LOCAL, Audit, Store, Tokens

    lifetime = None if days is None else timedelta(days=days)
    asked = [scope.strip() for scope in scopes.split(",") if scope.strip()]
    with Store(store or DEFAULT_STORE, create=True) as opened:
        made, secret = Tokens(opened).create(name, asked, lifetime)
        Audit(opened).write(LOCAL, _HERE, "create token", name, {"scopes": sorted(made.scopes)})
    if as_json:
        view.document({"token": _document(made), "secret": secret})
        return
    tell(f"token '{name}' may {', '.join(sorted(made.scopes))}; it is not shown again:")
    view.line(secret)


@token.command("ls")
def list_tokens(store: StoreOption = None, as_json: Json = False) -> None:
    """List the tokens, without their secrets."""
    from evomerge.cli import view
    from evomerge.store import Store, Tokens

    with Store(store or DEFAULT_STORE) as opened:
        rows = [_document(one) for one in Tokens(opened).all()]
    if as_json:
        view.document(rows)
    else:
        view.tokens(rows)


@token.command()
def revoke(name: TokenName, store: StoreOption = None) -> None:
    """Have a token open nothing from now on."""
    from evomerge.store import LOCAL, Audit, Store, Tokens

    with Store(store or DEFAULT_STORE) as opened:
        Tokens(opened).revoke(name)
        Audit(opened).write(LOCAL, _HERE, "revoke token", name, {})
    tell(f"token '{name}' is revoked")


def _document(one: "Token") -> dict[str, Any]:
    return {
        "name": one.name,
        "scopes": sorted(one.scopes),
        "state": one.state,
        "created_at": one.created_at,
        "expires_at": one.expires_at,
        "revoked_at": one.revoked_at,
        "used_at": one.used_at,
    }
