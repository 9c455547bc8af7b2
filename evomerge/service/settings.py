"""How a server is set up. Knows nothing of what it does."""

from dataclasses import dataclass, field
from pathlib import Path


@dataclass(frozen=True)
class Settings:
    """store: its URL. data: the folder below which logs and exports are written. roots: the folders
    in which models and tasks of submitted jobs may lie. searches, devices: how many are at work at
    once; devices None: no limit. public_url: where clients find it, if not at host and port.
    max_body: bytes. hosts: names besides its own that it answers to. proxies: addresses and
    networks of reverse proxies, which are believed when they say whom they ask for. webhook_hosts:
    names of hosts in its own network that webhooks may be at."""

    store: str
    host: str = "127.0.0.1"
    port: int = 8765
    data: Path = Path("evomerge-server")
    roots: tuple[Path, ...] = field(default_factory=lambda: (Path.cwd(),))
    searches: int = 1
    devices: int | None = None
    public_url: str | None = None
    tls_cert: Path | None = None
    tls_key: Path | None = None
    max_body: int = 1_000_000
    hosts: tuple[str, ...] = ()
    proxies: tuple[str, ...] = ()
    webhook_hosts: tuple[str, ...] = ()
