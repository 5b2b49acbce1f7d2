"""`chatfold tune`: flags to a run, and a run to a table, a page and a configuration file."""

from __future__ import annotations

import asyncio
import json
import logging
import os
import sys
import tempfile
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    from collections.abc import Iterator

    from memory.policy import Policy
    from proxy.config import Config
    from proxy.engines.base import Engine
    from proxy.tuning.measures import Row
    from proxy.tuning.report import Report
    from proxy.tuning.running import Run
    from proxy.tuning.simulation import Vocabulary
    from proxy.tuning.speeds import Speeds
    from proxy.tuning.suggest import Suggestion

SUGGESTED = "suggested"
SPEED = click.FloatRange(min=0.01, max=1e6)
FILE = click.Path(path_type=Path)


@dataclass(frozen=True, slots=True)
class Options:
    """The flags, as given."""

    sources: tuple[Path, ...]
    policy: tuple[str, ...]
    window: int | None
    real: bool
    state: Path | None
    page: Path | None
    json: bool
    limit: int
    turns: int
    max_tokens: int | None
    prefill: float | None
    decode: float | None
    calibrate: bool
    pause: float
    suggest: bool
    first_token: float | None
    tries: int
    apply: str | None
    file: Path | None
    data: str | None
    model: str | None


@click.command()
@click.argument("sources", nargs=-1, type=FILE, metavar="[SOURCE]...")
@click.option("--policy", multiple=True, help="A policy's name or file; several times. [presets]")
@click.option("--window", type=click.IntRange(256, 2**24), help="Tokens. [as serve would have]")
@click.option("--real", is_flag=True, help="With the model: summaries are written, times measured.")
@click.option("--state", type=FILE, help="Where --real keeps what is done. [the user's cache]")
@click.option("--page", type=FILE, default=Path("tune.html"), help="The page to write. [tune.html]")
@click.option("--no-page", is_flag=True, help="Write no page.")
@click.option("--json", is_flag=True, help="Print JSON in place of the table.")
@click.option("--limit", type=click.IntRange(1, 1000), default=5, help="Most chats a source. [5]")
@click.option("--turns", type=click.IntRange(0), default=0, help="Only the first turns. [0: all]")
@click.option("--max-tokens", type=click.IntRange(1), help="Longest answer, as the client asks.")
@click.option("--prefill", type=SPEED, help="Prompt tokens a second, in place of measuring.")
@click.option("--decode", type=SPEED, help="Generated tokens a second, in place of measuring.")
@click.option("--calibrate", is_flag=True, help="Measure the model's speed again.")
@click.option(
    "--pause", type=click.FloatRange(0.1), default=30.0, help="Seconds a user reads. [30]"
)
@click.option("--suggest", is_flag=True, help="Search the knobs within the limits.")
@click.option("--first-token", type=SPEED, help="Limit: seconds to the first token at p95.")
@click.option("--tries", type=click.IntRange(1, 500), default=30, help="Policies to try. [30]")
@click.option("--apply", metavar="NAME", help="Write this policy into the configuration file.")
@click.option("--config", "file", type=FILE, help="A TOML file.")
@click.option("--data", help="Directory of the database.")
@click.option("--model", help="Path of a GGUF file.")
def tune(no_page: bool, **flags: Any) -> None:
    """Try policies on chats that happened, and see what each would cost and keep.

    SOURCE is a chatfold database, an export of LibreChat or ChatGPT, OpenAI messages (JSON or lines
    of JSON), or a file of LoCoMo; without one, the proxy's own database is read. Nothing is
    written to a source, and nothing is sent anywhere.
    """
    options = Options(**flags | {"page": None if no_page else flags["page"]})
    _check(options)
    _quiet()
    try:
        suggestion = asyncio.run(_run(options)) if _has_work(options) else None
        if options.apply:
            click.echo(_apply(options, suggestion))
    except KeyboardInterrupt:
        if options.real:
            click.echo("\nchatfold: stopped. The same command goes on from here.", err=True)
        raise click.Abort from None
    except _mistakes() as exc:
        raise click.ClickException(str(exc)) from exc


def _quiet() -> None:
    """What goes wrong ends the command with its own sentence: only errors of the house are told."""
    handler = logging.StreamHandler()
    handler.setLevel(logging.ERROR)
    logging.getLogger("chatfold").addHandler(handler)


def _mistakes() -> tuple[type[Exception], ...]:
    from memory.store import StoreError
    from proxy.engines.base import EngineError
    from proxy.engines.embedded.loading import LoadError
    from proxy.engines.embedded.template import TemplateError
    from proxy.tuning.applying import ApplyError
    from proxy.tuning.replay import Refused
    from proxy.tuning.sources import SourceError

    ours = SourceError, ApplyError, StoreError, EngineError, LoadError, TemplateError, Refused
    return *ours, OSError


def _check(options: Options) -> None:
    if options.suggest and options.real:
        raise click.UsageError("--suggest plans without the model: leave --real out")
    if (options.prefill is None) != (options.decode is None):
        raise click.UsageError("--prefill and --decode go together")
    if options.first_token is not None and not options.suggest:
        raise click.UsageError("--first-token is a limit for --suggest")
    if options.apply == SUGGESTED and not options.suggest:
        raise click.UsageError(f"--apply {SUGGESTED} needs --suggest")


def _has_work(options: Options) -> bool:
    """`chatfold tune --apply NAME` by itself only writes."""
    return bool(options.sources or options.policy or options.suggest or not options.apply)


# -- the run ---------------------------------------------------------------------------------------


async def _run(options: Options) -> Suggestion | None:
    from proxy.tuning import models, report
    from proxy.tuning.replay import Setting
    from proxy.tuning.running import Run

    config, policies = _config(options), _policies(options.policy)
    chats = [chat for path in _sources(options, config) for chat in await _read(options, path)]
    vocabulary = models.vocabulary(config)
    window = models.window_tokens(config, vocabulary)
    directory = options.state or _state()
    async with _model(options, config, directory) as engine:
        speeds, told = await _speeds(options, config, engine)
        setting = Setting(window, options.max_tokens)
        run = Run.of(chats, setting, speeds, pause_s=options.pause)
        rows = await _rows(run, policies, options, vocabulary, engine, directory)
    suggestion = await _suggest(options, run, policies, rows, vocabulary)
    if suggestion:
        rows = [*rows, replace(suggestion.row, policy=suggestion.policy.name)]
    found = report.Report(
        rows=tuple({r.policy: r for r in rows}.values()),
        chats=tuple((c.name, len(c.exchanges)) for c in chats),
        window_tokens=window,
        model=_model_name(config),
        depth="model" if options.real else "planning",
        speeds=speeds,
        speeds_from=told,
        pause_s=options.pause,
        suggestion=suggestion.reasons if suggestion else (),
    )
    _tell(options, found, suggestion)
    return suggestion


def _config(options: Options) -> Config:
    from proxy.config import check_files, load

    window = None if options.window is None else str(options.window)
    flags = {"data": options.data, "model": options.model, "n_ctx": window}
    config = load(flags, environ=os.environ, file=options.file)
    if not config.upstream:
        check_files(config)
    return config


def _policies(names: Sequence[str]) -> list[Policy]:
    """Those named, else all presets; two of one name are told apart by what was given."""
    from memory.policy import load_policy, presets_folder

    given = names or sorted(p.stem for p in presets_folder().glob("*.toml"))
    found: dict[str, Policy] = {}
    for name in dict.fromkeys(given):
        try:
            policy = load_policy(name)
        except ValueError as exc:
            raise click.ClickException(str(exc)) from exc
        if policy.name in found:
            policy = replace(policy, name=name)
        found[policy.name] = policy
    return list(found.values())


def _sources(options: Options, config: Config) -> tuple[Path, ...]:
    from proxy.doctor import DATABASE

    return options.sources or (config.data / DATABASE,)


async def _read(options: Options, path: Path) -> list[Any]:
    from proxy.tuning.sources import read_source

    chats = await read_source(path, limit=options.limit)
    return [chat.first(options.turns) for chat in chats]


def _state() -> Path:
    import platformdirs

    return Path(platformdirs.user_cache_dir("chatfold")) / "tune"


@asynccontextmanager
async def _model(options: Options, config: Config, directory: Path) -> AsyncIterator[Engine | None]:
    from proxy.tuning.running import started

    if not options.real:
        yield None
        return
    async with started(config, directory=directory) as engine:
        yield engine


async def _speeds(options: Options, config: Config, engine: Engine | None) -> tuple[Speeds, str]:
    from proxy.tuning.running import speeds_of
    from proxy.tuning.speeds import Speeds

    if options.prefill and options.decode:
        return Speeds(1 / options.prefill, 1 / options.decode), "the speeds given"
    with tempfile.TemporaryDirectory(prefix="chatfold-tune-") as directory:
        return await speeds_of(
            config, directory=Path(directory), engine=engine, anew=options.calibrate
        )


async def _rows(
    run: Run,
    policies: Sequence[Policy],
    options: Options,
    vocabulary: Vocabulary,
    engine: Engine | None,
    directory: Path,
) -> list[Row]:
    from proxy.tuning.running import measure, plan

    with _bar(run.turns * len(policies), "replaying") as tell:
        if engine is None:
            return await plan(run, policies, vocabulary, tell=tell)
        return await measure(run, policies, engine, directory=directory, tell=tell)


async def _suggest(
    options: Options,
    run: Run,
    policies: Sequence[Policy],
    rows: Sequence[Row],
    vocabulary: Vocabulary,
) -> Suggestion | None:
    from proxy.tuning.running import plan
    from proxy.tuning.suggest import Limits, Tried, search

    if not options.suggest:
        return None
    limits = Limits(options.first_token, options.pause)
    presets = [Tried(p, r) for p, r in zip(policies, rows, strict=True)]
    with _bar(run.turns * options.tries, "searching") as tell:

        async def measure(policy: Policy) -> Row:
            (row,) = await plan(run, [policy], vocabulary, tell=tell)
            return row

        return await search(presets, measure, limits, tries=options.tries)


@contextmanager
def _bar(length: int, label: str) -> Iterator[Callable[[int], object]]:
    """A progress bar, where somebody looks."""
    if not sys.stderr.isatty():
        yield lambda n: None
        return
    with click.progressbar(length=length, label=label, file=sys.stderr, show_pos=True) as bar:
        yield bar.update


def _model_name(config: Config) -> str:
    from proxy.config import model_file

    return config.upstream or model_file(config).name


# -- what comes of it ------------------------------------------------------------------------------


def _tell(options: Options, found: Report, suggestion: Suggestion | None) -> None:
    from proxy.tuning import report

    if options.json:
        click.echo(json.dumps(_as_json(found, suggestion), indent=1, ensure_ascii=False))
    else:
        click.echo(f"{report.headline(found)}\n\n{report.table(found)}")
        if suggestion:
            click.echo("\n" + "\n".join(f"- {reason}" for reason in suggestion.reasons))
    if options.page:
        _write(options.page, report.page(found))
        click.echo(f"{options.page} has the plots.", err=options.json)


def _as_json(found: Report, suggestion: Suggestion | None) -> dict[str, Any]:
    from proxy.tuning.applying import policy_text

    out: dict[str, Any] = {
        "window_tokens": found.window_tokens,
        "model": found.model,
        "depth": found.depth,
        "chats": [{"name": name, "turns": turns} for name, turns in found.chats],
        "best": sorted(found.best),
        "policies": [row.to_json() for row in found.rows],
    }
    if suggestion:
        out["suggestion"] = {
            "policy": policy_text(suggestion.policy),
            "reasons": list(suggestion.reasons),
            "holds": suggestion.holds,
        }
    return out


def _write(path: Path, text: str) -> None:
    """Whole or not at all."""
    draft = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        draft.write_text(text, "utf-8")
        draft.replace(path)
    finally:
        draft.unlink(missing_ok=True)


def _apply(options: Options, suggestion: Suggestion | None) -> str:
    from memory.policy import load_policy
    from proxy.config_sources import DEFAULT_FILE, named_file
    from proxy.tuning.applying import apply, save_policy

    file = named_file(os.environ, options.file) or DEFAULT_FILE
    name = options.apply or ""
    if name == SUGGESTED and suggestion:
        if suggestion.policy.name != SUGGESTED:
            return apply(file, suggestion.policy.name)
        beside = file.resolve().with_name(f"{SUGGESTED}.toml")
        save_policy(beside, suggestion.policy, explanation="\n".join(suggestion.reasons))
        return apply(file, str(beside))
    try:
        load_policy(name)
    except ValueError as exc:
        raise click.ClickException(str(exc)) from exc
    return apply(file, name)
