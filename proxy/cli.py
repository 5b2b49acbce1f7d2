"""The `chatfold` command. A user's mistake is one line on stderr and exit status 2."""

from __future__ import annotations

import asyncio
import logging.config
import math
import os
import signal
import socket
import sys
from collections.abc import Callable, Sequence
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from proxy import hub
from proxy.config import Config, ConfigError, Key, check_files, keys, load
from proxy.hub import HubError
from proxy.inspecting.command import inspect
from proxy.tuning.command import tune

if TYPE_CHECKING:
    from starlette.applications import Starlette

SERVE_FLAGS = ("host", "port", "data", "model", "hf", "n_ctx", "policy", "upstream", "api_key")
"""The keys that have a flag, beside all of `[engine]`; others are set in the file or the
environment.
"""

MISTAKE = 2
BACKLOG = 2048

KEEP_ALIVE_S = 75
"""Longer than clients keep an idle connection, so that the server is not the one to close it just
as a request arrives."""


def main(arguments: Sequence[str] | None = None) -> None:
    """The entry point. Ends the process: status 0, or 2 for a mistake in flags or configuration."""
    try:
        sys.exit(cli.main(args=arguments, prog_name="chatfold", standalone_mode=False) or 0)
    except click.exceptions.NoArgsIsHelpError as exc:
        exc.show()
        sys.exit(MISTAKE)
    except click.ClickException as exc:
        _fail(exc.format_message())
    except ConfigError as exc:
        _fail(str(exc))
    except click.Abort:
        sys.exit(130)


def _fail(message: str) -> None:
    click.echo(f"chatfold: {' '.join(message.split())}", err=True)
    sys.exit(MISTAKE)


def _print_version(context: click.Context, _: click.Parameter, wanted: bool) -> None:
    if wanted:
        try:
            click.echo(f"chatfold {version('chatfold')}")
        except PackageNotFoundError:
            click.echo("chatfold, not installed as a package")
        context.exit()


def _flagged() -> list[Key]:
    return [k for k in keys() if k.name in SERVE_FLAGS or k.name.startswith("engine.")]


def _serve_flags(command: Callable[..., None]) -> Callable[..., None]:
    for key in reversed(_flagged()):
        # A switch has two names, and neither is the default: nothing given is nothing said.
        names = f"{key.flag}/{key.flag.replace('--', '--no-')}" if key.type == "bool" else key.flag
        text = f"{key.rule.doc} [{key.default_text}]"
        command = click.option(names, _parameter(key), help=text, default=None)(command)
    return command


def _parameter(key: Key) -> str:
    return key.name.replace(".", "_")


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.option(
    "--version",
    is_flag=True,
    is_eager=True,
    expose_value=False,
    callback=_print_version,
    help="Show the version.",
)
def cli() -> None:
    """chatfold keeps long chats fast: a proxy between a chat UI and a llama.cpp model."""


@cli.command()
@_serve_flags
@click.option("--config", "file", type=click.Path(path_type=Path), help="A TOML file.")
def serve(file: Path | None, **flags: str | bool | None) -> None:
    """Run the proxy until it is told to stop.

    Every setting can also stand in config/chatfold.toml or the environment (CHATFOLD_PORT, ...).
    """
    given = {key.name: flags[_parameter(key)] for key in _flagged()}
    config = load(given, environ=os.environ, file=file)
    _check(config)
    _configure_logging(config)
    asyncio.run(_check_store(config))
    with _listen(config) as listener:
        app = _build_app(config)
        click.echo(greeting(config.host, listener.getsockname()[1]))
        _run(app, config, listener)


@cli.command()
@click.option("--config", "file", type=click.Path(path_type=Path), help="A TOML file.")
@click.option("--data", help="Directory of the database.")
@click.option("--model", help="Path of a GGUF file.")
@click.option("--policy", help="A policy's name or file.")
@click.option("--upstream", help="URL of the server in place of the embedded model.")
@click.option(
    "--librechat",
    multiple=True,
    help="LibreChat's directory, its .env or librechat.yaml, or lines of one of them. Repeatable.",
)
def doctor(file: Path | None, librechat: tuple[str, ...], **flags: str | None) -> None:
    """Look for what is wrong: model, policy, database, upstream, the running proxy, LibreChat.

    Changes nothing. Ends with status 1 when something is wrong.
    """
    from proxy.doctor import examine
    from proxy.doctor_librechat import examine_around, examine_librechat

    config = load(flags, environ=os.environ, file=file)
    findings = [*examine(config), *examine_around(config)]
    for given in librechat:
        findings += examine_librechat(config, given)
    for finding in findings:
        mark = "WRONG" if finding.trouble else "ok"
        text = " - ".join(filter(None, (finding.detail, finding.trouble)))
        click.echo(f"{mark:5}  {finding.subject}: {text}")
    sys.exit(any(f.trouble for f in findings))


@cli.command()
@click.argument("target", type=click.Path(path_type=Path, dir_okay=False))
@click.option("--config", "file", type=click.Path(path_type=Path), help="A TOML file.")
@click.option("--data", help="Directory of the database.")
def backup(target: Path, file: Path | None, data: str | None) -> None:
    """Write a consistent copy of the database to TARGET, also while the proxy runs."""
    from memory.store import StoreError
    from proxy.doctor import DATABASE

    config = load({"data": data}, environ=os.environ, file=file)
    try:
        asyncio.run(_backup(config.data / DATABASE, target))
    except StoreError as exc:
        raise click.ClickException(str(exc)) from exc
    click.echo(f"{target}: {target.stat().st_size:,} bytes")


cli.add_command(tune)
cli.add_command(inspect)


async def _backup(source: Path, target: Path) -> None:
    from memory.store import Store

    store = await Store.open_read_only(source)
    try:
        await store.backup(target)
    finally:
        await store.close()


def greeting(host: str, port: int) -> str:
    """What a LibreChat user needs to know."""
    anywhere = host in ("0.0.0.0", "::", "")
    near = "127.0.0.1" if anywhere else f"[{host}]" if ":" in host else host
    lines = [f"OPENAI_REVERSE_PROXY=http://{near}:{port}/v1"]
    hint = "" if anywhere else "   (start with --host 0.0.0.0)"
    docker = f"http://host.docker.internal:{port}/v1"
    return "\n".join([*lines, f"LibreChat in Docker: OPENAI_REVERSE_PROXY={docker}{hint}"])


def _check(config: Config) -> None:
    """Finds a user's mistakes before anything is started. Makes the data directory, and downloads
    the model where the hub has it and this machine has not.
    """
    if not config.upstream:
        _fetch_model(config)
        check_files(config)
    try:
        config.data.mkdir(parents=True, exist_ok=True)
    except OSError as exc:
        sentence = f"the data directory {config.data} cannot be made: {exc.strerror}"
        raise ConfigError(sentence) from exc
    if not os.access(config.data, os.R_OK | os.W_OK | os.X_OK):
        raise ConfigError(f"the data directory {config.data} cannot be written to")


def _fetch_model(config: Config) -> None:
    from proxy.hub_http import fetch

    if not config.hf:
        return
    try:
        fetch(hub.parse(config.hf), environ=os.environ, tell=partial(click.echo, err=True))
    except HubError as exc:
        raise ConfigError(f"hf: {exc}") from exc


async def _check_store(config: Config) -> None:
    """Opens the database once: makes, upgrades or sets it aside before anybody connects."""
    from memory.store import Store, StoreError
    from proxy.doctor import DATABASE

    try:
        store = await Store.open(config.data / DATABASE)
        await store.close()
    except StoreError as exc:
        raise ConfigError(f"the database {config.data / DATABASE} cannot be used: {exc}") from exc


def _listen(config: Config) -> socket.socket:
    """A listening socket: from here on clients wait for the model rather than being refused."""
    try:
        found = socket.getaddrinfo(config.host, config.port, type=socket.SOCK_STREAM)
    except (OSError, UnicodeError) as exc:
        raise ConfigError(f"host {config.host!r} is not an address of this machine") from exc
    family, _, _, _, address = found[0]
    try:
        # Not SO_REUSEPORT: two proxies on one port would share the requests.
        listener = socket.create_server(address[:2], family=family, backlog=BACKLOG)
    except OSError as exc:
        problem = os.strerror(exc.errno) if exc.errno else str(exc)
        sentence = f"cannot listen on {config.host} port {config.port}: {problem}"
        raise ConfigError(sentence) from exc
    # Connections inherit it. asyncio sets it itself, but not on sockets that name no protocol, as
    # those of this listener: each short answer then came 40 ms late (Nagle, delayed ACK).
    listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    _bound_writes(listener, config.timeouts.reader_s)
    return listener


def _bound_writes(listener: socket.socket, reader_s: float) -> None:
    """Connections that take nothing for twice `reader_s` are closed by the kernel: a server cannot
    tell a client that reads nothing from one that is only slow, and would hold what it was to be
    sent for ever. The first `reader_s` are for the engine's own, clearer words.
    """
    if hasattr(socket, "TCP_USER_TIMEOUT"):  # Linux
        milliseconds = math.ceil(2000 * reader_s)
        listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, milliseconds)


def _build_app(config: Config) -> Starlette:
    from memory.policy import load_policy
    from proxy.app import create_app

    try:
        load_policy(config.policy)
    except ValueError as exc:
        raise ConfigError(str(exc)) from exc
    return create_app(config)


def _run(app: Starlette, config: Config, listener: socket.socket) -> None:
    """Serves until SIGINT or SIGTERM, then lets running answers end for drain_s seconds."""
    import uvicorn

    server = uvicorn.Server(
        uvicorn.Config(
            app,
            # Pinned: httptools differs from h11 on odd framing.
            http="h11",
            ws="none",
            lifespan="on",
            log_config=None,
            access_log=False,
            server_header=False,
            timeout_keep_alive=KEEP_ALIVE_S,
            timeout_graceful_shutdown=math.ceil(config.timeouts.drain_s),
        )
    )

    # uvicorn raises the signal again once it has stopped; so this one ends the process with
    # status 0 in place of the default's death by signal. It also serves before uvicorn's is set.
    def stop(signum: int, frame: Any) -> None:
        server.should_exit = True

    app.state.stopping = lambda: server.should_exit
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, stop)
    server.run(sockets=[listener])


def _configure_logging(config: Config) -> None:
    level = config.log_level.upper()
    quiet = level if level in ("DEBUG", "ERROR", "CRITICAL") else "WARNING"
    formatter = {"format": "%(asctime)s %(levelname)s %(name)s: %(message)s"}
    handler = {"class": "logging.StreamHandler", "formatter": "line"}  # stderr
    logging.config.dictConfig(
        {
            "version": 1,
            "disable_existing_loggers": False,
            "formatters": {"line": formatter},
            "handlers": {"stderr": handler},
            "root": {"level": quiet, "handlers": ["stderr"]},
            "loggers": {"chatfold": {"level": level}},
        }
    )
